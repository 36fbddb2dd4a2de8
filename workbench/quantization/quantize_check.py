"""What `quantize` refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workbench.errors import BadInput, notice
from workbench.quantization.activations.activations import KEY_VALUE, key_value_layers
from workbench.quantization.number.formats import Format
from workbench.quantization.number.grid import group_of
from workbench.quantization.quantize_settings import QuantizeSettings
from workbench.quantization.quantized_layer import mask_of
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.transform.transform import TRANSFORM
from workbench.subjects import Layer, Subject

#: Trait of a rounding -> what a format must be, why, and what helps.
ROUNDING_NEEDS: dict[str, tuple[Callable[[Format], bool], str]] = {
    "needs equal steps": (
        lambda format: format.uniform,
        "chooses floor or ceiling of integers, {format} has no equal steps; "
        "use format int, or another rounding",
    ),
    "needs zero points": (
        lambda format: format.affine,
        "moves zero points and {format} has none; use an unsigned format such as uint4",
    ),
    "needs real scales": (
        lambda format: format.scale == "real",
        "learns real scales and {format} has none; use an int, ExMy or codebook format",
    ),
}


def check(settings: QuantizeSettings, on: Subject) -> None:
    """`BadInput` for choices that do not go together, or not with this subject."""
    layers = on.layers(settings.layers)
    format = settings.format_for(layers[0].name)
    check_rounding(settings, format)
    check_salient(settings, layers, format)
    check_transform(settings, layers)
    check_activations(settings, layers)
    check_range(settings, format)
    check_groups(settings, layers, format)
    check_layer_bits(settings, on)
    check_sequence(settings)
    on.split("calibration")
    if settings.test_examples:
        on.split("test")


def check_sequence(settings: QuantizeSettings) -> None:
    """Say which settings of a walk over blocks have no effect."""
    needed = {
        "sequential_damp": (settings.paired, "sequential and target outputs"),
        "target": (settings.sequential, "sequential"),
        "within": (
            settings.in_sequence and settings.walks,
            "sequential, target weights and an objective of layers",
        ),
    }
    for name, (met, what) in needed.items():
        if name in settings.model_fields_set and not met:
            notice(f"{name}: has no effect without {what}")


def check_groups(settings: QuantizeSettings, layers: Sequence[Layer], format: Format) -> None:
    """Says of a group size that was given where it has no effect, and where groups do not come out even."""
    for layer in layers:
        width = layer.shape[-1]
        group = group_of(format, settings.granularity, settings.group_size, width)
        if "group_size" not in settings.model_fields_set:
            return
        if group != min(settings.group_size, width):
            notice(
                f"group_size: has no effect with format {settings.format}, granularity "
                f"{settings.granularity}; its groups have {group} columns"
            )
            return
        if width % group:
            notice(
                f"group_size: {group} does not divide the {width} inputs of {layer.name}; its last group has "
                f"{width % group}"
            )
            return


def check_rounding(settings: QuantizeSettings, format: Format) -> None:
    rounding = settings.rounding
    for trait, (has, why) in ROUNDING_NEEDS.items():
        if rounding.has(trait) and not has(format):
            raise BadInput(f"rounding: {rounding} {why.format(format=format.name)}")
    if rounding.has("column factors") and settings.transform != "none":
        raise BadInput(
            f"rounding: {rounding} learns column factors, a transform of its own; use transform none"
        )
    if not settings.by_blocks:
        return
    if settings.transform != "none":
        raise BadInput(
            "rounding.objective: 'block' learns in the model's own coordinates; "
            "use transform none, or objective layer"
        )
    if settings.adapter != "none":
        raise BadInput(
            "adapter: a low-rank term is fitted layer by layer; use rounding.objective layer, or adapter none"
        )
    objective = rounding.options.objective.options
    if 1 < objective.window <= objective.overlap:
        raise BadInput(
            f"rounding.objective.overlap: windows of {objective.window} blocks cannot share "
            f"{objective.overlap}; give an overlap smaller than the window"
        )


def check_salient(settings: QuantizeSettings, layers: Sequence[Layer], format: Format) -> None:
    if settings.salient == "none":
        return
    if not settings.rounding.has("any grid"):
        raise BadInput(
            f"salient: {settings.rounding} rounds on one grid; "
            f"use {', '.join(ROUNDING.with_trait('any grid'))}, or salient none"
        )
    if fused := stacked_experts(layers):
        raise BadInput(
            f"salient: {fused} is a stack of experts, each with salient weights of its own; "
            "choose other layers, or salient none"
        )
    if format.scale == "none":
        raise BadInput(
            f"salient: {format.name} has no scales; use an int, ExMy, codebook, block, "
            "ternary or binary format"
        )


def check_transform(settings: QuantizeSettings, layers: Sequence[Layer]) -> None:
    masked = [layer.name for layer in layers if mask_of(layer) is not None]
    if masked and settings.transform.has("mixes inputs"):
        kept = [name for name in TRANSFORM if "mixes inputs" not in TRANSFORM[name].traits]
        raise BadInput(
            f"transform: {settings.transform} mixes inputs, so the zeros of pruned layers ({masked[0]}, "
            f"...) would be lost; use {', '.join(kept)}"
        )


def check_activations(settings: QuantizeSettings, layers: Sequence[Layer]) -> None:
    if settings.rounds_inputs:
        settings.activations.options.format()
        if fused := stacked_experts(layers):
            raise BadInput(
                f"activations: {fused} reads its inputs inside a fused expert kernel; "
                "choose layers without experts, or activations none"
            )
    if settings.kv_bits == 1:
        raise BadInput("kv_bits: 1 bit is not accepted; it should be 0 (left alone) or 2 to 8")
    if settings.kv_bits and not key_value_layers(layers):
        raise BadInput(
            f"kv_bits: no layer of {settings.layers!r} is a key or value projection (names ending in "
            f"{', '.join(KEY_VALUE)})"
        )


def check_range(settings: QuantizeSettings, format: Format) -> None:
    if settings.range == "mean" and format.affine:
        raise BadInput("range: 'mean' needs a format symmetric about zero; use minmax or mse")
    if settings.range == "centred" and format.name != "binary":
        raise BadInput(
            "range: 'centred' makes a row's mean the zero point of binary weights, "
            f"not of {format.name}; use minmax or mse"
        )


def check_layer_bits(settings: QuantizeSettings, on: Subject) -> None:
    for glob, bits in settings.layer_bits.items():
        if settings.format.name != "int" or not 2 <= bits <= 8:
            raise BadInput(f"layer_bits: {glob!r} asks for {bits} bits; it takes 2 to 8 and format int")
        on.layers(glob)


def stacked_experts(layers: Sequence[Layer]) -> str:
    """The first layer that is a stack of experts, if any."""
    return next((layer.name for layer in layers if len(layer.shape) == 3), "")
