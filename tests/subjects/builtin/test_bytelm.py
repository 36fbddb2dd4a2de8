"""The byte language models: tokens are bytes, losses have closed forms,
and the shipped weights do what their record says.
"""

import json
import math

import pytest
import torch
import transformers
from safetensors import safe_open

from workbench.storage import data_folder
from workbench.subjects.builtin import bytelm, corpora

NAMES = ["bytelm", "bytemoe"]


@pytest.mark.parametrize(
    "text",
    ["", "def f(x):\n\treturn 'é → ü'  \n  ", "\x00\x7f\u00ad 漢字 🙂", "".join(map(chr, range(0x250)))],
)
def test_the_tokenizer_is_utf8(tmp_path, text):
    bytelm.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<start>a<pad>")["input_ids"] == [corpora.DOCUMENT_START, 97, corpora.PADDING]
    assert len(tokenizer) == corpora.BYTE_VOCABULARY


def test_the_loss_of_zero_embeddings_is_the_logarithm_of_the_vocabulary():
    model = bytelm.byte_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # tied: every logit is 0
    windows = torch.randint(256, (3, 17))
    assert bytelm.next_byte_loss(model, windows).item() == pytest.approx(math.log(258), abs=1e-6)
    assert bytelm.bits_per_byte(model, windows) == pytest.approx(math.log2(258), abs=1e-6)


def test_the_loss_is_the_one_transformers_computes():
    torch.manual_seed(0)
    model, windows = bytelm.byte_model(), torch.randint(256, (2, 33))
    assert bytelm.next_byte_loss(model, windows).item() == pytest.approx(
        model(input_ids=windows, labels=windows).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("experts", [2, 4])
def test_routing_imbalance_is_one_when_even_and_grows_to_the_number_of_experts(experts):
    one_hot = 50.0 * torch.eye(experts)
    assert bytelm.routing_imbalance([one_hot], chosen=1).item() == pytest.approx(1)
    collapsed = one_hot[[0] * 8]
    assert bytelm.routing_imbalance([collapsed], chosen=1).item() == pytest.approx(experts)
    assert bytelm.routing_imbalance([one_hot, collapsed], chosen=1).item() == pytest.approx((1 + experts) / 2)


def test_the_balance_loss_is_the_one_transformers_computes():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    # transformers counts both chosen slots as one token each, so its value is the number of slots times ours
    assert 2 * bytelm.routing_imbalance([logits]).item() == pytest.approx(
        load_balancing_loss_func((logits,), 4, 2).item(), rel=1e-5
    )


def test_a_pass_sees_every_window_once_and_targets_follow_inputs():
    stream = torch.arange(256 * 21, dtype=torch.int32)
    batches = bytelm.training_batches(stream, batch=4, seed=3)
    first_pass = [next(batches) for _ in range(4)]  # 19 or 20 windows, so 4 full batches at least
    starts = torch.cat(first_pass)[:, 0].tolist()
    assert len(set(starts)) == 16 and len({start % 256 for start in starts}) == 1
    for windows in first_pass:
        assert windows.shape == (4, 257) and torch.equal(windows[:, 1:], windows[:, :-1] + 1)


@pytest.mark.parametrize("experts", [0, 2])
def test_training_writes_a_folder_that_transformers_opens(tmp_path, monkeypatch, experts):
    monkeypatch.setattr(corpora, "standard_library", lambda: some_documents())
    bytelm.train(tmp_path, tokens=6 * 512, minutes=10, experts=experts, batch=2, compiled=False)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["tokens"] == 6 * 512 and record["steps"] == 6
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("0,0,")
    assert record["bits_per_byte"]["validation"] < float(lines[1].split(",")[-1])  # it has learnt something
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    windows = corpora.byte_windows([d for d in some_documents() if d.split == "test"], 256, 256)
    assert bytelm.bits_per_byte(model, windows) == pytest.approx(record["bits_per_byte"]["test"], abs=1e-4)
    assert {f.name for f in tmp_path.iterdir() if "token" not in f.name} <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "log.csv",
        "training.json",
    }


def some_documents():
    return [corpora.Document(f"document{i}", b"the cat sat on the mat; " * 40) for i in range(60)]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_weights_are_small_and_hold_no_optimizer_state(name):
    file = data_folder() / name / "model.safetensors"
    assert file.stat().st_size < 8e6
    with safe_open(file, "pt") as tensors:
        assert (
            set(tensors.keys())
            <= set(bytelm.byte_model(experts=4 if name == "bytemoe" else 0).state_dict()) | expert_names()
        )


def expert_names():
    """Mixtral checkpoints keep every expert's three matrices apart; the model in memory stacks them."""
    return {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}.weight"
        for i in range(4)
        for e in range(4)
        for w in (1, 2, 3)
    } | {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(4)}


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_model_reaches_its_recorded_loss(name):
    parts = getattr(bytelm, name)()
    assert parts.task == "causal-lm"
    sizes = {split: tuple(columns["input_ids"].shape) for split, columns in parts.splits.items()}
    assert sizes == {
        "train": (4096, 256),
        "calibration": (128, 256),
        "validation": (256, 256),
        "test": (256, 256),
    }
    test = parts.splits["test"]["input_ids"]
    recorded = parts.info["bits_per_byte"]["test"]
    if parts.info["same_corpus"]:
        assert bytelm.bits_per_byte(parts.model, test) == pytest.approx(recorded, abs=2e-3)
    else:  # another Python version's files of the same names
        assert bytelm.bits_per_byte(parts.model, test[::4]) == pytest.approx(recorded, abs=0.3)
    assert recorded < 2.5  # the uncompressed 8 bits, zlib about 2.2, a unigram model 4.9


def test_calibration_windows_come_from_train():
    splits = bytelm.window_splits(corpora.standard_library())
    train = {tuple(row) for row in splits["train"]["input_ids"].tolist()}
    assert {tuple(row) for row in splits["calibration"]["input_ids"].tolist()} <= train
    for split in ("validation", "test"):
        assert all(torch.equal(columns["labels"], columns["input_ids"]) for columns in [splits[split]])
