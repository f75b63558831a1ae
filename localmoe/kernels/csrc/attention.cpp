#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "layer.h"

namespace localmoe {

namespace {

// Pairs (x[2i], x[2i + 1]) times complex rotations.
void rotate(const float* x, const float* rotations, int64_t width, float factor, float* y) {
  for (int64_t i = 0; i < width; i += 2) {
    const float c = rotations[i], s = rotations[i + 1], a = factor * x[i], b = factor * x[i + 1];
    y[i] = a * c - b * s;
    y[i + 1] = a * s + b * c;
  }
}

template <typename Floats>
void grow(Floats& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
}

constexpr int64_t kShares = 32;    // of a context, at most: enough for every thread, and little to merge
constexpr int64_t kTakenEach = 4;  // times that a thread takes some of them: so many that the threads end together
constexpr int64_t kMostTogether = 4;  // blocks of heads for which a row is widened once: more leave the second cache

// How a token that attends to `context` tokens divides them: by nothing else, so that batches and threads change no bit.
struct Division {
  int64_t chunks_a_share, shares;

  explicit Division(int64_t context) {
    const int64_t chunks = (context + kContextChunk - 1) / kContextChunk;
    chunks_a_share = (chunks + kShares - 1) / kShares;
    shares = (chunks + chunks_a_share - 1) / chunks_a_share;
  }
};

}  // namespace

void AttentionWorkspace::Step::prepare(const Tier& tier, const Matrix& matrix, int64_t tokens, int threads) {
  operand.shape(tier, matrix.form, tokens, matrix.in, false);
  rounding.reset(tokens * operand.blocks(), 4);
  threads_ = threads;
  rows.reset(matrix.out, rows_at_a_time(matrix, threads));
}

void AttentionWorkspace::Step::round(const float* x, int64_t stride) {
  const int64_t blocks = operand.blocks();
  rounding.take([&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) operand.set(i / blocks, i % blocks, x + i / blocks * stride);
  });
}

void AttentionWorkspace::Step::multiply(const Tier& tier, const Matrix& matrix, float* y, const Matrix& then) {
  rows.take([&](int64_t first, int64_t last) {
    const Place next = last < matrix.out ? matrix.row(last + (threads_ - 1) * (last - first)) : then.row(0);
    operand.multiply(tier, matrix, first, last, y + first, matrix.out, next);
  });
}

void AttentionWorkspace::prepare(const Tier& tier, const MlaLayer& layer, int64_t start, int64_t tokens, int threads) {
  tokens_ = tokens;
  shares_ = 0;
  for (int64_t t = 0; t < tokens; ++t) shares_ = std::max(shares_, Division(start + t + 1).shares);
  head_blocks_ = (layer.heads + kHeadBlock - 1) / kHeadBlock;
  if (layer.query_down) {
    query_down_.prepare(tier, *layer.query_down, tokens, threads);
    grow(low_, tokens * layer.query_down->out);
  }
  query_.prepare(tier, layer.query, tokens, threads);
  latent_.prepare(tier, layer.latent, tokens, threads);
  output_.prepare(tier, layer.output, tokens, threads);
  absorbing_.reset(layer.heads + 1, 1);  // all tokens of a head: its rows of the matrix are read once
  const int64_t takes = kTakenEach * threads;
  together_ = std::clamp<int64_t>(tokens * shares_ * head_blocks_ / takes, 1, std::min(kMostTogether, head_blocks_));
  groups_ = (head_blocks_ + together_ - 1) / together_;
  const int64_t items = tokens * shares_ * groups_;
  interleaving_.reset(tokens * head_blocks_, 1);
  shares_left_.reset(items, std::max<int64_t>(1, items / takes));
  merging_.reset(layer.heads, 1);
  const int64_t width = layer.rank + layer.rope, partials = tokens * shares_ * layer.heads;
  grow(queries_, tokens * layer.query.out);
  grow(rows_, tokens * width);
  grow(absorbed_, tokens * layer.heads * width);
  grow(largest_, partials);
  grow(sums_, partials);
  grow(attended_, partials * layer.rank);
  grow(outputs_, tokens * layer.heads * layer.value);
  scratch_.resize(threads);
  for (std::vector<float>& scratch : scratch_) grow(scratch, layer.rank);
  grow(interleaved_, tokens * head_blocks_ * kHeadBlock * width);
  attending_.resize(threads);
  for (AlignedFloats& scratch : attending_) grow(scratch, attend_scratch(width, together_ * kHeadBlock));
}

// The query, by one matrix or two, and the tokens' rows of the cache before their norm.
void AttentionWorkspace::project(const Tier& tier, ThreadPool& pool, const MlaLayer& layer, const float* x,
                                 int thread) {
  Step& first = layer.query_down ? query_down_ : query_;
  first.round(x, layer.latent.in);
  latent_.round(x, layer.latent.in);
  pool.barrier();
  if (layer.query_down)
    query_down_.multiply(tier, *layer.query_down, low_.data(), layer.latent);
  else
    query_.multiply(tier, layer.query, queries_.data(), layer.latent);
  latent_.multiply(tier, layer.latent, rows_.data(), layer.expand);
  pool.barrier();
  if (!layer.query_down) return;
  const int64_t rank = layer.query_down->out;
  for (int64_t t = thread; t < tokens_; t += pool.threads()) {
    float* low = low_.data() + t * rank;
    rms_norm(low, layer.query_norm, layer.epsilon, low);
  }
  pool.barrier();
  query_.round(low_.data(), rank);
  pool.barrier();
  query_.multiply(tier, layer.query, queries_.data(), layer.latent);
  pool.barrier();
}

void AttentionWorkspace::remember(const VectorOps& ops, const MlaLayer& layer, const LatentRows& cache, int64_t start,
                                  const float* rotations) {
  for (int64_t t = 0; t < tokens_; ++t) {
    float* row = rows_.data() + t * cache.width;
    rms_norm(row, layer.latent_norm, layer.epsilon, row);
    rotate(row + layer.rank, rotations + t * layer.rope, layer.rope, 1.0f, row + layer.rank);
    ops.store_row(cache, start + t, row);
  }
}

void AttentionWorkspace::absorb(const VectorOps& ops, const MlaLayer& layer, int64_t token, int64_t head,
                                const float* rotations) {
  float* query = queries_.data() + (token * layer.heads + head) * (layer.nope + layer.rope);
  float* absorbed = absorbed_.data() + (token * layer.heads + head) * (layer.rank + layer.rope);
  for (int64_t i = 0; i < layer.nope; ++i) query[i] *= layer.scale;
  ops.combine_rows(layer.expand, head * (layer.nope + layer.value), layer.nope, query, absorbed);
  rotate(query + layer.nope, rotations + token * layer.rope, layer.rope, layer.scale, absorbed + layer.rank);
}

Partial AttentionWorkspace::partial(const MlaLayer& layer, int64_t token, int64_t share, int64_t head) {
  const int64_t at = (token * shares_ + share) * layer.heads + head;
  return {largest_.data() + at, sums_.data() + at, attended_.data() + at * layer.rank};
}

// A block of a token's queries as `attend` takes them; all have theirs before any attends.
void AttentionWorkspace::interleave(const VectorOps& ops, const MlaLayer& layer, const LatentRows& cache, int64_t item) {
  const int64_t token = item / head_blocks_, head = item % head_blocks_ * kHeadBlock;
  ops.interleave(cache, absorbed_.data() + (token * layer.heads + head) * cache.width,
                 std::min(kHeadBlock, layer.heads - head), interleaved_.data() + item * kHeadBlock * cache.width);
}

// Items [item, end): shares of a token's context, then those of its next blocks of heads, then of the next token.
void AttentionWorkspace::attend(const VectorOps& ops, const MlaLayer& layer, const LatentRows& cache, int64_t start,
                                int64_t item, int64_t end, float* scratch) {
  for (int64_t begin = -1; item < end; ++item) {
    const int64_t share = item % shares_, block = item / shares_ % groups_ * together_;
    const int64_t token = item / shares_ / groups_, context = start + token + 1;
    const int64_t length = Division(context).chunks_a_share * kContextChunk, first = share * length;
    if (first >= context) continue;  // an earlier token of the pass, whose context has fewer shares
    if (begin < 0 || share == 0) begin = first;
    const int64_t next_shares = std::min(end - item, shares_ - share);
    const int64_t head = block * kHeadBlock, heads = std::min(together_ * kHeadBlock, layer.heads - head);
    const Partial to = partial(layer, token, share, head);
    std::fill_n(to.largest, heads, -std::numeric_limits<float>::infinity());
    std::fill_n(to.sum, heads, 0.0f);
    std::fill_n(to.latent, heads * layer.rank, 0.0f);
    const float* queries = interleaved_.data() + (token * head_blocks_ + block) * kHeadBlock * cache.width;
    for (int64_t from = first; from < std::min(first + length, context); from += kContextChunk) {
      const Chunk chunk{from, std::min(from + kContextChunk, context), begin,
                        std::min(first + next_shares * length, context)};
      ops.attend(cache, chunk, queries, heads, to, scratch);
    }
  }
}

// The shares' parts in their order, then v_b.
void AttentionWorkspace::merge(const VectorOps& ops, const MlaLayer& layer, int64_t start, int64_t token,
                               int64_t head, float* scratch) {
  const Partial whole = partial(layer, token, 0, head);
  for (int64_t share = 1; share < Division(start + token + 1).shares; ++share)
    ops.add_partial(whole, partial(layer, token, share, head), 1, layer.rank);
  for (int64_t r = 0; r < layer.rank; ++r) scratch[r] = whole.latent[r] / *whole.sum;
  ops.dot_rows(layer.expand, head * (layer.nope + layer.value) + layer.nope, layer.value, scratch,
               outputs_.data() + (token * layer.heads + head) * layer.value);
}

void AttentionWorkspace::forward(const Tier& tier, ThreadPool& pool, const MlaLayer& layer, const LatentRows& cache,
                                 int64_t start, const float* x, const float* rotations, int64_t tokens,
                                 float* result) {
  const VectorOps& ops = vector_ops(tier);
  prepare(tier, layer, start, tokens, pool.threads());
  pool.run([&](int thread) {
    float* scratch = scratch_[thread].data();
    project(tier, pool, layer, x, thread);
    absorbing_.take([&](int64_t item, int64_t) {
      if (item == 0) return remember(ops, layer, cache, start, rotations);
      for (int64_t t = 0; t < tokens; ++t) absorb(ops, layer, t, item - 1, rotations);
    });
    pool.barrier();
    interleaving_.take([&](int64_t item, int64_t) { interleave(ops, layer, cache, item); });
    pool.barrier();
    shares_left_.take([&](int64_t item, int64_t end) {
      attend(ops, layer, cache, start, item, end, attending_[thread].data());
    });
    pool.barrier();
    merging_.take([&](int64_t head, int64_t) {
      for (int64_t t = 0; t < tokens; ++t) merge(ops, layer, start, t, head, scratch);
    });
    pool.barrier();
    output_.round(outputs_.data(), layer.output.in);
    pool.barrier();
    output_.multiply(tier, layer.output, result, layer.output);
  });
}

}  // namespace localmoe
