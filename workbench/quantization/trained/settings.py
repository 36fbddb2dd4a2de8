"""The fields of `train-quantized`."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.axis import Axis, Choice, parameter
from workbench.instruments import SubjectInstrument
from workbench.training.chosen import RunFields
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE

#: An entry is a `TrainedRounding`, which reads its options from the settings' `method`. The trait "low-rank"
#: says that low-rank terms of frozen weights are trained; "signs", that the layers' inputs become signs.
TRAINED_ROUNDING = Axis(
    "trained-rounding",
    "learned steps; values that follow the mean magnitude; two learned values; widths by noise or bit "
    "planes; formats by policy; LoRA inside the rounding; "
    "several widths of one stored integer; fixed point with a learned binary point; LoRA beside it",
    found_in="workbench.quantization.trained",
)


class TrainedSettings(SubjectInstrument, RunFields):
    """What `train-quantized` is told: the roundings that are trained, and the objective, read it."""

    layers: str = parameter("blocks", "layers to quantize, comma-separated globs")
    method: Choice = TRAINED_ROUNDING.choice("lsq")
    group_size: int = parameter(
        4096,
        "weights of a group (4096 and wider rows: one scale a row)",
        ge=1,
        le=4096,
        scale="log",
        unit="weights",
    )
    distillation: float = parameter(
        0.0,
        "share of the loss that asks for the outputs of the subject before training, in place of the targets",
        ge=0,
        le=1,
        step=0.1,
        group="Teacher",
    )
    temperature: float = parameter(
        1.0,
        "temperature at which those outputs are compared",
        only_with="distillation",
        gt=0,
        le=100,
        scale="log",
        group="Teacher",
    )
    entropy: float = parameter(
        0.0, "weight of the information in queries and keys, which is to grow", ge=0, le=100, group="Teacher"
    )
    attention_match: float = parameter(
        0.0,
        "weight of the distance (1 - cosine) between attention maps and those of the subject before training",
        ge=0,
        le=100,
        group="Teacher",
    )
    activation_bits: int = parameter(
        0, "width of the layers' inputs, a scale for every token (0: left alone)", ge=0, le=8, unit="bits"
    )
    rounded_attention: bool = parameter(
        False,
        "round queries, keys, values and attention maps to activation_bits as well",
        group="Attention and tokens",
    )
    wide_tokens: float = parameter(
        0.0,
        "share of the tokens, those that attend most to the first one, "
        "rounded to 8 bits in place of activation_bits",
        ge=0,
        lt=1,
        step=0.05,
        group="Attention and tokens",
    )
    steps: int = parameter(200, "optimizer steps", ge=1, le=100000, scale="log")
    batch_size: int = parameter(
        16, "examples of a step", ge=1, le=4096, scale="log", unit="examples", group="Training"
    )
    learning_rate: float = parameter(2e-4, "peak learning rate", gt=0, le=1, scale="log")
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("linear", group="Training")
    switch_at: float = parameter(
        0.0, "share of the steps trained in full precision first", ge=0, lt=1, step=0.05, group="Training"
    )
    reset_optimizer: bool = parameter(
        False, "forget the optimizer's moments at the switch", only_with="switch_at", group="Training"
    )
    from_scratch: bool = parameter(
        False, "start from random weights instead of the subject's", group="Training"
    )
    test_examples: int = parameter(
        512, "test and validation examples at most", ge=1, unit="examples", group="Data"
    )

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"learning_rate_schedule": "schedule"}
