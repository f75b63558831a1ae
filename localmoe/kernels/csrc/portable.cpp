// Plain C++: right on every CPU, and what the other tiers are easiest compared with.
#include <algorithm>
#include <bit>

#include "kernels.h"

namespace localmoe {

namespace {

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// The dot product of the 32 weights from `start` of a row with their activations.
template <Form F>
int32_t dot_group(const uint8_t* row, int64_t start, const Block& block) {
  const int64_t in_block = start % kBlock;
  int32_t dot = 0;
  if constexpr (F == Form::kInt8) {
    for (int64_t i = 0; i < kQuantGroup; ++i) dot += (row[start + i] - zero_of(F)) * block.q[in_block + i];
    return dot;
  }
  for (int64_t i = 0; i < kQuantGroup / 2; ++i) {
    const uint8_t pair = row[start / 2 + i];
    const int32_t first = F == Form::kInt4 ? pair & 15 : kNf4[pair >> 4];
    const int32_t second = F == Form::kInt4 ? pair >> 4 : kNf4[pair & 15];
    dot += (first - zero_of(F)) * block.q[in_block / 2 + i];
    dot += (second - zero_of(F)) * block.q[kBlock / 2 + in_block / 2 + i];
  }
  return dot;
}

template <Form F>
inline float stored_scale(const uint8_t* scales, int64_t index) {
  if constexpr (F == Form::kNf4) return reinterpret_cast<const float*>(scales)[index];
  return from_bf16(reinterpret_cast<const uint16_t*>(scales)[index]);
}

template <Form F>
void rows(const QuantizedProduct& p, int64_t first, int64_t last) {
  const int64_t groups = p.in / p.group;
  for (int64_t r = first; r < last; ++r) {
    const uint8_t* row = p.weights + r * p.row_bytes;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const Block* x = p.x + t * p.blocks;
      float sum = 0.0f;
      for (int64_t start = 0; start < p.in; start += kQuantGroup) {
        const Block& block = x[start / kBlock];
        const float scale = stored_scale<F>(p.scales, r * groups + start / p.group);
        sum += scale * block.scale[start % kBlock / kQuantGroup] * static_cast<float>(dot_group<F>(row, start, block));
      }
      p.y[t * p.out + r] = sum;
    }
  }
}

void quantized_rows(const QuantizedProduct& p, int64_t first, int64_t last) {
  switch (p.form) {
    case Form::kInt4: return rows<Form::kInt4>(p, first, last);
    case Form::kInt8: return rows<Form::kInt8>(p, first, last);
    default: return rows<Form::kNf4>(p, first, last);
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

const Tier kPortable = {"portable", always, quantized_rows, bf16_rows};

}  // namespace localmoe
