// 512-bit.
#include <immintrin.h>

namespace localmoe {
namespace {
constexpr int kWidth = 16;
constexpr int kScoreRows = 16;  // cached rows whose scores stay in registers
}  // namespace
}  // namespace localmoe

#include "vector_types.inc"

namespace localmoe {
namespace {
inline Ints widen(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Words widen(const uint16_t* from) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
}  // namespace
}  // namespace localmoe

#include "vector_ops.inc"
#include "int8_attention.inc"
#include "either_attention.inc"

namespace localmoe {

const VectorOps kAvx512Ops = {"avx512",          combine_rows,  dot_rows,      store_row,
                              interleave_either, attend_either, silu_multiply, read};

}  // namespace localmoe
