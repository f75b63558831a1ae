// AVX-VNNI: 256-bit dot products on CPUs without AVX-512 (Alder Lake and later, Zen 5).
#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"

namespace {

inline __m256i dot_sevens(__m256i acc, __m256i u, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, u, x); }
inline __m256i dot_nibbles(__m256i acc, __m256i even, __m256i even_x, __m256i odd, __m256i odd_x) {
  return dot_sevens(dot_sevens(acc, even, even_x), odd, odd_x);
}
inline __m256i dot_bytes(__m256i u, __m256i x, const int32_t* correction) {
  return _mm256_dpbusd_avx_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(correction)), u, x);
}

}  // namespace

#include "ymm.inc"

namespace {

template <localmoe::Form F>
constexpr int kPlaneBits = F == localmoe::Form::kNf4 ? 7 : F == localmoe::Form::kInt8 ? 8 : 4;

template <int Bits>
struct Accumulator {
  __m256i sums = _mm256_setzero_si256();

  void add(__m256i u, __m256i x) { sums = _mm256_dpbusd_avx_epi32(sums, u, x); }
  __m256i total() const { return sums; }
};

}  // namespace

#include "gemm_ymm.inc"

namespace localmoe {

// Leaf 7, subleaf 1, EAX bit 4; AVX2's test stands for the operating system saving the registers.
static bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

const Tier kAvxVnni = {"avxvnni", has_avxvnni, quantized_rows, bf16_rows, quantized_gemm};

}  // namespace localmoe
