// The Python side: arrays are checked here, once, and only then reach a kernel.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace localmoe {
struct bfloat16 {
  uint16_t bits;
};
}  // namespace localmoe

namespace nanobind::detail {
template <>
struct dtype_traits<localmoe::bfloat16> {
  static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
  static constexpr auto name = const_name("bfloat16");
};
}  // namespace nanobind::detail

namespace localmoe {
namespace {

template <typename T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

class Kernels {
 public:
  Kernels(const std::string& tier, int threads) : tier_(find(tier)), pool_(threads) {}

  void linear_int4(Matrix<float> x, Matrix<int32_t> packed, Matrix<bfloat16> scale, int64_t group, Result y) {
    quantized(x, packed, scale, group, y, 4);
  }

  void linear_int8(Matrix<float> x, Matrix<int32_t> packed, Matrix<bfloat16> scale, int64_t group, Result y) {
    quantized(x, packed, scale, group, y, 8);
  }

  void linear_bf16(Matrix<float> x, Matrix<bfloat16> weight, Result y) {
    const auto in = static_cast<int64_t>(weight.shape(1));
    require(static_cast<int64_t>(x.shape(1)) == in, "x and weight disagree on in_features");
    require(y.shape(0) == x.shape(0) && y.shape(1) == weight.shape(0), "the result has another shape");
    const DenseProduct product{reinterpret_cast<const uint16_t*>(weight.data()), x.data(), y.data(),
                               static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(weight.shape(0)), in};
    nb::gil_scoped_release released;
    pool_.run(product.out, chunk(in * 2),
              [&](int64_t first, int64_t last) { tier_.bf16(product, first, last); });
  }

 private:
  static const Tier& find(const std::string& name) {
    for (const Tier* tier : supported_tiers())
      if (tier->name == name) return *tier;
    throw std::invalid_argument("this CPU has no kernel tier " + name);
  }

  // Rows a thread takes at a time: about 32 KiB of weights, so that threads end together.
  static int64_t chunk(int64_t row_bytes) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_bytes)); }

  void quantized(const Matrix<float>& x, const Matrix<int32_t>& packed, const Matrix<bfloat16>& scale,
                 int64_t group, const Result& y, int bits) {
    const auto tokens = static_cast<int64_t>(x.shape(0)), in = static_cast<int64_t>(x.shape(1));
    const auto out = static_cast<int64_t>(packed.shape(0));
    require(group == 32 || group == 64 || group == 128, "group_size must be 32, 64 or 128");
    require(in % group == 0, "group_size does not divide in_features");
    require(static_cast<int64_t>(packed.shape(1)) * 32 == in * bits, "x and packed disagree on in_features");
    require(static_cast<int64_t>(scale.shape(0)) == out && static_cast<int64_t>(scale.shape(1)) == in / group,
            "the scale has another shape");
    require(static_cast<int64_t>(y.shape(0)) == tokens && static_cast<int64_t>(y.shape(1)) == out,
            "the result has another shape");

    const int64_t blocks = (in + kBlock - 1) / kBlock;
    const QuantizedProduct product{reinterpret_cast<const uint8_t*>(packed.data()),
                                   reinterpret_cast<const uint16_t*>(scale.data()),
                                   nullptr, y.data(), tokens, out, in, group, in * bits / 8, blocks};
    nb::gil_scoped_release released;
    std::vector<Block> activations(tokens * blocks);
    for (int64_t t = 0; t < tokens; ++t)
      quantize_activations(x.data() + t * in, in, bits == 4 ? 8 : 128, bits == 4 ? Order::kEvenOdd : Order::kNatural,
                           activations.data() + t * blocks);
    QuantizedProduct filled = product;
    filled.x = activations.data();
    const auto kernel = bits == 4 ? tier_.int4 : tier_.int8;
    pool_.run(out, chunk(product.row_bytes), [&](int64_t first, int64_t last) { kernel(filled, first, last); });
  }

  const Tier& tier_;
  ThreadPool pool_;
};

}  // namespace
}  // namespace localmoe

NB_MODULE(_cpu, m) {
  using localmoe::Kernels;
  m.def("supported_tiers", [] {
    std::vector<std::string> names;
    for (const localmoe::Tier* tier : localmoe::supported_tiers()) names.emplace_back(tier->name);
    return names;
  });
  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<const std::string&, int>(), nb::arg("tier"), nb::arg("threads"))
      .def("linear_int4", &Kernels::linear_int4)
      .def("linear_int8", &Kernels::linear_int8)
      .def("linear_bf16", &Kernels::linear_bf16);
}
