"""Triton kernels, each beside its PyTorch reference: proved on every push without a GPU, fast on one.

One operation per module; every operation takes `backend="auto" | "torch" | "triton"` and runs anywhere
(see `backend`). Importing this package imports neither Triton nor any kernel. Where the product computes what
a kernel computes it calls the operation here; `tests/kernels/test_in_use.py` lists them.

| module | operations |
|---|---|
| `sequence`: `packing`, `rotary` | packed batches, rotary positions |
| `sequence`: `attention`, `unpadded` | attention without padding, BERT and Llama run unpadded |
| `sequence`: `fft_convolution` | long convolutions by the fast Fourier transform |
| `sparse`: `block_sparse`, `semi_structured` | block-sparse and 2:4 weight times dense activations |
| `sparse`: `block_fisher`, `threshold` | Fisher blocks, their inverse; the k-th largest weight, unsorted |
| `quantized`: `low_bit_linear` | int4, int8, NF4, FP8, MXFP4 weights |
| `quantized`: `scaled_matmul`, `int8_flow` | int8 x int8 and FP8 x FP8; int8 from operator to operator |
| `quantized`: `numbers`, `quantize` | numbers before scaling, quantize-dequantize |
| `quantized`: `hadamard`, `kronecker` | rotations fused with it |
| `quantized`: `round_columns` | GPTQ's column loop |
| `training`: `optimizer_step` | AdamW, LAMB, Lion with fp32, bf16, int8 and FP8 states |
| `training`: `linear_cross_entropy` | chunked loss |
| `training`: `norm`, `activation`, `saved_activation` | norms and activations that keep 8 or 2 bits |
| `random_bits` | counter-based random numbers |
| `registry`, `check` | what there is, what it compiles to |
| `bench`, `roofline`, `command` | how fast it is, how fast it could be |
"""

from workbench.kernels.command import main

__all__ = ["main"]
