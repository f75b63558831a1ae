"""The CUDA kernels, in Triton, over the layouts of `localmoe.formats`: one noun a file.

Nothing imports this package but what has found a CUDA device (`localmoe.kernels.cuda`) and the tests, which run it on
CPU tensors through Triton's interpreter. Activations are float32 and never rounded to int8; sums are float32.

Legend of shape comments: T rows (tokens of a pass), H hidden_size, I an expert's width, E experts, k experts a token,
A attention heads, r kv_lora_rank, n qk_nope_head_dim, p qk_rope_head_dim, v v_head_dim, S keys, N and K a matrix's
out and in.

Octets: a vector times a quantized matrix is read as eight streams, element j at `(j % 8) * K / 8 + j // 8`. Word w of a
row holds elements 8w to 8w+7 (int4, NF4: 32 bits, int8: 64), so element i of neighbouring words meets neighbouring
activations. Kernels that make such a vector write it in this order.
"""
