// The Python side: arrays are checked here, once, and only then reach a kernel.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "arrays.h"
#include "experts.h"
#include "kernels.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace localmoe {
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
    operand_.shape(matrix.form, tokens, matrix.in);
    rounding_.reset(tokens * blocks, 4);
    rows_.reset(matrix.out, std::max<int64_t>(1, kChunkBytes / matrix.row_bytes));
    pool_.run([&](int) {
      rounding_.take([&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          operand_.set(i / blocks, i % blocks, x.data() + i / blocks * matrix.in);
      });
      pool_.barrier();
      rows_.take([&](int64_t first, int64_t last) {
        operand_.multiply(tier_, matrix, first, last, y.data() + first, matrix.out);
      });
    });
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
      require(id >= 0 && id < static_cast<int64_t>(experts.routed().size()) && experts.has(id), "no such expert");
      require(experts.routed()[id]->gate.in == width, "an expert has another width");
    }
    require(experts.shared() == nullptr || experts.shared()->gate.in == width, "the shared expert has another width");
    nb::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    workspace_.forward(tier_, pool_, experts.routed(), experts.shared(), {ids.data(), weights.data(), k}, x.data(),
                       tokens, width, y.data());
  }

 private:
  static constexpr int64_t kChunkBytes = 32768;  // of weights a thread takes at a time: threads end together

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
  nb::class_<OwnedMatrix>(m, "Matrix")
      .def_static("int4", [](const Rows<int32_t>& packed, const Rows<bfloat16>& scale, int64_t group) {
        return OwnedMatrix::integers(Form::kInt4, packed, scale, group);
      })
      .def_static("int8", [](const Rows<int32_t>& packed, const Rows<bfloat16>& scale, int64_t group) {
        return OwnedMatrix::integers(Form::kInt8, packed, scale, group);
      })
      .def_static("bf16", &OwnedMatrix::bf16)
      .def_prop_ro("out_features", [](const OwnedMatrix& matrix) { return matrix.view.out; });
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<int64_t>(), "count"_a)
      .def("has", &Experts::has)
      .def("set", &Experts::set)
      .def("set_shared", &Experts::set_shared);
  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<const std::string&, int, std::vector<int>>(), "tier"_a, "threads"_a, "cpus"_a)
      .def("linear", &Kernels::linear)
      .def("experts", &Kernels::experts);
}
