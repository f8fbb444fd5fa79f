// MatMulAnyBits for AVX2 with FMA and F16C (Haswell, Zen 1 and later).
//
// A strip's panel of inputs is unpacked to bytes once, in the L1 cache, and every activation row passes over
// it. Products of a byte and an int8 are summed in pairs into int16, which saturates: codes below 128 cannot
// reach that (2 * 127 * 127 < 2^15), and 8-bit codes are split into their low 7 bits and the top one.
#include "any_bits.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define ISA __attribute__((target("avx2,fma,f16c")))
#define INLINE ISA __attribute__((always_inline)) inline

namespace any_bits {
namespace {

constexpr size_t kRows = 64;    // activation rows of a task
constexpr size_t kPanel = 16;   // chunks unpacked at a time: 4 KiB of bytes

// For 8 codes in a lane of 16 bytes: the two bytes that hold code i, and the power of two that lifts it to
// bit 8. Of a lane that holds two octets, `second` finds those of the other one.
template <int BITS>
struct Lane {
  alignas(32) uint8_t first[32];
  alignas(32) uint8_t second[32];
  alignas(32) uint16_t lift[16];
  constexpr Lane() : first(), second(), lift() {
    for (int i = 0; i < 16; i++) {
      const int code = i % 8, byte = code * BITS / 8, after = byte + 1 < BITS ? byte + 1 : byte;
      first[2 * i] = static_cast<uint8_t>(byte);
      first[2 * i + 1] = static_cast<uint8_t>(after);
      second[2 * i] = static_cast<uint8_t>(BITS + byte);
      second[2 * i + 1] = static_cast<uint8_t>(BITS + after);
      lift[i] = static_cast<uint16_t>(1 << (8 - code * BITS % 8));
    }
  }
};
template <int BITS>
constexpr Lane<BITS> kLane{};

INLINE __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// 32 codes, 4 * BITS bytes of which 16 + 2 * BITS are read, in order.
template <int BITS>
INLINE __m256i unpack32(const uint8_t* p) {
  if constexpr (BITS == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + 2 * BITS), 1);
  const __m256i lift = load(kLane<BITS>.lift);
  const __m256i a = _mm256_mullo_epi16(_mm256_shuffle_epi8(v, load(kLane<BITS>.first)), lift);
  const __m256i b = _mm256_mullo_epi16(_mm256_shuffle_epi8(v, load(kLane<BITS>.second)), lift);
  const __m256i bytes = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
  return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>((1 << BITS) - 1)));
}

// `count` chunks of a strip as bytes [chunks][4][64].
template <int BITS>
ISA void unpack(const Call& c, const uint8_t* p, size_t count, uint8_t* out) {
  // NOTE unpack32 reads up to 14 bytes past its codes: the last chunk of the tensor goes by way of a copy.
  const uint8_t* end = c.codes + c.shape.codes_bytes();
  alignas(32) uint8_t spare[32 * BITS + 32];
  for (size_t chunk = 0; chunk < count; chunk++, p += 32 * BITS) {
    const uint8_t* from = p;
    if (p + 32 * BITS + 16 > end) from = static_cast<const uint8_t*>(memcpy(spare, p, 32 * BITS));
    for (int line = 0; line < (BITS + 1) / 2; line++)
      _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetch + 64 * line), _MM_HINT_T0);
    for (int part = 0; part < 8; part++, out += 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), unpack32<BITS>(from + part * 4 * BITS));
  }
}

// 32 products, summed into 8 lanes.
template <bool WIDE>
INLINE __m256i dot32(__m256i w, __m256i q) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (!WIDE) return _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), ones);
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(top, w), q), ones);
  const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(top, w), q), ones);
  return _mm256_add_epi32(low, high);
}

// Scales and zero points of a strip, block by block of a panel: the work of the rows is then plain loads.
struct PanelGroups {
  float scale[2 * kPanel][kStrip];
  int32_t zero[2 * kPanel][kStrip];
};

ISA void panel_groups(const Call& c, size_t strip, GroupCursor* cursor, size_t blocks, PanelGroups* out) {
  for (size_t b = 0; b < blocks; b++) {
    const uint16_t* at = c.strip_scales(strip) + cursor->group * kStrip;
    _mm_storeu_ps(out->scale[b], _mm_cvtph_ps(_mm_loadu_si64(at)));
    const uint64_t word = c.zero_word(strip, cursor->group);
    for (size_t r = 0; r < kStrip; r++) out->zero[b][r] = c.zero(word, r);
    cursor->next();
  }
}

// Adds a panel's share of one activation row's four results. The zero point's share of a block comes in
// whole, in the fourfold sum at the end; the products' in eight lanes for each weight row.
template <int HALVES, bool WIDE>
ISA void row_panel(const Call& c, const uint8_t* w, const PanelGroups& g, size_t chunk, size_t count, size_t row,
                   float* sums) {
  __m256 sum[kStrip];
  for (size_t r = 0; r < kStrip; r++) sum[r] = _mm256_setzero_ps();
  __m128 offset = _mm_loadu_ps(sums);
  for (size_t i = 0; i < count; i++, w += kStrip * kChunk) {
    const int8_t* q = c.q + ((chunk + i) * c.m + row) * kChunk;
    const __m256i q0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i q1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32));
    for (size_t half = 0; half < HALVES; half++) {
      const size_t b = i * HALVES + half, at = (chunk * HALVES + b) * c.m + row;
      const __m128 scale = _mm_mul_ps(_mm_loadu_ps(g.scale[b]), _mm_set1_ps(c.x_scale[at]));
      const __m128i zero = _mm_loadu_si128(reinterpret_cast<const __m128i*>(g.zero[b]));
      const __m128i shift = _mm_madd_epi16(zero, _mm_set1_epi32(c.negative[at]));
      offset = _mm_fmadd_ps(_mm_cvtepi32_ps(shift), scale, offset);
      alignas(16) float scales[kStrip];
      _mm_store_ps(scales, scale);
      for (size_t r = 0; r < kStrip; r++) {
        const uint8_t* from = w + r * kChunk;
        __m256i dot = half == 0 ? dot32<WIDE>(load(from), q0) : dot32<WIDE>(load(from + 32), q1);
        if constexpr (HALVES == 1) dot = _mm256_add_epi32(dot, dot32<WIDE>(load(from + 32), q1));
        sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scales[r]), sum[r]);
      }
    }
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(sums, _mm_add_ps(four, offset));
}

template <int BITS, int HALVES>
ISA void run_strip(const Call& c, size_t strip, size_t row, size_t end) {
  const Shape& s = c.shape;
  const size_t n = strip * kStrip, valid = s.n - n < kStrip ? s.n - n : kStrip;
  alignas(32) uint8_t w[kPanel * kStrip * kChunk];
  float sums[kRows][kStrip] = {};
  PanelGroups groups;
  GroupCursor cursor(s);
  for (size_t chunk = 0; chunk < s.chunks; chunk += kPanel) {
    const size_t count = s.chunks - chunk < kPanel ? s.chunks - chunk : kPanel;
    unpack<BITS>(c, c.strip_codes(strip) + chunk * s.chunk_bytes(), count, w);
    panel_groups(c, strip, &cursor, count * HALVES, &groups);
    for (size_t r = row; r < end; r++) row_panel<HALVES, BITS == 8>(c, w, groups, chunk, count, r, sums[r - row]);
  }
  for (size_t r = row; r < end; r++) memcpy(c.y + r * s.n + n, sums[r - row], valid * sizeof(float));
}

template <int BITS, int HALVES>
void run_as(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  for (size_t strip = first; strip < last; strip++) run_strip<BITS, HALVES>(c, strip, row, end);
}

void run(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  using Run = void (*)(const Call&, size_t, size_t, size_t, size_t);
  static constexpr Run kRun[2][8] = {
      {run_as<1, 1>, run_as<2, 1>, run_as<3, 1>, run_as<4, 1>,
       run_as<5, 1>, run_as<6, 1>, run_as<7, 1>, run_as<8, 1>},
      {run_as<1, 2>, run_as<2, 2>, run_as<3, 2>, run_as<4, 2>,
       run_as<5, 2>, run_as<6, 2>, run_as<7, 2>, run_as<8, 2>}};
  kRun[c.shape.block == 32][c.shape.bits - 1](c, first, last, row, end);
}

// One block of one row: 32 or 64 floats, all there.
ISA void quantize_block(const Call& c, const float* x, size_t row, size_t block) {
  const size_t width = c.shape.block, at = block * c.m + row, k = block * width;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 top = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
  for (size_t i = 0; i < width; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v));
    bad = _mm256_add_ps(bad, _mm256_sub_ps(v, v));  // NaN if any input is not finite
  }
  alignas(32) float tops[8], bads[8];
  _mm256_store_ps(tops, top);
  _mm256_store_ps(bads, bad);
  float most = 0, any_bad = 0;
  for (int i = 0; i < 8; i++) {
    most = tops[i] > most ? tops[i] : most;
    any_bad += bads[i];
  }
  const __m256 inverse = _mm256_set1_ps(most > 0 ? 127.0f / most : 0.0f);
  int8_t* q = c.q + (k / kChunk * c.m + row) * kChunk + k % kChunk;
  __m256i sum = _mm256_setzero_si256();
  for (size_t i = 0; i < width; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    _mm_storeu_si64(q + i, bytes);
    sum = _mm256_add_epi32(sum, _mm256_cvtepi8_epi32(bytes));
  }
  alignas(32) int32_t sums[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
  int32_t total = 0;
  for (int i = 0; i < 8; i++) total += sums[i];
  c.x_scale[at] = most / 127.0f + any_bad;
  c.negative[at] = -total;
}

ISA void quantize(const Call& c, size_t row, size_t end) {
  const Shape& s = c.shape;
  for (size_t r = row; r < end; r++)
    for (size_t block = 0; block < s.blocks; block++) {
      const size_t k = block * s.block, rest = k < s.k ? s.k - k : 0;
      const float* x = c.x + r * s.k + (rest ? k : 0);
      alignas(32) float padded[kChunk] = {};
      if (rest < s.block) x = static_cast<const float*>(memcpy(padded, x, rest * sizeof(float)));
      quantize_block(c, x, r, block);
    }
}

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Isa kAvx2 = {"avx2", supported, 1, kRows, quantize, run};

}  // namespace any_bits
#endif
