// Unpacking for AVX-512 VBMI: what the kernel for few rows and the one for many share.
#pragma once

#include "any_bits.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c")))
#define INLINE ISA __attribute__((always_inline)) inline

namespace any_bits {

constexpr size_t kFewRows = 5;  // up to here the kernel for few rows is the faster one
void avx512_few_rows(const Call&, size_t first, size_t last, size_t row, size_t end);

namespace {

// Byte indices that bring, for part j, the `bits` bytes of 8 codes into each 64-bit lane: row lane/2,
// codes 16 j + 8 (lane % 2). `pitch` is the distance between the rows of the source.
template <int BITS>
struct Lanes {
  alignas(64) uint8_t whole[4][64];
  alignas(64) uint8_t inside[64];
  alignas(64) uint8_t row[64];
  alignas(64) uint8_t shift[64];
  constexpr Lanes() : whole(), inside(), row(), shift() {
    for (int i = 0; i < 64; i++) {
      const int lane = i / 8, byte = i % 8 < BITS ? i % 8 : BITS - 1;
      for (int j = 0; j < 4; j++)
        whole[j][i] = static_cast<uint8_t>(((lane / 2) * 8 + 2 * j + lane % 2) * BITS + byte);
      inside[i] = static_cast<uint8_t>((lane % 2) * BITS + byte);
      row[i] = static_cast<uint8_t>(lane * BITS + byte);
      shift[i] = static_cast<uint8_t>((i % 8) * BITS);
    }
  }
};
template <int BITS>
constexpr Lanes<BITS> kLanes{};

// The same in registers. A full-width load takes a cycle, which is what limits these loops, and a compiler that
// sees constants would load them again in each turn: hence the empty assembly, which it cannot see through.
template <int BITS>
struct Tables {
  __m512i whole[4], inside, row, shift, mask;
  INLINE Tables() {
    for (int j = 0; j < 4; j++) whole[j] = held(kLanes<BITS>.whole[j]);
    inside = held(kLanes<BITS>.inside);
    row = held(kLanes<BITS>.row);
    shift = held(kLanes<BITS>.shift);
    mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  }
  static INLINE __m512i held(const uint8_t* p) {
    __m512i v = _mm512_load_si512(p);
    __asm__("" : "+v"(v));
    return v;
  }
};

INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE __m512i load32(const void* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

// Four 16-byte pieces, one per weight row, into the four quarters of a register.
template <int BITS>
INLINE __m512i gather_rows(const uint8_t* p, int j) {
  const uint8_t* at = p + 2 * BITS * j;
  __m512i v = _mm512_broadcast_i32x4(load16(at));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load16(at + 8 * BITS));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load16(at + 16 * BITS));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, load16(at + 24 * BITS));
}

// A chunk of a strip: w[j] holds, for weight row r in quarter r, the codes 16 j .. 16 j + 15.
template <int BITS>
INLINE void unpack(const Tables<BITS>& t, const uint8_t* p, __m512i w[4]) {
  __m512i low, high;
  if constexpr (BITS == 1) low = load32(p);
  if constexpr (BITS >= 2 && BITS <= 4) low = _mm512_loadu_si512(p);
  if constexpr (BITS == 3) high = load32(p + 64);
  if constexpr (BITS == 4) high = _mm512_loadu_si512(p + 64);
  for (int j = 0; j < 4; j++) {
    __m512i v;
    if constexpr (BITS <= 2) v = _mm512_permutexvar_epi8(t.whole[j], low);
    if constexpr (BITS == 3 || BITS == 4) v = _mm512_permutex2var_epi8(low, t.whole[j], high);
    if constexpr (BITS >= 5) v = gather_rows<BITS>(p, j);
    if constexpr (BITS >= 5 && BITS <= 7) v = _mm512_shuffle_epi8(v, t.inside);
    w[j] = BITS == 8 ? v : _mm512_and_si512(_mm512_multishift_epi64_epi8(t.shift, v), t.mask);
  }
}

// NOTE gather_rows reads up to 6 bytes past a chunk: the last chunk of the tensor goes by way of a copy.
template <int BITS>
INLINE const uint8_t* guarded(const Call& c, const uint8_t* p, uint8_t* spare) {
  if (BITS < 5 || BITS == 8 || p + 2 * 32 * BITS <= c.codes + c.shape.codes_bytes()) return p;
  memcpy(spare, p, 32 * BITS);
  return spare;
}

// One row of a chunk: 64 codes in order, from 8 * BITS bytes (`p` may be read up to 64 bytes on).
template <int BITS>
INLINE __m512i unpack_row(const Tables<BITS>& t, const uint8_t* p) {
  const __m512i v = BITS <= 4 ? load32(p) : _mm512_loadu_si512(p);
  if constexpr (BITS == 8) return v;
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(t.shift, _mm512_permutexvar_epi8(t.row, v)), t.mask);
}

}  // namespace
}  // namespace any_bits
#endif
