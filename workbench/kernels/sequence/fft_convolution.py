"""Long convolution by FFTs made of small matrix products (Monarch decomposition), a study of FlashFFTConv
(Fu et al., 2023).

With N = N1 N2, x as an N1 x N2 matrix X (n = n1 N2 + n2) and k = k1 + N1 k2,
the transform is three dense steps,

    Xhat[k1, k2] = ( (F1 X) * T ) F2,   F_N[j, k] = e^(-2 pi i j k / N),   T[k1, n2] = e^(-2 pi i k1 n2 / N)

and no permutation is needed when the filter's spectrum is kept in the same order. A convolution is transform,
product, inverse transform: eight real matrix products that a kernel can hold on the chip, where an FFT
of butterflies cannot use tensor cores. Order 3 splits N1 once more, without a kernel of its own. Where this
departs from the paper: a frequency-sparse filter is zeroed and no block of it is skipped, and gating and
partial convolutions are left out.

>>> u, k = torch.randn(2, 3, 64), torch.randn(3, 64)
>>> bool(torch.allclose(fft_convolution(u, k), fft_convolution_reference(u, k), atol=1e-4))
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import jit, mma, narrow, on_device, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel


def fft_convolution_reference(u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal convolution y[t] = sum_s k[s] u[t - s] by `torch.fft` on 2 L points;
    u (batch, channels, L), k (channels, L).
    """
    n = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u.float(), n) * torch.fft.rfft(k.float(), n), n)[
        ..., : u.shape[-1]
    ].to(u.dtype)


def factors(n: int, order: int) -> tuple[int, ...]:
    """`order` powers of two, as equal as can be, smallest last, whose product is n.

    >>> factors(8192, 2), factors(8192, 3)
    ((128, 64), (32, 16, 16))
    """
    if n < 2**order or n & (n - 1) or order < 1:
        raise BadInput(f"n = {n}, order = {order}: a power of two of at least 2^order is needed")
    log, rest = divmod(n.bit_length() - 1, order)
    return tuple(2 ** (log + (i < rest)) for i in range(order))


def dft_matrix(n: int, device: Any = None) -> torch.Tensor:
    """(n, n) complex128: e^(-2 pi i j k / n), with the exponent reduced before it is rounded."""
    j = torch.arange(n, device=device)
    return torch.polar(
        torch.ones(n, n, dtype=torch.float64, device=device),
        -2 * math.pi * ((j[:, None] * j) % n).double() / n,
    )


def monarch_transform(x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """DFT of x (..., N) by matrix products of the given sizes, in Monarch order:
    entry (k1, k2) of the last step's matrix, flattened.
    """
    if len(sizes) == 1:
        return x @ dft_matrix(sizes[0], x.device).to(x.dtype)
    n1, n2 = math.prod(sizes[:-1]), sizes[-1]
    matrix = x.view(*x.shape[:-1], n1, n2)
    first = monarch_transform(matrix.transpose(-1, -2), sizes[:-1]).transpose(
        -1, -2
    )  # (k1 in its own order, n2)
    j = monarch_order(sizes[:-1], x.device)
    twiddle = torch.polar(
        torch.ones(n1, n2, dtype=torch.float64, device=x.device),
        -2 * math.pi * (j[:, None] * torch.arange(n2, device=x.device)).double() / (n1 * n2),
    ).to(x.dtype)
    return ((first * twiddle) @ dft_matrix(n2, x.device).to(x.dtype)).flatten(-2)


def monarch_order(sizes: tuple[int, ...], device: Any = None) -> torch.Tensor:
    """(N,) int64: the frequency at each place of `monarch_transform`'s result."""
    if len(sizes) == 1:
        return torch.arange(sizes[0], device=device)
    n1 = math.prod(sizes[:-1])
    return (
        monarch_order(sizes[:-1], device)[:, None] + n1 * torch.arange(sizes[-1], device=device)
    ).flatten()


def cost(
    n: int, order: int, batch: int, bandwidth: float, tensor: float, on_chip: float, chip_bytes: int = 2**17
) -> float:
    """Seconds of one forward transform of `batch` sequences of n complex fp16 points
    (Fu et al., 2023, equation 2, simplified).

    Each of the `order` steps of size N_i does 16 N N_i real operations at `tensor` FLOP/s and moves 4 N bytes
    at `bandwidth` (bytes/s), or at `on_chip` when a sequence fits `chip_bytes`.
    Larger orders do less arithmetic and more moving.
    """
    per_step = [
        16.0 * n * size / tensor + 2 * 4.0 * n / (on_chip if 4 * n <= chip_bytes else bandwidth)
        for size in factors(n, order)
    ]
    return batch * sum(per_step)


@jit
def _complex(ar, ai, br, bi):
    """Product of two complex matrices given as real and imaginary parts."""
    zero = tl.zeros([ar.shape[0], br.shape[1]], tl.float32)
    return mma(ar, br, zero) - mma(ai, bi, zero), mma(ar, bi, zero) + mma(ai, br, zero)


@jit
def _convolve(
    u_ptr,
    y_ptr,
    f1_ptr,
    f2_ptr,
    t_ptr,
    k_ptr,
    channels,
    length,
    conjugate,
    N1: tl.constexpr,
    N2: tl.constexpr,
    KIND: tl.constexpr,
):
    """One channel of one sequence. Tables hold the real part, then the imaginary part;
    k is the filter's spectrum / N.
    """
    program = tl.program_id(0).to(tl.int64)
    channel = program % channels
    i = tl.arange(0, N1)
    j = tl.arange(0, N2)
    at = i[:, None] * N2 + j[None, :]
    u = tl.load(u_ptr + program * length + at, mask=at < length, other=0.0)
    f1r = tl.load(f1_ptr + i[:, None] * N1 + i[None, :])
    f1i = tl.load(f1_ptr + N1 * N1 + i[:, None] * N1 + i[None, :])
    zero = tl.zeros([N1, N2], tl.float32)
    u = narrow(u.to(tl.float32), KIND)
    ar = mma(f1r, u, zero)
    ai = mma(f1i, u, zero)
    tr = tl.load(t_ptr + at)
    ti = tl.load(t_ptr + N1 * N2 + at)
    br = ar * tr - ai * ti
    bi = ar * ti + ai * tr
    f2r = tl.load(f2_ptr + j[:, None] * N2 + j[None, :])
    f2i = tl.load(f2_ptr + N2 * N2 + j[:, None] * N2 + j[None, :])
    cr, ci = _complex(narrow(br, KIND), narrow(bi, KIND), f2r, f2i)
    kr = tl.load(k_ptr + channel * (2 * N1 * N2) + at)
    ki = tl.load(k_ptr + channel * (2 * N1 * N2) + N1 * N2 + at) * conjugate
    dr = cr * kr - ci * ki
    di = cr * ki + ci * kr
    dr = narrow(dr, KIND)
    di = narrow(di, KIND)
    er = mma(dr, f2r, zero) + mma(di, f2i, zero)  # times the conjugate
    ei = mma(di, f2r, zero) - mma(dr, f2i, zero)
    gr = er * tr + ei * ti
    gi = ei * tr - er * ti
    y = mma(f1r, narrow(gr, KIND), mma(f1i, narrow(gi, KIND), zero))
    tl.store(y_ptr + program * length + at, narrow(y, y_ptr.dtype.element_ty), mask=at < length)


def _tables(sizes: tuple[int, int], kind: torch.dtype, device: Any) -> list[torch.Tensor]:
    twiddle = torch.polar(
        torch.ones(sizes, dtype=torch.float64),
        -2 * math.pi * torch.outer(*(torch.arange(n).double() for n in sizes)) / math.prod(sizes),
    )
    split = [torch.stack([m.real, m.imag]) for m in (dft_matrix(sizes[0]), dft_matrix(sizes[1]), twiddle)]
    return [split[0].to(device, kind), split[1].to(device, kind), split[2].to(device, torch.float32)]


def filter_spectrum(k: torch.Tensor, sizes: tuple[int, ...], kept: float = 1.0) -> torch.Tensor:
    """(channels, 2, N) fp32: spectrum of k (channels, L), zero-padded to N, divided by N, in Monarch order.

    `kept` < 1 zeroes all but that share of the places, highest frequencies first (frequency-sparse filters).
    """
    n = math.prod(sizes)
    order = monarch_order(sizes, k.device)
    spectrum = torch.fft.fft(k.double(), n)[:, order] / n
    if kept < 1:
        frequency = torch.minimum(order, n - order)
        spectrum = torch.where(frequency <= round(kept * n / 2), spectrum, 0)
    return torch.stack([spectrum.real, spectrum.imag], 1).float()


def _launch(u: torch.Tensor, spectrum: torch.Tensor, sizes: tuple[int, int], conjugate: bool) -> torch.Tensor:
    u = u.contiguous()
    y = torch.empty_like(u)
    kind = (
        torch.float32
        if u.dtype == torch.float32
        else torch.float16
        if u.dtype == torch.float16
        else torch.bfloat16
    )
    if u.numel():
        with on_device(u):
            _convolve[(u.shape[0] * u.shape[1],)](
                u,
                y,
                *_tables(sizes, kind, u.device),
                spectrum,
                u.shape[1],
                u.shape[2],
                -1.0 if conjugate else 1.0,
                N1=sizes[0],
                N2=sizes[1],
                KIND={torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
                    kind
                ],
                num_warps=4 if math.prod(sizes) <= 1024 else 8,
            )
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, k: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
        spectrum = filter_spectrum(k, sizes)
        ctx.save_for_backward(u, k, spectrum)
        ctx.sizes = sizes
        return _launch(u, spectrum, sizes, conjugate=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """du is the correlation of the gradient with k, the same kernel with the conjugate spectrum;
        dk that of u with the gradient.
        """
        u, k, spectrum = ctx.saved_tensors
        g, n = grads[0], 2 * u.shape[-1]
        du = _launch(g, spectrum, ctx.sizes, conjugate=True)
        product = (torch.fft.rfft(u.float(), n).conj() * torch.fft.rfft(g.float(), n)).sum(0)
        return du, torch.fft.irfft(product, n)[..., : k.shape[-1]].to(k.dtype), None


def fft_convolution(u: torch.Tensor, k: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Causal convolution y[b, c, t] = sum_{s <= t} k[c, s] u[b, c, t - s];
    u (batch, channels, L), k (channels, L), L a power of two.

    Differentiable in both. The kernel holds a whole sequence on the chip: L from 128 to 2048, to 512 below
    compute capability 9.0, where 2048 would spill registers.
    """
    if u.ndim != 3 or k.shape != u.shape[1:] or u.shape[-1] < 2 or u.shape[-1] & (u.shape[-1] - 1):
        raise BadInput(
            f"u {tuple(u.shape)}, k {tuple(k.shape)}: need (batch, channels, L) and (channels, L), "
            "L a power of two"
        )
    sizes = factors(2 * u.shape[-1], 2)
    most = 512 if u.is_cuda and torch.cuda.get_device_capability(u.device) < (9, 0) else 2048
    if 128 <= u.shape[-1] <= most and use_triton("fft_convolution", u.numel(), u, backend):
        return _Convolution.apply(u, k, sizes)
    return fft_convolution_reference(u, k) if u.numel() else u * 1.0


KERNELS = (
    Kernel(
        "fft_convolution.forward_backward",
        _convolve,
        tuple(
            Configuration(
                f"{kind}-{n1}x{n2}",
                {
                    "u_ptr": f"*{kind}",
                    "y_ptr": f"*{kind}",
                    "f1_ptr": f"*{kind}",
                    "f2_ptr": f"*{kind}",
                    "t_ptr": "*fp32",
                    "k_ptr": "*fp32",
                    "conjugate": "fp32",
                },
                {"N1": n1, "N2": n2, "KIND": kind},
                warps=4 if n1 * n2 <= 1024 else 8,
                capability=80 if n1 * n2 <= 1024 else 90,
            )
            for kind, n1, n2 in (("bf16", 32, 32), ("fp16", 32, 32), ("bf16", 64, 64))
        ),
    ),
)


def cases() -> list[Case]:
    """64 x 768 channels of 2048 points."""
    batch, channels, length = 64, 768, 2048

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        u = torch.randn(batch, channels, length, device=device, dtype=torch.bfloat16)
        k = torch.randn(channels, length, device=device)
        sizes = (64, 64)
        spectrum = filter_spectrum(k, sizes)
        return lambda: _launch(u, spectrum, sizes, False), lambda: fft_convolution_reference(u, k)

    n = batch * channels * length
    return [
        Case(
            "fft_convolution",
            f"{batch} x {channels} x {length} bf16",
            n,
            4.0 * n,
            2.0 * n * 24 * 64,
            make,
            "bf16",
            "torch.fft",
        )
    ]
