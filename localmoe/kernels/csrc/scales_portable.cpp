// 128-bit vectors, which the compiler makes of whatever the CPU has.
namespace localmoe {
namespace {
constexpr int kWidth = 4;
}  // namespace
}  // namespace localmoe

#include "vector_types.inc"

namespace localmoe {
namespace {
// Adding 1.5 * 2^23 leaves no bits for a fraction, and rounds half to even.
inline Floats nearest_between(Floats x, Floats lowest, Floats highest) {
  x = x > lowest ? x : lowest;
  x = x < highest ? x : highest;
  return (x + 12582912.0f) - 12582912.0f;
}
}  // namespace
}  // namespace localmoe

#include "scales.inc"

namespace localmoe {
void search_scales_portable(const ScaleSearch& search) { search_scales(search); }
}  // namespace localmoe
