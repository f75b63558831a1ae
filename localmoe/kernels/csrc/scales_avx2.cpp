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
inline Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline bool any_above(Floats x, Floats limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ)) != 0; }
}  // namespace
}  // namespace localmoe

#include "scales.inc"

namespace localmoe {
void search_scales_avx2(const ScaleSearch& search) { search_scales(search); }
}  // namespace localmoe
