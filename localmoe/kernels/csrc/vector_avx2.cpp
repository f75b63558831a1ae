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

#include "activations.inc"
#include "vector_ops.inc"

// What int16_attention.inc needs.
namespace localmoe {
namespace {
namespace halves {

constexpr int kScored = 8;  // cached rows whose scores stay in registers
constexpr int kSummed = 4;   // heads whose sums do, of two vectors of latents

// kWidth pairs of 16-bit integers, or sums of their products. In 32-bit lanes: what is declared as __m256i, of 64-bit
// ones, the compiler keeps in two registers while it is summed up.
typedef int32_t Halves __attribute__((vector_size(kWidth * 4)));

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline Halves load_halves(const void* from) {
  return reinterpret_cast<Halves>(load_256(from));
}

inline Halves two_everywhere(const void* halves) {
  int32_t two;
  std::memcpy(&two, halves, sizeof(two));
  return reinterpret_cast<Halves>(_mm256_set1_epi32(two));
}

// Unsigned, since sums of weights that are none (a cache with NaN) may wrap; what they are worth is NaN then.
inline Halves add_products(Halves sum, Halves a, Halves b) {
  const __m256i products = _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<Halves>(reinterpret_cast<Words>(sum) + reinterpret_cast<Words>(products));
}

// The bits of the largest absolute value of `count` bf16 numbers.
inline uint32_t largest_bits(const uint8_t* bf16, int64_t count) {
  const __m256i sign = _mm256_set1_epi16(INT16_MIN);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 16)
    largest = _mm256_max_epu16(largest, _mm256_andnot_si256(sign, load_256(bf16 + 2 * i)));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))), 0);
}

// The lower halves of two vectors' lanes, the second's above the first's.
inline Halves join_halves(Floats low, Floats high) {
  const __m256i above = _mm256_slli_epi32(reinterpret_cast<__m256i>(high), 16);
  return reinterpret_cast<Halves>(_mm256_blend_epi16(reinterpret_cast<__m256i>(low), above, 0xaa));
}

// 16 bytes of an int8 row as they are worth before its scale.
inline void center_bytes(const uint8_t* from, int16_t* to) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_sub_epi16(wide, _mm256_set1_epi16(128)));
}

inline void interleave_halves(const int16_t* one, const int16_t* two, Halves* to) {
  const __m256i a = load_256(one);
  const __m256i b = load_256(two);
  to[0] = reinterpret_cast<Halves>(_mm256_unpacklo_epi16(a, b));
  to[1] = reinterpret_cast<Halves>(_mm256_unpackhi_epi16(a, b));
}

// Sums over what `interleave_halves` made, in the order of the latents.
inline void put_in_order(Floats& one, Floats& two) {
  const __m256 a = reinterpret_cast<__m256>(one), b = reinterpret_cast<__m256>(two);
  one = reinterpret_cast<Floats>(_mm256_permute2f128_ps(a, b, 0x20));
  two = reinterpret_cast<Floats>(_mm256_permute2f128_ps(a, b, 0x31));
}

}  // namespace halves
}  // namespace
}  // namespace localmoe

#include "int16_attention.inc"

namespace localmoe {
namespace {

Way way_of(const LatentRows& rows) {
  if (rows.form != CacheForm::kFloat32 && halves::takes(rows)) return {halves::interleave, halves::attend};
  return {interleave, attend};
}

}  // namespace
}  // namespace localmoe

#include "either_attention.inc"

namespace localmoe {

const VectorOps kAvx2Ops = {"avx2",            round_block,   round_plain_block, combine_rows,  dot_rows, store_row,
                            interleave_either, attend_either, add_partial,       silu_multiply, read};

}  // namespace localmoe
