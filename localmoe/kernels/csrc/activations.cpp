#include <algorithm>
#include <bit>

#include "kernels.h"

namespace localmoe {

namespace {

// Rounds 32 activations; returns their scale. In loops that the compiler turns into vectors, whatever the CPU.
float round_group(const float* x, int8_t* q) {
  int32_t largest_bits = 0;  // magnitudes are ordered as their bits are
  for (int64_t i = 0; i < kQuantGroup; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const float scale = std::bit_cast<float>(largest_bits) / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < kQuantGroup; ++i) {
    // Adding 1.5 * 2^23 rounds to the nearest even integer, which then stands in the lowest bits
    float scaled = x[i] * inverse;
    scaled = scaled < 127.0f ? scaled : 127.0f;
    scaled = scaled > -127.0f ? scaled : -127.0f;
    q[i] = static_cast<int8_t>(std::bit_cast<int32_t>(scaled + 12582912.0f));
  }
  return scale;
}

// The same for the group at `start` of n activations, with zeros beyond the last.
float round_group_of(const float* x, int64_t n, int64_t start, int8_t* q) {
  if (start + kQuantGroup <= n) return round_group(x + start, q);
  float padded[kQuantGroup] = {};
  std::copy_n(x + start, n - start, padded);
  return round_group(padded, q);
}

// What a step of the weights' integers is worth.
float unit_of(Form form) { return form == Form::kNf4 ? 1.0f / kNf4One : 1.0f; }

}  // namespace

void quantize_activations(const float* x, int64_t n, Form form, Block& block) {
  const bool apart = even_odd(form);
  int8_t q[kBlock] = {};
  for (int64_t group = 0; group < kBlock / kQuantGroup; ++group) {
    const int64_t start = group * kQuantGroup;
    block.scale[group] = start < n ? round_group_of(x, n, start, q + start) * unit_of(form) : 0.0f;
    std::fill_n(block.spread + 4 * group, 4, block.scale[group]);
  }
  for (int64_t i = 0; i < kBlock / 2; ++i) {
    block.q[i] = apart ? q[2 * i] : q[i];
    block.q[kBlock / 2 + i] = apart ? q[2 * i + 1] : q[kBlock / 2 + i];
  }
  const int64_t lane = apart ? 8 : 4;
  for (int64_t i = 0; i < kBlock / 4; ++i) block.correction[i] = 0;
  for (int64_t i = 0; i < kBlock / lane; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < lane; ++k) sum += q[i * lane + k];
    block.correction[i] = -zero_of(form) * sum;
  }
}

void quantize_activations(const float* x, int64_t n, Form form, PlainBlock& block) {
  block = {};
  for (int64_t start = 0; start < n; start += kQuantGroup) {
    const int64_t group = start / kQuantGroup;
    block.scale[group] = round_group_of(x, n, start, block.q + start) * unit_of(form);
    int32_t sum = 0;
    for (int64_t i = start; i < start + kQuantGroup; ++i) sum += block.q[i];
    block.correction[group] = -zero_of(form) * sum;
  }
}

}  // namespace localmoe
