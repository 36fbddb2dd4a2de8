"""The fields that scores of layers and widths rest on, whatever is asked of them afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.instruments import WEIGHTS, SubjectInstrument
from workbench.measures.reference import kind_of
from workbench.quantization.allocation.layer_sensitivity import check_alone
from workbench.quantization.allocation.width_cost import WIDTH_COST
from workbench.quantization.quantize import Quantize
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.subjects import Subject

#: Blocks whose predicted damage is corrected by a measured one, where a budget is asked for that is about
#: what the model does.
SWAPS = 8


def swaps_parameter(default: int) -> Any:
    """The declaration of `swaps`; who has another default says it again."""
    return parameter(
        default,
        "blocks, the largest predicted share first, that are put into the dense model at every width: the "
        "divergence measured so takes the place of the predicted one (0: none)",
        ge=0,
        le=1000,
        unit="blocks",
        group="Measurement",
    )


class AllocationSettings(SubjectInstrument):
    """What every layer at every width is rounded with, and how its damage is estimated."""

    layers: str = parameter("blocks", "layers to quantize, comma-separated globs")
    widths: list[int] = parameter([2, 3, 4, 8], "widths a layer may get", min_length=2, unit="bits")
    sensitivity: Choice = WIDTH_COST.choice("gauss-newton", group="Rounding")
    symmetric: bool = parameter(
        False, "integers symmetric about zero, which at 2 bits leaves three of four values", group="Rounding"
    )
    group_size: int = parameter(
        64, "weights of a group", ge=1, le=4096, scale="log", unit="weights", group="Rounding"
    )
    range: Literal["auto", "minmax", "mse"] = parameter("mse", "how scales are found", group="Rounding")
    rounding: Choice = ROUNDING.choice("gptq", group="Rounding")
    calibration_examples: int = parameter(
        64, "calibration examples of the inputs' second moments", ge=1, unit="examples", group="Data"
    )
    predict_examples: int = parameter(
        64, "calibration examples of the sensitivities", ge=1, unit="examples", group="Data"
    )
    swaps: int = swaps_parameter(0)
    swap_examples: int = parameter(
        8,
        "calibration examples that swapped blocks are measured on",
        ge=1,
        unit="examples",
        only_with="swaps",
        group="Data",
    )

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"examples": "calibration_examples"}

    def quantizer(
        self, bits: int = 4, layer_bits: Mapping[str, int] | None = None, test_examples: int = 0
    ) -> Quantize:
        return Quantize(
            layers=self.layers,
            format={"name": "int", "bits": bits, "symmetric": self.symmetric},
            layer_bits=dict(layer_bits or {}),
            group_size=self.group_size,
            range=self.range,
            rounding=self.rounding,
            sequential=False,
            calibration_examples=self.calibration_examples,
            predict_examples=0,
            test_examples=test_examples,
            seed=self.seed,
        )

    def calibrates(self) -> dict[str, tuple[str, int]]:
        """The rounding's examples or those of the sensitivities, whichever are more."""
        return {WEIGHTS: ("calibration", max(self.calibration_examples, self.predict_examples))}

    def check(self, on: Subject) -> None:
        check_widths(self.widths)
        if self.sensitivity.has("drawn targets") and on.task.loss_kind == "other":
            raise BadInput(
                f"sensitivity: {self.sensitivity} draws targets from the model's own distribution, "
                "which this custom loss does not define; use curvature"
            )
        measures = self.swaps > 0 or self.sensitivity.has("measured distance")
        if measures and not kind_of(on.task):
            raise BadInput(
                f"swaps: the task {on.task.name} has a loss of its own, so what two models answer does not "
                "compare; set swaps to 0 and a sensitivity that needs the loss alone, such as curvature"
            )
        check_alone(self.rounding)
        for width in self.widths:
            self.quantizer(bits=width).check(on)


def check_widths(widths: Sequence[int]) -> None:
    if bad := [width for width in widths if not 2 <= width <= 8]:
        raise BadInput(f"widths: {bad[0]} bits are not accepted; give widths from 2 to 8")
    if len(set(widths)) != len(widths):
        raise BadInput(f"widths: {list(widths)} repeats a width")
