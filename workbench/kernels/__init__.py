"""Triton kernels, each beside its PyTorch reference: proved on every push without a GPU, fast on one.

One operation per module; every operation takes `backend="auto" | "torch" | "triton"` and runs anywhere (see `backend`).
Importing this package imports neither Triton nor any kernel.

| module | operations |
|---|---|
| `packing`, `rotary`, `attention`, `unpadded` | packed batches, rotary positions, attention without padding, BERT and Llama run unpadded |
| `block_sparse`, `semi_structured` | block-sparse and 2:4 weight times dense activations |
| `low_bit_linear`, `scaled_matmul`, `int8_flow` | int4, int8, NF4, FP8, MXFP4 weights; int8 x int8 and FP8 x FP8; int8 from operator to operator |
| `quantize`, `hadamard`, `kronecker`, `random_bits` | quantize-dequantize, rotations fused with it, counter-based random numbers |
| `optimizer_step` | AdamW, LAMB, Lion with fp32, bf16, int8 and FP8 states |
| `linear_cross_entropy`, `norm`, `activation`, `saved_activation` | chunked loss; norms and activations that keep 8 or 2 bits |
| `block_fisher`, `threshold` | Fisher blocks and their inverse; the k-th largest of 10^9 weights without a sort |
| `registry`, `check`, `bench`, `roofline`, `command` | what there is, what it compiles to, how fast it is, how fast it could be |
"""

from workbench.kernels.command import main

__all__ = ["main"]
