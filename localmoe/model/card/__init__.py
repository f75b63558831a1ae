"""The model on a CUDA card: the same maths as `localmoe.model`'s, over the kernels of `localmoe.kernels.triton`.

Passes of up to 8 rows (decode, and guesses that are checked) take one way: preallocated memory, no host in between,
each row's bits its own, so that a CUDA graph can replay them. Longer passes, of a prompt, take another: tiles on tensor
cores. Whatever is here runs as well on CPU tensors through Triton's interpreter, which is how it is tested without a
card. Imported only where a card is used.
"""
