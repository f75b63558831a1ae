// One MoE layer's experts in one call: router output in, weighted sum out.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "arrival.h"
#include "matrix.h"
#include "thread_pool.h"

namespace localmoe {

// A SwiGLU expert: down(silu(gate x) * up x). Gate and up have one form and shape.
struct Mlp {
  Matrix gate, up, down;
};

constexpr int64_t kElsewhere = -1;  // instead of an id: somebody else computes that expert

// Which experts a token goes to: [tokens, k]. The ids of a token are distinct, those that are here.
struct Routing {
  const int64_t* ids;
  const float* weights;
  int64_t k;
};

// The memory of such calls, kept from one to the next.
class ExpertWorkspace {
 public:
  // result[t] = sum over t's experts, in ascending order, of weight * expert(hidden[t]), then `shared`'s output:
  // [tokens, width] both. `shared` may be missing, and so may the routed experts (k = 0): then it is a plain MLP.
  void forward(const Tier& tier, ThreadPool& pool, const std::vector<std::optional<Mlp>>& routed, const Mlp* shared,
               const Routing& routing, const float* hidden, int64_t tokens, int64_t width, float* result);

  // How bytes are asked for that are not in memory.
  Arrivals& arrivals() { return arrivals_; }

 private:
  // One expert and the tokens that go to it.
  struct Job {
    const Mlp* mlp = nullptr;
    std::vector<int32_t> tokens;
    std::vector<float> weights;
    const Operand* rounded = nullptr;  // all tokens' activations
    Operand gathered;                  // its tokens', where they are not all
    const Operand* input = nullptr;    // one of the two
    Operand inner;                     // silu(gate) * up
    size_t place = 0;                  // in the order that the inner products are computed in
    std::atomic<int64_t> missing{0};   // blocks of `inner`; the down projection waits for the last
  };
  struct InnerItem {
    Job* job;
    int64_t block;
  };

  void plan(const std::vector<std::optional<Mlp>>& routed, const Mlp* shared, const Routing& routing, int64_t tokens);
  void prepare(const Tier& tier, int64_t tokens);
  void gather(Job& job);
  void inner_rows(const Tier& tier, int64_t item, int threads, std::vector<float>& scratch);
  void result_rows(const Tier& tier, int64_t first, int64_t last, int64_t tokens, float* result, int threads,
                   std::vector<float>& scratch);
  Job& job(size_t index);
  void order();

  std::deque<Job> jobs_;  // the first `used_` are this call's
  size_t used_ = 0;
  std::vector<std::vector<int32_t>> by_expert_;
  std::array<std::vector<Operand>, 2> inputs_;  // the activations, for few and for many tokens, by form of matrix
  std::vector<Operand*> wanted_;    // those of this call
  std::vector<InnerItem> items_;
  std::vector<size_t> order_;       // of the jobs' inner products
  std::vector<const Mlp*> mlps_;    // the jobs', where bytes are asked for
  Arrivals arrivals_;
  std::vector<std::vector<float>> scratch_;  // by thread
  Chunks rounding_, gathering_, inner_, result_;
  int64_t hidden_ = 0;
};

}  // namespace localmoe
