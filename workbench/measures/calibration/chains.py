"""Methods of a calibration study: what each runs for a number of examples, and what it is beside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.instruments import WEIGHTS, Instrument
from workbench.names import instruments_of, recipe

#: Calibration examples of what reads them for reported numbers alone.
FEWEST = 1


@dataclass(frozen=True)
class Study:
    """What every method is run with."""

    bits: int
    sparsity: float
    layers: str
    seed: int
    device: str


@dataclass(frozen=True)
class Chain:
    """A method as instruments, one on what the one before returned. `free` of calibration data, or not."""

    method: str
    steps: tuple[Instrument, ...]
    free: bool

    @property
    def identity(self) -> str:
        return json.dumps([[s.name(), s.model_dump(mode="json")] for s in self.steps], sort_keys=True)


def chain(method: str, study: Study, examples: int) -> Chain:
    """The recipe of a method at the study's width and sparsity, with so many calibration examples; nothing
    beside the weights is measured. `BadInput` for what changes no model.
    """
    steps = tuple(asked(step, study, examples) for step in instruments_of(recipe(method), {}))
    for step in steps:
        if step.on != "subject" or not step.changes_model:
            raise BadInput(
                f"methods: {method} runs {step.name()}, which changes no model; give methods that do, such "
                "as gptq, awq, wanda or sparsegpt"
            )
    free = not any(WEIGHTS in calibrates(step) for step in steps)
    if free and examples > FEWEST:
        return chain(method, study, FEWEST)
    return Chain(method, steps, free)


def calibrates(step: Any) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = step.calibrates()
    return found


def asked(step: Any, study: Study, examples: int) -> Instrument:
    fields = type(step).model_fields
    wanted: dict[str, Any] = {"seed": study.seed, "device": study.device, "calibration_examples": examples}
    wanted |= {name: least(fields[name]) for name in ("predict_examples", "test_examples") if name in fields}
    if "layers" in fields and "layers" not in step.given():
        wanted["layers"] = study.layers
    made = step.with_fields(**{name: value for name, value in wanted.items() if name in fields})
    if "sparsity" in fields and (not hasattr(made, "pattern") or made.pattern().fixed is None):
        made = made.with_fields(sparsity=study.sparsity)
    if hasattr(made, "with_gradients"):
        made = made.with_gradients(examples)
    widths = {} if quantizes_inputs(made) else narrowed(made, study.bits)
    found: Instrument = made.with_fields(**widths)
    return found


def least(info: Any) -> int:
    """The smallest number that a field takes."""
    return next((int(bound.ge) for bound in info.metadata if hasattr(bound, "ge")), 0)


def quantizes_inputs(step: Any) -> bool:
    """A recipe with a width for weights and one for activations keeps both."""
    return getattr(step, "activations", "none") != "none"


def narrowed(step: Any, bits: int) -> dict[str, Choice]:
    """The integer formats that a step chooses, at this width."""
    found = {}
    for name in type(step).model_fields:
        value = getattr(step, name)
        if not isinstance(value, Choice):
            continue
        inner = getattr(value.options, "format", None)
        if name == "format" and hasattr(value.options, "bits"):
            found[name] = value.with_options(bits=bits)
        elif isinstance(inner, Choice) and hasattr(inner.options, "bits"):
            found[name] = value.with_options(format=inner.with_options(bits=bits))
    return found


def without_data(made: Chain) -> Chain | None:
    """The method on the same grid or pattern that reads no calibration data: nearest rounding, magnitudes."""
    last: Any = made.steps[-1]
    same: tuple[str, ...]
    if last.name() == "quantize":
        name, same = "nearest", ("layers", "format", "granularity", "group_size", "layer_bits")
        told: dict[str, Any] = {"rounding": "nearest"}
    elif last.name() == "prune":
        name, same, told = "magnitude", ("layers", "pattern", "sparsity"), {"method": "magnitude"}
    else:
        return None
    measured = ("predict_examples", "test_examples", "seed", "device")
    same = (*same, *(field for field in measured if field in type(last).model_fields))
    told["calibration_examples"] = FEWEST
    twin = type(last)(**{field: getattr(last, field) for field in same}, **told)
    found = Chain(name, (twin,), True)
    return found if WEIGHTS not in calibrates(twin) else None


def beside(chains: Sequence[Chain]) -> tuple[list[Chain], dict[str, str]]:
    """Those chains and the ones without data that they are beside, each once; method -> the name of that."""
    found, known, twins = list(chains), {c.identity: c.method for c in chains if c.free}, dict[str, str]()
    for made in chains:
        twin = None if made.free else without_data(made)
        if twin is None:
            continue
        if twin.identity not in known:
            taken = {c.method for c in found}
            name = twin.method if twin.method not in taken else f"{twin.method} for {made.method}"
            known[twin.identity] = name
            found.append(Chain(name, twin.steps, True))
        twins[made.method] = known[twin.identity]
    return found, twins
