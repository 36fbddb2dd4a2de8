"""Docstrings by package: parsed and not imported, split by module, each text once."""

import re
from collections import Counter

import pytest

from workbench.errors import BadInput
from workbench.subjects.builtin import docstrings

LIMITS = {"train": 40, "validation": 5, "test": 8}


@pytest.fixture(scope="module")
def collected():
    return docstrings.collect(LIMITS, per_module=6)


def test_no_module_is_in_two_splits_and_limits_hold(collected):
    homes: dict[str, set[str]] = {}
    for text in collected:
        homes.setdefault(text.module, set()).add(text.split)
        assert text.module.startswith(text.package + "/")
    assert all(len(splits) == 1 for splits in homes.values())
    assert set(Counter((t.package, t.split) for t in collected).values()) == set(
        LIMITS.values()
    )  # every class is full
    assert max(Counter(t.module for t in collected).values()) <= 6
    assert len({t.package for t in collected}) == 8


def test_texts_are_distinct_and_do_not_name_their_package(collected):
    assert len({t.text for t in collected}) == len(collected)
    for text in collected:
        assert not re.search(rf"\b{text.package}\b", text.text, re.IGNORECASE), text.text
        assert len(text.text.split()) >= 8


def test_collecting_again_gives_the_same(collected):
    assert docstrings.collect(LIMITS, per_module=6) == collected


@pytest.fixture
def made_up_package(tmp_path, monkeypatch):
    root = tmp_path / "made_up_package"
    (root / "tests").mkdir(parents=True)
    text = "Return the {} of the values that were given to it along one axis"
    modules = {
        "__init__.py": f'"""{text.format("mean")}"""\nraise SystemExit("this package must not be imported")',
        "one.py": (
            f'class A:\n    """{text.format("Alpha2")}"""\n    async def f(self):\n        """too short"""'
        ),
        "two.py": f'class B:\n    """{text.format("Beta3")}"""',  # says what one.py says, of another name
        "broken.py": 'def f(:\n    """never parsed, so this text is not found at all"""',
        "tests/three.py": f'"""{text.format("median")}"""',
    }
    for name, source in modules.items():
        (root / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return "made_up_package"


def test_parsing_skips_duplicates_tests_and_broken_files_without_importing(made_up_package):
    everything = {"train": 9, "validation": 9, "test": 9}
    found = docstrings.collect(everything, [made_up_package])
    kept = sorted(re.search(r"the (\w+) of", t.text)[1] for t in found)
    assert kept in (["Alpha2", "mean"], ["Beta3", "mean"])
    assert len({docstrings.duplicate_key(t.text) for t in found}) == 2


def test_giveaways_are_words_or_prefixes_not_parts_of_words():
    cleaned = docstrings.clean(
        "np.mean of a  NumPy ndarray,\n torch.Tensor or torchvision; go.Figure; go on, input pandas.DataFrame"
    )
    assert cleaned == (
        "package.mean of a package package, package.Tensor or package; package.Figure; "
        "go on, input package.package"
    )


def test_a_missing_package_is_named_before_anything_is_read():
    with pytest.raises(BadInput, match="'no_such_package_here' is not installed"):
        docstrings.collect(LIMITS, ["no_such_package_here"])
