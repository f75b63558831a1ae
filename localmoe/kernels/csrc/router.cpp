#include "router.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace localmoe {

namespace {

void scores_of(const RouterRule& rule, const float* logits, std::vector<float>& scores) {
  const auto count = static_cast<int64_t>(scores.size());
  if (rule.sigmoid) {
    for (int64_t e = 0; e < count; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  const float largest = *std::max_element(logits, logits + count);
  float sum = 0.0f;
  for (int64_t e = 0; e < count; ++e) sum += scores[e] = std::exp(logits[e] - largest);
  for (float& score : scores) score /= sum;
}

// The indices of the largest `count` values, in descending order.
void best_of(const std::vector<float>& values, int64_t count, std::vector<int64_t>& order) {
  order.resize(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int64_t a, int64_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
}

void leave_out_groups(const RouterRule& rule, std::vector<float>& choice, std::vector<int64_t>& order) {
  const int64_t size = static_cast<int64_t>(choice.size()) / rule.groups, best = std::min(rule.best, size);
  std::vector<float> counts(rule.groups), members(size);
  for (int64_t g = 0; g < rule.groups; ++g) {
    std::copy_n(choice.begin() + g * size, size, members.begin());
    std::partial_sort(members.begin(), members.begin() + best, members.end(), std::greater<>());
    counts[g] = std::accumulate(members.begin(), members.begin() + best, 0.0f);
  }
  best_of(counts, rule.groups, order);
  for (int64_t i = rule.kept; i < rule.groups; ++i)
    std::fill_n(choice.begin() + order[i] * size, size, rule.outside);
}

}  // namespace

void route(const RouterRule& rule, const float* logits, int64_t tokens, int64_t experts, int64_t* ids, float* weights) {
  std::vector<float> scores(experts), choice(experts);
  std::vector<int64_t> order;
  for (int64_t t = 0; t < tokens; ++t, logits += experts, ids += rule.k, weights += rule.k) {
    scores_of(rule, logits, scores);
    choice = scores;
    for (size_t e = 0; e < rule.bias.size(); ++e) choice[e] += rule.bias[e];
    if (rule.kept < rule.groups) leave_out_groups(rule, choice, order);
    best_of(choice, rule.k, order);
    float sum = 0.0f;
    for (int64_t i = 0; i < rule.k; ++i) {
      ids[i] = order[i];
      // With a bias the weight is the score alone; without one an expert outside its groups weighs what it was given
      weights[i] = rule.bias.empty() ? choice[order[i]] : scores[order[i]];
      sum += weights[i];
    }
    const float factor = rule.normalised ? rule.factor / (sum + 1e-20f) : rule.factor;
    for (int64_t i = 0; i < rule.k; ++i) weights[i] *= factor;
  }
}

}  // namespace localmoe
