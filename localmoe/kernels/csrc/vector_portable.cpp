// 128-bit vectors, which the compiler makes of whatever the CPU has.
namespace localmoe {
namespace {
constexpr int kWidth = 4;
constexpr int kScoreRows = 4;  // cached rows whose scores stay in registers
}  // namespace
}  // namespace localmoe

#include "vector_types.inc"

namespace localmoe {
namespace {
inline Ints widen(const uint8_t* from) { return Ints{from[0], from[1], from[2], from[3]}; }
inline Words widen(const uint16_t* from) { return Words{from[0], from[1], from[2], from[3]}; }
}  // namespace
}  // namespace localmoe

#include "activations.inc"
#include "vector_ops.inc"

namespace localmoe {

const VectorOps kPortableOps = {"portable", round_block, round_plain_block, combine_rows,  dot_rows, store_row,
                                interleave, attend,      add_partial,       silu_multiply, read};

}  // namespace localmoe
