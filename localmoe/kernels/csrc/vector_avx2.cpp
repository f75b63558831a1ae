// 256-bit.
#include <immintrin.h>

namespace localmoe {
namespace {
constexpr int kWidth = 8;
constexpr int kScoreRows = 8;  // cached rows whose scores stay in registers
}  // namespace
}  // namespace localmoe

#include "vector_types.inc"

namespace localmoe {
namespace {
inline Ints widen(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Words widen(const uint16_t* from) {
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
}  // namespace
}  // namespace localmoe

#include "vector_ops.inc"
#include "int16_attention.inc"
#include "either_attention.inc"

namespace localmoe {

const VectorOps kAvx2Ops = {"avx2",           combine_rows,  dot_rows,      store_row, interleave_either, attend_either,
                            silu_multiply, read};

}  // namespace localmoe
