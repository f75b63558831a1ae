// A layer's parts as Python holds them: what they are made of is checked once and kept alive.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "experts.h"
#include "router.h"

namespace localmoe {

namespace nb = nanobind;

using Ids = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LayerIds = nb::ndarray<int64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using LayerWeights = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using CacheRows = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// One layer's routed experts, set one by one as they are first used, and its shared expert.
class Experts {
 public:
  explicit Experts(int64_t count) : routed_(count) {}

  bool has(int64_t index) const { return routed_.at(index).has_value(); }

  void set(int64_t index, const OwnedMatrix& gate, const OwnedMatrix& up, const OwnedMatrix& down) {
    routed_.at(index) = own(gate, up, down);
  }

  void set_shared(const OwnedMatrix& gate, const OwnedMatrix& up, const OwnedMatrix& down) {
    shared_ = own(gate, up, down);
  }

  const std::vector<std::optional<Mlp>>& routed() const { return routed_; }
  const Mlp* shared() const { return shared_ ? &*shared_ : nullptr; }

 private:
  Mlp own(const OwnedMatrix& gate, const OwnedMatrix& up, const OwnedMatrix& down) {
    require(gate.view.form == up.view.form && gate.view.out == up.view.out && gate.view.in == up.view.in,
            "gate and up are not alike");
    require(down.view.in == gate.view.out && down.view.out == gate.view.in, "down does not fit gate and up");
    for (const OwnedMatrix* matrix : {&gate, &up, &down}) owners_.push_back(*matrix);
    return {gate.view, up.view, down.view};
  }

  std::vector<std::optional<Mlp>> routed_;
  std::optional<Mlp> shared_;
  std::vector<OwnedMatrix> owners_;
};

// One layer's attention weights.
class Attention {
 public:
  Attention(const OwnedMatrix& query, const OwnedMatrix& latent, const OwnedMatrix& expand, const OwnedMatrix& output,
            std::vector<float> latent_norm, int64_t heads, int64_t nope, float scale, float epsilon)
      : owners_{query, latent, expand, output} {
    layer_.query = query.view;
    layer_.latent = latent.view;
    layer_.expand = expand.view;
    layer_.output = output.view;
    layer_.latent_norm = std::move(latent_norm);
    layer_.heads = heads;
    layer_.nope = nope;
    layer_.rank = expand.view.in;
    layer_.rope = latent.view.out - layer_.rank;
    layer_.value = heads > 0 ? expand.view.out / heads - nope : 0;
    layer_.scale = scale;
    layer_.epsilon = epsilon;
    require(heads > 0 && nope > 0 && layer_.rope > 0 && layer_.rope % 2 == 0 && layer_.value > 0 &&
                expand.view.out == heads * (nope + layer_.value) && query.view.out == heads * (nope + layer_.rope) &&
                output.view.in == heads * layer_.value &&
                static_cast<int64_t>(layer_.latent_norm.size()) == layer_.rank,
            "the attention's matrices do not fit each other");
    require(expand.view.form != Form::kInt4 && expand.view.form != Form::kNf4, "kv_b_proj cannot be 4-bit");
  }

  void set_query_down(const OwnedMatrix& matrix, std::vector<float> norm) {
    require(matrix.view.out == layer_.query.in && static_cast<int64_t>(norm.size()) == matrix.view.out,
            "q_a_proj does not fit q_b_proj");
    owners_.push_back(matrix);
    layer_.query_down = matrix.view;
    layer_.query_norm = std::move(norm);
  }

  const MlaLayer& layer() const { return layer_; }

 private:
  std::vector<OwnedMatrix> owners_;
  MlaLayer layer_{};
};

// One layer's choice of experts.
class Router {
 public:
  Router(bool sigmoid, std::vector<float> bias, int64_t groups, int64_t kept, int64_t best, float outside, int64_t k,
         bool normalised, float factor)
      : rule_{sigmoid, std::move(bias), groups, kept, best, outside, k, normalised, factor} {
    require(groups > 0 && kept > 0 && kept <= groups && best > 0 && k > 0, "the router's numbers do not fit");
  }

  const RouterRule& rule() const { return rule_; }

  void check(int64_t experts) const {
    require(rule_.k <= experts && experts % rule_.groups == 0 &&
                (rule_.bias.empty() || static_cast<int64_t>(rule_.bias.size()) == experts),
            "the logits have another width");
  }

  void route(const Rows<float>& logits, const Ids& ids, const Result& weights) const {
    const int64_t tokens = extent(logits, 0), experts = extent(logits, 1);
    require(extent(ids, 0) == tokens && extent(weights, 0) == tokens && extent(ids, 1) == rule_.k &&
                extent(weights, 1) == rule_.k,
            "ids or weights have another shape");
    check(experts);
    nb::gil_scoped_release released;
    localmoe::route(rule_, logits.data(), tokens, experts, ids.data(), weights.data());
  }

 private:
  RouterRule rule_;
};

// One whole layer. What it is made of lives as long as this does.
class Layer {
 public:
  Layer(std::vector<float> attention_norm, const Attention& attention, std::vector<float> mlp_norm,
        const Experts& experts, float epsilon)
      : attention_norm_(std::move(attention_norm)), mlp_norm_(std::move(mlp_norm)), epsilon_(epsilon),
        attention_(attention), experts_(experts) {
    const MlaLayer& layer = attention.layer();
    require(static_cast<int64_t>(attention_norm_.size()) == width() && mlp_norm_.size() == attention_norm_.size() &&
                layer.output.out == width() && (!experts.shared() || experts.shared()->gate.in == width()),
            "the layer's parts do not fit each other");
  }

  void set_router(const OwnedMatrix& matrix, const Router& router) {
    const auto count = static_cast<int64_t>(experts_.routed().size());
    require(matrix.view.in == width() && matrix.view.out == count, "the router's matrix has another shape");
    router.check(count);
    router_matrix_ = matrix;
    router_ = &router;
  }

  int64_t width() const { return attention_.layer().latent.in; }
  int64_t k() const { return router_ ? router_->rule().k : 0; }
  const std::vector<float>& attention_norm() const { return attention_norm_; }
  const std::vector<float>& mlp_norm() const { return mlp_norm_; }
  float epsilon() const { return epsilon_; }
  const MlaLayer& attention() const { return attention_.layer(); }
  const Experts& experts() const { return experts_; }
  const Router* router() const { return router_; }
  const Matrix& router_matrix() const { return router_matrix_->view; }

 private:
  std::vector<float> attention_norm_, mlp_norm_;
  float epsilon_;
  const Attention& attention_;
  const Experts& experts_;
  const Router* router_ = nullptr;
  std::optional<OwnedMatrix> router_matrix_;
};

// Layers that follow one another. Each lives as long as this does.
class Layers {
 public:
  void add(const Layer& layer) {
    require(layers_.empty() || layer.width() == width(), "a layer has another width");
    require(layer.k() == 0 || k_ == 0 || layer.k() == k_, "a layer chooses another number of experts");
    k_ = std::max(k_, layer.k());
    layers_.push_back(&layer);
  }

  int64_t size() const { return static_cast<int64_t>(layers_.size()); }
  int64_t width() const { return layers_.empty() ? 0 : layers_.front()->width(); }
  int64_t k() const { return k_; }  // experts a token; 0 where all are dense
  const Layer& operator[](int64_t number) const { return *layers_[number]; }

 private:
  std::vector<const Layer*> layers_;
  int64_t k_ = 0;
};

// The latent caches of several layers, one each.
struct Caches {
  explicit Caches(std::vector<CacheRows> by_layer) : rows(std::move(by_layer)) {}

  std::vector<CacheRows> rows;
};

}  // namespace localmoe
