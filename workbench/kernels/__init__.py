"""Triton kernels, each beside its PyTorch reference: proved on every push without a GPU, fast on one.

One operation per module; every operation takes `backend="auto" | "torch" | "triton"` and runs anywhere
(see `backend`). Importing this package imports neither Triton nor any kernel. Where the product computes what
a kernel computes it calls the operation here; `tests/kernels/test_in_use.py` lists them.

| module | operations |
|---|---|
| `packing`, `rotary` | packed batches, rotary positions |
| `attention`, `unpadded` | attention without padding, BERT and Llama run unpadded |
| `block_sparse`, `semi_structured` | block-sparse and 2:4 weight times dense activations |
| `low_bit_linear` | int4, int8, NF4, FP8, MXFP4 weights |
| `scaled_matmul`, `int8_flow` | int8 x int8 and FP8 x FP8; int8 from operator to operator |
| `quantize`, `random_bits` | quantize-dequantize, counter-based random numbers |
| `hadamard`, `kronecker` | rotations fused with it |
| `optimizer_step` | AdamW, LAMB, Lion with fp32, bf16, int8 and FP8 states |
| `linear_cross_entropy` | chunked loss |
| `norm`, `activation`, `saved_activation` | norms and activations that keep 8 or 2 bits |
| `block_fisher`, `threshold` | Fisher blocks, their inverse; the k-th largest of 10^9 weights, unsorted |
| `registry`, `check` | what there is, what it compiles to |
| `bench`, `roofline`, `command` | how fast it is, how fast it could be |
"""

from workbench.kernels.command import main

__all__ = ["main"]
