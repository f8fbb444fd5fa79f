// MatMulAnyBits in plain C++: the reading of the layout to check the others against, and what runs on
// processors without a path of their own. Written so that a compiler can vectorise the inner loops.
#include "any_bits.h"

#include <cmath>
#include <cstring>

namespace any_bits {
namespace {

float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// A chunk of a strip as bytes, [4][64].
void unpack(const uint8_t* p, int bits, uint8_t* out) {
  const uint64_t mask = (1u << bits) - 1;
  for (size_t octet = 0; octet < kStrip * 8; octet++, p += bits) {
    uint64_t word = 0;
    for (int i = 0; i < bits; i++) word |= static_cast<uint64_t>(p[i]) << (8 * i);
    for (size_t i = 0; i < 8; i++)
      out[octet * 8 + i] = static_cast<uint8_t>((word >> (i * static_cast<size_t>(bits))) & mask);
  }
}

int32_t dot(const uint8_t* w, const int8_t* q, size_t count) {
  int32_t sum = 0;
  for (size_t i = 0; i < count; i++) sum += static_cast<int32_t>(w[i]) * q[i];
  return sum;
}

struct StripGroup {
  float scale[kStrip];
  int32_t zero[kStrip];
};

StripGroup strip_group(const Call& c, size_t strip, size_t group) {
  StripGroup out;
  const uint64_t word = c.zero_word(strip, group);
  for (size_t r = 0; r < kStrip; r++) {
    out.scale[r] = from_half(c.strip_scales(strip)[group * kStrip + r]);
    out.zero[r] = c.zero(word, r);
  }
  return out;
}

constexpr size_t kRows = 64;

void run_strip(const Call& c, size_t strip, size_t row, size_t end) {
  const Shape& s = c.shape;
  const size_t n = strip * kStrip, valid = s.n - n < kStrip ? s.n - n : kStrip, halves = kChunk / s.block;
  float sums[kRows][kStrip] = {};
  uint8_t w[kStrip * kChunk];
  GroupCursor cursor(s);
  StripGroup g = strip_group(c, strip, 0);
  for (size_t block = 0; block < s.blocks; block++) {
    const size_t chunk = block / halves, start = block % halves * s.block;
    if (start == 0) unpack(c.strip_codes(strip) + chunk * s.chunk_bytes(), s.bits, w);
    for (size_t i = row; i < end; i++) {
      const int8_t* q = c.q + (chunk * c.m + i) * kChunk + start;
      const size_t at = block * c.m + i;
      for (size_t r = 0; r < kStrip; r++) {
        const int32_t sum = dot(w + r * kChunk + start, q, s.block) + g.zero[r] * c.negative[at];
        sums[i - row][r] += static_cast<float>(sum) * (g.scale[r] * c.x_scale[at]);
      }
    }
    if (cursor.next()) g = strip_group(c, strip, cursor.group);
  }
  for (size_t i = row; i < end; i++) memcpy(c.y + i * s.n + n, sums[i - row], valid * sizeof(float));
}

void run(const Call& c, size_t first, size_t last, size_t row, size_t end) {
  for (size_t strip = first; strip < last; strip++) run_strip(c, strip, row, end);
}

constexpr float kRound = 12582912;  // 1.5 * 2^23: adding and taking it away rounds to the nearest even

void quantize_block(const Call& c, const float* x, size_t valid, size_t row, size_t block) {
  const size_t at = block * c.m + row, k = block * c.shape.block;
  float most = 0, bad = 0;
  for (size_t i = 0; i < valid; i++) {
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    bad += x[i] - x[i];  // NaN if any input is not finite
  }
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  int8_t* q = c.q + (k / kChunk * c.m + row) * kChunk + k % kChunk;
  int32_t sum = 0;
  for (size_t i = 0; i < c.shape.block; i++) {
    const float v = i < valid ? (x[i] * inverse + kRound) - kRound : 0;
    // The comparisons are false for NaN, whose conversion would be undefined.
    q[i] = static_cast<int8_t>(v >= -127 ? (v <= 127 ? v : 127) : -127);
    sum += q[i];
  }
  c.x_scale[at] = most / 127.0f + bad;
  c.negative[at] = -sum;
}

void quantize(const Call& c, size_t row, size_t end) {
  const Shape& s = c.shape;
  for (size_t r = row; r < end; r++)
    for (size_t block = 0; block < s.blocks; block++) {
      const size_t k = block * s.block, rest = k < s.k ? s.k - k : 0;
      quantize_block(c, c.x + r * s.k + (rest ? k : 0), rest < s.block ? rest : s.block, r, block);
    }
}

bool supported() { return true; }

}  // namespace

const Isa kPortable = {"portable", supported, 1, kRows, quantize, run};

}  // namespace any_bits
