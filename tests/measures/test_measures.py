"""Every measure against an independent computation in double precision from whole logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import workbench
from tests.conftest import tiny
from workbench import BadInput
from workbench.measures import TokenPairs, compare, confidence_table, language_measures, reference_of
from workbench.subjects import Subject

LANGUAGE = ("gpt2", "llama", "mixtral", "t5")
LENGTH, COUNT = 20, 12


def examples(architecture: str) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded on the right, labels -100 at the padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 99, (COUNT, LENGTH), generator=generator)
    lengths = torch.randint(5, LENGTH + 1, (COUNT,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    if architecture == "bert":
        labels = torch.randint(3, (COUNT,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def on(architecture: str, columns: dict[str, torch.Tensor], noise: float = 0.0) -> Subject:
    model = tiny(architecture).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    task = {"bert": "sequence-classification", "t5": "seq2seq-lm"}.get(architecture, "causal-lm")
    kind = workbench.subjects.TASK[task].value()
    return Subject(f"{architecture} {noise}", model, kind, {"test": columns})


@torch.no_grad()
def log_probabilities(subject: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one example at a time, without its padding: (items, outputs), targets, example of each item."""
    parts, targets, examples = [], [], []
    for row in range(subject.size("test")):
        batch = {name: column[row : row + 1] for name, column in subject.split("test").items()}
        length = int(batch["attention_mask"].sum())
        batch = {name: c[:, :length] if c.ndim == 2 else c for name, c in batch.items()}
        output, wanted = subject.task.flat(subject.task.output(subject.model, batch), batch)
        parts.append(output.double().log_softmax(-1))
        targets.append(wanted)
        examples += [row] * len(wanted)
    return torch.cat(parts).numpy(), torch.cat(targets).numpy(), np.array(examples)


@pytest.mark.parametrize("architecture", LANGUAGE)
def test_language_measures_are_those_of_whole_logits(architecture):
    columns = examples(architecture)
    dense, changed = on(architecture, columns), on(architecture, columns, 0.05)
    found = compare(dense, changed)
    got = found.measures()
    p, targets, windows = log_probabilities(dense)
    q, _, _ = log_probabilities(changed)
    kl = (np.exp(p) * (p - q)).sum(-1)
    rows = np.arange(len(targets))
    delta = np.exp(q[rows, targets]) - np.exp(p[rows, targets])
    want = {
        "kl": kl.mean(),
        "kl_median": np.median(kl),
        "kl_99": np.quantile(kl, 0.99),
        "kl_999": np.quantile(kl, 0.999),
        "kl_max": kl.max(),
        "same_top": (p.argmax(-1) == q.argmax(-1)).mean(),
        "acceptance": np.minimum(np.exp(p), np.exp(q)).sum(-1).mean(),
        "ln_perplexity_ratio": (p[rows, targets] - q[rows, targets]).mean(),
        "delta_p_rms": math.sqrt(np.square(delta).mean()),
        "delta_p_1": np.quantile(delta, 0.01),
        "delta_p_99_9": np.quantile(delta, 0.999),
        "tokens": len(targets),
    }
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
    assert got["kl"] > 1e-3
    assert np.array_equal(found.pairs.window, windows)
    assert found.pairs.divergence == pytest.approx(kl, abs=3e-6)
    confidence = np.exp(p.max(-1))
    table = confidence_table(found.pairs)
    assert table["tokens"].sum() == len(targets)
    low = confidence < 0.25
    assert table["kl"][0] == pytest.approx(kl[low].mean(), abs=1e-6) and table["tokens"][0] == low.sum()


@pytest.mark.parametrize("architecture", LANGUAGE)
def test_neither_batch_size_nor_padding_matters(architecture):
    columns = examples(architecture)
    wider = {
        "input_ids": nn.functional.pad(columns["input_ids"], (0, 7)),
        "attention_mask": nn.functional.pad(columns["attention_mask"], (0, 7)),
        "labels": nn.functional.pad(columns["labels"], (0, 7), value=-100),
    }
    want = compare(on(architecture, columns), on(architecture, columns, 0.05)).measures()
    for data, size in ((columns, 1), (columns, 5), (wider, 64)):
        got = compare(on(architecture, data), on(architecture, data, 0.05), batch_size=size).measures()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, abs=1e-6), (name, size)


@pytest.mark.parametrize("architecture", [*LANGUAGE, "bert"])
def test_a_subject_against_itself_is_exactly_zero(architecture):
    columns = examples(architecture)
    found = compare(on(architecture, columns), on(architecture, columns)).measures()
    assert found["kl"] == 0 and found["kl_low"] == 0 and found["kl_high"] == 0
    assert found.get("ln_perplexity_ratio", 0.0) == 0 and found.get("delta_p_rms", 0.0) == 0


def test_permuted_neurons_are_the_same_model_to_rounding():
    columns = examples("llama")
    dense, changed = on("llama", columns), on("llama", columns)
    order = torch.randperm(64)
    with torch.no_grad():
        for block in changed.model.model.layers:
            for name in ("gate_proj", "up_proj"):
                part = getattr(block.mlp, name)
                part.weight.copy_(part.weight[order])
            block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order])
    found = compare(dense, changed).measures()
    assert abs(found["kl"]) < 1e-7 and found["same_top"] == 1


def test_a_word_that_neither_model_can_say_adds_nothing():
    """Vocabularies are padded, and heads may forbid words: ln 0 - ln 0 is no divergence."""
    from workbench.measures.language import pair_of

    dense = torch.tensor([[0.0, 1.0, -math.inf], [0.5, 0.0, 2.0]])
    changed = torch.tensor([[1.0, 0.0, -math.inf], [0.5, 0.0, 2.0]])
    p, q = dense[0, :2].log_softmax(-1), changed[0, :2].log_softmax(-1)
    found = pair_of(dense.clone(), changed.clone(), torch.tensor([0, 2]))
    assert found["divergence"].tolist() == pytest.approx([float((p.exp() * (p - q)).sum()), 0.0])
    forbidden = pair_of(dense[1:].clone(), torch.tensor([[0.5, 0.0, -math.inf]]), torch.tensor([0]))
    assert float(forbidden["divergence"]) == math.inf


def test_classifiers_are_counted_as_by_hand():
    columns = examples("bert")
    dense, changed = on("bert", columns), on("bert", columns, 0.2)
    got = compare(dense, changed, batch_size=5).measures()
    p, targets, _ = log_probabilities(dense)
    q, _, _ = log_probabilities(changed)
    right, after = p.argmax(-1) == targets, q.argmax(-1) == targets
    truth = np.eye(3)[targets]
    want = {
        "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
        "accuracy": after.mean(),
        "right_to_wrong": (right & ~after).sum(),
        "wrong_to_right": (~right & after).sum(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
        "brier": np.square(np.exp(q) - truth).sum(-1).mean(),
    }
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
    confidence = np.exp(q.max(-1))
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(after[inside].mean() - confidence[inside].mean())
    assert got["calibration_error"] == pytest.approx(error, abs=1e-6)
    shares = [after[targets == c].mean() for c in np.unique(targets)]
    assert got["worst_class_accuracy"] == pytest.approx(min(shares))
    assert got["accuracy_low"] <= got["accuracy"] <= got["accuracy_high"]


def test_embeddings_by_cosine_and_rank():
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(30, 8))
    pairs = workbench.measures.VectorPairs(dense, dense + 0.5 * generator.normal(size=(30, 8)))
    got = workbench.measures.embedding_measures(pairs)
    cosines = [1 - float(workbench_cosine(a, b)) for a, b in zip(pairs.dense, pairs.changed, strict=True)]
    assert got["distance"] == pytest.approx(np.mean(cosines))
    one, two = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (pairs.dense, pairs.changed))
    ranks = [
        stats.spearmanr(np.delete(one @ one[i], i), np.delete(two @ two[i], i)).statistic for i in range(30)
    ]
    assert got["rank_agreement"] == pytest.approx(np.mean(ranks))
    itself = workbench.measures.embedding_measures(workbench.measures.VectorPairs(dense, 1 * dense))
    assert itself["distance"] == 0 and itself["neighbours_kept"] == 1
    assert itself["rank_agreement"] == pytest.approx(1)


def workbench_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_an_encoder_without_a_head(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    dense = workbench.subject(tmp_path / "encoder", data="random", task="embedding")
    changed = dense.copy()
    assert compare(dense, changed).measures()["distance"] == 0
    with torch.no_grad():
        changed.layers()[0].original.mul_(0.5)
    assert 0 < compare(dense, changed).measures()["distance"] < 1


def test_the_interval_covers_what_was_drawn():
    """Of tokens that come in windows which differ, 95 % intervals hold the mean about 95 times in a hundred:
    too narrow were the windows taken for independent tokens."""
    from workbench.measures.intervals import block_bootstrap

    generator = np.random.default_rng(0)
    covered = narrow = 0
    blocks = np.repeat(np.arange(40), 25)
    for _ in range(60):
        values = np.repeat(generator.normal(size=40), 25) + generator.normal(size=1000)
        low, high = block_bootstrap(values, blocks)
        covered += low <= 0 <= high
        low, high = block_bootstrap(values[::5], np.arange(200))
        narrow += low <= 0 <= high
    assert covered >= 52 > 45 > narrow


def test_counted_intervals_and_flips():
    from workbench.measures.intervals import mcnemar, wilson

    # Newcombe 1998, table I: 81 of 263 by the score method
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert mcnemar(0, 0) == 1 and mcnemar(5, 0) == pytest.approx(2 / 32)


@pytest.mark.parametrize(
    "value, low, high, name",
    [
        (0.01, 0.005, 0.015, "accept"),
        (0.05, 0.04, 0.06, "regression"),
        (0.028, 0.02, 0.036, "cannot tell"),
        (0.03, 0.02, 0.04, "cannot tell"),
        (0.01, math.nan, math.nan, "cannot tell"),
    ],
)
def test_verdicts(value, low, high, name):
    from workbench.measures import verdict

    found = verdict(value, low, high, tolerance=0.03, texts=16)
    assert found.name == name
    if value == 0.028:  # a half width of 0.008 has to shrink to 0.002: sixteen times the texts
        assert found.more_texts == 15 * 16 and str(found) == "cannot tell (240 more texts would)"
    assert verdict(value, low, high, 0.03, 16, size=10, budget=9).name == "does not fit"


def test_words_and_their_thresholds():
    from workbench.measures import word

    assert [word(v) for v in (0, 0.0049, 0.005, 0.03, 0.1, math.inf)] == [
        "same",
        "same",
        "close",
        "visible",
        "changed",
        "changed",
    ]


def test_other_outputs_and_other_tasks_do_not_compare():
    columns = examples("llama")
    dense = on("llama", columns)
    import transformers

    config = transformers.LlamaConfig(**{**dense.model.config.to_dict(), "vocab_size": 120})
    other = Subject("wider", transformers.LlamaForCausalLM(config), dense.task, {"test": columns})
    with pytest.raises(BadInput, match="'wider' has 120 outputs and the reference .* has 99"):
        compare(dense, other)
    with pytest.raises(BadInput, match="has the task sequence-classification, the reference"):
        compare(dense, on("bert", examples("bert")))
    net = nn.Linear(2, 2)
    x = torch.randn(16, 2)
    own = workbench.subject(
        net, data={"inputs": x, "labels": x}, loss=lambda o, b: (o - b["labels"]).abs().mean()
    )
    with pytest.raises(BadInput, match="a loss of its own"):
        compare(own, own)


def test_a_reference_survives_what_is_done_to_the_model():
    """A reference says what the model said when it was asked, its head included."""
    columns = examples("llama")
    dense, work = on("llama", columns), on("llama", columns)
    want = compare(dense, on("llama", columns, 0.05)).measures()
    reference = reference_of(work, changing=True)
    with torch.no_grad():
        for mine, theirs in zip(
            work.model.parameters(), on("llama", columns, 0.05).model.parameters(), strict=True
        ):
            mine.copy_(theirs)
    assert reference.against(work).measures() == pytest.approx(want)
    untouched = reference_of(dense)
    with torch.no_grad():
        dense.model.lm_head.weight.mul_(2)
    with pytest.raises(BadInput, match="head of the reference was written to"):
        untouched.against(work)


def test_one_pass_also_measures_the_loss():
    columns = examples("llama")
    dense, plain = on("llama", columns), on("llama", columns)
    reference = reference_of(dense)
    assert dense.evaluations[("test", COUNT)] == plain.evaluated("test")
    reference.against(changed := on("llama", columns, 0.05))
    alone = on("llama", columns, 0.05).evaluated("test")
    assert changed.evaluations[("test", COUNT)] == pytest.approx(alone, abs=1e-6)


def test_llama_cpp_definitions():
    """tools/perplexity: KL and the change of p(correct), their RMS and percentiles between order statistics,
    computed there over the tokens as here.
    """
    generator = np.random.default_rng(1)
    count = 997
    p, q = generator.uniform(0.01, 1, count), generator.uniform(0.01, 1, count)
    zeros = np.zeros(count)
    pairs = TokenPairs(
        np.arange(count) // 100,
        zeros.astype(int),
        zeros,
        zeros,
        zeros,
        zeros == 0,
        np.log(p),
        np.log(q),
        zeros == 0,
    )
    got = language_measures(pairs)
    change = np.sort(q - p)

    def percentile(share: float) -> float:
        place = share * (count - 1)
        below = int(place)
        return float(change[below] + (place - below) * (change[min(below + 1, count - 1)] - change[below]))

    for share, name in ((0.001, "0_1"), (0.05, "5"), (0.5, "50"), (0.99, "99"), (0.999, "99_9")):
        assert got[f"delta_p_{name}"] == pytest.approx(percentile(share))
    assert got["delta_p_rms"] == pytest.approx(math.sqrt(((q - p) ** 2).mean()))
    assert got["ln_perplexity_ratio"] == pytest.approx(np.log(p).mean() - np.log(q).mean())
