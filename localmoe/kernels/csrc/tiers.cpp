#include <string_view>

#include "kernels.h"
#include "vector_ops.h"

namespace localmoe {

std::vector<const Tier*> supported_tiers() {
#ifdef LOCALMOE_X86
  const Tier* const all[] = {&kPortable, &kAvx2, &kAvxVnni, &kAvx512};
#else
  const Tier* const all[] = {&kPortable};
#endif
  std::vector<const Tier*> supported;
  for (const Tier* tier : all)
    if (tier->supported()) supported.push_back(tier);
  return supported;
}

const VectorOps& vector_ops(const Tier& tier) {
#ifdef LOCALMOE_X86
  const std::string_view name = tier.name;
  if (name == "avx512") return kAvx512Ops;
  if (name == "avx2" || name == "avxvnni") return kAvx2Ops;
#endif
  return kPortableOps;
}

}  // namespace localmoe
