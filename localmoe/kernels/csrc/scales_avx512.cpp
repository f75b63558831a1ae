// 512-bit.
#include <immintrin.h>

namespace localmoe {
namespace {
constexpr int kWidth = 16;
}  // namespace
}  // namespace localmoe

#include "vector_types.inc"

namespace localmoe {
namespace {
inline Floats nearest(Floats x) {
  // Masked: GCC warns of what the plain one leaves undefined
  return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline bool any_above(Floats x, Floats limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ) != 0; }
}  // namespace
}  // namespace localmoe

#include "scales.inc"

namespace localmoe {
void search_scales_avx512(const ScaleSearch& search) { search_scales(search); }
}  // namespace localmoe
