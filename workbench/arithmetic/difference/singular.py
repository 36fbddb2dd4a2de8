"""Differences by their singular vectors: the first of them in 16 bits, or all in widths that fall off."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.arithmetic.difference.difference import DIFFERENCE, Matrix, Stored, half
from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.packing import packed_matrix, unpacked_matrix
from workbench.quantization.rounding.feedback import linear_feedback
from workbench.quantization.rounding.gptq import gptq_with_moving_scales

#: Weights that share a scale and a zero point, and GPTQ's damping, as in the authors' run.
GROUP, DAMP = 128, 0.01
#: Widths that are floats and not a grid: nothing is rounded to fewer bits than their type has.
FLOATS = {16: torch.float16, 32: torch.float32}


class LowRank(Options):
    rank: int = parameter(16, "singular vectors that are kept", ge=1, le=65536)


@DIFFERENCE.add(
    "singular-vectors",
    formula="w = w_base + U_r S_r V_r^T, the first r of the singular value decomposition of d",
    source="Eckart and Young 1936; the baseline of Liu et al. 2024 and Ping et al. 2024",
    title="Low-rank difference",
    options=LowRank,
)
class Truncated:
    def __init__(self, options: LowRank) -> None:
        self.options = options

    def pack(self, matrix: Matrix) -> Stored:
        left, values, right = decomposed(matrix.difference)
        rank = min(self.options.rank, len(values))
        root = values[:rank].sqrt()
        return {"up": half(left[:, :rank] * root), "down": half(root[:, None] * right[:rank])}

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        return base + stored["up"].float() @ stored["down"].float()


def decomposed(difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), singular values (k,) from the largest, V^T (k, in), float32, computed in float64."""
    left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
    return left.float(), values.float(), right.float()


class Mixed(Options):
    widths: tuple[int, ...] = parameter((8, 3, 2), "bits of each group of singular vectors", min_length=1)
    ranks: tuple[int, ...] = parameter(
        (2, 32), "vectors of each group; one fewer: the last takes what is left"
    )
    average: float = parameter(
        1.0, "bits for each weight of the matrix that the last group may fill up to", gt=0, le=32, unit="bits"
    )


@DIFFERENCE.add(
    "delta-come",
    formula="d = sum_g Q_b(U_g) S_g Q_b(V_g)^T, b falling with the singular values; V, then U, by GPTQ",
    source="Ping et al. 2024, Delta-CoMe, eqs. 3 to 5; the authors' code",
    needs="inputs",
    title="Delta-CoMe",
    options=Mixed,
)
class DeltaCoMe:
    def __init__(self, options: Mixed) -> None:
        self.options = options
        if wrong := [each for each in options.widths if each not in FLOATS and not 1 <= each <= 8]:
            raise BadInput(f"method.widths: {wrong[0]} is not accepted, widths are 1 to 8, 16 or 32 bits")
        if len(options.ranks) not in (len(options.widths), len(options.widths) - 1):
            raise BadInput(
                f"method.ranks: {len(options.ranks)} are given for {len(options.widths)} widths; give as "
                "many, or one fewer"
            )

    def groups(self, out: int, inside: int) -> Iterator[tuple[int, int, int]]:
        """(width, first, last) of each group of singular vectors of a matrix."""
        most, begin, bits = min(out, inside), 0, self.options.average * out * inside
        for which, width in enumerate(self.options.widths):
            size = out + inside
            given = which < len(self.options.ranks)
            count = self.options.ranks[which] if given else max(int(bits // (width * size)), 0)
            end = min(begin + count, most)
            if end > begin:
                yield width, begin, end
            bits -= width * size * (end - begin)
            begin = end

    def pack(self, matrix: Matrix) -> Stored:
        left, values, right = decomposed(matrix.difference)
        gram = torch.eye(right.shape[1]) if matrix.gram is None else matrix.gram()
        stored: Stored = {"values": values}
        end = 0
        for number, (width, begin, end) in enumerate(self.groups(*matrix.base.shape)):
            rows, scale = right[begin:end], values[begin:end, None]
            stored |= prefixed(f"v{number}.", rounded(rows, width, gram))
            mixed = scale * unrounded(stored, f"v{number}.", width, rows.shape)
            columns = left[:, begin:end]
            stored |= prefixed(f"u{number}.", rounded(columns, width, mixed @ gram @ mixed.T))
        return stored | {"values": values[:end]}

    def unpack(self, stored: Stored, base: Tensor) -> Tensor:
        total = base.clone()
        for number, (width, begin, end) in enumerate(self.groups(*base.shape)):
            rows = unrounded(stored, f"v{number}.", width, (end - begin, base.shape[1]))
            columns = unrounded(stored, f"u{number}.", width, (base.shape[0], end - begin))
            total += (columns * stored["values"][begin:end]) @ rows
        return total


def prefixed(prefix: str, stored: Stored) -> Stored:
    return {prefix + name: value for name, value in stored.items()}


def rounded(matrix: Tensor, width: int, gram: Tensor) -> Stored:
    """A matrix (out, in) in so many bits: unsigned codes with a scale and a zero point for each row and group
    of 128, rounded by GPTQ on the second moment of what it reads; or floats.
    """
    if width in FLOATS:
        return {"floats": matrix.to(FLOATS[width]).clone()}
    format, inside = named(f"uint{width}"), matrix.shape[1]
    group = GROUP if inside % GROUP == 0 else inside
    feedback = linear_feedback(gram.double(), DAMP).float()
    values, grid = gptq_with_moving_scales(matrix, feedback, format, group, "minmax")
    return packed_matrix(values, grid)


def unrounded(stored: Stored, prefix: str, width: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    mine = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    if width in FLOATS:
        return mine["floats"].float()
    group = GROUP if shape[1] % GROUP == 0 else shape[1]
    scale = mine["scale"].float()
    return unpacked_matrix(mine, Grid(named(f"uint{width}"), scale, None, group), tuple(shape))
