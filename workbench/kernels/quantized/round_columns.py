"""GPTQ's column loop: columns are rounded one after another, and each answers the errors before it.

For column j of (columns, out), with strictly upper triangular feedback F (see `rounding.feedback`):

    v_j = w_j + sum_{i<j} F_ij e_i,    q_j = round(v_j) on its grid,    e_j = w_j - q_j

(Frantar et al. 2023, algorithm 1, in the form of Chee et al. 2023, QuIP). PyTorch takes six operations a
column, each far too small for a GPU; the kernel keeps all columns of some outputs in registers and takes one
launch. Its sums run over the errors in order, PyTorch's as BLAS likes, so the two differ in the last digits
of v_j and, where v_j lies that near to a tie, in what it is rounded to.

>>> values, errors = torch.tensor([[0.6], [0.6]]), torch.tensor([[0.6], [0.6]])
>>> feedback, ones = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 1)
>>> round_columns(values, errors, feedback, ones, None, None, Numbers(0, -8, 7))
>>> values.flatten().tolist(), [round(e, 1) for e in errors.flatten().tolist()]
([1.0, 0.0], [-0.4, 0.6])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.backend import cdiv, jit, on_device, power_of_two, tl, use_triton
from workbench.kernels.quantized.numbers import Numbers, limits
from workbench.kernels.quantized.quantize import quantize_block
from workbench.kernels.registry import Case, Configuration, Kernel

#: Columns of one launch, and outputs of one program: 64 x 16 numbers in the registers of 128 threads.
COLUMNS, OUTPUTS = 64, 16


@jit
def _round_columns(
    values_ptr,
    errors_ptr,
    feedback_ptr,
    scale_ptr,
    zero_ptr,
    keep_ptr,
    code_ptr,
    columns,
    outputs,
    values_stride,
    errors_stride,
    keep_stride,
    feedback_row,
    feedback_column,
    scale_column,
    scale_output,
    zero_column,
    zero_output,
    low,
    high,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    CODES: tl.constexpr,
    ZERO: tl.constexpr,
    KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = out < outputs
    out = out.to(tl.int64)
    place = tl.arange(0, COLUMNS)
    work = tl.load(
        values_ptr + place[:, None].to(tl.int64) * values_stride + out[None, :],
        mask=(place < columns)[:, None] & inside[None, :],
        other=0.0,
    )
    for column in range(columns):
        value = tl.sum(tl.where((place == column)[:, None], work, 0.0), axis=0)
        s = tl.load(scale_ptr + column * scale_column + out * scale_output, mask=inside, other=1.0)
        z = tl.zeros_like(s)
        if ZERO:
            z = tl.load(zero_ptr + column * zero_column + out * zero_output, mask=inside, other=0.0)
        rounded = quantize_block(
            value, s, z, low, high, code_ptr, z, KIND, EXPONENT, MANTISSA, CODES, STOCHASTIC=False
        )
        if KEEP:
            kept = tl.load(keep_ptr + column * keep_stride + out, mask=inside, other=0.0)
            rounded = rounded * kept
        dense = tl.load(errors_ptr + column * errors_stride + out, mask=inside, other=0.0)
        error = dense - rounded
        tl.store(values_ptr + column * values_stride + out, rounded, mask=inside)
        tl.store(errors_ptr + column * errors_stride + out, error, mask=inside)
        answers = tl.load(
            feedback_ptr + column * feedback_row + place * feedback_column, mask=place < columns, other=0.0
        )
        work = work + answers[:, None] * error[None, :]


def round_columns(
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    numbers: Numbers | None,
    round_into: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """Round columns in their order, in place.

    values : (columns, out) the weights with the answers to whatever comes before these; then the rounded ones
    errors : (columns, out) the weights; then weights - values. Both float32, outputs side by side
    feedback : (columns, columns), zero on the diagonal and below it
    scale, zero : (columns, out), of any strides;  keep : (columns, out), 0 where a weight is pruned, or None
    numbers : what there is before scaling; None when the kernel does not know them
    round_into : what rounds to them in PyTorch, and may write into what it is given
    """
    if at_once(values, zero, numbers, backend) == COLUMNS:
        assert numbers is not None
        _launch(values, errors, feedback, scale, zero, keep, numbers)
    else:
        assert round_into is not None or numbers is not None
        _reference(values, errors, feedback, scale, zero, keep, round_into or numbers.round)  # type: ignore[union-attr]


def at_once(values: Tensor, zero: Tensor | None, numbers: Numbers | None, backend: str = "auto") -> int:
    """Columns to hand over together: more go through matrix products between two calls."""
    known = numbers is not None and (zero is None or numbers.kind == 0)
    return COLUMNS if known and use_triton("round_columns", values.numel(), values, backend) else 16


def _rows(t: Tensor | None) -> Iterable[Any]:
    """One row a column; the same tensor where they share one."""
    if t is None:
        return repeat(None)
    return repeat(t[0]) if t.stride(0) == 0 else t.unbind()


def _reference(
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    round_into: Callable[[Tensor], Tensor],
) -> None:
    # Columns that are not yet rounded count for nothing: their rows of the feedback are zeros here.
    before = errors.T
    columns = zip(
        range(len(values)),
        values.unbind(),
        errors.unbind(),
        feedback.unbind(1),
        _rows(scale),
        _rows(zero),
        _rows(keep),
        strict=False,
    )
    for i, value, error, answers, step, shift, kept in columns:
        if i:
            value.addmv_(before, answers)
        value.div_(step)
        if shift is None:
            units = round_into(value)
        else:
            units = round_into(value.add_(shift)).sub_(shift)
        torch.mul(units, step, out=value)
        if kept is not None:
            value.mul_(kept)
        error.sub_(value)


def _launch(
    values: Tensor,
    errors: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    numbers: Numbers,
) -> None:
    columns, outputs = values.shape
    if not values.numel():
        return
    code = torch.tensor(numbers.codebook or (0.0,), dtype=torch.float32, device=values.device)
    low, high = limits(numbers)
    shift = scale if zero is None else zero
    with on_device(values):
        _round_columns[(cdiv(outputs, OUTPUTS),)](
            values,
            errors,
            feedback,
            scale,
            shift,
            values if keep is None else keep,
            code,
            columns,
            outputs,
            values.stride(0),
            errors.stride(0),
            0 if keep is None else keep.stride(0),
            *feedback.stride(),
            *scale.stride(),
            *shift.stride(),
            low,
            high,
            KIND=numbers.kind,
            EXPONENT=numbers.exponent,
            MANTISSA=numbers.mantissa,
            CODES=len(numbers.codebook),
            ZERO=zero is not None,
            KEEP=keep is not None,
            COLUMNS=power_of_two(columns, 16),
            OUTPUTS=OUTPUTS,
            num_warps=4,
        )


_TYPES = dict.fromkeys(
    ("values_ptr", "errors_ptr", "feedback_ptr", "scale_ptr", "zero_ptr", "keep_ptr", "code_ptr"), "*fp32"
)


def _configuration(name: str, **constants: Any) -> Configuration:
    base = {
        "KIND": 0,
        "EXPONENT": 0,
        "MANTISSA": 0,
        "CODES": 0,
        "ZERO": False,
        "KEEP": False,
        "COLUMNS": COLUMNS,
        "OUTPUTS": OUTPUTS,
    }
    return Configuration(name, _TYPES | {"low": "fp32", "high": "fp32"}, base | constants)


KERNELS = (
    Kernel(
        "round_columns.forward",
        _round_columns,
        (
            _configuration("int"),
            _configuration("int-zero", ZERO=True),
            _configuration("int-zero-pruned", ZERO=True, KEEP=True),
            _configuration("e2m1", KIND=1, EXPONENT=2, MANTISSA=1),
            _configuration("nf4", KIND=2, CODES=16),
        ),
    ),
)


def cases() -> list[Case]:
    """One group of 64 columns of 4096 and of 14336 outputs, uint4 with zero points."""

    def make(outputs: int, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        weight = torch.randn(COLUMNS, outputs, device=device)
        feedback = (0.1 * torch.randn(COLUMNS, COLUMNS, device=device)).triu(1)
        low, high = weight.amin(0, keepdim=True), weight.amax(0, keepdim=True)
        scale = ((high - low) / 15).expand_as(weight)
        zero = (-low / scale[:1]).round().expand_as(weight)
        numbers = Numbers(0, 0.0, 15.0)

        def run(backend: str) -> None:
            round_columns(
                weight.clone(), weight.clone(), feedback, scale, zero, None, numbers, backend=backend
            )

        return lambda: run("triton"), lambda: run("torch")

    return [
        Case(
            "round_columns",
            f"{COLUMNS} x {outputs} uint4",
            COLUMNS * outputs,
            16.0 * COLUMNS * outputs,
            2.0 * COLUMNS * COLUMNS * outputs,
            lambda device, outputs=outputs: make(outputs, device),  # type: ignore[misc]
        )
        for outputs in (4096, 14336)
    ]
