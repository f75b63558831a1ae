#include "kernels.h"

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

}  // namespace localmoe
