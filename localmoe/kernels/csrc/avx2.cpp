// AVX2 and FMA: most desktop CPUs since 2013.
#include <immintrin.h>

#include "kernels.h"

namespace {

// maddubs adds two products in 16 bits and saturates. Of nibbles even four stay far from that: 4 * 15 * 127.
inline __m256i dot_nibbles(__m256i acc, __m256i even, __m256i even_x, __m256i odd, __m256i odd_x) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, even_x), _mm256_maddubs_epi16(odd, odd_x));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Two of 7 bits just fit: 2 * 127 * 127 < 32768.
inline __m256i dot_sevens(__m256i acc, __m256i u, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
}

// Bytes up to 255 do not, but their distance from 128 does (2 * 128 * 127), with its sign given to the activations.
inline __m256i dot_bytes(__m256i u, __m256i x, const int32_t*) {
  const __m256i centered = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(centered), _mm256_sign_epi8(x, centered));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

}  // namespace

#include "ymm.inc"

namespace {

// Nibbles for maddubs: eight sums of two stay in 16 bits, 8 * 2 * 15 * 127 < 32768. NF4's sevens need 32 at once.
template <localmoe::Form F>
constexpr int kPlaneBits = F == localmoe::Form::kNf4 ? 7 : 4;

template <int Bits>
struct Accumulator {
  __m256i sums = _mm256_setzero_si256();

  void add(__m256i u, __m256i x) {
    if constexpr (Bits == 4)
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(u, x));
    else
      sums = dot_sevens(sums, u, x);
  }
  __m256i total() const { return Bits == 4 ? _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) : sums; }
};

}  // namespace

#include "gemm_ymm.inc"

namespace localmoe {

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const Tier kAvx2 = {"avx2", has_avx2, quantized_rows, bf16_rows, quantized_gemm};

}  // namespace localmoe
