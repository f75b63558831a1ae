// Prefill on AVX-512 VNNI: 16 rows of weights are unpacked once, so that 4 neighbours of each fill a lane, and then
// multiplied with every token; two such panels at once, so that what is loaded of a token serves both.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace localmoe {
namespace {

constexpr int kRows = 16;
constexpr int kTokens = 8;  // whose accumulators stay in registers
constexpr int kPanels = 2;  // multiplied at once

// In lanes of 32 bits: sums declared as __m512i, of 64-bit lanes, are copied from one register to another.
typedef int32_t Lanes __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

// Vectors as elements: their own types lose their alignment as template arguments.
struct Ints {
  __m512i v;
};
struct Scales {
  Floats v;
};

// 16 rows, unpacked: for each 4 in-features a vector with 4 unsigned bytes a row, and for each 32 their scales. NF4 has
// two such vectors, of the upper and of the lower seven bits: for each 32 first the upper ones.
struct Panel {
  std::vector<Ints> weights;   // [in / 4] or [in / 2]
  std::vector<Scales> scales;  // [in / 32]
};

inline float from_bf16(uint16_t bits) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits) << 16)));
}

// Vector j gets numbers 4j to 4j + 3 of all rows, from quarters[k], whose lane L has 16 numbers of row 4L + k.
inline void transpose(const __m512i quarters[4], Ints* to) {
  const __m512i a = _mm512_unpacklo_epi32(quarters[0], quarters[1]);
  const __m512i b = _mm512_unpackhi_epi32(quarters[0], quarters[1]);
  const __m512i c = _mm512_unpacklo_epi32(quarters[2], quarters[3]);
  const __m512i d = _mm512_unpackhi_epi32(quarters[2], quarters[3]);
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

template <Form F>
constexpr int kPlanes = F == Form::kNf4 ? 2 : 1;

inline __m512i looked_up(const Nf4Table& table, __m512i codes) {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(table.bytes));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), codes);
}

template <Form F>
void unpack_group(const uint8_t* const* rows, int64_t group, Ints* to) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512i halves[2][4];  // numbers 0-15 and 16-31 of the group
  for (int k = 0; k < 4; ++k) {
    if constexpr (F == Form::kInt8) {
      halves[0][k] = lanes_of(rows, k, group * 32);
      halves[1][k] = lanes_of(rows, k, group * 32 + 16);
    } else {
      const __m512i packed = lanes_of(rows, k, group * 16);
      const __m512i low = _mm512_and_si512(packed, low_nibbles);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles);
      const __m512i even = F == Form::kInt4 ? low : high, odd = F == Form::kInt4 ? high : low;
      halves[0][k] = _mm512_unpacklo_epi8(even, odd);
      halves[1][k] = _mm512_unpackhi_epi8(even, odd);
    }
  }
  for (const auto& half : halves) {
    if constexpr (F == Form::kNf4) {
      __m512i upper[4], lower[4];
      for (int k = 0; k < 4; ++k) {
        upper[k] = looked_up(kNf4Upper, half[k]);
        lower[k] = looked_up(kNf4Lower, half[k]);
      }
      transpose(upper, to);
      transpose(lower, to + 8);
    } else {
      transpose(half, to);
    }
    to += 4;
  }
}

template <Form F>
void unpack(const QuantizedProduct& p, int64_t row, int64_t last, Panel& panel) {
  const int64_t groups = p.in / kQuantGroup, stored = p.in / p.group, share = p.group / kQuantGroup;
  const uint8_t* rows[kRows];
  const uint8_t* scales[kRows];
  for (int r = 0; r < kRows; ++r) {  // beyond the last row: that one again, not stored in the end
    const int64_t at = std::min(row + r, last - 1);
    rows[r] = p.weights + at * p.row_bytes;
    scales[r] = p.scales + at * stored * scale_bytes(F);
  }
  panel.weights.resize(p.in / 4 * kPlanes<F>);
  panel.scales.resize(groups);
  for (int64_t g = 0; g < groups; ++g) {
    unpack_group<F>(rows, g, panel.weights.data() + 8 * kPlanes<F> * g);
    if (g % share != 0) {
      panel.scales[g] = panel.scales[g - 1];
      continue;
    }
    alignas(64) float values[kRows];
    for (int r = 0; r < kRows; ++r) {
      if constexpr (F == Form::kNf4)
        std::memcpy(values + r, scales[r] + g / share * 4, 4);
      else
        values[r] = from_bf16(reinterpret_cast<const uint16_t*>(scales[r])[g / share]);
    }
    panel.scales[g].v = reinterpret_cast<const Floats&>(values);
  }
}

inline Lanes add_products(Lanes sum, __m512i weights, Lanes activations) {
  return reinterpret_cast<Lanes>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), weights, reinterpret_cast<__m512i>(activations)));
}

// Adds 32 in-features of T tokens to dots. `x` is the first token's block, `part` the 32 of it.
template <int P, int T>
inline void add_group(const Ints* const (&weights)[P], const PlainBlock* x, int64_t stride, int64_t part,
                      Lanes (&dots)[P][T]) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      int32_t four;
      std::memcpy(&four, x[t * stride].q + part * kQuantGroup + 4 * j, sizeof(four));
      const auto everywhere = reinterpret_cast<Lanes>(_mm512_set1_epi32(four));
#pragma GCC unroll 2
      for (int k = 0; k < P; ++k) dots[k][t] = add_products(dots[k][t], weights[k][j].v, everywhere);
    }
  }
}

// T tokens from `token` on with P panels, whose rows are `row` and after, up to `last`.
template <Form F, int P, int T>
void multiply(const QuantizedProduct& p, const Panel* panels, int64_t token, int64_t row, int64_t last) {
  Floats sums[P][T] = {};
  const Ints* weights[P];
  for (int k = 0; k < P; ++k) weights[k] = panels[k].weights.data();
  const int64_t groups = p.in / kQuantGroup, blocks = p.blocks;
  for (int64_t g = 0; g < groups; ++g) {
    const PlainBlock* x = p.plain + token * blocks + g / 4;
    const int64_t part = g % 4;
    Lanes dots[P][T] = {};
    if constexpr (F == Form::kNf4) {
      add_group<P, T>(weights, x, blocks, part, dots);
      for (int k = 0; k < P; ++k) weights[k] += 8;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int k = 0; k < P; ++k)
        dots[k][t] = (F == Form::kNf4 ? dots[k][t] << 7 : dots[k][t]) + x[t * blocks].correction[part];
    add_group<P, T>(weights, x, blocks, part, dots);
    for (int k = 0; k < P; ++k) weights[k] += 8;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int k = 0; k < P; ++k) {
        const auto scale = reinterpret_cast<__m512>(panels[k].scales[g].v * x[t * blocks].scale[part]);
        const auto dot = reinterpret_cast<__m512>(__builtin_convertvector(dots[k][t], Floats));
        sums[k][t] = reinterpret_cast<Floats>(_mm512_fmadd_ps(dot, scale, reinterpret_cast<__m512>(sums[k][t])));
      }
  }
  for (int k = 0; k < P; ++k, row += kRows) {
    const auto present = static_cast<__mmask16>((1u << std::min<int64_t>(kRows, last - row)) - 1);
    for (int t = 0; t < T; ++t)
      _mm512_mask_storeu_ps(p.y + (token + t) * p.out + row, present, reinterpret_cast<__m512>(sums[k][t]));
  }
}

// The last tokens, fewer than kTokens, at once: T of them or fewer.
template <Form F, int P, int T>
void multiply_rest(const QuantizedProduct& p, const Panel* panels, int64_t token, int64_t row, int64_t last) {
  if constexpr (T > 0) {
    if (p.tokens - token == T)
      multiply<F, P, T>(p, panels, token, row, last);
    else
      multiply_rest<F, P, T - 1>(p, panels, token, row, last);
  }
}

template <Form F, int P>
void multiply_all(const QuantizedProduct& p, Panel* panels, int64_t row, int64_t last) {
  for (int k = 0; k < P; ++k) unpack<F>(p, row + k * kRows, last, panels[k]);
  int64_t t = 0;
  for (; t + kTokens <= p.tokens; t += kTokens) multiply<F, P, kTokens>(p, panels, t, row, last);
  multiply_rest<F, P, kTokens - 1>(p, panels, t, row, last);
}

template <Form F>
void gemm(const QuantizedProduct& p, int64_t first, int64_t last) {
  thread_local Panel panels[kPanels];  // unpacked, as large as the widest matrix so far
  int64_t row = first;
  for (; row + kRows < last; row += kPanels * kRows) multiply_all<F, kPanels>(p, panels, row, last);
  if (row < last) multiply_all<F, 1>(p, panels, row, last);
}

}  // namespace

void gemm_avx512(const QuantizedProduct& p, int64_t first, int64_t last) {
  switch (p.form) {
    case Form::kInt4: return gemm<Form::kInt4>(p, first, last);
    case Form::kInt8: return gemm<Form::kInt8>(p, first, last);
    default: return gemm<Form::kNf4>(p, first, last);
  }
}

}  // namespace localmoe
