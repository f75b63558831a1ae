// Which experts a token goes to, from its router logits (model/moe.py has the maths and the sources).
#pragma once

#include <cstdint>
#include <vector>

namespace localmoe {

struct RouterRule {
  bool sigmoid;              // or softmax over all experts
  std::vector<float> bias;   // added to scores for choosing only; may be empty
  int64_t groups, kept;      // experts outside a token's best `kept` groups are left out; all are kept where equal
  int64_t best;              // a group counts by the sum of its best so many
  float outside;             // the score that experts of other groups get
  int64_t k;                 // experts a token
  bool normalised;           // weights sum up to 1, before `factor`
  float factor;
};

// ids and weights [tokens, k] from logits [tokens, experts], a token's experts in descending order of choice; of equal
// ones the first.
void route(const RouterRule& rule, const float* logits, int64_t tokens, int64_t experts, int64_t* ids, float* weights);

}  // namespace localmoe
