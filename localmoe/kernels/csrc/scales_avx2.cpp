// 256-bit.
#include <immintrin.h>

namespace localmoe {
namespace {
constexpr int kWidth = 8;
}  // namespace
}  // namespace localmoe

#include "vector_types.inc"

namespace localmoe {
namespace {
inline Floats nearest_between(Floats x, Floats lowest, Floats highest) {
  return _mm256_round_ps(_mm256_min_ps(_mm256_max_ps(x, lowest), highest), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
}  // namespace
}  // namespace localmoe

#include "scales.inc"

namespace localmoe {
void search_scales_avx2(const ScaleSearch& search) { search_scales(search); }
}  // namespace localmoe
