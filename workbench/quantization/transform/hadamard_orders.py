"""Hadamard matrices of the widths that models have: 576 = 36 x 16, 1536 = 12 x 128, 2560 = 20 x 128.

Sylvester's construction (1867) gives powers of two only, and the largest one that divides 576 mixes 64
features. Paley's two constructions (1933) give q + 1 for a prime q = 3 mod 4 and 2 (q + 1) for a prime
q = 1 mod 4; the Kronecker product of a Paley and a Sylvester matrix is a Hadamard matrix again. That is how
QuaRot (Ashkboos et al. 2024, section 3) mixes all the features of a layer.

>>> widest(576), widest(384), widest(11008)
(576, 384, 256)
>>> core(576), core(64)
(36, 1)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from workbench.kernels.quantized.hadamard import hadamard, hadamard_matrix

#: The widest Paley matrix: beyond it a dense product costs more than mixing within blocks loses.
WIDEST_CORE = 512


def power_of_two(width: int) -> int:
    """The largest power of two that divides `width`: 384 -> 128."""
    return width & -width


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def has_paley(order: int) -> bool:
    """Whether one of Paley's constructions over a prime gives this order."""
    first, second = order - 1, order // 2 - 1
    return order % 4 == 0 and ((first % 4 == 3 and is_prime(first)) or (second % 4 == 1 and is_prime(second)))


@functools.cache
def core(order: int) -> int:
    """The order of the Paley factor of a Hadamard matrix of `order`: 1 for a power of two, 0 where none is
    known here.
    """
    power = power_of_two(order)
    odd = order // power
    if odd == 1:
        return 1
    factors = (odd << bits for bits in range(2, power.bit_length()))
    return next((m for m in factors if m <= WIDEST_CORE and has_paley(m)), 0)


def widest(width: int) -> int:
    """The order of the Hadamard matrix for rows of `width`: the width itself where there is one, else the
    largest power of two that divides it.
    """
    return width if core(width) else power_of_two(width)


def residues(prime: int) -> Tensor:
    """(prime, prime) Jacobsthal matrix: entry (i, j) is 1 where i - j is a non-zero square modulo the prime,
    -1 where it is no square, 0 on the diagonal.
    """
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[[number * number % prime for number in range(1, prime)]] = 1
    character[0] = 0
    index = torch.arange(prime)
    return character[(index[:, None] - index) % prime]


@functools.cache
def paley(order: int) -> Tensor:
    """The Hadamard matrix of +-1, float64, of Paley's second construction (symmetric) where there is one,
    else of the first (skew but for its diagonal).
    """
    second = order // 2 - 1
    symmetric = second % 4 == 1 and is_prime(second)
    prime = second if symmetric else order - 1
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    bordered[1:, 1:] = residues(prime)
    bordered[0, 0] = 0
    if not symmetric:
        bordered[1:, 0] = -1
        return bordered + torch.eye(order, dtype=torch.float64)
    one, other = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    eye = torch.eye(prime + 1, dtype=torch.float64)
    return torch.kron(bordered, one.double()) + torch.kron(eye, other.double())


def mixed(rows: Tensor, order: int, back: bool = False) -> Tensor:
    """Rows (..., width) times the orthonormal Hadamard matrix of `order` on each `order` features, or, with
    `back`, times its transpose; in fp32 or wider, returned in the rows' type.
    """
    size = core(order)
    inner = order // size
    found = hadamard(rows, inner) if inner > 1 else rows
    if size == 1:
        return found
    matrix = paley(order=size).to(found.device, torch.promote_types(found.dtype, torch.float32))
    matrix = matrix * size**-0.5
    blocks = found.to(matrix.dtype).unflatten(-1, (-1, size, inner))
    return ((matrix if back else matrix.mT) @ blocks).flatten(-3).to(rows.dtype)


def matrix_of_order(order: int) -> Tensor:
    """The orthogonal matrix (order, order), float64, that `mixed` multiplies with: Paley kron Sylvester."""
    size = core(order)
    sylvester = hadamard_matrix(order // size, dtype=torch.float64)
    return sylvester if size == 1 else torch.kron(paley(size) * size**-0.5, sylvester)
