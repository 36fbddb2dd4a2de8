"""Controls carry every kind of value there and back unchanged, and show what its field declares."""

from __future__ import annotations

import enum
from typing import Literal

import ipywidgets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from widgets.settings.controls import Controls, choices
from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import Instrument


class Norm(enum.Enum):
    L1 = "l1"
    L2 = "l2"


class Everything(Instrument):
    """One field of every kind."""

    sparsity: float = parameter(0.5, "share", ge=0, lt=1, step=0.01)
    rate: float = parameter(1e-3, "learning rate", gt=0, le=1, scale="log")
    group: int = parameter(64, "weights", ge=1, le=4096, scale="log", unit="weights")
    bits: int = parameter(4, "width", ge=2, le=8)
    steps: int = parameter(100, "how many", ge=1)
    shift: float = parameter(0.0, "any number")
    flag: bool = parameter(False, "yes or no")
    method: Literal["a", "b", 3, True, None] = parameter("a", "which")
    norm: Norm = parameter(Norm.L2, "a member")
    maybe: Literal["x", "y"] | None = parameter(None, "or none")
    limit: int | None = parameter(None, "none: all")
    text: str = parameter("blocks", "text")
    label: str | None = parameter(None, "text or none")
    grid: tuple[float, ...] = parameter((0.5, 0.7), "numbers")
    pair: tuple[int, str] = parameter((1, "a"), "mixed")
    layers: list[str] = parameter([], "globs")
    layer_bits: dict[str, int] = parameter({}, "by glob")
    table: list[list[float]] = parameter([[0.5, 8.0]], "nested")


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.fixed_dictionaries(
    {
        "sparsity": st.floats(0, 1, exclude_max=True),
        "rate": st.floats(1e-300, 1),
        "group": st.integers(1, 4096),
        "bits": st.integers(2, 8),
        "steps": st.integers(1, 2**53),
        "shift": NUMBER,
        "flag": st.booleans(),
        "method": st.sampled_from(["a", "b", 3, True, None]),
        "norm": st.sampled_from(Norm),
        "maybe": st.sampled_from(["x", "y", None]),
        "limit": st.none() | st.integers(-(2**53), 2**53),
        "text": TEXT,
        "label": st.none()
        | TEXT
        | st.sampled_from(
            ["null", "yes", "1", "0E0", "1e5", "~", "'", '"', "- a", "{", "[", "a: b", "#", "...", "\xa0"]
        ),
        "grid": st.lists(NUMBER, max_size=4).map(tuple),
        "pair": st.tuples(st.integers(-9, 9), TEXT),
        "layers": st.lists(TEXT | st.sampled_from(["*.q", "null", "1", "a: b", "#", "yes"]), max_size=4),
        "layer_bits": st.dictionaries(TEXT, st.integers(2, 8), max_size=3),
        "table": st.lists(st.lists(NUMBER, max_size=3), max_size=3),
    }
)


@pytest.fixture(scope="module")
def controls() -> Controls:
    return Controls(Everything)


def test_defaults_show(controls: Controls) -> None:
    assert Everything(**Controls(Everything).values) == Everything()


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_round_trip_is_identity(controls: Controls, values: dict) -> None:
    wanted = Everything(**values)
    controls.values = wanted.model_dump(mode="json")
    got = Everything(**controls.values)
    assert got == wanted
    assert all(type(getattr(got, name)) is type(getattr(wanted, name)) for name in values)


def test_each_kind_of_field_gets_its_control(controls: Controls) -> None:
    kinds = {name: type(item.widget) for name, item in Controls(Everything).controls.items()}
    assert (
        kinds["sparsity"] is ipywidgets.FloatSlider
        and kinds["rate"] is ipywidgets.FloatLogSlider
        and kinds["bits"] is ipywidgets.IntSlider
    )
    assert kinds["flag"] is ipywidgets.Checkbox and kinds["steps"] is ipywidgets.BoundedIntText
    assert {kinds[n] for n in ("method", "norm", "maybe")} == {ipywidgets.Dropdown}
    group = controls.controls["group"].widget
    assert (
        isinstance(group, ipywidgets.FloatLogSlider)
        and group.base == 2
        and group.description == "group (weights)"
        and group.tooltip == "weights"
    )
    sparsity = Controls(Everything).controls["sparsity"].widget
    assert (sparsity.min, sparsity.max, sparsity.step) == (0, 1, 0.01)


def test_lines_of_text_read_as_a_person_writes_them() -> None:
    made = Controls(Everything)
    for name, line, value in [
        ("grid", "0.5, 0.7, 1", [0.5, 0.7, 1]),
        ("grid", "[1]", [1]),
        ("layers", "*.q_proj, b", ["*.q_proj", "b"]),
        ("layers", "['a,b', c]", ["a,b", "c"]),
        ("layers", "", []),
        ("layer_bits", "fc1: 4, fc2: 8", {"fc1": 4, "fc2": 8}),
        ("limit", "", None),
        ("label", "plain text", "plain text"),
    ]:
        made.controls[name].widget.value = line
        assert made.controls[name].read() == value
    made.controls["layer_bits"].widget.value = "*.q: 4"  # YAML takes a leading * for a reference
    with pytest.raises(BadInput, match="in quotes"):
        made.controls["layer_bits"].read()


def test_unknown_fields_and_choices_are_refused() -> None:
    with pytest.raises(BadInput, match=r"bitz: unknown field \(fields: sparsity"):
        Controls(Everything).values = {"bitz": 3}
    with pytest.raises(BadInput, match="'z' is not accepted"):
        Controls(Everything).values = {"maybe": "z"}


def test_choices_of_types_without_a_finite_list() -> None:
    assert choices(str) is None and choices(int | None) is None
    assert choices(Literal["a"] | None) == [("a", "a"), ("none", None)]


def test_a_view_model_reports_while_its_sliders_move() -> None:
    class View(BaseModel):
        cut: float = Field(0.1, ge=0, le=1)

    calls: list[int] = []
    made = Controls(View, {"cut": 0.3}, changed=lambda: calls.append(1), live=True)
    slider = made.controls["cut"].widget
    assert (
        isinstance(slider, ipywidgets.FloatSlider)
        and slider.continuous_update
        and made.values == {"cut": 0.3}
        and not calls
    )
    slider.value = 0.4
    assert len(calls) == 1
