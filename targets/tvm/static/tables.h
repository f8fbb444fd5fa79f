// What the generated model.c says of a model, and what runtime.c and backend.c say to each other.
#ifndef GAMMAC_TABLES_H_
#define GAMMAC_TABLES_H_

#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

enum { GAMMAC_DIMS = 4, GAMMAC_PLACES = 3, GAMMAC_MOST_ARGUMENTS = 32 };
enum gammac_place { GAMMAC_PARAMS, GAMMAC_CACHES, GAMMAC_ARENA };

// Sizes [0] of 0 stand for the rows of a call.
typedef struct {
  uint8_t place, code, bits, dims;
  int64_t sizes[GAMMAC_DIMS];
  size_t offset;
} gammac_tensor;

// A bit that a processor must have set: of a word of a cpuid leaf, or of AT_HWCAP (0) and AT_HWCAP2 (1).
typedef struct {
  uint8_t leaf, part, word, bit;
} gammac_feature;

typedef int (*gammac_kernel)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

// A kernel with `count` of the arguments from `first` on, which are places in the list of tensors.
typedef struct {
  gammac_kernel run;
  uint32_t first, count;
} gammac_step;

// ids i64 [rows, 1] and past i64 [1] go in, logits f32 [1, vocabulary] come out.
typedef struct {
  const gammac_step* steps;
  int count;
  int ids, past, logits;
} gammac_program;

typedef struct {
  const gammac_tensor* tensors;
  int tensor_count;
  const uint32_t* arguments;
  gammac_program decode, prefill;
  const gammac_feature* features;
  int feature_count;
  int chunk;  // rows of a prefill that the arena has room for
  size_t params_size;
  uint64_t fingerprint;
  size_t caches_size, arena_size;
} gammac_tables;

extern const gammac_tables gammac_model_tables;

// ---- processor.c ----

int gammac_processor_fits(const gammac_feature* features, int count);

// ---- backend.c ----

typedef struct gammac_pool gammac_pool;

// The kernels have what they expect of a runtime then. NULL where there is no memory or no thread to be had.
gammac_pool* gammac_pool_new(int threads);
void gammac_pool_free(gammac_pool* pool);

// Kernels that this thread calls run on `pool`.
void gammac_pool_use(gammac_pool* pool);

#endif  // GAMMAC_TABLES_H_
