#include "matrix.h"

#include <algorithm>
#include <cstring>

#include "vector_ops.h"

namespace localmoe {

namespace {

bool is_plain(Form form) { return form == Form::kFloat32 || form == Form::kBfloat16; }

template <typename T>
void grow(std::vector<T>& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
}

}  // namespace

int64_t rows_at_a_time(const Matrix& matrix, int threads) {
  constexpr int64_t kLeast = 32 << 10, kMost = 256 << 10, kSharesEach = 8;
  const int64_t bytes = std::clamp(matrix.out * matrix.row_bytes / (threads * kSharesEach), kLeast, kMost);
  return std::max<int64_t>(32, bytes / matrix.row_bytes / 32 * 32);  // whole pairs of panels, for many tokens
}

void Operand::shape(const Tier& tier, Form form, int64_t tokens, int64_t in, bool many) {
  ops_ = &vector_ops(tier);
  form_ = form;
  tokens_ = tokens;
  in_ = in;
  blocks_ = (in + kBlock - 1) / kBlock;
  plain_blocks_ = many && !is_plain(form) && tier.quantized_gemm != nullptr;
  if (is_plain(form))
    grow(plain_, tokens * in);
  else if (plain_blocks_)
    grow(plain_rounded_, tokens * blocks_);
  else
    grow(rounded_, tokens * blocks_);
}

void Operand::set_block(int64_t token, int64_t block, const float* x) {
  const int64_t start = block * kBlock, size = std::min(kBlock, in_ - start), at = token * blocks_ + block;
  if (is_plain(form_))
    std::memcpy(plain_.data() + token * in_ + start, x, size * sizeof(float));
  else if (plain_blocks_)
    ops_->round_plain_block(x, size, form_, plain_rounded_[at]);
  else
    ops_->round_block(x, size, form_, rounded_[at]);
}

void Operand::copy(int64_t token, const Operand& from, int64_t from_token) {
  if (is_plain(form_))
    std::copy_n(from.plain_.data() + from_token * in_, in_, plain_.data() + token * in_);
  else if (plain_blocks_)
    std::copy_n(from.plain_rounded_.data() + from_token * blocks_, blocks_, plain_rounded_.data() + token * blocks_);
  else
    std::copy_n(from.rounded_.data() + from_token * blocks_, blocks_, rounded_.data() + token * blocks_);
}

void Operand::multiply(const Tier& tier, const Matrix& matrix, int64_t first, int64_t last, float* y, int64_t stride,
                       Place next) const {
  const Place rows = matrix.row(first);
  if (is_plain(form_)) {
    const DenseProduct product{reinterpret_cast<const uint16_t*>(rows.weights), plain_.data(), y, tokens_, stride, in_};
    tier.bf16(product, 0, last - first);
    return;
  }
  const QuantizedProduct product{matrix.form, rows.weights, rows.scales,      rounded_.data(), y,    tokens_,
                                 stride,      in_,          matrix.group,     matrix.row_bytes, blocks_, next,
                                 plain_rounded_.data()};
  (plain_blocks_ ? tier.quantized_gemm : tier.quantized)(product, 0, last - first);
}

}  // namespace localmoe
