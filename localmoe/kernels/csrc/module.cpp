// The Python side: arrays are checked here, once, and only then reach a kernel.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "driver.h"
#include "experts.h"
#include "kernels.h"
#include "router.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace localmoe {

void bind_scales(nb::module_&);  // scales.cpp

namespace {

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

  void route(const Rows<float>& logits, const nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& ids,
             const Result& weights) const {
    const int64_t tokens = extent(logits, 0), experts = extent(logits, 1);
    require(extent(ids, 0) == tokens && extent(weights, 0) == tokens && extent(ids, 1) == rule_.k &&
                extent(weights, 1) == rule_.k,
            "ids or weights have another shape");
    require(rule_.k <= experts && experts % rule_.groups == 0 &&
                (rule_.bias.empty() || static_cast<int64_t>(rule_.bias.size()) == experts),
            "the logits have another width");
    nb::gil_scoped_release released;
    localmoe::route(rule_, logits.data(), tokens, experts, ids.data(), weights.data());
  }

 private:
  RouterRule rule_;
};

// A tier, a team of threads and their memory. One call at a time: others wait.
class Kernels {
 public:
  Kernels(const std::string& tier, int threads, std::vector<int> cpus)
      : tier_(find(tier)), pool_(threads, std::move(cpus)) {}

  void linear(const Rows<float>& x, const OwnedMatrix& weight, const Result& y) {
    const Matrix& matrix = weight.view;
    const int64_t tokens = extent(x, 0), blocks = (matrix.in + kBlock - 1) / kBlock;
    require(extent(x, 1) == matrix.in, "x and weight disagree on in_features");
    require(extent(y, 0) == tokens && extent(y, 1) == matrix.out, "the result has another shape");
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    operand_.shape(tier_, matrix.form, tokens, matrix.in, tokens > kMatvecTokens);
    rounding_.reset(tokens * blocks, 4);
    rows_.reset(matrix.out, rows_at_a_time(matrix, pool_.threads()));
    pool_.run([&](int) {
      rounding_.take([&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          operand_.set(i / blocks, i % blocks, x.data() + i / blocks * matrix.in);
      });
      pool_.barrier();
      rows_.take([&](int64_t first, int64_t last) {
        operand_.multiply(tier_, matrix, first, last, y.data() + first, matrix.out,
                          matrix.row(last + (last - first) * (pool_.threads() - 1)));
      });
    });
  }

  // Bytes a second that the whole team reads of `memory`, once from end to end.
  double read_bandwidth(const nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& memory) {
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    rows_.reset(extent(memory, 0), 1 << 20);
    std::atomic<uint32_t> total{0};
    const auto started = std::chrono::steady_clock::now();
    pool_.run([&](int) {
      uint32_t sum = 0;
      rows_.take([&](int64_t first, int64_t last) {
        sum += vector_ops(tier_).read(memory.data() + first, memory.data() + last);
      });
      total += sum;  // so that the reads are not for nothing
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    return static_cast<double>(memory.nbytes()) / seconds.count();
  }

  // y = the experts' weighted sum and the shared expert's output. Every routed expert must have been set.
  void experts(const Experts& experts, const Rows<float>& x, const Rows<int64_t>& ids, const Rows<float>& weights,
               const Result& y) {
    const int64_t tokens = extent(x, 0), k = extent(ids, 1), width = extent(x, 1);
    require(extent(ids, 0) == tokens && extent(weights, 0) == tokens && extent(weights, 1) == k,
            "ids and weights do not fit the tokens");
    require(extent(y, 0) == tokens && extent(y, 1) == width, "the result has another shape");
    for (int64_t i = 0; i < tokens * k; ++i) {
      const int64_t id = ids.data()[i];
      if (id == kElsewhere) continue;
      require(id >= 0 && id < static_cast<int64_t>(experts.routed().size()) && experts.has(id), "no such expert");
      require(experts.routed()[id]->gate.in == width, "an expert has another width");
    }
    require(experts.shared() == nullptr || experts.shared()->gate.in == width, "the shared expert has another width");
    nb::gil_scoped_release released;
    run(experts, {ids.data(), weights.data(), k}, x.data(), tokens, width, y.data());
  }

  // The same, of what was checked before.
  void run(const Experts& experts, const Routing& routing, const float* x, int64_t tokens, int64_t width, float* y) {
    std::lock_guard lock(mutex_);
    workspace_.forward(tier_, pool_, experts.routed(), experts.shared(), routing, x, tokens, width, y);
  }

  // y = the attention output of x, whose rows are written to `cache` at `start` and after.
  void attention(const Attention& attention, const Rows<float>& x, const Rows<float>& rotations,
                 const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>& cache, int64_t start,
                 const Result& y) {
    const MlaLayer& layer = attention.layer();
    const int64_t tokens = extent(x, 0), width = layer.rank + layer.rope;
    require(extent(x, 1) == layer.latent.in && extent(y, 1) == layer.output.out && extent(y, 0) == tokens,
            "x or the result has another shape");
    require(layer.query_down ? layer.query_down->in == layer.latent.in : layer.query.in == layer.latent.in,
            "the query's matrix has another width");
    require(extent(rotations, 0) == tokens && extent(rotations, 1) == layer.rope, "rotations have another shape");
    LatentRows rows{CacheForm::kInt8, cache.data(), width, layer.rank};
    if (cache.dtype() == nb::dtype<float>()) rows.form = CacheForm::kFloat32;
    if (cache.dtype() == nb::dtype<int16_t>()) rows.form = CacheForm::kBfloat16;  // numpy has no bfloat16
    require(rows.form != CacheForm::kInt8 || cache.dtype() == nb::dtype<uint8_t>(), "the cache has another type");
    const int64_t itemsize = cache.dtype().bits / 8;
    require(extent(cache, 1) * itemsize == rows.row_bytes(), "the cache has another width");
    require(start >= 0 && start + tokens <= extent(cache, 0), "the cache is too small");
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    attention_.forward(tier_, pool_, layer, rows, start, x.data(), rotations.data(), tokens, y.data());
  }

 private:
  static const Tier& find(const std::string& name) {
    for (const Tier* tier : supported_tiers())
      if (tier->name == name) return *tier;
    throw std::invalid_argument("this CPU has no kernel tier " + name);
  }

  const Tier& tier_;
  ThreadPool pool_;
  std::mutex mutex_;  // of the memory below
  Operand operand_;
  Chunks rounding_, rows_;
  ExpertWorkspace workspace_;
  AttentionWorkspace attention_;
};

// What the CPU does of one layer's experts while a card computes the others: made once over memory that both sides know,
// run again and again, on the driver's thread. An expert that has a slot on the card is left out.
class ExpertJob {
 public:
  using Ids = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Slots = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

  ExpertJob(Kernels& kernels, const Experts& experts, const Rows<float>& x, const Ids& ids, const Rows<float>& weights,
            const Slots& slots, const Result& y)
      : kernels_(kernels), experts_(experts), x_(x), ids_(ids), weights_(weights), slots_(slots), y_(y) {
    const int64_t tokens = extent(x, 0), count = static_cast<int64_t>(experts.routed().size());
    require(extent(ids, 0) == tokens && extent(weights, 0) == tokens && extent(weights, 1) == extent(ids, 1),
            "ids and weights do not fit the tokens");
    require(extent(y, 0) == tokens && extent(y, 1) == extent(x, 1), "the result has another shape");
    require(extent(slots, 0) == count, "there is not one slot an expert");
    for (int64_t id = 0; id < count; ++id)
      require(experts.has(id) && experts.routed()[id]->gate.in == extent(x, 1), "an expert is missing or does not fit");
    known_.resize(tokens * extent(ids, 1));
  }

  void run() {
    const int64_t count = static_cast<int64_t>(experts_.routed().size());
    for (size_t i = 0; i < known_.size(); ++i) {
      const int64_t id = ids_.data()[i];
      known_[i] = id < 0 || id >= count || slots_.data()[id] >= 0 ? kElsewhere : id;
    }
    kernels_.run(experts_, {known_.data(), weights_.data(), extent(ids_, 1)}, x_.data(), extent(x_, 0), extent(x_, 1),
                 y_.data());
  }

  // Once what is in the stream is done.
  void enqueue(const CudaDriver& driver, uintptr_t stream) {
    driver.launch(reinterpret_cast<void*>(stream), [](void* job) { static_cast<ExpertJob*>(job)->run(); }, this);
  }

 private:
  Kernels& kernels_;
  const Experts& experts_;
  Rows<float> x_;
  Ids ids_;
  Rows<float> weights_;
  Slots slots_;
  Result y_;
  std::vector<int64_t> known_;
};

}  // namespace
}  // namespace localmoe

NB_MODULE(_cpu, m) {
  using namespace localmoe;
  m.def("supported_tiers", [] {
    std::vector<std::string> names;
    for (const Tier* tier : supported_tiers()) names.emplace_back(tier->name);
    return names;
  });
  bind_scales(m);
  nb::class_<OwnedMatrix>(m, "Matrix")
      .def_static("int4", [](const Rows<int32_t>& packed, const Rows<bfloat16>& scale, int64_t group) {
        return OwnedMatrix::integers(Form::kInt4, packed, scale, group);
      })
      .def_static("int8", [](const Rows<int32_t>& packed, const Rows<bfloat16>& scale, int64_t group) {
        return OwnedMatrix::integers(Form::kInt8, packed, scale, group);
      })
      .def_static("nf4", &OwnedMatrix::nf4)
      .def_static("bf16", &OwnedMatrix::bf16)
      .def_prop_ro("out_features", [](const OwnedMatrix& matrix) { return matrix.view.out; });
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<int64_t>(), "count"_a)
      .def("set", &Experts::set)
      .def("set_shared", &Experts::set_shared);
  nb::class_<Router>(m, "Router")
      .def(nb::init<bool, std::vector<float>, int64_t, int64_t, int64_t, float, int64_t, bool, float>(), "sigmoid"_a,
           "bias"_a, "groups"_a, "kept"_a, "best"_a, "outside"_a, "k"_a, "normalised"_a, "factor"_a)
      .def("route", &Router::route);
  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<const std::string&, int, std::vector<int>>(), "tier"_a, "threads"_a, "cpus"_a)
      .def("linear", &Kernels::linear)
      .def("experts", &Kernels::experts)
      .def("read_bandwidth", &Kernels::read_bandwidth)
      .def("attention", &Kernels::attention);
  nb::class_<CudaDriver>(m, "CudaDriver").def(nb::init<const std::string&>(), "library"_a);
  nb::class_<ExpertJob>(m, "ExpertJob")
      .def(nb::init<Kernels&, const Experts&, const Rows<float>&, const ExpertJob::Ids&, const Rows<float>&,
                    const ExpertJob::Slots&, const Result&>(),
           "kernels"_a, "experts"_a, "x"_a, "ids"_a, "weights"_a, "slots"_a, "y"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>())
      .def("run", &ExpertJob::run, nb::call_guard<nb::gil_scoped_release>())
      .def("enqueue", &ExpertJob::enqueue, "driver"_a, "stream"_a);
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<const OwnedMatrix&, const OwnedMatrix&, const OwnedMatrix&, const OwnedMatrix&,
                    std::vector<float>, int64_t, int64_t, float, float>(),
           "query"_a, "latent"_a, "expand"_a, "output"_a, "latent_norm"_a, "heads"_a, "nope"_a, "scale"_a,
           "epsilon"_a)
      .def("set_query_down", &Attention::set_query_down, "matrix"_a, "norm"_a);
}
