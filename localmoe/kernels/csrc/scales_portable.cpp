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
inline Floats nearest(Floats x) { return (x + 12582912.0f) - 12582912.0f; }
inline bool any_above(Floats x, Floats limit) {
  const Ints above = x > limit;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}
}  // namespace
}  // namespace localmoe

#include "scales.inc"

namespace localmoe {
void search_scales_portable(const ScaleSearch& search) { search_scales(search); }
}  // namespace localmoe
