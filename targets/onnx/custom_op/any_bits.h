// What MatMulAnyBits computes and how its operands lie in memory: shared by every instruction set.
//
// y[m, n] = sum_k x[m, k] * scale[n, k / group] * (code[n, k] - zero[n, k / group])
//
// Rows come in strips of 4, inputs in chunks of 64, and a strip is one contiguous stream:
//   codes  [strips][chunks][4 rows][8 * bits bytes]   8 codes are `bits` bytes, little-endian
//   scales [strips][groups][4]                        float16
//   zeros  [strips][ceil(groups / 2)][bits bytes]     8 zeros (2 groups x 4 rows), coded as the codes are
// Activations become int8 per row and per block of `block` inputs (symmetric, scale = max|x| / 127),
// 64 wide, or 32 where a group is no multiple of 64: a block never crosses a group. A non-finite input
// makes its whole output row NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace any_bits {

constexpr size_t kStrip = 4, kChunk = 64, kPrefetch = 8192;

struct Shape {
  size_t n, k, group;
  int bits;
  bool asymmetric;
  size_t strips, chunks, groups;
  size_t block, blocks;     // activation block and how many there are, padding included
  size_t blocks_per_group;  // huge when there is one group

  size_t chunk_bytes() const { return kStrip * 8 * static_cast<size_t>(bits); }
  size_t codes_bytes() const { return strips * chunks * chunk_bytes(); }
  size_t scales_count() const { return strips * groups * kStrip; }
  size_t zeros_bytes() const { return strips * ((groups + 1) / 2) * static_cast<size_t>(bits); }
};

// One multiplication: packed weights, quantised activations, the output.
struct Call {
  Shape shape;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null if symmetric
  const float* x;        // [m][k]
  size_t m;
  int8_t* q;          // [chunks][m][64]: a chunk of all rows together, as the kernels read it
  float* x_scale;     // [blocks][m]
  int32_t* negative;  // [blocks][m]: minus the sum of a block's q, for the zero points; fits 16 bits
  float* y;           // [m][n]

  const uint8_t* strip_codes(size_t strip) const {
    return codes + strip * shape.chunks * shape.chunk_bytes();
  }
  const uint16_t* strip_scales(size_t strip) const { return scales + strip * shape.groups * kStrip; }

  // The four zeros of (strip, group) in the low 4 * bits bits.
  uint64_t zero_word(size_t strip, size_t group) const {
    const size_t bits = static_cast<size_t>(shape.bits);
    if (!shape.asymmetric) return 0x0001000100010001ull;  // callers use the midpoint instead
    const uint8_t* at = zeros + (strip * ((shape.groups + 1) / 2) + group / 2) * bits;
    uint64_t word = 0;
    for (size_t i = 0; i < bits; i++) word |= static_cast<uint64_t>(at[i]) << (8 * i);
    return word >> (group % 2 ? 4 * bits : 0);
  }
  int32_t zero(uint64_t word, size_t row) const {
    const int bits = shape.bits;
    if (!shape.asymmetric) return 1 << (bits - 1);
    return static_cast<int32_t>((word >> (row * static_cast<size_t>(bits))) & ((1u << bits) - 1));
  }
};

// Which group a block lies in, block after block, without a division per step.
struct GroupCursor {
  size_t group, left, per_group, last;
  explicit GroupCursor(const Shape& s)
      : group(0), left(s.blocks_per_group), per_group(s.blocks_per_group), last(s.groups - 1) {}
  // Steps to the next block; true when that enters a new group. Padding stays in the last one.
  bool next() {
    if (--left) return false;
    left = per_group;
    if (group == last) return false;
    group++;
    return true;
  }
};

// One instruction set. `run` does the strips [first, last) for the activation rows [row, end).
struct Isa {
  const char* name;
  bool (*supported)();
  size_t tile;  // strips that belong together when many rows are multiplied
  size_t rows;  // activation rows of one task
  void (*quantize)(const Call&, size_t row, size_t end);
  void (*run)(const Call&, size_t first, size_t last, size_t row, size_t end);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512;
#endif

}  // namespace any_bits
