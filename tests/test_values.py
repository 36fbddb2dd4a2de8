"""Values as people type them are JSON's: what YAML 1.1 would read into a text is text, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from workbench.axis import Fields
from workbench.errors import BadInput
from workbench.pruning import FisherSweep, Prune
from workbench.pruning.recovery.trainable import parse_blocks
from workbench.quantization import Quantize
from workbench.storage.forecast import bytes_of
from workbench.values import read, read_file


@pytest.mark.parametrize(
    "text",
    [
        *("1:30", "0b11", "1_000", "0x1F", "007", "inf", "nan", ".inf", "1e400", "1,5", "\uff11\uff12"),
        *("true", "False"),
    ],
)
def test_what_is_no_number_of_json_is_refused_where_one_is_asked_for(text: str) -> None:
    """Faults 22 and 34: notations of YAML 1.1 were read as other numbers (90, 3, 1000, infinity)."""
    for kind in (int, float, float | None):
        with pytest.raises(BadInput, match="bits: ") as caught:
            read(text, kind, "bits")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("90", int, 90),
        ("-1.5e-3", float, -0.0015),
        ("+.5", float, 0.5),
        ("1e3", int, 1000.0),
        ("null", float | None, None),
        ("true", bool, True),
        ("[0.5, 1e-3]", list[float], [0.5, 0.001]),
        ("0.1,0.2", list[float], [0.1, 0.2]),
        ("*layers.0.*,head", list[str], ["*layers.0.*", "head"]),
        ("a.[0-3].b, 'c, d'", list[str], ["a.[0-3].b", "c, d"]),
        ("[007, 1:30]", list[str], ["007", "1:30"]),
        ("{*.q_proj: 4}", dict[str, int], {"*.q_proj": 4}),
        ('{"*.q_proj":4, b.[0-1].c: 3}', dict[str, int], {"*.q_proj": 4, "b.[0-1].c": 3}),
        ("a: 1, b: 2", dict[str, int], {"a": 1, "b": 2}),
        ("1:30", object, "1:30"),
        ("!!python/name:os.system", object, "!!python/name:os.system"),
        ("&a [*a]", object, "&a [*a]"),
        ("[1, [2, {x: y}]]", object, [1, [2, {"x": "y"}]]),
        ("7", str, "7"),
        ("", list[int], []),
    ],
)
def test_values_by_their_type(text: str, kind: object, value: object) -> None:
    """Faults 22, 32 and 53: globs are no aliases, lists need no brackets."""
    found = read(text, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["[0.5", "{a: 1", "[1, 2]]", '["a', "[" * 5000, "{a: 1, a: 2}", "{:}", "9" * 5000]
)
def test_what_cannot_be_read_is_one_line(text: str) -> None:
    """Fault 22: `--sparsity '[0.5'` was a traceback."""
    with pytest.raises(BadInput, match="sparsity: ") as caught:
        read(text, list[float] if text.startswith("[") else object, "sparsity")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("instrument", "given"),
    [
        (Prune, {"sparsity": True}),
        (Prune, {"seed": "1_000"}),
        (Prune, {"saliency": "fisher", "saliency.damp": "0_1.5"}),
        (Quantize, {"layer_bits": {"*": True}}),
    ],
)
def test_an_instruments_numbers_are_numbers(instrument: type[Fields], given: dict[str, Any]) -> None:
    """Fault 34 behind the command line, where Python, panels and stored fields ask: `sparsity=True` pruned
    every weight, `seed="1_000"` was 1000.
    """
    with pytest.raises(BadInput, match="is not a number"):
        instrument(**given)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: FisherSweep(damps="0.1,1_000").grid(),
        lambda: FisherSweep(damps="nan").grid(),
        lambda: FisherSweep(gradients="inf").grid(),
        lambda: FisherSweep(blocks="8,nan").grid(),
        lambda: parse_blocks("1_0", 20),
        lambda: parse_blocks("\u0663", 20),
        lambda: bytes_of("\u0663GB"),
        lambda: bytes_of("9" * 400 + "GB"),
    ],
)
def test_lists_and_amounts_are_read_the_same_way(ask: Callable[[], object]) -> None:
    """Fault 34 where a field is a text with numbers in it: `1_000` was 1000, nan a damp; infinity, nan and
    an amount of 400 digits were tracebacks.
    """
    with pytest.raises(BadInput) as caught:
        ask()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_of_parameters_hold_json_s_numbers(tmp_path: Path) -> None:
    """Fault 34, in files; what Send to report writes comes back as it was."""
    file = tmp_path / "p.yaml"
    file.write_text("a: 1:30\nb: 0b11\nc: 1_000\nd: 1e-3\ne: [1, yes, 2001-01-01, null]\nf: '7'\n")
    assert read_file(file) == {
        "a": "1:30",
        "b": "0b11",
        "c": "1_000",
        "d": 0.001,
        "e": [1, "yes", "2001-01-01", None],
        "f": "7",
    }
    values = {"x": [1, 2.5e-05, "1:30", "null", None, True, "a: b", "#", ""], "y": {"z": "0b1"}, "t": "ä\n b"}
    file.write_text(yaml.safe_dump(values))
    assert read_file(file) == values


@pytest.mark.parametrize(
    "text",
    [
        "a: [1", "a: 1e400", "- a", "a: &x 1\nb: *x", "a: !!python/object:os.system 1", "a: 1\na: 2", "1: 2",
        "a: " + "[" * 3000, "a: " + "9" * 5000, "\x00", "a: \ud800",
    ],
)  # fmt: skip
def test_broken_files_of_parameters_are_one_line(tmp_path: Path, text: str) -> None:
    """Fault 22: broken YAML was a traceback; aliases may make gigabytes of a line."""
    file = tmp_path / "p.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadInput, match=r"parameters: ") as caught:
        read_file(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
