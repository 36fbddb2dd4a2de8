"""The fields of `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from workbench.axis import Choice, parameter
from workbench.instruments import NUMBERS, WEIGHTS, SubjectInstrument
from workbench.quantization.activations.activations import ACTIVATION_QUANTIZER
from workbench.quantization.number.formats import Format
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.number.split_grid import SALIENT
from workbench.quantization.rounding.adapters import ADAPTER
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.transform.transform import TRANSFORM


class QuantizeSettings(SubjectInstrument):
    """What `quantize` is told: its checks and the rounding of its layers read it."""

    layers: str = parameter(
        "blocks",
        "layers to quantize, comma-separated globs; 'blocks' is every layer inside the repeated blocks",
    )
    format: Choice = NUMBER_FORMAT.choice("int4")
    granularity: Literal["auto", "tensor", "channel", "group"] = parameter(
        "auto", "what shares a scale; auto: the format's own block, or groups"
    )
    group_size: int = parameter(
        64, "weights of a group (in one row)", ge=1, le=4096, scale="log", unit="weights"
    )
    range: Literal["auto", "minmax", "mse", "mean", "centred"] = parameter(
        "auto",
        "how scales are found: largest magnitude, least squared error, mean magnitude, "
        "or (binary) with the mean as zero point",
        group="Transform and exceptions",
    )
    rounding: Choice = ROUNDING.choice("nearest")
    transform: Choice = TRANSFORM.choice("none", group="Transform and exceptions")
    activations: Choice = ACTIVATION_QUANTIZER.choice("none", group="Activations and cache")
    kv_bits: int = parameter(
        0,
        "width of keys and values as a cache would keep them (0: left alone)",
        ge=0,
        le=8,
        unit="bits",
        group="Activations and cache",
    )
    layer_bits: dict[str, int] = parameter(
        {},
        "width by layer glob, where it differs from the format's (integers only)",
        group="Transform and exceptions",
    )
    salient: Choice = SALIENT.choice("none", group="Transform and exceptions")
    adapter: Choice = ADAPTER.choice("none", group="Transform and exceptions")
    sequential: bool = parameter(
        True,
        "block by block: calibrate on the inputs that the already quantized blocks produce; else on the "
        "dense model's (no difference where nothing but the weights is read)",
        group="Order of layers",
    )
    within: bool = parameter(
        False,
        "sequential: inside a block too, layers that read the same after those that they read from "
        "(q, k, v; o; gate, up; down)",
        group="Order of layers",
    )
    target: Literal["weights", "outputs"] = parameter(
        "weights",
        "sequential: what is rounded, the dense weights, or weights fitted so that on those inputs they give "
        "what the dense layer gives on its own",
        group="Order of layers",
    )
    sequential_damp: float = parameter(
        0.01,
        "target outputs: damping of the weights fitted to those inputs, as a share of the mean diagonal of "
        "their second moment",
        gt=0,
        le=1,
        scale="log",
        group="Order of layers",
    )
    calibration_examples: int = parameter(
        128, "calibration examples for the inputs' second moments", ge=1, unit="examples", group="Data"
    )
    predict_examples: int = parameter(
        32,
        "calibration examples of predicted and measured loss change (0: none)",
        ge=0,
        unit="examples",
        group="Data",
    )
    test_examples: int = parameter(
        1024, "test examples at most (0: no test)", ge=0, unit="examples", group="Data"
    )

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {
            "bits": "format.bits",
            "symmetric": "format.symmetric",
            "objective": "rounding.objective",
            "window": "rounding.objective.window",
            "overlap": "rounding.objective.overlap",
            "activation_format": "activations.format",
            "activation_bits": "activations.format.bits",
            "wide_share": "activations.wide_share",
            "salient_pattern": "salient",
            "salient_share": "salient.share",
            "salient_bits": "salient.bits",
            "adapter_rank": "adapter.rank",
            "adapter_steps": "adapter.alternations",
            "examples": "calibration_examples",
        }

    @classmethod
    def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Choices that flat options of one release ago make by themselves."""
        found: dict[str, Any] = {}
        if given.get("salient.share"):
            found["salient"] = "columns"
        if given.get("adapter.rank"):
            found["adapter"] = "qlora" if given.get("adapter.alternations") == 0 else "loftq"
        if "damp" in given:
            found["sequential_damp"] = given["damp"]
        return found

    def format_for(self, layer: str) -> Format:
        """The format of a layer, after `layer_bits` (the last glob that matches wins)."""
        format = self.format
        for glob, width in self.layer_bits.items():
            if fnmatchcase(layer, glob):
                format = self.format.with_options(bits=width)
        made: Format = format()
        return made

    def calibrates(self) -> dict[str, tuple[str, int]]:
        """Where only weights are read the layers' inputs make the reported errors."""
        ranges = self.activations.has("ranges") or bool(getattr(self.activations.options, "wide_share", 0))
        decides = self.reads_inputs or self.paired or (self.rounds_inputs and ranges)
        return {WEIGHTS if decides else NUMBERS: ("calibration", self.calibration_examples)}

    @property
    def by_blocks(self) -> bool:
        """True for a learned rounding that reconstructs what blocks put out."""
        return self.rounding.has("learned") and self.rounding.options.objective.has("by blocks")

    @property
    def reads_inputs(self) -> bool:
        """True when what the layers read decides how they are rounded."""
        parts = (self.rounding, self.transform, self.salient)
        return self.range == "mse" or any(part.entry.needs == "inputs" for part in parts)

    @property
    def in_sequence(self) -> bool:
        """True when a block is rounded once those before it are in place."""
        return self.sequential and (self.reads_inputs or self.paired)

    @property
    def paired(self) -> bool:
        """True when what is rounded is fitted to the dense model's outputs."""
        return self.sequential and self.target == "outputs"

    @property
    def walks(self) -> bool:
        """True when layers are rounded on the second moments of one visit of their block after another."""
        return not (self.by_blocks or self.paired)

    @property
    def rounds_inputs(self) -> bool:
        return self.activations != "none"

    @property
    def rounds_rows(self) -> bool:
        """True when a transform is learned on rounded inputs, so that some of them must be kept."""
        return self.transform.has("needs rows") and self.rounds_inputs
