// The search for the scales of grouped integers (quantize/quantizers.py has the same in torch, and the maths).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace localmoe {

// Rows of weights as they are stored; strides are in numbers.
struct SourceRows {
  enum class Type { kFloat32, kBfloat16, kFp8 } type;
  const void* data;
  int64_t rows, in;
  // Of FP8 (e4m3): factors [.., factor_stride], one a block of block_rows x block_columns.
  const float* factors = nullptr;
  int64_t block_rows = 0, block_columns = 0, factor_stride = 0;
};

struct ScaleSearch {
  SourceRows source;
  Form form;                    // kInt4 or kInt8
  int64_t group;
  float baseline;               // |largest weight| / |scale| of plain absmax
  std::vector<float> guesses;   // the same of the first guesses; none: absmax it is
  const float* importance;      // [in], or none
  uint32_t* packed;             // [rows, in / 8 or in / 4], or none
  uint16_t* scales;             // [rows, in / group], bfloat16
  float* errors;                // [rows, in / group] squared errors, weighted by importance
  float* norms;                 // the same of the weights
};

// Every tier gives the same bits: elementwise operations without fused multiply-adds, and sums in one order.
using SearchScales = void (*)(const ScaleSearch&);
void search_scales_portable(const ScaleSearch&);
#ifdef LOCALMOE_X86
void search_scales_avx2(const ScaleSearch&);
void search_scales_avx512(const ScaleSearch&);
#endif

}  // namespace localmoe
