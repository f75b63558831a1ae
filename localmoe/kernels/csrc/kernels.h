// What the kernel tiers share: the form activations take, and one entry a weight format.
#pragma once

#include <cstdint>
#include <vector>

namespace localmoe {

constexpr int64_t kBlock = 128;     // activations handled at a time
constexpr int64_t kQuantGroup = 32; // activations that share a scale
constexpr int64_t kPrefetch = 4096; // bytes ahead: the distance that reached the most bandwidth from memory

// 128 activations rounded to int8, `scale` one a 32. Weights are stored as unsigned q + offset, which is what
// dot-product instructions take; `correction` takes the offset out again: -offset * (the activations that one
// 32-bit lane adds up), 8 neighbours of int4's, 4 of int8's. By lane and not by group, so that no lane holds
// a large number that another lane would have to cancel in float32.
struct alignas(64) Block {
  int8_t q[kBlock];
  int32_t correction[kBlock / 4];
  float scale[kBlock / kQuantGroup];
};

// How a block's q are ordered. int4 unpacks to the even and then the odd elements of 64 bytes at once.
enum class Order { kNatural, kEvenOdd };

// The same for products with many tokens, in their own order; `correction` is that of 32 activations.
struct PlainBlock {
  int8_t q[kBlock];
  float scale[kBlock / kQuantGroup];
  int32_t correction[kBlock / kQuantGroup];
};

// y[t, r] for rows [first, last): grouped integer weights. `weights` holds `row_bytes` bytes a row.
// Prefetching goes on from the end of the rows to `next`, where this thread will probably read then: what lies behind
// the rows is another thread's.
struct QuantizedProduct {
  const uint8_t* weights;
  const uint16_t* scales;  // bfloat16 [out, in / group]
  const Block* x;          // [tokens, blocks]
  float* y;                // [tokens, out]
  int64_t tokens, out, in, group, row_bytes, blocks;
  const uint8_t* next;
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
  void (*int4)(const QuantizedProduct&, int64_t first, int64_t last);
  void (*int8)(const QuantizedProduct&, int64_t first, int64_t last);
  void (*bf16)(const DenseProduct&, int64_t first, int64_t last);
  // For many tokens, or none where the others serve as well.
  void (*int4_gemm)(const QuantizedProduct&, int64_t first, int64_t last) = nullptr;
  void (*int8_gemm)(const QuantizedProduct&, int64_t first, int64_t last) = nullptr;
};

// Rounds `n` activations to int8 in ceil(n / 128) blocks; what lies beyond n is zero.
void quantize_activations(const float* x, int64_t n, int offset, Order order, Block* blocks);

// The same for one block of the other kind, of at most 128 activations.
void quantize_plain(const float* x, int64_t n, int offset, PlainBlock& block);

std::vector<const Tier*> supported_tiers();  // by this CPU, the plainest first

extern const Tier kPortable;
#ifdef LOCALMOE_X86
extern const Tier kAvx2, kAvxVnni, kAvx512;
void int4_gemm_avx512(const QuantizedProduct&, int64_t first, int64_t last);
void int8_gemm_avx512(const QuantizedProduct&, int64_t first, int64_t last);
#endif

}  // namespace localmoe
