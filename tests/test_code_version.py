"""What a result's key depends on: the files that its instrument reaches, and nothing else."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

import workbench
from workbench.axis import entries_in
from workbench.code_version import PACKAGE, closure, code_version
from workbench.pruning import Prune
from workbench.quantization import Quantize

PLUGIN = '''
from workbench.pruning import Prune


class Halve(Prune):
    """A user's own instrument."""

    def _run(self, on, progress):
        return super()._run(on, progress)
'''


@pytest.fixture
def tree(tmp_path):
    """A copy of the package, to change files in."""
    return shutil.copytree(
        PACKAGE, tmp_path / "workbench", ignore=shutil.ignore_patterns("__pycache__", "_data")
    )


def touch(file):
    file.write_text(file.read_text() + "\n# changed\n")


def keys(root):
    return {name: code_version(cls, root=root) for name, cls in workbench.catalog().items()}


def test_a_copy_of_the_tree_is_the_same_code(tree):
    assert code_version(Prune, root=tree) == code_version(Prune)


def test_evidence_and_figures_change_no_key(tree):
    before = keys(tree)
    touch(tree / "figures.py")
    touch(tree / "cli.py")
    for file in (tree / "evidence").rglob("*.py"):
        touch(file)
    assert keys(tree) == before


def test_a_family_leaves_the_others_keys_as_they_were(tree):
    before = {cls: code_version(cls, root=tree) for cls in (Prune, Quantize)}
    touch(tree / "quantization" / "rounding" / "problem.py")
    assert code_version(Prune, root=tree) == before[Prune]
    assert code_version(Quantize, root=tree) != before[Quantize]


def test_pruning_depends_on_no_file_of_quantization(tree):
    made = [Prune(), Prune(method="wanda"), Prune(method="sparsegpt"), Prune(method="obert")]

    def chosen():
        return [code_version(Prune, [e.value for e in entries_in(one)], tree) for one in made]

    before = chosen()
    for file in (tree / "quantization").rglob("*.py"):
        touch(file)
    assert chosen() == before


def test_an_entry_counts_where_it_is_chosen(tree):
    def key(rounding):
        chosen = Quantize(rounding=rounding)
        return code_version(Quantize, [entry.value for entry in entries_in(chosen)], tree)

    before = {rounding: key(rounding) for rounding in ("nearest", "gptq")}
    touch(tree / "quantization" / "rounding" / "gptq.py")
    assert key("nearest") == before["nearest"] and key("gptq") != before["gptq"]


def test_what_everything_stands_on_changes_every_key(tree):
    before = keys(tree)
    touch(tree / "instruments.py")
    assert all(version != before[name] for name, version in keys(tree).items())


def test_a_name_is_followed_to_the_file_that_defines_it():
    reached = {
        file.relative_to(PACKAGE).as_posix() for file in closure(["workbench.pruning.studies.subtune"])
    }
    assert {"pruning/recovery/trainable.py", "subjects/__init__.py", "subjects/subject.py"} <= reached
    assert "subjects/loaders.py" not in reached  # offered by the same package as `Subject`
    course = ["workbench.pruning.sparse_training.run"]
    stopped = closure(course, stop={"workbench.pruning.engine.weights"})
    assert PACKAGE / "pruning" / "engine" / "weights.py" in stopped
    assert PACKAGE / "pruning" / "solvers" / "icbs.py" in closure(course) - stopped


def test_a_class_of_ones_own_adds_its_file(tmp_path):
    def version(text):
        file = tmp_path / "halve.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("halve_of_a_user", file)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(importlib.sys.modules, "halve_of_a_user", module)
            spec.loader.exec_module(module)
            return code_version(module.Halve)

    first = version(PLUGIN)
    assert first != code_version(Prune)
    assert version(PLUGIN + "\n# changed\n") != first
    assert version(PLUGIN) == first
