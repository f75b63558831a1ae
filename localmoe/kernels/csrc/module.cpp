// The Python side: arrays are checked here, once, and only then reach a kernel.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "doorbell.h"
#include "driver.h"
#include "experts.h"
#include "kernels.h"
#include "layer.h"
#include "parts.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace localmoe {

void bind_scales(nb::module_&);  // scales.cpp

namespace {

// A tier, a team of threads and their memory. One call at a time: others wait.
class Kernels {
 public:
  Kernels(const std::string& tier, int threads, std::vector<int> cpus)
      : tier_(find(tier)), pool_(threads, std::move(cpus)) {}

  void linear(const Rows<float>& x, const OwnedMatrix& weight, const Result& y) {
    const Matrix& matrix = weight.view;
    const int64_t tokens = extent(x, 0);
    require(extent(x, 1) == matrix.in, "x and weight disagree on in_features");
    require(extent(y, 0) == tokens && extent(y, 1) == matrix.out, "the result has another shape");
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    product(matrix, x.data(), tokens, y.data());
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

  // Experts that are not in memory are asked for so many bytes ahead of their computation; see Arrivals::set.
  void ask_ahead(int64_t bytes, bool tells) {
    std::lock_guard lock(mutex_);
    workspace_.arrivals().set(bytes, tells);
  }

  int64_t bytes_asked() {
    std::lock_guard lock(mutex_);
    return workspace_.arrivals().asked();
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
                 const CacheRows& cache, int64_t start, const Result& y) {
    const MlaLayer& layer = attention.layer();
    const int64_t tokens = extent(x, 0);
    require(extent(x, 1) == layer.latent.in && extent(y, 1) == layer.output.out && extent(y, 0) == tokens,
            "x or the result has another shape");
    const LatentRows latents = rows(layer, cache, start, tokens, rotations);
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    attention_.forward(tier_, pool_, layer, latents, start, x.data(), rotations.data(), tokens, y.data());
  }

  // x becomes the output of `layers` from number `first` on; each one's rows are written to its cache at `start` and
  // after. Returns the number of the layer to go on from, past the last if all are done, and whether its router has
  // chosen: then an expert of the choice has not been set, x is what that layer's attention left, `normed` what its
  // experts take, and its ids and weights say which. Otherwise `seconds` were over, so that the caller may be
  // interrupted. Called again with both it goes on.
  std::pair<int64_t, bool> layers(const Layers& layers, int64_t first, bool routed, double seconds, const Result& x,
                                  const Rows<float>& rotations, const Caches& caches, int64_t start,
                                  const Result& normed, const LayerIds& ids, const LayerWeights& weights) {
    const Pass pass = checked(layers, x, rotations, caches, start, normed, ids, weights);
    require(first >= 0 && first <= layers.size(), "there is no such layer");
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    out_.resize(std::max<size_t>(out_.size(), pass.tokens * layers.width()));
    const ThreadPool::Stay stay(pool_);
    Marks marks;
    int64_t number = first;
    while (number < layers.size() && (number == first || marks.since_first() < seconds)) {
      const Layer& layer = layers[number];
      if (!std::exchange(routed, false)) attend(layer, pass, number, marks);
      if (!finish(layer, pass, number, marks)) return {number, true};
      ++number;
    }
    return {number, false};
  }

  // Seconds spent in layers, by part, since the last call.
  nb::dict take_seconds() {
    std::unique_lock lock(mutex_);
    const LayerSeconds taken = std::exchange(seconds_, {});
    lock.unlock();
    nb::dict parts;
    parts["attention"] = taken.attention;
    parts["router"] = taken.router;
    parts["experts"] = taken.experts;
    parts["dense"] = taken.dense;
    return parts;
  }

 private:
  static const Tier& find(const std::string& name) {
    for (const Tier* tier : supported_tiers())
      if (tier->name == name) return *tier;
    throw std::invalid_argument("this CPU has no kernel tier " + name);
  }

  // A layer's part of the latent cache, with what must hold of it and of the rotations.
  static LatentRows rows(const MlaLayer& layer, const CacheRows& cache, int64_t start, int64_t tokens,
                         const Rows<float>& rotations) {
    const int64_t width = layer.rank + layer.rope;
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
    return rows;
  }

  // What a call over several layers is given, by layer where it differs.
  struct Pass {
    float *x, *normed;
    const float* rotations;
    std::vector<LatentRows> caches;
    int64_t start, tokens, k;
    int64_t* ids;    // [layers, tokens, k]
    float* weights;  // the same

    Routing routing(const Layer& layer, int64_t number) const {
      const int64_t at = number * tokens * k;
      return {ids + at, weights + at, layer.router() == nullptr ? 0 : k};
    }
  };

  static Pass checked(const Layers& layers, const Result& x, const Rows<float>& rotations, const Caches& caches,
                      int64_t start, const Result& normed, const LayerIds& ids, const LayerWeights& weights) {
    const int64_t tokens = extent(x, 0), width = layers.width();
    require(tokens <= kMatvecTokens, "a layer takes few tokens");
    require(extent(x, 1) == width && extent(normed, 0) == tokens && extent(normed, 1) == width,
            "x or its norm has another shape");
    require(extent(ids, 0) == layers.size() && extent(weights, 0) == layers.size() && extent(ids, 1) == tokens &&
                extent(weights, 1) == tokens && extent(ids, 2) == layers.k() && extent(weights, 2) == layers.k(),
            "ids or weights have another shape");
    require(static_cast<int64_t>(caches.rows.size()) == layers.size(), "there is not one cache a layer");
    Pass pass{x.data(), normed.data(), rotations.data(), {}, start, tokens, layers.k(), ids.data(), weights.data()};
    for (int64_t number = 0; number < layers.size(); ++number)
      pass.caches.push_back(rows(layers[number].attention(), caches.rows[number], start, tokens, rotations));
    return pass;
  }

  // A layer's attention, added to x, and its choice of experts.
  void attend(const Layer& layer, const Pass& pass, int64_t number, Marks& marks) {
    norm(pass.x, layer.attention_norm(), layer.epsilon(), pass.tokens, pass.normed);
    attention_.forward(tier_, pool_, layer.attention(), pass.caches[number], pass.start, pass.normed, pass.rotations,
                       pass.tokens, out_.data());
    add(pass.x, out_.data(), pass.tokens * layer.width());
    marks.mark(seconds_.attention);
    norm(pass.x, layer.mlp_norm(), layer.epsilon(), pass.tokens, pass.normed);
    if (layer.router() == nullptr) return;
    const int64_t count = layer.router_matrix().out, at = number * pass.tokens * pass.k;
    logits_.resize(std::max<size_t>(logits_.size(), pass.tokens * count));
    product(layer.router_matrix(), pass.normed, pass.tokens, logits_.data());
    route(layer.router()->rule(), logits_.data(), pass.tokens, count, pass.ids + at, pass.weights + at);
    marks.mark(seconds_.router);
  }

  // A layer's experts, added to x; false if one of them has not been set.
  bool finish(const Layer& layer, const Pass& pass, int64_t number, Marks& marks) {
    const Experts& experts = layer.experts();
    const auto count = static_cast<int64_t>(experts.routed().size());
    const Routing routing = pass.routing(layer, number);
    for (int64_t i = 0; i < pass.tokens * routing.k; ++i) {
      const int64_t id = routing.ids[i];
      if (id < 0 || id >= count || !experts.has(id)) return false;
      if (experts.routed()[id]->gate.in != layer.width()) return false;
    }
    workspace_.forward(tier_, pool_, experts.routed(), experts.shared(), routing, pass.normed, pass.tokens,
                       layer.width(), out_.data());
    add(pass.x, out_.data(), pass.tokens * layer.width());
    marks.mark(layer.router() == nullptr ? seconds_.dense : seconds_.experts);
    return true;
  }

  static void norm(const float* x, const std::vector<float>& weight, float epsilon, int64_t tokens, float* y) {
    const auto width = static_cast<int64_t>(weight.size());
    for (int64_t t = 0; t < tokens; ++t) rms_norm(x + t * width, weight, epsilon, y + t * width);
  }

  void product(const Matrix& matrix, const float* x, int64_t tokens, float* y) {
    const int64_t blocks = (matrix.in + kBlock - 1) / kBlock;
    operand_.shape(tier_, matrix.form, tokens, matrix.in, tokens > kMatvecTokens);
    rounding_.reset(tokens * blocks, 4);
    rows_.reset(matrix.out, rows_at_a_time(matrix, pool_.threads()));
    pool_.run([&](int) {
      rounding_.take([&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) operand_.set(i / blocks, i % blocks, x + i / blocks * matrix.in);
      });
      pool_.barrier();
      rows_.take([&](int64_t first, int64_t last) {
        operand_.multiply(tier_, matrix, first, last, y + first, matrix.out,
                          matrix.row(last + (last - first) * (pool_.threads() - 1)));
      });
    });
  }

  const Tier& tier_;
  ThreadPool pool_;
  std::mutex mutex_;  // of what is below
  Operand operand_;
  Chunks rounding_, rows_;
  ExpertWorkspace workspace_;
  AttentionWorkspace attention_;
  std::vector<float> out_, logits_;
  LayerSeconds seconds_;
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

  // Once what is in the stream is done; it then goes on. `caller` is a CudaDriver or a Doorbell.
  template <typename Caller>
  void enqueue(Caller& caller, uintptr_t stream) {
    caller.call(reinterpret_cast<void*>(stream), {[](void* job) { static_cast<ExpertJob*>(job)->run(); }, this});
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

// Work that does nothing: the way to the CPU and back alone.
template <typename Caller>
void ring(Caller& caller, uintptr_t stream) {
  caller.call(reinterpret_cast<void*>(stream), {[](void*) {}, nullptr});
}

void new_doorbell(Doorbell* self, const CudaDriver& driver,
                  const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& words) {
  const auto address = reinterpret_cast<uintptr_t>(words.data());
  require(extent(words, 0) >= static_cast<int64_t>(sizeof(Doorbell::Words)), "the words of a doorbell take 128 bytes");
  require(address % alignof(Doorbell::Words) == 0, "the words of a doorbell are not aligned to 64 bytes");
  new (self) Doorbell(driver, reinterpret_cast<Doorbell::Words*>(address));
}

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
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<std::vector<float>, const Attention&, std::vector<float>, const Experts&, float>(),
           "attention_norm"_a, "attention"_a, "mlp_norm"_a, "experts"_a, "epsilon"_a, nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 5>())
      .def("set_router", &Layer::set_router, "matrix"_a, "router"_a, nb::keep_alive<1, 3>());
  nb::class_<Layers>(m, "Layers").def(nb::init<>()).def("add", &Layers::add, "layer"_a, nb::keep_alive<1, 2>());
  nb::class_<Caches>(m, "Caches").def(nb::init<std::vector<CacheRows>>(), "rows"_a);
  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<const std::string&, int, std::vector<int>>(), "tier"_a, "threads"_a, "cpus"_a)
      .def("linear", &Kernels::linear)
      .def("ask_ahead", &Kernels::ask_ahead, "bytes"_a, "tells"_a)
      .def("bytes_asked", &Kernels::bytes_asked)
      .def("experts", &Kernels::experts)
      .def("read_bandwidth", &Kernels::read_bandwidth)
      .def("attention", &Kernels::attention)
      .def("layers", &Kernels::layers)
      .def("take_seconds", &Kernels::take_seconds);
  nb::class_<CudaDriver>(m, "CudaDriver")
      .def(nb::init<const std::string&>(), "library"_a)
      .def("ring", &ring<const CudaDriver>, "stream"_a);
  nb::class_<Doorbell>(m, "Doorbell")
      .def("__init__", &new_doorbell, "driver"_a, "words"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("ring", &ring<Doorbell>, "stream"_a)
      .def("let_go", &Doorbell::let_go)
      .def("stop", &Doorbell::stop, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<ExpertJob>(m, "ExpertJob")
      .def(nb::init<Kernels&, const Experts&, const Rows<float>&, const ExpertJob::Ids&, const Rows<float>&,
                    const ExpertJob::Slots&, const Result&>(),
           "kernels"_a, "experts"_a, "x"_a, "ids"_a, "weights"_a, "slots"_a, "y"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>())
      .def("run", &ExpertJob::run, nb::call_guard<nb::gil_scoped_release>())
      .def("enqueue", &ExpertJob::enqueue<const CudaDriver>, "caller"_a, "stream"_a)
      .def("enqueue", &ExpertJob::enqueue<Doorbell>, "caller"_a, "stream"_a, nb::keep_alive<2, 1>());
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<const OwnedMatrix&, const OwnedMatrix&, const OwnedMatrix&, const OwnedMatrix&,
                    std::vector<float>, int64_t, int64_t, float, float>(),
           "query"_a, "latent"_a, "expand"_a, "output"_a, "latent_norm"_a, "heads"_a, "nope"_a, "scale"_a,
           "epsilon"_a)
      .def("set_query_down", &Attention::set_query_down, "matrix"_a, "norm"_a);
}
