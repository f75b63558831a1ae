#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace localmoe {

namespace {

// Rounds up to 32 activations; returns their scale.
float round_group(const float* x, int64_t size, int8_t* q) {
  float largest = 0.0f;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float scale = largest / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest even integer, as vectors
    const float rounded = x[i] * inverse + 12582912.0f - 12582912.0f;
    q[i] = static_cast<int8_t>(std::clamp(rounded, -127.0f, 127.0f));
  }
  return scale;
}

// What a step of the weights' integers is worth.
float unit_of(Form form) { return form == Form::kNf4 ? 1.0f / kNf4One : 1.0f; }

}  // namespace

void quantize_activations(const float* x, int64_t n, Form form, Block* blocks) {
  const int64_t count = (n + kBlock - 1) / kBlock;
  std::memset(static_cast<void*>(blocks), 0, sizeof(Block) * count);
  const bool apart = even_odd(form);
  const int64_t lane = apart ? 8 : 4;
  for (int64_t start = 0; start < n; start += kQuantGroup) {
    const int64_t size = std::min(kQuantGroup, n - start);
    Block& block = blocks[start / kBlock];
    const int64_t in_block = start % kBlock;
    int8_t q[kQuantGroup] = {};
    block.scale[in_block / kQuantGroup] = round_group(x + start, size, q) * unit_of(form);
    for (int64_t i = 0; i < kQuantGroup; ++i) {
      const int64_t at = in_block + i;
      block.q[apart ? (at & 1) * (kBlock / 2) + at / 2 : at] = q[i];
      block.correction[at / lane] -= zero_of(form) * q[i];
    }
  }
}

void quantize_plain(const float* x, int64_t n, Form form, PlainBlock& block) {
  block = {};
  for (int64_t start = 0; start < n; start += kQuantGroup) {
    const int64_t group = start / kQuantGroup;
    const float scale = round_group(x + start, std::min(kQuantGroup, n - start), block.q + start);
    block.scale[group] = scale * unit_of(form);
    int32_t sum = 0;
    for (int64_t i = start; i < start + kQuantGroup; ++i) sum += block.q[i];
    block.correction[group] = -zero_of(form) * sum;
  }
}

}  // namespace localmoe
