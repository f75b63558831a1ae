#include "experts.h"

#include <algorithm>
#include <utility>

#include "vector_ops.h"

namespace localmoe {

namespace {

// Tokens of a long pass for which an expert's weights are not worth being unpacked into panels.
constexpr int64_t kFewForAnExpert = 4;

// Rows of the down projections taken at a time: many make long streams, but every thread should get some.
int64_t result_rows_for(int64_t width, int threads) {
  return std::clamp<int64_t>(width / (4 * threads) / 64 * 64, 64, 256);
}

}  // namespace

ExpertWorkspace::Job& ExpertWorkspace::job(size_t index) {
  if (index == jobs_.size()) jobs_.emplace_back();
  return jobs_[index];
}

// Experts in ascending order, the shared one last: a token's sum has the same order whatever else is in the batch.
void ExpertWorkspace::plan(const std::vector<std::optional<Mlp>>& routed, const Mlp* shared, const Routing& routing,
                           int64_t tokens) {
  by_expert_.resize(std::max(by_expert_.size(), routed.size()));
  for (auto& slots : by_expert_) slots.clear();
  for (int64_t i = 0; i < tokens * routing.k; ++i)
    if (routing.ids[i] != kElsewhere) by_expert_[routing.ids[i]].push_back(static_cast<int32_t>(i));
  used_ = 0;
  const auto add = [&](const Mlp& mlp) -> Job& {
    Job& added = job(used_++);
    added.mlp = &mlp;
    added.tokens.clear();
    added.weights.clear();
    return added;
  };
  for (size_t expert = 0; expert < routed.size(); ++expert) {
    if (by_expert_[expert].empty()) continue;
    Job& added = add(*routed[expert]);
    for (const int32_t slot : by_expert_[expert]) {
      added.tokens.push_back(static_cast<int32_t>(slot / routing.k));
      added.weights.push_back(routing.weights[slot]);
    }
  }
  if (shared == nullptr) return;
  Job& added = add(*shared);
  for (int64_t t = 0; t < tokens; ++t) {
    added.tokens.push_back(static_cast<int32_t>(t));
    added.weights.push_back(1.0f);
  }
}

// As planned, or, where bytes are asked for, those in memory first, the shared expert among them: the others arrive
// meanwhile. Sums are made in the order of the plan all the same.
void ExpertWorkspace::order() {
  mlps_.clear();
  order_.resize(used_);
  for (size_t i = 0; i < used_; ++i) order_[i] = i;
  if (!arrivals_.on()) return;
  for (size_t i = 0; i < used_; ++i) mlps_.push_back(jobs_[i].mlp);
  order_ = arrivals_.begin(mlps_);
}

void ExpertWorkspace::prepare(const Tier& tier, int64_t tokens) {
  for (auto& inputs : inputs_) inputs.resize(kForms);
  std::array<std::array<bool, kForms>, 2> wanted{};
  items_.clear();
  for (size_t place = 0; place < used_; ++place) {
    Job& job = jobs_[order_[place]];
    job.place = place;
    const auto count = static_cast<int64_t>(job.tokens.size());
    const Matrix& gate = job.mlp->gate;
    const bool many = tokens > kMatvecTokens && count > kFewForAnExpert;
    const auto form = static_cast<size_t>(gate.form);
    Operand& rounded = inputs_[many][form];
    if (!std::exchange(wanted[many][form], true)) rounded.shape(tier, gate.form, tokens, gate.in, many);
    job.rounded = &rounded;
    job.input = count == tokens ? &rounded : &job.gathered;  // its tokens are all of them, in order
    if (count != tokens) job.gathered.shape(tier, gate.form, count, gate.in, many);
    job.inner.shape(tier, job.mlp->down.form, count, gate.out, many);
    job.missing.store(job.inner.blocks(), std::memory_order_relaxed);
    for (int64_t block = 0; block < job.inner.blocks(); ++block) items_.push_back({&job, block});
  }
  wanted_.clear();
  for (size_t many = 0; many < 2; ++many)
    for (size_t form = 0; form < kForms; ++form)
      if (wanted[many][form]) wanted_.push_back(&inputs_[many][form]);
}

void ExpertWorkspace::inner_rows(const Tier& tier, int64_t item, int threads, std::vector<float>& scratch) {
  Job& job = *items_[item].job;
  const Mlp& mlp = *job.mlp;
  const int64_t block = items_[item].block;
  if (arrivals_.on()) arrivals_.reached(job.place);
  // The threads take items in turn, so this one's next is probably so many further on
  const auto after = static_cast<size_t>(item + threads);
  const Place next = after < items_.size() ? items_[after].job->mlp->gate.row(items_[after].block * kBlock)
                                           : jobs_.front().mlp->down.row(0);
  const int64_t first = block * kBlock, last = std::min(first + kBlock, mlp.gate.out), rows = last - first;
  const auto tokens = static_cast<int64_t>(job.tokens.size());
  scratch.resize(std::max<size_t>(scratch.size(), 2 * tokens * rows));
  float* gate = scratch.data();
  float* up = gate + tokens * rows;
  job.input->multiply(tier, mlp.gate, first, last, gate, rows, mlp.up.row(first));
  job.input->multiply(tier, mlp.up, first, last, up, rows, next);
  vector_ops(tier).silu_multiply(gate, up, tokens * rows);
  for (int64_t t = 0; t < tokens; ++t) job.inner.set_block(t, block, gate + t * rows);
  if (job.missing.fetch_sub(1, std::memory_order_acq_rel) == 1) job.missing.notify_all();
}

void ExpertWorkspace::result_rows(const Tier& tier, int64_t first, int64_t last, int64_t tokens, float* result,
                                  int threads, std::vector<float>& scratch) {
  const int64_t rows = last - first;
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(result + t * hidden_ + first, rows, 0.0f);
  for (size_t i = 0; i < used_; ++i) {
    Job& job = jobs_[i];
    const auto count = static_cast<int64_t>(job.tokens.size());
    // Every inner item was taken before the first of these, so its thread is at work on it
    wait_for_zero(job.missing);
    scratch.resize(std::max<size_t>(scratch.size(), count * rows));
    const Place next = i + 1 < used_ ? jobs_[i + 1].mlp->down.row(first)
                                     : jobs_.front().mlp->down.row(first + rows * threads);
    job.inner.multiply(tier, job.mlp->down, first, last, scratch.data(), rows, next);
    for (int64_t j = 0; j < count; ++j) {
      float* to = result + job.tokens[j] * hidden_ + first;
      const float* from = scratch.data() + j * rows;
      for (int64_t r = 0; r < rows; ++r) to[r] += job.weights[j] * from[r];
    }
  }
}

void ExpertWorkspace::forward(const Tier& tier, ThreadPool& pool, const std::vector<std::optional<Mlp>>& routed,
                              const Mlp* shared, const Routing& routing, const float* hidden, int64_t tokens,
                              int64_t width, float* result) {
  hidden_ = width;
  plan(routed, shared, routing, tokens);
  order();
  prepare(tier, tokens);
  scratch_.resize(pool.threads());
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  const auto inner_items = static_cast<int64_t>(items_.size());
  rounding_.reset(tokens * blocks, 4);
  gathering_.reset(static_cast<int64_t>(used_), 1);
  inner_.reset(inner_items, 1);
  result_.reset(width, result_rows_for(width, pool.threads()));
  pool.run([&](int thread) {
    rounding_.take([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (Operand* input : wanted_) input->set(i / blocks, i % blocks, hidden + i / blocks * width);
    });
    pool.barrier();
    if (tokens > 1) {
      gathering_.take([&](int64_t first, int64_t) { gather(jobs_[first]); });
      pool.barrier();
    }
    std::vector<float>& scratch = scratch_[thread];
    inner_.take([&](int64_t first, int64_t) { inner_rows(tier, first, pool.threads(), scratch); });
    result_.take([&](int64_t first, int64_t last) {
      result_rows(tier, first, last, tokens, result, pool.threads(), scratch);
    });
  });
}

void ExpertWorkspace::gather(Job& job) {
  if (job.input != &job.gathered) return;
  for (size_t j = 0; j < job.tokens.size(); ++j)
    job.gathered.copy(static_cast<int64_t>(j), *job.rounded, job.tokens[j]);
}

}  // namespace localmoe
