"""Training with quantized matrix products, outliers spread by Hadamard rotations
(Ashkboos, Nikdan, Tabesh et al. 2025, HALO).

A linear layer Y = X W^T trains through three products, each here on operands Q(.)
rounded with one scale a tensor:

    level       0                    1                     2
    Y           Q(X) Q(W)^T          Q(X H) Q(W H)^T       Q(X H) Q(W H)^T
    dX          Q(dY) Q(W)           Q(dY) Q(W)            K^T (Q(K dY) Q(W))
    dW          Q(dY)^T Q(X)         Q(dY)^T Q(X)          Q(dY)^T Q(X)

H mixes features, K mixes tokens; both are orthogonal, so without rounding every level is the plain layer. The
placement is that of the authors' published implementation; its quantized communication between devices is not
part of this. Here H and K are block-diagonal where a side is no power of two, and K mixes at most `TOKENS`
tokens, the last block filled with zeros. Rounding is simulated: values on the format's grid, products in
the model's own precision. What is not a linear layer, and all that lies outside the blocks, is left alone.
The gradient dY may have a format of its own: FP8 training rounds X and W to E4M3 and dY to E5M2 (Micikevicius
et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.kernels.quantized.hadamard import hadamard
from workbench.kernels.quantized.quantize import quantize_dequantize
from workbench.quantization.number.formats import Format, named
from workbench.quantization.transform.hadamard_orders import power_of_two
from workbench.statistics.inputs import WeightCalls
from workbench.subjects import Layer, Subject
from workbench.training.precision.precision import PRECISION

LEVELS = (0, 1, 2)
TOKENS = 128  # tokens mixed by one rotation: the product with the rotation stays small beside the layer's


def rounded(x: Tensor, format: Format | None) -> Tensor:
    """x on the format's grid that just holds its largest magnitude, same dtype; None rounds nothing."""
    if format is None:
        return x
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = work.abs().amax() / format.element.highest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if (numbers := format.element.numbers) is None:
        return (format.element.round(work / scale) * scale).to(x.dtype)
    rows = torch.atleast_2d(work)
    return (
        quantize_dequantize(rows, scale.view(1, 1), None, numbers, rows.shape[-1]).view(x.shape).to(x.dtype)
    )


def over_features(rows: Tensor) -> Tensor:
    """rows (..., features) H; H is its own inverse."""
    return hadamard(rows)


def over_tokens(rows: Tensor) -> Tensor:
    """K rows (tokens, features), tokens a multiple of the block it mixes; K is its own inverse."""
    block = min(TOKENS, power_of_two(len(rows)))
    return hadamard(rows, block, along=-2)


def filled(rows: Tensor) -> Tensor:
    """Rows of zeros after these, up to the next multiple of `TOKENS`,
    or the next power of two when they are fewer.
    """
    whole = TOKENS if len(rows) > TOKENS else 1 << (len(rows) - 1).bit_length()
    return torch.cat([rows, rows.new_zeros(-len(rows) % whole, rows.shape[1])])


def output(x: Tensor, weight: Tensor, format: Format | None, level: int) -> Tensor:
    """X W^T (tokens, out) of x (tokens, in) and weight (out, in)."""
    if level:
        x, weight = over_features(x), over_features(weight)
    return rounded(x, format) @ rounded(weight, format).mT


def input_gradient(
    error: Tensor, weight: Tensor, format: Format | None, level: int, of_error: Format | None = None
) -> Tensor:
    """dY W (tokens, in) of error (tokens, out); `of_error` is dY's own format, None the other operand's."""
    of_error = of_error or format
    if level < 2:
        return rounded(error, of_error) @ rounded(weight, format)
    return over_tokens(rounded(over_tokens(filled(error)), of_error) @ rounded(weight, format))[: len(error)]


def weight_gradient(
    error: Tensor, x: Tensor, format: Format | None, of_error: Format | None = None
) -> Tensor:
    """dY^T X (out, in); `of_error` is dY's own format, None the other operand's."""
    return rounded(error, of_error or format).mT @ rounded(x, format)


def relative_errors(x: Tensor, weight: Tensor, error: Tensor, format: Format) -> dict[str, float]:
    """Relative errors ||found - exact|| / ||exact|| (Frobenius) by name: "X", "W", "E" of the operands
    rounded as they are, "XH", "WH", "KE" rounded after their rotation;
    "Y", "dX", "dW" of the products without rotation, "Y rotated", "dX rotated" with it.
    """
    pairs = {
        "X": x,
        "W": weight,
        "E": error,
        "XH": over_features(x),
        "WH": over_features(weight),
        "KE": over_tokens(filled(error)),
    }
    found = {name: (rounded(value, format), value) for name, value in pairs.items()}
    found |= {
        "Y": (output(x, weight, format, 0), x @ weight.mT),
        "dX": (input_gradient(error, weight, format, 0), error @ weight),
        "dW": (weight_gradient(error, x, format), error.mT @ x),
    }
    found |= {
        "Y rotated": (output(x, weight, format, 1), found["Y"][1]),
        "dX rotated": (input_gradient(error, weight, format, 2), found["dX"][1]),
    }
    return {name: float((value - exact).norm() / exact.norm()) for name, (value, exact) in found.items()}


class QuantizedLinear(Function):
    """x (..., in), weight (out, in) -> (..., out) by the three products above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        format: Format | None,
        level: int,
        of_error: Format | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.format, ctx.level, ctx.of_error = format, level, of_error
        return output(x.flatten(0, -2), weight, format, level).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        error = upstream[0].flatten(0, -2)
        by_input = (
            input_gradient(error, weight, ctx.format, ctx.level, ctx.of_error).unflatten(0, x.shape[:-1])
            if ctx.needs_input_grad[0]
            else None
        )
        by_weight = (
            weight_gradient(error, x.flatten(0, -2), ctx.format, ctx.of_error)
            if ctx.needs_input_grad[1]
            else None
        )
        return by_input, by_weight, None, None, None


class QuantizedProducts(WeightCalls):
    """While entered, the products of these layers run on operands of a format, forward and backward;
    biases are added in full precision.

    format : a name with a scale and no zero point, as int8, int6 or e4m3fn, or "" for no rounding;
        level : 0, 1 or 2;  gradient_format : of the gradient of what a layer puts out, "" for the same
    `BadInput` for stacked experts, whose products are not those of a linear layer, for other formats and
    other levels.
    """

    def __init__(
        self, layers: Sequence[Layer], format: str, level: int = 0, gradient_format: str = ""
    ) -> None:
        super().__init__(layers)
        if level not in LEVELS:
            raise BadInput(
                f"rotation: {level} is no level; accepted: 0 (none), 1 (forward), "
                "2 (forward and input gradient)"
            )
        if stacked := [layer.name for layer in layers if len(layer.shape) == 3]:
            raise BadInput(
                f"precision: {stacked[0]} is a stack of experts; {format} products need plain linear layers"
            )
        self.format, self.level = scaled_format(format), level
        self.gradient_format = scaled_format(gradient_format)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if self.found(given["weight"]) is not None:
                product: Tensor = QuantizedLinear.apply(
                    given["input"], given["weight"], self.format, self.level, self.gradient_format
                )
                return product if given.get("bias") is None else product + given["bias"]
        elif name == "addmm" and len(args) == 3 and self.found(args[2]) is not None:
            product = QuantizedLinear.apply(
                args[1], args[2].mT, self.format, self.level, self.gradient_format
            )
            return product + args[0]
        return func(*args, **kwargs)


def scaled_format(name: str) -> Format | None:
    """A format of one scale a tensor; None for no name."""
    format = named(name) if name else None
    if format is not None and (format.scale != "real" or format.affine or format.block):
        raise BadInput(
            f"precision: {name} is no format of one scale a tensor without zero point; accepted: "
            "int2 to int16 and ExMy as e4m3fn"
        )
    return format


class Rounded(Options):
    format: str = parameter(help="number format with one scale a tensor, as int8, int4, e4m3fn or e5m2")
    rotation: int = parameter(
        0, "Hadamard rotations (HALO's levels): none, forward, forward and input gradient", ge=0, le=2
    )
    gradient_format: str = parameter(
        "", "format of the gradients of what layers put out, as e5m2 beside e4m3fn (empty: the same)"
    )


def spelled(options: Rounded) -> str:
    rotation = f" rotation {options.rotation}" if options.rotation else ""
    return (
        options.format
        + rotation
        + (f" gradients {options.gradient_format}" if options.gradient_format else "")
    )


@PRECISION.add(
    "rounded",
    formula="Y = Q(X H) Q(W H)^T, dX = K^T (Q(K dY) Q(W)), dW = Q(dY)^T Q(X)",
    source="Ashkboos, Nikdan, Tabesh et al. 2025, HALO",
    options=Rounded,
    spelled=spelled,
    beside={"precision.format": "int8"},
)
def rounded_products(subject: Subject, options: Rounded) -> QuantizedProducts:
    return QuantizedProducts(
        subject.layers("blocks"), options.format, options.rotation, options.gradient_format
    )
