"""Quantized subjects for other programs: compressed-tensors checkpoints (transformers, vLLM) and ONNX files
(ONNX Runtime).

Values are carried over exactly. What a target cannot express is refused by name before anything is written.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import BadInput, notice
from workbench.quantization.activations.activations import ActivationQuant
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.number.split_grid import SplitGrid
from workbench.storage import replacing
from workbench.storage.forecast import in_words, weight_bytes
from workbench.storage.reopening import check_exported, probe
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import bake
from workbench.subjects.checkpoint_files import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Bytes of weights from which on it is said that they are held.
SAID = 200_000_000


#: Session setting of ONNX Runtime by which products with integer weights are computed in float32.
EXACT = "session.qdq_matmulnbits_accuracy_level"


def quantized_layers(subject: Subject) -> list[Layer]:
    if subject.held_back:
        raise BadInput(subject.held_back)
    found = [layer for layer in subject.layers("*") if any(isinstance(c, FakeQuant) for c in layer.changes)]
    if not found:
        raise BadInput("subject: no layer is quantized; run quantize first")
    return found


def refuse(layer: Layer, reason: str, target: str) -> None:
    raise BadInput(f"{target}: {layer.name} {reason}, which {target} cannot express")


def check_exportable(layers: Sequence[Layer], target: str, formats: tuple[str, ...]) -> None:
    for layer in layers:
        grid = quantizer_of(layer).grid
        name = grid.format.name
        if not name.startswith(formats):
            refuse(layer, f"has the format {name} (it takes {', '.join(formats)})", target)
        if len(layer.shape) == 3:
            refuse(layer, "is a stack of experts", target)
        if isinstance(grid, SplitGrid):
            refuse(layer, "keeps salient weights on a grid of their own", target)
        if grid.transform is not None:
            refuse(layer, "is rounded in the coordinates of an online transform", target)
        if grid.zero is not None and not bool((grid.zero == grid.zero.round()).all()):
            refuse(layer, "has zero points that are no integers", target)
        if layer.shape[-1] % grid.group:
            refuse(layer, f"has {layer.shape[-1]} inputs, no multiple of its group of {grid.group}", target)
        if any(isinstance(c, ActivationQuant) for c in layer.changes):
            refuse(layer, "rounds activations in a way of this workbench's own", target)


def say_size(subject: Subject, target: str, times: int) -> None:
    """Say of a model that is not small how much of it is held at once while it is written."""
    size = weight_bytes(subject.model)
    if size >= SAID:
        notice(
            f"{target}: while it is written the model is held in memory {times} times, "
            f"{in_words(times * size)} in all, and has to fit; a GGUF file is written tensor by tensor"
        )


def to_compressed_tensors(
    subject: Subject,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reopen: bool = True,
    told: Callable[[str], Any] | None = None,
) -> Path:
    """Write a checkpoint that `transformers` and vLLM open:
    packed int2..int8, or FP8 E4M3 with tensor or channel scales.

    `BadInput` for anything else, by layer. What a save left in `folder` is replaced, anything else is refused
    unless `overwrite`. Before it takes its place it is opened in a fresh process and its loss compared,
    unless `reopen` is False; `told` is then called with what came of it. The whole model has to fit in
    memory. Needs the package `compressed-tensors` (extra `export`).
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    if not hasattr(subject.model, "save_pretrained"):
        raise BadInput("subject: only a transformers model can be written as a compressed-tensors checkpoint")
    layers = quantized_layers(subject)
    check_exportable(layers, "compressed-tensors", ("int", "uint", "e4m3fn"))
    say_size(subject, "compressed-tensors", 3)
    groups: dict[str, dict[str, Any]] = {}
    for layer in layers:
        grid = quantizer_of(layer).grid
        if layer.transposed:
            refuse(layer, "is a transposed Conv1D", "compressed-tensors")
        arguments = scheme_of(layer, grid)
        # Packed zero points do not survive loading (their placeholder is made unpacked),
        # so affine integers take a byte each.
        storage = (
            "float-quantized"
            if arguments["type"] == "float"
            else ("pack-quantized" if arguments["symmetric"] else "naive-quantized")
        )
        group = groups.setdefault(
            json.dumps(arguments, sort_keys=True), {"targets": [], "weights": arguments, "format": storage}
        )
        group["targets"].append("re:" + layer.name.replace(".", "[.]") + "$")
    formats = sorted({g["format"] for g in groups.values()})
    config = QuantizationConfig(
        config_groups={f"group_{i}": g for i, g in enumerate(groups.values())},
        ignore=[],
        format=formats[0] if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.FROZEN,
    )
    grids = {layer.name: quantizer_of(layer).grid for layer in layers}
    # the check above has seen that it is transformers'
    model = cast("PreTrainedModel", bake(copy.deepcopy(subject.model)).cpu().eval())
    apply_quantization_config(model, config, run_compressed=False)
    for name, grid in grids.items():
        fill_parameters(model.get_submodule(name), grid)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    with replacing(folder, overwrite=overwrite, field="folder") as draft:
        model.save_pretrained(draft, safe_serialization=True)
        compressor.update_config(str(draft))
        if subject.tokenizer is not None and hasattr(subject.tokenizer, "save_pretrained"):
            subject.tokenizer.save_pretrained(draft)
        if reopen:
            found = check_exported(subject, draft, "checkpoint", probe(subject))
            if told is not None:
                told(found)
    return Path(folder)


def scheme_of(layer: Layer, grid: Grid) -> dict[str, Any]:
    """compressed-tensors' description of a grid."""
    out, width = layer.shape
    whole = grid.scale.numel() == 1 and out > 1
    strategy = "tensor" if whole else ("channel" if grid.group == width else "group")
    real = grid.format.name == "e4m3fn"
    if real and strategy == "group":
        refuse(layer, "has E4M3 values with group scales", "compressed-tensors")
    if strategy == "tensor" and not real:
        # Packed zero points exist for channels and groups only, so one scale is written for every channel.
        strategy = "channel"
    return {
        "num_bits": 8 if real else grid.format.element.bits,
        "type": "float" if real else "int",
        "symmetric": grid.zero is None,
        "strategy": strategy,
        "group_size": grid.group if strategy == "group" else None,
        "dynamic": False,
    }


def fill_parameters(module: nn.Module, grid: Grid) -> None:
    """Put our scales and zero points where compressed-tensors looks for them;
    its codes are signed, so zero points shift by half the range.
    """
    scale: Tensor = module.weight_scale  # type: ignore[assignment]
    with torch.no_grad():
        scale.copy_(
            grid.scale.cpu().expand(scale.shape) if scale.ndim == 2 else grid.scale.cpu().reshape(scale.shape)
        )
        if grid.zero is not None:
            zero: Tensor = module.weight_zero_point  # type: ignore[assignment]
            zero.copy_(
                (grid.zero.cpu() - 2 ** (grid.format.element.bits - 1)).expand(zero.shape).to(zero.dtype)
            )


def to_onnx(
    subject: Subject,
    file: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reopen: bool = True,
    told: Callable[[str], Any] | None = None,
) -> Path:
    """Write an ONNX file whose quantized weights are 8-bit integers with `DequantizeLinear`
    (opset 21: one scale a tensor, channel or group).

    Inputs are the task's columns, with a free batch size and a free length of each sequence. ONNX Runtime
    computes what this computes with the session setting that the file's metadata name; by default it rounds
    activations to 8 bits as well. A file that no
    export wrote is refused unless `overwrite`. Before it takes its place it is run in a fresh process and its
    loss compared, unless `reopen` is False or ONNX Runtime is not installed, which is said; `told` is called
    with what came of it. The whole model has to fit in memory.
    Needs the packages `onnx` and `onnxscript` (extra `export`).
    """
    import onnx
    from onnx import numpy_helper

    layers = quantized_layers(subject)
    check_exportable(layers, "onnx", ("int", "uint"))
    grids = {layer.name: quantizer_of(layer).grid for layer in layers}
    say_size(subject, "onnx", 4)
    model = bake(copy.deepcopy(subject.model)).cpu().eval()
    batch = {k: v.cpu() for k, v in next(subject.batches("calibration", 2)).items()}
    if len(next(iter(batch.values()))) < 2:
        batch = {k: torch.cat([v, v]) for k, v in batch.items()}
    given = subject.task.exported(model, batch)
    wrapped = Outputs(subject, model, list(given)).eval()
    with replacing(file, overwrite=overwrite, field="file") as draft:
        arguments = tuple(given.values())
        named = subject.task.free_axes(given)
        free = {
            name: torch.export.Dim(name, min=1 if name == "batch" else 2)
            for axes in named.values()
            for name in axes.values()
        }
        try:
            program = torch.onnx.export(
                wrapped,
                arguments,
                dynamo=True,
                optimize=False,
                opset_version=21,
                verbose=False,
                input_names=wrapped.names,
                output_names=["output"],
                dynamic_shapes=(
                    tuple({axis: free[name] for axis, name in named[column].items()} for column in given),
                ),
            )
        except Exception as error:  # the exporter's own code on another library's
            reason = next((part for part in re.findall(r"Error'>: (.+)", str(error))), one_line(error))
            raise BadInput(
                f"onnx: the exporter cannot follow {type(subject.model).__name__} with free lengths: "
                f"{reason[:200]}; export it with to_compressed_tensors, or save the subject"
            ) from None
        assert program is not None
        graph = program.model_proto
        known = {i.name: i for i in graph.graph.initializer}
        for layer in layers:
            name = f"model.{layer.name}.{layer.tensor}"
            if name not in known:
                raise BadInput(
                    f"onnx: the exporter changed {layer.name} beyond recognition; "
                    "export the dense model instead"
                )
            grid = grids[layer.name]
            codes = grid.codes(layer.weight.detach())
            integers, scale, zero, attributes = dequantize_inputs(layer, grid, codes)
            graph.graph.initializer.remove(known[name])
            parts = {"codes": integers, "scale": scale, "zero": zero}
            graph.graph.initializer.extend(
                [numpy_helper.from_array(v, f"{name}.{k}") for k, v in parts.items()]
            )
            node = onnx.helper.make_node(
                "DequantizeLinear",
                [f"{name}.{k}" for k in parts],
                [name],
                name=f"{name}.dequantize",
                **attributes,
            )
            graph.graph.node.insert(0, node)
        check_free(graph, named)
        note = graph.metadata_props.add()
        note.key, note.value = "session_config", f"{EXACT}=1"
        onnx.checker.check_model(graph)
        onnx.save(graph, str(draft))
        if reopen:
            found = check_exported(subject, draft, "onnx", subject.task.exported(model, probe(subject)))
            if told is not None:
                told(found)
            elif found.startswith("not opened"):
                notice(f"onnx: {found}")
    notice(
        f"onnx: ONNX Runtime rounds the inputs of products with integer weights too, unless a session has "
        f"{EXACT} = 1 (SessionOptions.add_session_config_entry); the file's metadata say so"
    )
    return Path(file)


def check_free(program: Any, named: Mapping[str, Mapping[int, str]]) -> None:
    """`BadInput` where the exporter has fixed a size that is to be free, as it does for a loop over
    positions.
    """
    for given in program.graph.input:
        sizes = given.type.tensor_type.shape.dim
        for axis, what in named.get(given.name, {}).items():
            if not sizes[axis].dim_param:
                raise BadInput(
                    f"onnx: the exporter fixes the {what} of {given.name} at {sizes[axis].dim_value}, so "
                    "the file takes no other; export it with to_compressed_tensors, or save the subject"
                )


class Outputs(nn.Module):
    """The model as a function of plain tensors that returns the task's output."""

    def __init__(self, subject: Subject, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.task, self.names = model, subject.task, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.task.output(self.model, dict(zip(self.names, values, strict=True)))


def dequantize_inputs(
    layer: Layer, grid: Grid, codes: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """(codes, scales, zero points, attributes) of `DequantizeLinear` for a weight in the module's own
    orientation.
    """
    signed = grid.zero is None
    half = 2 ** (grid.format.element.bits - 1)
    integers = (((codes + half) % (2 * half)) - half if signed else codes).cpu()
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    scale, zero = grid.scale.cpu(), zero.cpu()
    kind = np.int8 if signed else np.uint8
    attributes: dict[str, Any] = {}
    if scale.numel() == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    elif scale.shape[-1] == 1:
        scale, zero, attributes = scale[:, 0], zero[:, 0], {"axis": 1 if layer.transposed else 0}
    else:
        attributes = {"axis": 0 if layer.transposed else 1, "block_size": grid.group}
        scale, zero = (t.T if layer.transposed else t for t in (scale, zero))
    if layer.transposed:
        integers = integers.T
    return (
        np.ascontiguousarray(integers.numpy().astype(kind)),
        np.ascontiguousarray(scale.numpy().astype(np.float32)),
        np.ascontiguousarray(zero.numpy().astype(kind)),
        attributes,
    )
