// Absorbed multi-head latent attention of a few tokens in one call (model/mla.py has the maths).
#pragma once

#include <cstdint>
#include <new>
#include <optional>
#include <vector>

#include "matrix.h"
#include "thread_pool.h"
#include "vector_ops.h"

namespace localmoe {

// Memory that begins a cache line.
template <typename T>
struct FromCacheLine {
  using value_type = T;
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const FromCacheLine&) const = default;
  static constexpr std::align_val_t kLine{64};
};
using AlignedFloats = std::vector<float, FromCacheLine<float>>;

// One layer's weights and dimensions. Without `query_down` the query is made in one step.
struct MlaLayer {
  std::optional<Matrix> query_down;  // q_a_proj
  Matrix query;                      // q_proj or q_b_proj
  Matrix latent;                     // kv_a_proj_with_mqa
  Matrix expand;                     // kv_b_proj: heads * (nope + value) rows
  Matrix output;                     // o_proj
  std::vector<float> query_norm, latent_norm;
  int64_t heads, nope, rope, value, rank;
  float scale, epsilon;
};

// The memory of such calls, kept from one to the next.
class AttentionWorkspace {
 public:
  // result[t] = attention output of x[t], [tokens, hidden] both. The tokens' own rows are written to the cache at
  // `start` and after; a token attends to everything before it and itself. rotations: complex, [tokens, rope / 2].
  void forward(const Tier& tier, ThreadPool& pool, const MlaLayer& layer, const LatentRows& cache, int64_t start,
               const float* x, const float* rotations, int64_t tokens, float* result);

 private:
  // Consecutive rounded activations for one matrix, then its product: two phases of a body.
  struct Step {
    Operand operand;
    Chunks rounding, rows;
    int threads_ = 1;
    void prepare(const Tier& tier, const Matrix& matrix, int64_t tokens, int threads);
    void round(const float* x, int64_t stride);
    void multiply(const Tier& tier, const Matrix& matrix, float* y, const Matrix& then);
  };

  void prepare(const Tier& tier, const MlaLayer& layer, int64_t start, int64_t tokens, int threads);
  void project(const Tier& tier, ThreadPool& pool, const MlaLayer& layer, const float* x, int thread);
  void remember(const VectorOps& ops, const MlaLayer& layer, const LatentRows& cache, int64_t start,
                const float* rotations);
  void absorb(const VectorOps& ops, const MlaLayer& layer, int64_t token, int64_t head, const float* rotations);
  void interleave(const VectorOps& ops, const MlaLayer& layer, const LatentRows& cache, int64_t item);
  void attend(const VectorOps& ops, const MlaLayer& layer, const LatentRows& cache, int64_t start, int64_t item,
              int64_t end, float* scratch);
  void merge(const VectorOps& ops, const MlaLayer& layer, int64_t start, int64_t token, int64_t head, float* scratch);
  Partial partial(const MlaLayer& layer, int64_t token, int64_t share, int64_t head);

  Step query_down_, query_, latent_, output_;
  Chunks absorbing_, interleaving_, shares_left_, merging_;
  int64_t tokens_ = 0, shares_ = 0, head_blocks_ = 0;
  int64_t together_ = 1, groups_ = 0;  // blocks of heads that attend at the same time, and how often that many
  std::vector<float> low_, queries_, rows_, absorbed_, largest_, sums_, attended_, outputs_;
  AlignedFloats interleaved_;                // [tokens, blocks of heads, kHeadBlock, width]
  std::vector<std::vector<float>> scratch_;  // by thread, as is the next
  std::vector<AlignedFloats> attending_;
};

}  // namespace localmoe
