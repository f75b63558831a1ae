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

#include "activations.inc"
#include "vector_ops.inc"

// What int16_attention.inc needs.
namespace localmoe {
namespace {
namespace halves {

constexpr int kScored = 16;  // cached rows whose scores stay in registers
constexpr int kSummed = 8;   // heads whose sums do, of two vectors of latents

// kWidth pairs of 16-bit integers, or sums of their products. In 32-bit lanes: what is declared as __m512i, of 64-bit
// ones, the compiler keeps in two registers while it is summed up.
typedef int32_t Halves __attribute__((vector_size(kWidth * 4)));

inline Halves load_halves(const void* from) {
  return reinterpret_cast<Halves>(_mm512_loadu_si512(from));
}

inline Halves two_everywhere(const void* halves) {
  int32_t two;
  std::memcpy(&two, halves, sizeof(two));
  return reinterpret_cast<Halves>(_mm512_set1_epi32(two));
}

inline Halves add_products(Halves sum, Halves a, Halves b) {
  return reinterpret_cast<Halves>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a),
                                                      reinterpret_cast<__m512i>(b)));
}

// The bits of the largest absolute value of `count` bf16 numbers.
inline uint32_t largest_bits(const uint8_t* bf16, int64_t count) {
  const __m512i sign = _mm512_set1_epi16(INT16_MIN);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32)
    largest = _mm512_max_epu16(largest, _mm512_andnot_si512(sign, _mm512_loadu_si512(bf16 + 2 * i)));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))), 0);
}

// The lower halves of two vectors' lanes, the second's above the first's.
inline Halves join_halves(Floats low, Floats high) {
  const __m512i up = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 4, 4, 4, 5, 8, 8, 8, 9, 12, 12, 12, 13));
  return reinterpret_cast<Halves>(_mm512_mask_shuffle_epi8(reinterpret_cast<__m512i>(low), 0xcccccccccccccccc,
                                                           reinterpret_cast<__m512i>(high), up));
}

// 32 bytes of an int8 row as they are worth before its scale.
inline void center_bytes(const uint8_t* from, int16_t* to) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  _mm512_storeu_si512(to, _mm512_sub_epi16(wide, _mm512_set1_epi16(128)));
}

inline void interleave_halves(const int16_t* one, const int16_t* two, Halves* to) {
  const __m512i a = _mm512_loadu_si512(one);
  const __m512i b = _mm512_loadu_si512(two);
  to[0] = reinterpret_cast<Halves>(_mm512_unpacklo_epi16(a, b));
  to[1] = reinterpret_cast<Halves>(_mm512_unpackhi_epi16(a, b));
}

// Sums over what `interleave_halves` made, in the order of the latents.
inline void put_in_order(Floats& one, Floats& two) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 a = reinterpret_cast<__m512>(one), b = reinterpret_cast<__m512>(two);
  one = reinterpret_cast<Floats>(_mm512_permutex2var_ps(a, first, b));
  two = reinterpret_cast<Floats>(_mm512_permutex2var_ps(a, second, b));
}

}  // namespace halves
}  // namespace
}  // namespace localmoe

#include "int16_attention.inc"
#include "int8_attention.inc"

namespace localmoe {
namespace {

Way way_of(const LatentRows& rows) {
  if (rows.form == CacheForm::kInt8 && bytes::takes(rows)) return {bytes::interleave, bytes::attend};
  if (rows.form == CacheForm::kBfloat16 && halves::takes(rows)) return {halves::interleave, halves::attend};
  return {interleave, attend};
}

}  // namespace
}  // namespace localmoe

#include "either_attention.inc"

namespace localmoe {

const VectorOps kAvx512Ops = {"avx512",          round_block,   round_plain_block, combine_rows,  dot_rows, store_row,
                              interleave_either, attend_either, add_partial,       silu_multiply, read};

}  // namespace localmoe
