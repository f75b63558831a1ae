// What the kernel tiers share: the form activations take, and one entry a weight format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace localmoe {

constexpr int64_t kBlock = 128;     // activations handled at a time
constexpr int64_t kQuantGroup = 32; // activations that share a scale
constexpr int64_t kPrefetch = 4096; // bytes ahead: the distance that reached the most bandwidth from memory
constexpr int64_t kPrefetchScales = 1024;  // the same for scales, of which there are fewer; rows' lie one after another

// What a stored matrix is made of.
enum class Form { kFloat32, kBfloat16, kInt4, kInt8, kNf4 };
constexpr size_t kForms = 5;

// NF4's sixteen values (QLoRA, arXiv:2305.14314, appendix E) in fixed point, so that int8 dot products serve: u =
// round(value * kNf4One) + kNf4One, at most 14 bits, its upper and its lower seven in two tables. Off by 6e-5 of the
// largest at most, a sixtieth of what rounding activations may cost. Seven bits keep maddubs from saturating.
constexpr int32_t kNf4One = 8128;
constexpr int16_t kNf4[16] = {0, 2469, 3860, 4918, 5816, 6626, 7388, 8128,
                              8775, 9436, 10128, 10875, 11710, 12701, 14004, 16256};

// The upper or the lower seven bits of each, as byte shuffles take them.
struct alignas(16) Nf4Table {
  int8_t bytes[16];

  constexpr explicit Nf4Table(bool upper) : bytes{} {
    for (int code = 0; code < 16; ++code) bytes[code] = static_cast<int8_t>(upper ? kNf4[code] >> 7 : kNf4[code] & 127);
  }
};
inline constexpr Nf4Table kNf4Upper{true}, kNf4Lower{false};

// Quantized weights are stored as integers that are never negative; this is the one that stands for 0.
constexpr int32_t zero_of(Form form) { return form == Form::kInt4 ? 8 : form == Form::kInt8 ? 128 : kNf4One; }

// 128 activations rounded to int8, `scale` one a 32 (for NF4 also over kNf4One). Dot-product instructions take the
// weights unsigned, as they are stored; `correction` takes the zero out again: -zero * (the activations that one 32-bit
// lane adds up), 8 neighbours of 4-bit forms', 4 of int8's. By lane and not by group, so that no lane holds a large
// number that another lane would have to cancel in float32.
struct alignas(64) Block {
  int8_t q[kBlock];
  int32_t correction[kBlock / 4];
  float scale[kBlock / kQuantGroup];
  alignas(64) float spread[kBlock / 8];  // 4-bit forms: the same, for each 32-bit lane of the products
};

// Two weights to a byte unpack to the even and then the odd ones of 64 bytes at once: so are their activations ordered.
constexpr bool even_odd(Form form) { return form != Form::kInt8; }

// The same for products with many tokens, in their own order; `correction` is that of 32 activations.
struct PlainBlock {
  int8_t q[kBlock];
  float scale[kBlock / kQuantGroup];
  int32_t correction[kBlock / kQuantGroup];
};

constexpr int64_t scale_bytes(Form form) { return form == Form::kNf4 ? 4 : 2; }

// Where rows of a matrix begin.
struct Place {
  const uint8_t *weights, *scales;
};

// y[t, r] for rows [first, last): grouped integer weights. `weights` holds `row_bytes` bytes a row.
// Prefetching goes on from the end of the rows to `next`, where this thread will probably read then: what lies behind
// the rows is another thread's.
struct QuantizedProduct {
  Form form;
  const uint8_t* weights;
  const uint8_t* scales;   // [out, in / group], bfloat16 or for NF4 float32
  const Block* x;          // [tokens, blocks]
  float* y;                // [tokens, out]
  int64_t tokens, out, in, group, row_bytes, blocks;
  Place next;
  const PlainBlock* plain = nullptr;  // instead of x, for the products with many tokens
};

// The same for bfloat16 weights [out, in] and float32 activations [tokens, in].
struct DenseProduct {
  const uint16_t* weights;
  const float* x;
  float* y;
  int64_t tokens, out, in;
};

struct Tier {
  const char* name;
  bool (*supported)();
  void (*quantized)(const QuantizedProduct&, int64_t first, int64_t last);
  void (*bf16)(const DenseProduct&, int64_t first, int64_t last);
  // For many tokens, or none where `quantized` serves as well.
  void (*quantized_gemm)(const QuantizedProduct&, int64_t first, int64_t last) = nullptr;
};

std::vector<const Tier*> supported_tiers();  // by this CPU, the plainest first

extern const Tier kPortable;
#ifdef LOCALMOE_X86
extern const Tier kAvx2, kAvxVnni, kAvx512;
void gemm_avx512(const QuantizedProduct&, int64_t first, int64_t last);
#endif

}  // namespace localmoe
