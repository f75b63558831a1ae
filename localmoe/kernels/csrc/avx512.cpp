// AVX-512 with VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later): 128 weights a step.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace localmoe {
namespace {
// On their way to the first cache, lines 4 KiB ahead would hold its few buffers: 4 % slower from memory.
constexpr int kLocality = 2;
constexpr int64_t kFar = 6144, kAgain = 3072;
}  // namespace
}  // namespace localmoe

#include "rows.inc"

namespace localmoe {
namespace {

inline __m512 spread(__m128 scales, __m512i lanes) {
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(scales));
}

// What is left of a row at a block, as masks; a whole block needs none.
template <bool kWhole>
struct Left {
  int64_t weights;

  // 64 of the row's bytes; those beyond its end are not read.
  __m512i bytes(const uint8_t* from, int64_t left) const {
    if constexpr (kWhole) return _mm512_loadu_si512(from);
    const __mmask64 present = left >= 64 ? ~__mmask64{0} : (left <= 0 ? 0 : (__mmask64{1} << left) - 1);
    return _mm512_maskz_loadu_epi8(present, from);
  }

  // The four scales of the block, one for each 32 weights, from 128 / Group stored ones.
  template <Form F, int Group>
  __m128 scales(const uint8_t* from) const {
    const auto present = static_cast<__mmask8>((1u << std::min<int64_t>(kBlock / Group, weights / Group)) - 1);
    __m128 stored;
    if constexpr (F == Form::kNf4) {
      stored = _mm_maskz_loadu_ps(present, from);
    } else {
      const __m128i bits = kWhole && Group == 32 ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))
                                                 : _mm_maskz_loadu_epi16(present, from);
      stored = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
    }
    if constexpr (Group == 32) return stored;
    if constexpr (Group == 64) return _mm_shuffle_ps(stored, stored, _MM_SHUFFLE(1, 1, 0, 0));
    return _mm_shuffle_ps(stored, stored, 0);
  }

  // The same, each in the four lanes whose weights it scales.
  template <Form F, int Group>
  __m512 scales_in_lanes(const uint8_t* from) const {
    if constexpr (kWhole && F == Form::kInt4 && Group == 32) {  // bf16 to float32 and into place by one shuffle
      const __m512i places = _mm512_set_epi32(
          0x706ffff, 0x706ffff, 0x706ffff, 0x706ffff, 0x504ffff, 0x504ffff, 0x504ffff, 0x504ffff,
          0x302ffff, 0x302ffff, 0x302ffff, 0x302ffff, 0x100ffff, 0x100ffff, 0x100ffff, 0x100ffff);
      int64_t stored;
      std::memcpy(&stored, from, sizeof(stored));
      return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(stored), places));
    }
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return spread(scales<F, Group>(from), lanes);
  }
};

// NF4's codes through a table.
inline __m512i looked_up(const Nf4Table& table, __m512i codes) {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(table.bytes));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), codes);
}

// Dot products of 64 bytes' weights, the even and the odd ones, with a block's activations.
inline __m512i dot_halves(__m512i dots, __m512i even, __m512i odd, const Block* x) {
  dots = _mm512_dpbusd_epi32(dots, even, _mm512_load_si512(x->q));
  return _mm512_dpbusd_epi32(dots, odd, _mm512_load_si512(x->q + 64));
}

// A block of one row with T tokens, whose blocks are `stride` apart: adds to sums.
template <Form F, int Group, int T, bool kWhole>
inline void four_bit_block(const uint8_t* from, const uint8_t* scales, Left<kWhole> left, Ahead ahead, const Block* x,
                           int64_t stride, __m512* sums) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  ahead.weights(from);
  const __m512i packed = left.bytes(from, left.weights / 2);
  const __m512i low = _mm512_and_si512(packed, low_nibbles);
  const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles);
  const __m512 row_scale = left.template scales_in_lanes<F, Group>(scales);
  for (int t = 0; t < T; ++t, x += stride) {
    __m512i dots = _mm512_load_si512(x->correction);
    if constexpr (F == Form::kInt4) {
      dots = dot_halves(dots, low, high, x);
    } else {  // the high nibble is the first of the two
      const __m512i upper =
          dot_halves(_mm512_setzero_si512(), looked_up(kNf4Upper, high), looked_up(kNf4Upper, low), x);
      dots = dot_halves(dots, looked_up(kNf4Lower, high), looked_up(kNf4Lower, low), x);
      dots = _mm512_add_epi32(dots, _mm512_slli_epi32(upper, 7));
    }
    const __m512 scale = _mm512_mul_ps(row_scale, _mm512_load_ps(x->spread));
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sums[t]);
  }
}

template <int Group, int T, bool kWhole>
inline void int8_block(const uint8_t* from, const uint8_t* scales, Left<kWhole> left, Ahead ahead, const Block* x,
                       int64_t stride, __m512* sums) {
  const __m512i low_lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i high_lanes = _mm512_add_epi32(low_lanes, _mm512_set1_epi32(2));
  ahead.weights(from);
  ahead.weights(from + 64);
  const __m512i low = left.bytes(from, left.weights), high = left.bytes(from + 64, left.weights - 64);
  const __m128 row_scale = left.template scales<Form::kInt8, Group>(scales);
  for (int t = 0; t < T; ++t, x += stride) {
    const __m512i low_dots = _mm512_dpbusd_epi32(_mm512_load_si512(x->correction), low, _mm512_load_si512(x->q));
    const __m512i high_dots =
        _mm512_dpbusd_epi32(_mm512_load_si512(x->correction + 16), high, _mm512_load_si512(x->q + 64));
    const __m128 scale = _mm_mul_ps(row_scale, _mm_load_ps(x->scale));
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_dots), spread(scale, low_lanes), sums[t]);
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_dots), spread(scale, high_lanes), sums[t]);
  }
}

template <Form F, int Group, int T, bool kWhole>
inline void block(const uint8_t* from, const uint8_t* scales, Left<kWhole> left, Ahead ahead, const Block* x,
                  int64_t stride, __m512* sums) {
  if constexpr (F == Form::kInt8)
    int8_block<Group, T>(from, scales, left, ahead, x, stride, sums);
  else
    four_bit_block<F, Group, T>(from, scales, left, ahead, x, stride, sums);
}

template <Form F, int Group, int R, int T>
void tile(const QuantizedProduct& p, Ahead ahead, int64_t row, int64_t token) {
  constexpr int64_t kBits = F == Form::kInt8 ? 8 : 4;
  const int64_t scales_bytes = p.in / Group * scale_bytes(F);
  const uint8_t* weights = p.weights + row * p.row_bytes;
  const uint8_t* scales = p.scales + row * scales_bytes;
  const Block* x = p.x + token * p.blocks;
  __m512 sums[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
  constexpr int64_t kScalesLine = 64 / scale_bytes(F) * Group;  // weights whose scales fill a cache line
  int64_t start = 0;
  for (; start + kBlock <= p.in; start += kBlock, ++x)
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = scales + r * scales_bytes + start / Group * scale_bytes(F);
      if (start % kScalesLine == 0) ahead.scales(from);
      block<F, Group, T>(weights + r * p.row_bytes + start * kBits / 8, from, Left<true>{kBlock}, ahead, x, p.blocks,
                         sums[r]);
    }
  if (start < p.in)
    for (int r = 0; r < R; ++r)
      block<F, Group, T>(weights + r * p.row_bytes + start * kBits / 8,
                         scales + r * scales_bytes + start / Group * scale_bytes(F), Left<false>{p.in - start}, ahead,
                         x, p.blocks, sums[r]);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) p.y[(token + t) * p.out + row + r] = _mm512_reduce_add_ps(sums[r][t]);
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

const Tier kAvx512 = {"avx512", has_avx512, quantized_rows, bf16_rows, gemm_avx512};

}  // namespace localmoe
