#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace localmoe {

namespace {

// Where element i of a block goes: pairs (2b, 2b + 1) share a byte of int4 weights, low nibble first.
inline int64_t position(int64_t i, Order order) {
  return order == Order::kNatural ? i : (i & 1) * (kBlock / 2) + i / 2;
}

}  // namespace

void quantize_activations(const float* x, int64_t n, int offset, Order order, Block* blocks) {
  const int64_t count = (n + kBlock - 1) / kBlock;
  std::memset(static_cast<void*>(blocks), 0, sizeof(Block) * count);
  for (int64_t start = 0; start < n; start += kQuantGroup) {
    const int64_t size = std::min(kQuantGroup, n - start);
    Block& block = blocks[start / kBlock];
    const int64_t in_block = start % kBlock;
    float largest = 0.0f;
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x[start + i]));
    const float scale = largest / 127.0f;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const int64_t lane = order == Order::kNatural ? 4 : 8;
    for (int64_t i = 0; i < size; ++i) {
      const float q = std::clamp(std::nearbyint(x[start + i] * inverse), -127.0f, 127.0f);
      block.q[position(in_block + i, order)] = static_cast<int8_t>(q);
      block.correction[(in_block + i) / lane] -= offset * static_cast<int32_t>(q);
    }
    block.scale[in_block / kQuantGroup] = scale;
  }
}

}  // namespace localmoe
