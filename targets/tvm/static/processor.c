// Whether a processor has what the kernels use: by cpuid, or by what Linux tells a process.
#include "tables.h"

#ifdef __x86_64__
#include <cpuid.h>

static uint32_t word(const gammac_feature* feature) {
  uint32_t found[4] = {0, 0, 0, 0};
  __get_cpuid_count(feature->leaf, feature->part, &found[0], &found[1], &found[2], &found[3]);
  return found[feature->word];
}
#else
#include <sys/auxv.h>

static uint32_t word(const gammac_feature* feature) {
  return (uint32_t)getauxval(feature->word == 0 ? AT_HWCAP : AT_HWCAP2);
}
#endif

int gammac_processor_fits(const gammac_feature* features, int count) {
  for (int i = 0; i < count; ++i) {
    if ((word(&features[i]) >> features[i].bit & 1) == 0) return 0;
  }
  return 1;
}
