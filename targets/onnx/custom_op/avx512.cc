// MatMulAnyBits for AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): many activation rows.
//
// Four strips make a tile of 16 weight rows; its chunk is transposed into 16 registers (16 rows x 4 inputs
// each) that stay put while all activation rows pass by.
#include "avx512.h"

#if defined(__x86_64__)

namespace any_bits {
namespace {

constexpr size_t kRows = 256;  // activation rows of a task: keeps the tile's sums in the L1 cache

struct TileGroup {
  __m512 scale;
  __m512i zero;
};

// A tile's chunk: out[4 j + d] holds inputs 16 j + 4 d .. + 3 of 16 weight rows, lane 4 r + i being row r of
// strip i (an order that needs no shuffle across quarters; the results are put right at the end).
template <int BITS>
INLINE void unpack_tile(const Tables<BITS>& t, const Call& c, const size_t strips[4], size_t chunk, __m512i out[16]) {
  alignas(64) uint8_t spare[32 * BITS + 16];
  __m512i w[4][4];
  for (int i = 0; i < 4; i++) {
    const uint8_t* p = c.strip_codes(strips[i]) + chunk * 32 * BITS;
    _mm_prefetch(reinterpret_cast<const char*>(p + 512), _MM_HINT_T0);
    unpack<BITS>(t, guarded<BITS>(c, p, spare), w[i]);
  }
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_unpacklo_epi32(w[0][j], w[1][j]), b = _mm512_unpackhi_epi32(w[0][j], w[1][j]);
    const __m512i d = _mm512_unpacklo_epi32(w[2][j], w[3][j]), e = _mm512_unpackhi_epi32(w[2][j], w[3][j]);
    out[4 * j] = _mm512_unpacklo_epi64(a, d);
    out[4 * j + 1] = _mm512_unpackhi_epi64(a, d);
    out[4 * j + 2] = _mm512_unpacklo_epi64(b, e);
    out[4 * j + 3] = _mm512_unpackhi_epi64(b, e);
  }
}

INLINE __m512i transposed() { return _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0); }

// Scales and zero points of 16 weight rows in the tile's lane order.
ISA TileGroup tile_group(const Call& c, const size_t strips[4], size_t group) {
  alignas(64) uint16_t scales[16];
  alignas(64) int32_t zeros[16];
  for (size_t i = 0; i < 4; i++) {
    memcpy(scales + 4 * i, c.strip_scales(strips[i]) + group * kStrip, 8);
    const uint64_t word = c.zero_word(strips[i], group);
    for (size_t r = 0; r < 4; r++) zeros[4 * r + i] = c.zero(word, r);
  }
  TileGroup out;
  const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(scales));
  out.scale = _mm512_permutexvar_ps(transposed(), _mm512_cvtph_ps(half));
  out.zero = _mm512_load_si512(zeros);
  return out;
}

// Adds STEPS * 4 inputs to the sums of ROWS activation rows: `w` stays in registers while rows pass.
template <int STEPS, int ROWS>
INLINE void tile_rows(const __m512i* w, const TileGroup& g, const int8_t* q, const float* x_scale,
                      const int32_t* negative, float* sums) {
  __m512i dot[ROWS];
  for (int i = 0; i < ROWS; i++) dot[i] = _mm512_madd_epi16(g.zero, _mm512_set1_epi32(negative[i]));
  for (int step = 0; step < STEPS; step++)
    for (int i = 0; i < ROWS; i++) {
      int32_t four;
      memcpy(&four, q + i * 64 + step * 4, 4);
      dot[i] = _mm512_dpbusd_epi32(dot[i], w[step], _mm512_set1_epi32(four));
    }
  for (int i = 0; i < ROWS; i++) {
    const __m512 scale = _mm512_mul_ps(g.scale, _mm512_set1_ps(x_scale[i]));
    const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), scale, _mm512_load_ps(sums + 16 * i));
    _mm512_store_ps(sums + 16 * i, sum);
  }
}

ISA void store_tile(const Call& c, const float* sums, size_t strip, size_t row, size_t rows) {
  const size_t n = strip * kStrip, valid = c.shape.n - n < 16 ? c.shape.n - n : 16;
  const __mmask16 mask = static_cast<__mmask16>((1u << valid) - 1);
  for (size_t i = 0; i < rows; i++) {
    const __m512 v = _mm512_permutexvar_ps(transposed(), _mm512_load_ps(sums + 16 * i));
    _mm512_mask_storeu_ps(c.y + (row + i) * c.shape.n + n, mask, v);
  }
}

// Four strips from `strip` (a missing one is replaced by the last, and not stored) against many rows.
template <int BITS, int HALVES>
ISA void tile(const Call& c, size_t strip, size_t row, size_t end) {
  constexpr int kSteps = 16 / HALVES;
  const Shape& s = c.shape;
  const size_t rows = end - row;
  size_t strips[4];
  for (size_t i = 0; i < 4; i++) strips[i] = strip + i < s.strips ? strip + i : s.strips - 1;
  alignas(64) float sums[kRows * 16];
  memset(sums, 0, rows * 16 * sizeof(float));
  const Tables<BITS> t;
  GroupCursor cursor(s);
  TileGroup g = tile_group(c, strips, 0);
  for (size_t chunk = 0; chunk < s.chunks; chunk++) {
    __m512i w[16];
    unpack_tile<BITS>(t, c, strips, chunk, w);
    for (size_t half = 0; half < HALVES; half++) {
      const size_t at = (chunk * HALVES + half) * c.m + row;
      const int8_t* q = c.q + (chunk * c.m + row) * kChunk + half * 32;
      const __m512i* part = w + half * kSteps;
      size_t i = 0;
      for (; i + 4 <= rows; i += 4)
        tile_rows<kSteps, 4>(part, g, q + i * 64, c.x_scale + at + i, c.negative + at + i, sums + i * 16);
      for (; i < rows; i++)
        tile_rows<kSteps, 1>(part, g, q + i * 64, c.x_scale + at + i, c.negative + at + i, sums + i * 16);
      if (cursor.next()) g = tile_group(c, strips, cursor.group);
    }
  }
  store_tile(c, sums, strip, row, rows);
}

template <int BITS, int HALVES>
ISA void run_as(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  for (size_t strip = first; strip < last; strip += 4) tile<BITS, HALVES>(c, strip, row, end);
}

void run(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  if (end - row <= kFewRows) return avx512_few_rows(c, first, last, row, end);
  using Run = void (*)(const Call&, size_t, size_t, size_t, size_t);
  static constexpr Run kRun[2][8] = {
      {run_as<1, 1>, run_as<2, 1>, run_as<3, 1>, run_as<4, 1>,
       run_as<5, 1>, run_as<6, 1>, run_as<7, 1>, run_as<8, 1>},
      {run_as<1, 2>, run_as<2, 2>, run_as<3, 2>, run_as<4, 2>,
       run_as<5, 2>, run_as<6, 2>, run_as<7, 2>, run_as<8, 2>}};
  kRun[c.shape.block == 32][c.shape.bits - 1](c, first, last, row, end);
}

// One block of one row: 32 or 64 floats, `valid` of them real.
ISA void quantize_block(const Call& c, const float* x, size_t valid, size_t row, size_t block) {
  const size_t parts = c.shape.block / 16, at = block * c.m + row;
  __m512 v[4], top = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
  for (size_t i = 0; i < parts; i++) {
    const size_t real = valid > 16 * i ? valid - 16 * i : 0;
    v[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(real >= 16 ? 0xffff : (1u << real) - 1), x + 16 * i);
    top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
    bad = _mm512_add_ps(bad, _mm512_sub_ps(v[i], v[i]));  // NaN if any input is not finite
  }
  const float most = _mm512_reduce_max_ps(top);
  const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
  int8_t* q = c.q + ((block * c.shape.block / kChunk) * c.m + row) * kChunk + block * c.shape.block % kChunk;
  __m512i sum = _mm512_setzero_si512();
  for (size_t i = 0; i < parts; i++) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    const __m128i bytes = _mm512_cvtsepi32_epi8(rounded);
    sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), bytes);
  }
  c.x_scale[at] = most / 127.0f + _mm512_reduce_add_ps(bad);
  c.negative[at] = -_mm512_reduce_add_epi32(sum);
}

ISA void quantize(const Call& c, size_t row, size_t end) {
  const Shape& s = c.shape;
  for (size_t r = row; r < end; r++)
    for (size_t block = 0; block < s.blocks; block++) {
      const size_t k = block * s.block, valid = k < s.k ? s.k - k : 0;
      quantize_block(c, c.x + r * s.k + (valid ? k : 0), valid, r, block);
    }
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

}  // namespace

const Isa kAvx512 = {"avx512", supported, 4, kRows, quantize, run};

}  // namespace any_bits
#endif
