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

#define LOCALMOE_FP8_COLUMNS
// Columns x [count][kWidth] of e4m3 codes times `factor`: four columns of all rows are fetched at once, and widened by
// moving their bits to a float's places. `rows` are the rows' distances in bytes.
inline void fp8_columns(const uint8_t* from, __m512i rows, int count, float factor, float* x) {
  constexpr uint32_t kNan = 0x7f << 20;
  for (int i = 0; i < count; i += 4) {
    // Masked, as above
    const Words codes = Words(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, rows, from + i, 1));
    for (int k = 0; k < 4; ++k) {
      const Words code = codes << (24 - 8 * k);  // in the highest byte; below it are other columns
      const Words bits = code >> 4 & kNan;       // exponent and mantissa, 2^120 times too small
      const Floats value = Floats(bits | (code & 0x80000000)) * 0x1p120f * factor;
      *reinterpret_cast<Floats*>(x + (i + k) * kWidth) = bits == kNan ? value + __builtin_nanf("") : value;
    }
  }
}

inline bool any_above(Floats x, Floats limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ) != 0; }
}  // namespace
}  // namespace localmoe

#include "scales.inc"

namespace localmoe {
void search_scales_avx512(const ScaleSearch& search) { search_scales(search); }
}  // namespace localmoe
