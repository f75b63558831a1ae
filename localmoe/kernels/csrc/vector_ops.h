// What a layer needs besides matrix products with rounded activations, a set a tier. All in float32.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace localmoe {

constexpr int64_t kContextChunk = 256;  // cached tokens attended to at a time, whatever the number of threads

constexpr int64_t kHeadBlock = 16;  // heads that attend together: enough to read a latent once for many

// kInt8 is 128 + int8 for the latent, bf16 for the rotated key, then the latent's float32 scale.
enum class CacheForm { kFloat32, kBfloat16, kInt8 };

// One layer's latent cache: rows of latent (rank numbers), then rotated key.
struct LatentRows {
  CacheForm form;
  void* data;
  int64_t width, rank;

  int64_t row_bytes() const {
    switch (form) {
      case CacheForm::kFloat32: return width * 4;
      case CacheForm::kBfloat16: return width * 2;
      default: return rank + (width - rank) * 2 + 4;
    }
  }
};

// What attention over some cached tokens leaves, a head: the largest score, the sum of exp(score - largest), and that
// sum with each term times its token's latent. Over none: minus infinity, 0 and 0.
struct Partial {
  float* largest;  // [heads]
  float* sum;      // [heads]
  float* latent;   // [heads, rank]
};

// Cached tokens [first, last), at most kContextChunk, that a thread attends to now. It has begun at `begin` and goes on
// until `end`: what comes next is brought near meanwhile.
struct Chunk {
  int64_t first, last, begin, end;
};

struct VectorOps {
  const char* tier;

  // Rounds at most 128 activations to int8; what lies beyond n is zero.
  void (*round_block)(const float* x, int64_t n, Form form, Block& block);
  void (*round_plain_block)(const float* x, int64_t n, Form form, PlainBlock& block);

  // y[r] = sum over i of x[i] * W[row + i][r], for `count` rows: a query through k_b into the latents' space.
  void (*combine_rows)(const Matrix& matrix, int64_t row, int64_t count, const float* x, float* y);

  // y[i] = sum over r of W[row + i][r] * x[r], for `count` rows: an attended latent through v_b.
  void (*dot_rows)(const Matrix& matrix, int64_t row, int64_t count, const float* x, float* y);

  // Writes one row of the cache, rounded to nearest.
  void (*store_row)(const LatentRows& rows, int64_t index, const float* x);

  // At most kHeadBlock queries [heads, width] as `attend` takes them for such rows: kHeadBlock * width numbers.
  void (*interleave)(const LatentRows& rows, const float* queries, int64_t heads, float* to);

  // Attention of one token's `heads` queries, scaled and interleaved, to a chunk of its context, added to what `partial`
  // has of others (log-sum-exp, as in FlashDecoding). The heads are blocks that were interleaved one behind the other,
  // only the last of which may have fewer than kHeadBlock. `scratch` has attend_scratch numbers, and both it and the
  // queries begin a cache line.
  void (*attend)(const LatentRows& rows, const Chunk& chunk, const float* queries, int64_t heads,
                 const Partial& partial, float* scratch);

  // What attention over both parts leaves, to the first.
  void (*add_partial)(const Partial& to, const Partial& more, int64_t heads, int64_t rank);

  // gate[i] = silu(gate[i]) * up[i].
  void (*silu_multiply)(float* gate, const float* up, int64_t n);

  // Reads [first, last), whole cache lines, as fast as it can; the result is of no use but to have been made.
  uint32_t (*read)(const uint8_t* first, const uint8_t* last);
};

constexpr int64_t kTileRows = 16;  // cached rows widened at a time

// Scores of whole blocks of heads, a tile of rows (in 16-bit integers whole spans of 64), and a chunk's latents in 16
// bits.
inline int64_t attend_scratch(int64_t width, int64_t heads) {
  return (heads + width / 2) * kContextChunk + kTileRows * (width + 64);
}

// Those of the tier of this name; avxvnni has avx2's.
const VectorOps& vector_ops(const Tier& tier);

extern const VectorOps kPortableOps;
#ifdef LOCALMOE_X86
extern const VectorOps kAvx2Ops, kAvx512Ops;
#endif

}  // namespace localmoe
