#include "matrix.h"

#include <algorithm>
#include <cstring>

namespace localmoe {

namespace {

bool is_plain(Form form) { return form == Form::kFloat32 || form == Form::kBfloat16; }

}  // namespace

void Operand::shape(Form form, int64_t tokens, int64_t in) {
  form_ = form;
  tokens_ = tokens;
  in_ = in;
  blocks_ = (in + kBlock - 1) / kBlock;
  if (is_plain(form)) {
    if (plain_.size() < static_cast<size_t>(tokens * in)) plain_.resize(tokens * in);
  } else if (rounded_.size() < static_cast<size_t>(tokens * blocks_)) {
    rounded_.resize(tokens * blocks_);
  }
}

void Operand::set_block(int64_t token, int64_t block, const float* x) {
  const int64_t start = block * kBlock, size = std::min(kBlock, in_ - start);
  if (is_plain(form_)) {
    std::memcpy(plain_.data() + token * in_ + start, x, size * sizeof(float));
    return;
  }
  const bool nibbles = form_ == Form::kInt4;
  quantize_activations(x, size, nibbles ? 8 : 128, nibbles ? Order::kEvenOdd : Order::kNatural,
                       rounded_.data() + token * blocks_ + block);
}

void Operand::copy(int64_t token, const Operand& from, int64_t from_token) {
  if (is_plain(form_))
    std::copy_n(from.plain_.data() + from_token * in_, in_, plain_.data() + token * in_);
  else
    std::copy_n(from.rounded_.data() + from_token * blocks_, blocks_, rounded_.data() + token * blocks_);
}

void Operand::multiply(const Tier& tier, const Matrix& matrix, int64_t first, int64_t last, float* y,
                       int64_t stride, const uint8_t* next) const {
  const uint8_t* rows = matrix.data + first * matrix.row_bytes;
  if (is_plain(form_)) {
    const DenseProduct product{reinterpret_cast<const uint16_t*>(rows), plain_.data(), y, tokens_, stride, in_};
    tier.bf16(product, 0, last - first);
    return;
  }
  const auto* scales = static_cast<const uint16_t*>(matrix.scales) + first * (in_ / matrix.group);
  const QuantizedProduct product{rows,    scales, rounded_.data(), y,      tokens_, stride,
                                 in_, matrix.group, matrix.row_bytes, blocks_, next};
  (matrix.form == Form::kInt4 ? tier.int4 : tier.int8)(product, 0, last - first);
}

}  // namespace localmoe
