// AVX2 and FMA: most desktop CPUs since 2013.
#include <immintrin.h>

#include "kernels.h"

namespace {

// maddubs adds two products in 16 bits: at most 2 * 15 * 127, far from saturation.
inline __m256i dot_nibbles(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}

// maddubs would saturate here (2 * 255 * 127 > 32767), so both are widened to 16 bits first; the offset is
// taken out by the flipped top bit, and no correction is needed.
inline __m256i dot_bytes(__m256i u, __m256i s, const int32_t*) {
  const __m256i centered = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(centered)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(s)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(centered, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(s, 1)));
  return _mm256_add_epi32(low, high);
}

}  // namespace

#include "ymm.inc"

namespace localmoe {

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const Tier kAvx2 = {"avx2", has_avx2, int4_rows, int8_rows, bf16_rows};

}  // namespace localmoe
