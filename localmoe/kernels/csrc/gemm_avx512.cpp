// Prefill on AVX-512 VNNI: 16 rows of weights are unpacked once, so that 4 neighbours of each fill a lane, and then
// multiplied with every token.
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace localmoe {
namespace {

constexpr int kRows = 16;
constexpr int kTokens = 8;  // whose accumulators stay in registers

// Vectors as elements: their own types lose their alignment as template arguments.
struct Ints {
  __m512i v;
};
struct Scales {
  __m512 v;
};

// 16 rows, unpacked: for each 4 in-features a vector with 4 unsigned bytes a row, and for each 32 their scales.
struct Panel {
  std::vector<Ints> weights;   // [in / 4]
  std::vector<Scales> scales;  // [in / 32]
};

inline float from_bf16(uint16_t bits) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits) << 16)));
}

// Vector j gets numbers 4j to 4j + 3 of all rows, from quarters[k], whose lane L has 16 numbers of row 4L + k.
inline void transpose(const __m512i quarters[4], Ints* to) {
  const __m512i a = _mm512_unpacklo_epi32(quarters[0], quarters[1]), b = _mm512_unpackhi_epi32(quarters[0], quarters[1]);
  const __m512i c = _mm512_unpacklo_epi32(quarters[2], quarters[3]), d = _mm512_unpackhi_epi32(quarters[2], quarters[3]);
  to[0].v = _mm512_unpacklo_epi64(a, c);
  to[1].v = _mm512_unpackhi_epi64(a, c);
  to[2].v = _mm512_unpacklo_epi64(b, d);
  to[3].v = _mm512_unpackhi_epi64(b, d);
}

// 16 bytes at `offset` of rows k, 4 + k, 8 + k and 12 + k, a lane each.
inline __m512i lanes_of(const uint8_t* const* rows, int k, int64_t offset) {
  const auto load = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load(k)), load(4 + k), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load(8 + k)), load(12 + k), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

template <int Bits>
void unpack_group(const uint8_t* const* rows, int64_t group, Ints* to) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512i first[4], second[4];  // numbers 0-15 and 16-31 of the group
  for (int k = 0; k < 4; ++k) {
    if constexpr (Bits == 4) {
      const __m512i packed = lanes_of(rows, k, group * 16);
      const __m512i even = _mm512_and_si512(packed, low_nibbles);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles);
      first[k] = _mm512_unpacklo_epi8(even, odd);
      second[k] = _mm512_unpackhi_epi8(even, odd);
    } else {
      first[k] = lanes_of(rows, k, group * 32);
      second[k] = lanes_of(rows, k, group * 32 + 16);
    }
  }
  transpose(first, to);
  transpose(second, to + 4);
}

template <int Bits>
void unpack(const QuantizedProduct& p, int64_t row, int64_t last, Panel& panel) {
  const int64_t groups = p.in / kQuantGroup, stored = p.in / p.group, share = p.group / kQuantGroup;
  const uint8_t* rows[kRows];
  const uint16_t* scales[kRows];
  for (int r = 0; r < kRows; ++r) {  // beyond the last row: that one again, not stored in the end
    const int64_t at = std::min(row + r, last - 1);
    rows[r] = p.weights + at * p.row_bytes;
    scales[r] = p.scales + at * stored;
  }
  panel.weights.resize(p.in / 4);
  panel.scales.resize(groups);
  for (int64_t g = 0; g < groups; ++g) {
    unpack_group<Bits>(rows, g, panel.weights.data() + 8 * g);
    if (g % share != 0) {
      panel.scales[g] = panel.scales[g - 1];
      continue;
    }
    alignas(64) float values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = from_bf16(scales[r][g / share]);
    panel.scales[g].v = _mm512_load_ps(values);
  }
}

// T tokens from `token` on with a panel, whose rows are `row` and after.
template <int T>
void multiply(const QuantizedProduct& p, const Panel& panel, int64_t token, int64_t row, __mmask16 present) {
  __m512 sums[T];
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  const PlainBlock* x = p.plain + token * p.blocks;
  const Ints* weights = panel.weights.data();
  const int64_t groups = p.in / kQuantGroup;
  for (int64_t g = 0; g < groups; ++g, weights += 8) {
    const int64_t block = g / 4, part = g % 4;
    __m512i dots[T];
    for (int t = 0; t < T; ++t) dots[t] = _mm512_set1_epi32(x[t * p.blocks + block].correction[part]);
    for (int j = 0; j < 8; ++j) {
      const __m512i w = weights[j].v;
      for (int t = 0; t < T; ++t) {
        const auto* q = reinterpret_cast<const int32_t*>(x[t * p.blocks + block].q + part * kQuantGroup);
        dots[t] = _mm512_dpbusd_epi32(dots[t], w, _mm512_set1_epi32(q[j]));
      }
    }
    for (int t = 0; t < T; ++t) {
      const __m512 scale = _mm512_mul_ps(panel.scales[g].v, _mm512_set1_ps(x[t * p.blocks + block].scale[part]));
      sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, sums[t]);
    }
  }
  for (int t = 0; t < T; ++t) _mm512_mask_storeu_ps(p.y + (token + t) * p.out + row, present, sums[t]);
}

// The last tokens, fewer than kTokens, at once: T of them or fewer.
template <int T>
void multiply_rest(const QuantizedProduct& p, const Panel& panel, int64_t token, int64_t row, __mmask16 present) {
  if constexpr (T > 0) {
    if (p.tokens - token == T)
      multiply<T>(p, panel, token, row, present);
    else
      multiply_rest<T - 1>(p, panel, token, row, present);
  }
}

template <int Bits>
void gemm(const QuantizedProduct& p, int64_t first, int64_t last) {
  thread_local Panel panel;  // an unpacked panel of the widest matrix so far
  for (int64_t row = first; row < last; row += kRows) {
    unpack<Bits>(p, row, last, panel);
    const auto present = static_cast<__mmask16>((1u << std::min<int64_t>(kRows, last - row)) - 1);
    int64_t t = 0;
    for (; t + kTokens <= p.tokens; t += kTokens) multiply<kTokens>(p, panel, t, row, present);
    multiply_rest<kTokens - 1>(p, panel, t, row, present);
  }
}

}  // namespace

void int4_gemm_avx512(const QuantizedProduct& p, int64_t first, int64_t last) { gemm<4>(p, first, last); }
void int8_gemm_avx512(const QuantizedProduct& p, int64_t first, int64_t last) { gemm<8>(p, first, last); }

}  // namespace localmoe
