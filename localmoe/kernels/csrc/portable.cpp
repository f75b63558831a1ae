// Plain C++: right on every CPU, and what the other tiers are easiest compared with.
#include <algorithm>
#include <bit>

#include "kernels.h"

namespace localmoe {

namespace {

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Bits is 4 or 8: the only difference between the two formats here.
template <int Bits>
void quantized_rows(const QuantizedProduct& p, int64_t first, int64_t last) {
  const int64_t groups = p.in / p.group;
  for (int64_t r = first; r < last; ++r) {
    const uint8_t* row = p.weights + r * p.row_bytes;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const Block* x = p.x + t * p.blocks;
      float sum = 0.0f;
      for (int64_t start = 0; start < p.in; start += kQuantGroup) {
        const Block& block = x[start / kBlock];
        const int64_t in_block = start % kBlock;
        int32_t dot = 0;
        if constexpr (Bits == 4) {
          for (int64_t i = 0; i < kQuantGroup / 2; ++i) {
            const uint8_t pair = row[start / 2 + i];
            dot += ((pair & 15) - 8) * block.q[in_block / 2 + i];
            dot += ((pair >> 4) - 8) * block.q[kBlock / 2 + in_block / 2 + i];
          }
        } else {
          for (int64_t i = 0; i < kQuantGroup; ++i) dot += (row[start + i] - 128) * block.q[in_block + i];
        }
        const float scale = from_bf16(p.scales[r * groups + start / p.group]) * block.scale[in_block / kQuantGroup];
        sum += scale * static_cast<float>(dot);
      }
      p.y[t * p.out + r] = sum;
    }
  }
}

void bf16_rows(const DenseProduct& p, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const uint16_t* row = p.weights + r * p.in;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const float* x = p.x + t * p.in;
      float sums[8] = {};  // eight running sums: shorter chains of rounding, and the compiler may vectorize
      for (int64_t i = 0; i < p.in; i += 8) {
        const int64_t size = std::min<int64_t>(8, p.in - i);
        for (int64_t j = 0; j < size; ++j) sums[j] += from_bf16(row[i + j]) * x[i + j];
      }
      p.y[t * p.out + r] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    }
  }
}

bool always() { return true; }

}  // namespace

const Tier kPortable = {"portable", always, quantized_rows<4>, quantized_rows<8>, bf16_rows};

}  // namespace localmoe
