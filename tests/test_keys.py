"""What a result's key covers. Kind (faults 3 and 38): anything that changes a number and is not in the key
answers from the result of something else.
"""

from __future__ import annotations

import array
import collections
import copy
import fractions
import functools
import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydantic
import pytest
import torch
from torch import nn

import workbench
from workbench import version
from workbench.curvature import Trace
from workbench.keys import live_code
from workbench.statistics.factors import gradient_factors
from workbench.statistics.gradients import example_gradients
from workbench.subjects import Subject
from workbench.subjects.tasks import ModuleTask
from workbench.version import threads

USER = """
import torch
from helping_{tag} import weight
from torch import nn

FACTOR = 2.0
INNER = nn.Linear(3, 3, bias=False)

class Net(nn.Module):
    scale = 1.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.sharpness = 1.5

    def forward(self, inputs):
        return self.scale * self.layer(inputs)

def scaled(value):
    return FACTOR * value

def loss(output, batch):
    return weight() * scaled(nn.functional.cross_entropy(output, batch["labels"]))

def make():
    import workbench
    torch.manual_seed(1)
    data = {{"inputs": torch.randn(24, 4), "labels": torch.randint(3, (24,))}}
    return workbench.subject(Net(), data=data, loss=loss)
"""
HELPING = "def weight():\n    return 1.0\n"


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's file and one that it imports, in a folder on the path; opened again under a new name of the
    second after every edit, as a new process would.
    """
    monkeypatch.syspath_prepend(str(tmp_path))

    def opened(edit=("", ""), helping=("", ""), tag=[0]) -> Subject:  # noqa: B006 - counts the calls
        tag[0] += 1
        name = f"helping_{os.getpid()}"
        sys.modules.pop(name, None)
        (tmp_path / f"{name}.py").write_text(HELPING.replace(*helping))
        (tmp_path / "net.py").write_text(USER.format(tag=os.getpid()).replace(*edit))
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return workbench.subject(f"{tmp_path / 'net.py'}:make")

    return opened


def key(on):
    return Trace().key(on)


def small(**options):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = {"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))}
    return workbench.subject(module, data=data, **options)


@pytest.mark.parametrize(
    "edit",
    [
        ("FACTOR = 2.0", "FACTOR = 20.0"),
        ("return FACTOR * value", "return FACTOR * value * 3"),
        ("scale = 1.0", "scale = 3.0"),
        ("self.scale * self.layer(inputs)", "self.scale * self.layer(inputs.square())"),
        ("self.sharpness = 1.5", "self.sharpness = 2.5"),
        ('batch["labels"])', 'batch["labels"], label_smoothing=0.1)'),
    ],
)
def test_an_edit_of_the_users_file_gives_a_new_key(user, edit):
    first = key(user())
    assert key(user()) == first
    assert key(user(edit)) != first


def test_an_edit_of_a_file_that_the_users_file_imports_gives_a_new_key(user):
    assert key(user()) != key(user(helping=("1.0", "10.0")))


def test_a_loss_times_ten_is_computed_not_found(user, cache):
    """The report: 10.10 from the cache where 100.99 is right."""
    once, ten = Trace().run(user()), Trace().run(user(helping=("1.0", "10.0")))
    assert ten.facts["trace"] == pytest.approx(10 * once.facts["trace"], rel=1e-5)


def test_code_that_was_edited_after_it_was_loaded_is_not_the_new_code(user, tmp_path):
    """A result of old byte code is not stored under the new file's name."""
    loaded = user()
    text = (tmp_path / "net.py").read_text()
    (tmp_path / "net.py").write_text(text.replace("FACTOR = 2.0", "FACTOR = 20.0"))
    stale = key(loaded)
    assert stale != key(user(("FACTOR = 2.0", "FACTOR = 20.0")))


def test_what_a_loss_holds_counts(cache):
    """Two more of the kind: arguments of a partial, and what a closure or a callable object keeps."""

    def smoothed(output, batch, amount=0.0):
        return nn.functional.cross_entropy(output, batch["labels"], label_smoothing=amount)

    def closed(amount):
        return lambda output, batch: smoothed(output, batch, amount)

    class Weighted:
        def __init__(self, weights):
            self.weights = weights

        def __call__(self, output, batch):
            each = nn.functional.cross_entropy(output, batch["labels"], reduction="none")
            return (self.weights[batch["labels"]] * each).mean()

    def keys(*losses):
        return len({key(small(loss=loss)) for loss in losses})

    assert keys(*(functools.partial(smoothed, amount=a) for a in (0.1, 0.2, 0.1))) == 2
    assert keys(closed(0.1), closed(0.2), closed(0.1)) == 2
    assert keys(*(Weighted(torch.tensor([1.0, w, 1.0])) for w in (1.0, 2.0, 1.0))) == 2


class Mapped(dict):
    """A user's classes that keep what they hold elsewhere than in their own dictionary."""

    __getattr__ = dict.get


class Listed(list):
    pass


class Slotted:
    __slots__ = ("factor",)


class Below(Slotted):
    pass


class Private(pydantic.BaseModel):
    _factor: float = 1.0


class Number(float):
    pass


class Named:
    held = types.SimpleNamespace(factor=1.0)


def with_slot(value):
    made = Below()
    made.factor = value
    return made


@pytest.mark.parametrize(
    ("holder", "change", "read"),
    [
        (Mapped(factor=1.0), lambda held: held.update(factor=10.0), lambda held: held.factor),
        (Listed([1.0]), lambda held: held.__setitem__(0, 10.0), lambda held: held[0]),
        (with_slot(1.0), lambda held: setattr(held, "factor", 10.0), lambda held: held.factor),
        (Private(), lambda held: setattr(held, "_factor", 10.0), lambda held: held._factor),
        ({"": Number(1.0)}, lambda held: held.update({"": Number(10.0)}), lambda held: held[""]),
        (Named(), lambda held: setattr(Named.held, "factor", 10.0), lambda held: held.held.factor),
    ],
    ids=lambda part: type(part).__name__,
)
def test_objects_count_by_all_that_they_hold(holder, change, read, cache):
    """Kind: what a value is, asked of a place where only some values keep it."""
    on = small(loss=lambda output, batch: read(holder) * nn.functional.cross_entropy(output, batch["labels"]))
    before = Trace(products=4).run(on).facts["trace"]
    change(holder)
    after = Trace(products=4).run(on).facts["trace"]
    assert after == pytest.approx(Trace(products=4).run(on, cache=False).facts["trace"])
    assert after == pytest.approx(10 * before, rel=1e-3)


class Scaled(nn.Module):
    """A model that reads its factor from what its class holds, or from what it keeps on itself."""

    held: Any = types.SimpleNamespace(factor=1.0)

    def __init__(self, own=None):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        if own is not None:
            self.held = own

    def forward(self, inputs):
        return self.held.factor * self.inner(inputs)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (np.ones(3), np.full(3, 2.0)),
        (np.float32(1), np.float32(2)),
        (collections.deque([1]), collections.deque([2])),
        (array.array("d", [1.0]), array.array("d", [2.0])),
        (bytearray(b"a"), bytearray(b"b")),
        (fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
        (range(3), range(4)),
        (pd.Series([1.0]), pd.Series([2.0])),
        (np.random.default_rng(0), np.random.default_rng(1)),
        ([np.ones(2)], [np.zeros(2)]),
    ],
)
@pytest.mark.parametrize("on_class", [False, True])
def test_what_a_librarys_object_holds_counts(one, two, on_class, cache):
    """Kind: what a module keeps in an object of a library's was no part of its settings."""

    def subject_with(held):
        kind = type("Own", (Scaled,), {"other": held}) if on_class else Scaled
        torch.manual_seed(0)
        model = kind()
        if not on_class:
            model.other = held
        return workbench.subject(model, data={"inputs": torch.ones(12, 4), "labels": torch.arange(12) % 3})

    same, again, another = (subject_with(held).fingerprint for held in (one, copy.deepcopy(one), two))
    assert same == again != another


@pytest.mark.parametrize("own", [None, types.SimpleNamespace(factor=1.0), with_slot(1.0), Mapped(factor=1.0)])
def test_what_a_module_and_its_class_hold_counts(own, cache):
    """Kind: objects were left out of a module's settings, where numbers and functions counted."""
    generator = torch.Generator().manual_seed(0)
    data = {"inputs": torch.randn(8, 4, generator=generator), "labels": torch.arange(8) % 3}
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch["labels"])  # noqa: E731
    on = workbench.subject(Scaled(own), data=data, loss=loss)
    before = key(on)
    on.model(data["inputs"])
    assert key(on) == before
    if isinstance(own, dict):
        own["factor"] = 2.0
    else:
        on.model.held.factor = 2.0
    assert key(on) != before


def test_a_metric_of_ones_own_counts(cache):
    def task(top):
        class Top(ModuleTask):
            name = "top"

            def metrics(self, output, batch):
                return {"top": float(output.topk(top).indices.eq(batch["labels"][:, None]).sum())}

        return Top()

    on = small()
    found = [key(Subject(on.name, on.model, task(top), on.splits)) for top in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


def test_modules_that_were_replaced_or_set_count(cache):
    on = small()
    seen = [key(on)]

    def changed():
        seen.append(key(on))
        return len(set(seen)) == len(seen)

    on.model[0] = nn.Linear(4, 8)
    assert changed(), "a layer was replaced by a new one of its shape"
    on.model[1] = nn.ReLU()
    assert changed(), "an activation, which has no tensors, was replaced"
    on.model[1].inplace = True
    assert changed(), "a setting of a module"
    handle = on.model[0].register_forward_hook(lambda module, given, output: output * 2)
    assert changed(), "a hook"
    handle.remove()
    assert key(on) == seen[-2], "what was undone is as it was"


def test_what_decides_over_gradients_counts(cache, checkpoints, tmp_path):
    """Two more of the kind: a frozen layer is not trained and has no curvature; a hook changes gradients."""
    on = small()
    whole = key(on)
    trace = Trace().run(on).facts["trace"]
    on.model[0].weight.requires_grad_(False)
    assert key(on) != whole and Trace().run(on).facts["trace"] != trace
    saliencies(on)
    assert not on.model[0].weight.requires_grad, "looking at a subject thaws nothing"
    on.model[0].weight.requires_grad_(True)
    assert key(on) == whole
    handle = on.model[0].weight.register_hook(lambda gradient: 2 * gradient)
    assert key(on) != whole
    handle.remove()
    assert key(on) == whole
    frozen = workbench.subject(checkpoints["gpt2"], data="random")
    frozen.model.transformer.wte.weight.requires_grad_(False)
    again = workbench.subject(frozen.save(tmp_path / "frozen"))
    assert again.fingerprint == frozen.fingerprint
    assert not again.model.transformer.wte.weight.requires_grad


def saliencies(on):
    """Per-example gradients and Kronecker factors of a subject's layers."""
    layers = on.layers("*")
    list(example_gradients(on, layers, "train", 4))
    gradient_factors(on, layers, "train", 4)


def test_writes_that_torch_does_not_count_are_seen(cache):
    on = small()
    big = nn.Linear(300, 100)
    wide = workbench.subject(big, data={"inputs": torch.randn(20, 300), "labels": torch.randint(9, (20,))})
    for subject, weight in ((on, on.model[0].weight), (wide, big.weight)):
        before, loss = key(subject), subject.evaluated("train")["loss"]
        weight.data[0, 0] += 1
        second = key(subject)
        weight.detach().numpy()[-1, -1] += 1
        third = key(subject)
        weight.data.copy_(weight.data.flip(0))
        assert len({before, second, third, key(subject)}) == 4
        assert subject.evaluated("train")["loss"] != loss


def test_data_that_was_replaced_swapped_or_written_counts(cache):
    on = small()
    first = key(on)
    on.splits["train"], on.splits["test"] = on.splits["test"], on.splits["train"]
    swapped = key(on)
    on.splits["train"] = {name: column[:4] for name, column in on.splits["train"].items()}
    cut = key(on)
    on.splits["train"]["inputs"].numpy()[0] += 1
    assert len({first, swapped, cut, key(on)}) == 4


def test_a_derived_subject_whose_data_changed_is_another(cache):
    from workbench.pruning import Prune

    Prune(method="magnitude").run(small())
    pruned = Prune(method="magnitude").run(small()).subject
    before = pruned.fingerprint
    assert pruned._model is None
    pruned.splits["test"] = {name: column[:4] for name, column in pruned.splits["test"].items()}
    assert pruned.fingerprint != before


def test_the_tokenizer_counts(checkpoints):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(side="right", words=("a", "b", "c")):
        vocabulary = {word: place for place, word in enumerate(("[UNK]", "[PAD]", *words))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", padding_side=side
        )

    def named(made):
        return workbench.subject(checkpoints["bert"], data="random", tokenizer=made).fingerprint

    used = tokenizer()
    used(["a b", "c"], padding=True, truncation=True, max_length=4)
    first = named(tokenizer())
    assert named(used) == first
    assert len({first, named(tokenizer("left")), named(tokenizer(words=("a", "c", "b")))}) == 3


def test_libraries_threads_and_switches_count(monkeypatch, cache):
    on = small()
    seen = [key(on)]
    with threads(torch.get_num_threads() + 1):
        seen.append(key(on))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    seen.append(key(on))
    torch.set_float32_matmul_precision(precision)
    for library in version.LIBRARIES:
        monkeypatch.setattr(
            "workbench.instruments.versions", lambda name=library: version.versions() | {name: "0"}
        )
        seen.append(key(on))
    monkeypatch.undo()
    assert len(set(seen)) == len(seen) and key(on) == seen[0]


def test_a_plugins_own_imports_count(tmp_path, monkeypatch):
    """An entry of an axis, in a file that imports another."""
    from workbench.keys.live_code import digest_of

    monkeypatch.syspath_prepend(str(tmp_path))

    def opened(value):
        sys.modules.pop("beside_the_plugin", None)
        (tmp_path / "beside_the_plugin.py").write_text(f"def size():\n    return {value}\n")
        (tmp_path / "plugin.py").write_text(
            "import beside_the_plugin\n\ndef score(layer):\n    return beside_the_plugin.size()\n"
        )
        importlib.invalidate_caches()
        spec = importlib.util.spec_from_file_location("a_plugin", tmp_path / "plugin.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return digest_of([module.score])

    assert opened(1) == opened(1) != opened(2)


def test_code_that_stands_in_a_page_of_text_counts(tmp_path):
    """What a function computes is part of a key wherever it was written down, Python file or not."""
    page, found = tmp_path / "page.md", []
    page.write_text("# Words, and then some: code\n")
    for factor in (2, 2, 3):
        names: dict[str, object] = {"__name__": "page"}
        exec(compile(f"def scaled(x):\n    return {factor} * x", str(page), "exec"), names)
        found.append(live_code.digest_of([names["scaled"]]))
    assert found[0] == found[1] != found[2]


def test_a_folder_is_believed_for_what_is_in_it(tmp_path):
    """Its name is not enough: `reopen` took any folder of the right name."""
    from workbench.errors import BadInput
    from workbench.reports import reopen
    from workbench.subjects.identity import saved_as

    on = workbench.subject("digits-softmax")
    folder = on.save(tmp_path / on.fingerprint)
    assert saved_as(folder) == on.fingerprint == reopen(Trace, str(folder), on.fingerprint).fingerprint
    other = workbench.subject("digits-softmax")
    with torch.no_grad():
        other.layers()[0].original.add_(1)
    other.save(tmp_path / "other").rename(tmp_path / "moved")
    name = on.fingerprint
    for file in (tmp_path / "moved").iterdir():
        if file.name.startswith("model"):
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match="has changed since"):
        reopen(Trace, str(folder), name)


ELSEWHERE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import workbench
from tests.test_keys import key, small
print(key(workbench.subject({source!r})), key(small()), key(workbench.subject({checkpoint!r}, data="random")))
"""


def test_equal_things_have_equal_keys_in_every_process(user, tmp_path, checkpoints, cache):
    here = (
        key(user()),
        key(small()),
        key(workbench.subject(checkpoints["gpt2"], data="random")),
    )
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in checkpoints["gpt2"].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    for hashing in ("1",):
        found = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(ELSEWHERE).format(
                    folder=str(tmp_path), source=f"{tmp_path / 'net.py'}:make", checkpoint=str(moved)
                ),
            ],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PYTHONHASHSEED": hashing, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert found.stdout.split() == list(here), found.stderr


def test_reading_a_subject_leaves_its_fingerprint(cache):
    on = small()
    before = on.fingerprint
    on.evaluate("test")
    Trace().run(on)
    assert on.fingerprint == before == on.copy().fingerprint
    assert np.isfinite(on.evaluated("test")["loss"])
