// Torch tensors as the bindings take them, and matrices over them that keep them alive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "matrix.h"

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

template <typename T>
using Rows = nanobind::ndarray<const T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using Result = nanobind::ndarray<float, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

template <typename Array>
int64_t extent(const Array& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

// A matrix over tensors, which are checked here once and live as long as this does.
struct OwnedMatrix {
  Matrix view;
  nanobind::ndarray<> data, scales;

  static OwnedMatrix integers(Form form, const Rows<int32_t>& packed, const Rows<bfloat16>& scale, int64_t group) {
    const int64_t bits = form == Form::kInt4 ? 4 : 8, in = extent(packed, 1) * 32 / bits;
    require(group == 32 || group == 64 || group == 128, "group_size must be 32, 64 or 128");
    require(in % group == 0, "group_size does not divide in_features");
    require(extent(scale, 0) == extent(packed, 0) && extent(scale, 1) == in / group, "the scale has another shape");
    return {{form, reinterpret_cast<const uint8_t*>(packed.data()), scale.data(), extent(packed, 0), in, group,
             in * bits / 8},
            nanobind::ndarray<>(packed), nanobind::ndarray<>(scale)};
  }

  static OwnedMatrix nf4(const Rows<uint8_t>& codes, const Rows<float>& absmax) {
    const int64_t group = 64, in = extent(codes, 1) * 2;
    require(in % group == 0, "in_features are not a multiple of NF4's 64");
    require(extent(absmax, 0) == extent(codes, 0) && extent(absmax, 1) == in / group, "absmax has another shape");
    return {{Form::kNf4, codes.data(), absmax.data(), extent(codes, 0), in, group, in / 2},
            nanobind::ndarray<>(codes), nanobind::ndarray<>(absmax)};
  }

  static OwnedMatrix bf16(const Rows<bfloat16>& weight) {
    return {{Form::kBfloat16, reinterpret_cast<const uint8_t*>(weight.data()), nullptr, extent(weight, 0),
             extent(weight, 1), 0, extent(weight, 1) * 2},
            nanobind::ndarray<>(weight), {}};
  }
};

}  // namespace localmoe
