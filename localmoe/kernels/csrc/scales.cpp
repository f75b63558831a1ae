// The Python side of the scale search.
#include "scales.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "arrays.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace localmoe {
namespace {

template <typename T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

SearchScales implementation(const std::string& tier) {
  for (const Tier* known : supported_tiers()) {
    if (known->name != tier) continue;
#ifdef LOCALMOE_X86
    if (tier == "avx512") return search_scales_avx512;
    if (tier == "avx2" || tier == "avxvnni") return search_scales_avx2;
#endif
    return search_scales_portable;
  }
  throw std::invalid_argument("this CPU has no kernel tier " + tier);
}

SourceRows source_of(const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>& weights,
                     const std::optional<Rows<float>>& factors, int64_t block_rows, int64_t block_columns,
                     int64_t group) {
  SourceRows source{SourceRows::Type::kFloat32, weights.data(), extent(weights, 0), extent(weights, 1)};
  if (weights.dtype() == nb::dtype<float>()) return source;
  if (weights.dtype() == nb::dtype<int16_t>()) {  // numpy has no bfloat16
    source.type = SourceRows::Type::kBfloat16;
    return source;
  }
  require(weights.dtype() == nb::dtype<uint8_t>() && factors, "the weights have another type, or no factors");
  source.type = SourceRows::Type::kFp8;
  source.factors = factors->data();
  source.block_rows = block_rows;
  source.block_columns = block_columns;
  source.factor_stride = extent(*factors, 1);
  require(block_rows > 0 && block_rows % 16 == 0 && block_columns > 0 && block_columns % group == 0,
          "the blocks do not fit the groups");
  require(extent(*factors, 0) * block_rows >= source.rows && source.factor_stride * block_columns >= source.in,
          "there are too few factors");
  return source;
}

void search(const std::string& tier, int64_t bits, int64_t group, float baseline, std::vector<float> guesses,
            const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>& weights,
            const std::optional<Rows<float>>& factors, int64_t block_rows, int64_t block_columns,
            const std::optional<Array<const float, 1>>& importance, const std::optional<Array<int32_t, 2>>& packed,
            const Array<int16_t, 2>& scales, const Array<float, 2>& errors, const Array<float, 2>& norms) {
  const SearchScales run = implementation(tier);
  require(bits == 4 || bits == 8, "numbers have 4 or 8 bits");
  require(group == 32 || group == 64 || group == 128, "group_size must be 32, 64 or 128");
  const SourceRows source = source_of(weights, factors, block_rows, block_columns, group);
  require(source.in % group == 0, "group_size does not divide in_features");
  const int64_t groups = source.in / group;
  for (const nb::ndarray<>& result : {nb::ndarray<>(scales), nb::ndarray<>(errors), nb::ndarray<>(norms)})
    require(extent(result, 0) == source.rows && extent(result, 1) == groups, "a result has another shape");
  require(!packed || (extent(*packed, 0) == source.rows && extent(*packed, 1) == source.in * bits / 32),
          "packed has another shape");
  require(!importance || extent(*importance, 0) == source.in, "importance has another length");
  const ScaleSearch search{source,
                           bits == 4 ? Form::kInt4 : Form::kInt8,
                           group,
                           baseline,
                           std::move(guesses),
                           importance ? importance->data() : nullptr,
                           packed ? reinterpret_cast<uint32_t*>(packed->data()) : nullptr,
                           reinterpret_cast<uint16_t*>(scales.data()),
                           errors.data(),
                           norms.data()};
  nb::gil_scoped_release released;
  run(search);
}

}  // namespace

void bind_scales(nb::module_& m) {
  m.def("search_scales", &search, "tier"_a, "bits"_a, "group"_a, "baseline"_a, "guesses"_a, "weights"_a,
        "factors"_a.none(), "block_rows"_a, "block_columns"_a, "importance"_a.none(), "packed"_a.none(), "scales"_a,
        "errors"_a, "norms"_a);
}

}  // namespace localmoe
