"""How weights are stored: int4, int8, NF4 and FP8 matrices, and the safetensors directories that hold them."""
