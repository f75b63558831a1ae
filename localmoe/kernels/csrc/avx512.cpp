// AVX-512 with VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later): 128 weights a step.
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace localmoe {
namespace {

// The four scales of a block of 128 weights, one for each 32, from 128 / Group stored ones.
// `left` is how many weights of the row remain: stored scales beyond the row are not read.
template <int Group>
inline __m128 block_scales(const uint16_t* scales, int64_t left) {
  const auto present = static_cast<__mmask8>((1u << std::min<int64_t>(kBlock / Group, left / Group)) - 1);
  const __m128i bits = _mm_maskz_loadu_epi16(present, scales);
  const __m128 stored = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
  if constexpr (Group == 32) return stored;
  if constexpr (Group == 64) return _mm_shuffle_ps(stored, stored, _MM_SHUFFLE(1, 1, 0, 0));
  return _mm_shuffle_ps(stored, stored, 0);
}

inline __m512 spread(__m128 scales, __m512i lanes) {
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(scales));
}

// A mask of the first `count` of 64 bytes.
inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (count <= 0 ? 0 : (__mmask64{1} << count) - 1);
}

template <int Group>
float dot_int4(const QuantizedProduct& p, const uint8_t* row, const uint16_t* scales, const Block* x) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t start = 0; start < p.in; start += kBlock, ++x) {
    const int64_t left = p.in - start;
    const uint8_t* from = row + start / 2;
    _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetch), _MM_HINT_T0);
    const __m512i packed = _mm512_maskz_loadu_epi8(first_bytes(left / 2), from);
    __m512i dots = _mm512_load_si512(x->correction);
    dots = _mm512_dpbusd_epi32(dots, _mm512_and_si512(packed, low_nibbles), _mm512_load_si512(x->q));
    dots = _mm512_dpbusd_epi32(dots, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles),
                               _mm512_load_si512(x->q + 64));
    const __m128 scale = _mm_mul_ps(block_scales<Group>(scales + start / Group, left), _mm_load_ps(x->scale));
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), spread(scale, lanes), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

template <int Group>
float dot_int8(const QuantizedProduct& p, const uint8_t* row, const uint16_t* scales, const Block* x) {
  const __m512i low_lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i high_lanes = _mm512_add_epi32(low_lanes, _mm512_set1_epi32(2));
  __m512 low_sum = _mm512_setzero_ps(), high_sum = _mm512_setzero_ps();
  for (int64_t start = 0; start < p.in; start += kBlock, ++x) {
    const int64_t left = p.in - start;
    const uint8_t* from = row + start;
    _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetch), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetch + 64), _MM_HINT_T0);
    const __m512i low = _mm512_maskz_loadu_epi8(first_bytes(left), from);
    const __m512i high = _mm512_maskz_loadu_epi8(first_bytes(left - 64), from + 64);
    const __m512i low_dots =
        _mm512_dpbusd_epi32(_mm512_load_si512(x->correction), low, _mm512_load_si512(x->q));
    const __m512i high_dots =
        _mm512_dpbusd_epi32(_mm512_load_si512(x->correction + 16), high, _mm512_load_si512(x->q + 64));
    const __m128 scale = _mm_mul_ps(block_scales<Group>(scales + start / Group, left), _mm_load_ps(x->scale));
    low_sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_dots), spread(scale, low_lanes), low_sum);
    high_sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_dots), spread(scale, high_lanes), high_sum);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(low_sum, high_sum));
}

using Dot = float (*)(const QuantizedProduct&, const uint8_t*, const uint16_t*, const Block*);

template <Dot kDot>
void rows(const QuantizedProduct& p, int64_t first, int64_t last) {
  const int64_t groups = p.in / p.group;
  for (int64_t r = first; r < last; ++r)
    for (int64_t t = 0; t < p.tokens; ++t)
      p.y[t * p.out + r] = kDot(p, p.weights + r * p.row_bytes, p.scales + r * groups, p.x + t * p.blocks);
}

void int4_rows(const QuantizedProduct& p, int64_t first, int64_t last) {
  switch (p.group) {
    case 32: return rows<dot_int4<32>>(p, first, last);
    case 64: return rows<dot_int4<64>>(p, first, last);
    default: return rows<dot_int4<128>>(p, first, last);
  }
}

void int8_rows(const QuantizedProduct& p, int64_t first, int64_t last) {
  switch (p.group) {
    case 32: return rows<dot_int8<32>>(p, first, last);
    case 64: return rows<dot_int8<64>>(p, first, last);
    default: return rows<dot_int8<128>>(p, first, last);
  }
}

void bf16_rows(const DenseProduct& p, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const uint16_t* row = p.weights + r * p.in;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const float* x = p.x + t * p.in;
      __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t i = 0, which = 0; i < p.in; i += 16, which ^= 1) {
        _mm_prefetch(reinterpret_cast<const char*>(row + i) + kPrefetch, _MM_HINT_T0);
        const auto present = static_cast<__mmask16>(p.in - i >= 16 ? 0xffff : (1u << (p.in - i)) - 1);
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, row + i));
        const __m512 weights = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        sums[which] = _mm512_fmadd_ps(weights, _mm512_maskz_loadu_ps(present, x + i), sums[which]);
      }
      p.y[t * p.out + r] = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    }
  }
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Tier kAvx512 = {"avx512", has_avx512, int4_rows, int8_rows, bf16_rows};

}  // namespace localmoe
