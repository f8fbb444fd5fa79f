// MatMulAnyBits for AVX-512 with VNNI and VBMI, few activation rows: as fast as the weights can be read.
//
// A strip's chunk is unpacked into four registers, each holding 16 inputs of its 4 weight rows, so that one
// accumulator serves the four rows and one conversion serves 256 weights. From 5 bits up, where that
// arrangement is dear to make, a single activation row takes the weight rows one register each instead.
#include "avx512.h"

#if defined(__x86_64__)

namespace any_bits {
namespace {

// Scale and zero point of one group of a strip, spread as the strip kernel's accumulator is: quarter r
// is weight row r. The zero point sits in one lane of each quarter, since the four lanes are summed.
struct StripGroup {
  __m512 scale;
  __m512i zero;
};

INLINE StripGroup strip_group(const Call& c, const uint16_t* scales, size_t strip, size_t group) {
  const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m128 four = _mm_cvtph_ps(_mm_loadu_si64(scales + group * kStrip));
  StripGroup out;
  out.scale = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(four));
  if (!c.shape.asymmetric) {
    out.zero = _mm512_maskz_set1_epi32(0x1111, 1 << (c.shape.bits - 1));
    return out;
  }
  const uint64_t word = c.zero_word(strip, group);
  const int b = c.shape.bits;
  const __m512i all = _mm512_set1_epi64(static_cast<long long>(word));
  const __m512i shift = _mm512_set_epi64(0, 3 * b, 0, 2 * b, 0, b, 0, 0);
  out.zero = _mm512_maskz_and_epi32(0x1111, _mm512_srlv_epi64(all, shift), _mm512_set1_epi32((1 << b) - 1));
  return out;
}

// The four weight rows of a strip against ROWS activation rows starting at `row`.
template <int BITS, int HALVES, int ROWS>
ISA void strip_rows(const Call& c, size_t strip, size_t row) {
  const Shape& s = c.shape;
  const uint8_t* p = c.strip_codes(strip);
  const uint16_t* scales = c.strip_scales(strip);
  __m512 sum[ROWS];
  for (int i = 0; i < ROWS; i++) sum[i] = _mm512_setzero_ps();
  const Tables<BITS> t;
  GroupCursor cursor(s);
  StripGroup g = strip_group(c, scales, strip, 0);
  alignas(64) uint8_t spare[32 * BITS + 16];
  for (size_t chunk = 0; chunk < s.chunks; chunk++, p += 32 * BITS) {
    for (int line = 0; line < (BITS + 1) / 2; line++)
      _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetch + 64 * line), _MM_HINT_T0);
    __m512i w[4];
    unpack<BITS>(t, guarded<BITS>(c, p, spare), w);
    const int8_t* q = c.q + (chunk * c.m + row) * kChunk;
    for (int half = 0; half < HALVES; half++) {
      const size_t at = (chunk * HALVES + static_cast<size_t>(half)) * c.m + row;
      for (int i = 0; i < ROWS; i++) {
        __m512i dot = _mm512_madd_epi16(g.zero, _mm512_set1_epi32(c.negative[at + static_cast<size_t>(i)]));
        for (int j = 4 / HALVES * half; j < 4 / HALVES * (half + 1); j++) {
          dot = _mm512_dpbusd_epi32(dot, w[j], _mm512_broadcast_i32x4(load16(q + i * 64 + j * 16)));
        }
        const __m512 scale = _mm512_mul_ps(g.scale, _mm512_set1_ps(c.x_scale[at + static_cast<size_t>(i)]));
        sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum[i]);
      }
      if (cursor.next()) g = strip_group(c, scales, strip, cursor.group);
    }
  }
  const size_t n = strip * kStrip, valid = s.n - n < kStrip ? s.n - n : kStrip;
  for (int i = 0; i < ROWS; i++) {
    __m512 v = _mm512_add_ps(sum[i], _mm512_permute_ps(sum[i], 0xb1));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    const __m512 packed = _mm512_maskz_compress_ps(0x1111, v);
    float* y = c.y + (row + static_cast<size_t>(i)) * s.n + n;
    _mm512_mask_storeu_ps(y, static_cast<__mmask16>((1 << valid) - 1), packed);
  }
}

INLINE __m128 half4(const uint16_t* p) { return _mm_cvtph_ps(_mm_loadu_si64(p)); }

// Four zero points of a strip's group, as 32-bit lanes.
INLINE __m128i zeros4(const Call& c, size_t strip, size_t group) {
  const int b = c.shape.bits;
  if (!c.shape.asymmetric) return _mm_set1_epi32(1 << (b - 1));
  const __m256i words = _mm256_set1_epi64x(static_cast<long long>(c.zero_word(strip, group)));
  const __m256i shifted = _mm256_srlv_epi64(words, _mm256_set_epi64x(3 * b, 2 * b, b, 0));
  return _mm_and_si128(_mm256_cvtepi64_epi32(shifted), _mm_set1_epi32((1 << b) - 1));
}

// The four weight rows of a strip against one activation row.
template <int BITS, int HALVES>
ISA void strip_one(const Call& c, size_t strip, size_t row) {
  const Shape& s = c.shape;
  const uint8_t* p = c.strip_codes(strip);
  const uint8_t* last = c.codes + s.codes_bytes() - 32 * BITS - 64;
  const uint16_t* scales = c.strip_scales(strip);
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  __m128 offset = _mm_setzero_ps();
  const Tables<BITS> t;
  GroupCursor cursor(s);
  __m128 g_scale = half4(scales);
  __m128i g_zero = zeros4(c, strip, 0);
  alignas(64) uint8_t spare[32 * BITS + 64];
  alignas(16) float scale[4];
  for (size_t chunk = 0; chunk < s.chunks; chunk++, p += 32 * BITS) {
    for (int line = 0; line < (BITS + 1) / 2; line++)
      _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetch + 64 * line), _MM_HINT_T0);
    const uint8_t* from = p;
    if (p > last) from = static_cast<const uint8_t*>(memcpy(spare, p, 32 * BITS));
    const __m512i q = _mm512_loadu_si512(c.q + (chunk * c.m + row) * kChunk);
    __m512i w[4];
    for (int r = 0; r < 4; r++) w[r] = unpack_row<BITS>(t, from + r * 8 * BITS);
    for (int half = 0; half < HALVES; half++) {
      const size_t at = (chunk * HALVES + static_cast<size_t>(half)) * c.m + row;
      const __m128 both = _mm_mul_ps(g_scale, _mm_set1_ps(c.x_scale[at]));
      const __m128i shift = _mm_madd_epi16(g_zero, _mm_set1_epi32(c.negative[at]));
      offset = _mm_fmadd_ps(_mm_cvtepi32_ps(shift), both, offset);
      _mm_store_ps(scale, both);
      const __m512i qh = HALVES == 1 ? q : half ? _mm512_maskz_mov_epi64(0xf0, q) : _mm512_maskz_mov_epi64(0x0f, q);
      for (int r = 0; r < 4; r++) {
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[r], qh);
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale[r]), sum[r]);
      }
      if (cursor.next()) {
        g_scale = half4(scales + cursor.group * kStrip);
        g_zero = zeros4(c, strip, cursor.group);
      }
    }
  }
  const size_t n = strip * kStrip, valid = s.n - n < kStrip ? s.n - n : kStrip;
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(sum[0], sum[1]), _mm512_unpackhi_ps(sum[0], sum[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(sum[2], sum[3]), _mm512_unpackhi_ps(sum[2], sum[3]));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  _mm_mask_storeu_ps(c.y + row * s.n + n, static_cast<__mmask8>((1 << valid) - 1), _mm_add_ps(four, offset));
}

template <int BITS, int HALVES>
ISA void few_rows(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  for (size_t strip = first; strip < last; strip++) {
    size_t r = row;
    for (; r + 4 <= end; r += 4) strip_rows<BITS, HALVES, 4>(c, strip, r);
    for (; r + 2 <= end; r += 2) strip_rows<BITS, HALVES, 2>(c, strip, r);
    for (; r < end; r++) {
      if constexpr (BITS <= 4) strip_rows<BITS, HALVES, 1>(c, strip, r);
      if constexpr (BITS > 4) strip_one<BITS, HALVES>(c, strip, r);
    }
  }
}

}  // namespace

void avx512_few_rows(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  using Run = void (*)(const Call&, size_t, size_t, size_t, size_t);
  static constexpr Run kRun[2][8] = {
      {few_rows<1, 1>, few_rows<2, 1>, few_rows<3, 1>, few_rows<4, 1>,
       few_rows<5, 1>, few_rows<6, 1>, few_rows<7, 1>, few_rows<8, 1>},
      {few_rows<1, 2>, few_rows<2, 2>, few_rows<3, 2>, few_rows<4, 2>,
       few_rows<5, 2>, few_rows<6, 2>, few_rows<7, 2>, few_rows<8, 2>}};
  kRun[c.shape.block == 32][c.shape.bits - 1](c, first, last, row, end);
}

}  // namespace any_bits
#endif
