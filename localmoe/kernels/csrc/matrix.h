// A matrix as it is stored, and activations in the form its kernel takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace localmoe {

// [out, in], in memory that others own. `group` weights of a row share a scale.
struct Matrix {
  Form form;
  const uint8_t* data;
  const void* scales;  // bfloat16, or float32 for NF4; none for plain forms
  int64_t out, in, group, row_bytes;

  // Where row `index` begins, the last row for those beyond. Without scales they count as lying with the weights.
  Place row(int64_t index) const {
    const int64_t known = index < out ? index : out - 1;
    const uint8_t* weights = data + known * row_bytes;
    if (scales == nullptr) return {weights, weights};
    return {weights, static_cast<const uint8_t*>(scales) + known * (in / group) * scale_bytes(form)};
  }
};

// Rows that a thread takes at a time: long streams from memory, yet so many that the threads end together.
int64_t rows_at_a_time(const Matrix& matrix, int threads);

// Up to so many rows a product is matrix times vector for each: the weights' bytes decide. Above, weights are
// unpacked for many rows at once.
constexpr int64_t kMatvecTokens = 8;

struct VectorOps;

// Rows of float32 activations, and the same rounded for one form of matrix. Memory is kept from use to use.
class Operand {
 public:
  // `tokens` rows of `in` numbers that matrices of `form` will be multiplied with. `many`: for the tier's products
  // with many tokens, if it has them.
  void shape(const Tier& tier, Form form, int64_t tokens, int64_t in, bool many);

  int64_t blocks() const { return blocks_; }

  // Takes numbers [128 * block, ...) of a row, which begins at `row`. Many threads may set different blocks.
  void set(int64_t token, int64_t block, const float* row) { set_block(token, block, row + block * kBlock); }

  // The same, where the block's own numbers begin at `x`.
  void set_block(int64_t token, int64_t block, const float* x);

  // Copies one row of another operand of the same shape.
  void copy(int64_t token, const Operand& from, int64_t from_token);

  // y[t * stride + r - first] for rows [first, last) of the matrix. `next` is where the calling thread will probably
  // read weights then.
  void multiply(const Tier& tier, const Matrix& matrix, int64_t first, int64_t last, float* y, int64_t stride,
                Place next) const;

 private:
  const VectorOps* ops_ = nullptr;
  Form form_ = Form::kFloat32;
  int64_t tokens_ = 0, in_ = 0, blocks_ = 0;
  bool plain_blocks_ = false;
  std::vector<Block> rounded_;
  std::vector<PlainBlock> plain_rounded_;
  std::vector<float> plain_;
};

}  // namespace localmoe
