"""Losses, metrics, gradients and calibration sums depend neither on the batch size nor on the padding: the
truth is one example at a time, without padding, by the model's own class and plain torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from workbench import BadInput
from workbench.measures import compare
from workbench.pruning.recovery.recovery import distilled_loss
from workbench.pruning.saliency.heapr import atomic_scores
from workbench.statistics import second_moments
from workbench.subjects import TASK, Subject
from workbench.subjects.structure.units import discover

COUNT, LENGTH = 7, 9
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}
DEEP = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    **DEEP,
}
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
LABELS = {"num_labels": 3}
#: task, class, the settings of its config
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert": ("sequence-classification", t.BertForSequenceClassification, SMALL | LABELS),
    "roberta": ("sequence-classification", t.RobertaForSequenceClassification, SMALL | LABELS),
    "electra": ("token-classification", t.ElectraForTokenClassification, SMALL | LABELS),
    "albert": ("masked-lm", t.AlbertForMaskedLM, SMALL | {"embedding_size": 16}),
    "distilbert": (
        "token-classification",
        t.DistilBertForTokenClassification,
        LABELS
        | {
            "vocab_size": 61,
            "dim": 16,
            "n_heads": 2,
            "n_layers": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
        },
    ),
    "deberta": ("masked-lm", t.DebertaV2ForMaskedLM, SMALL),
    "gpt2": (
        "causal-lm",
        t.GPT2LMHeadModel,
        {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "gpt2-classes": (
        "sequence-classification",
        t.GPT2ForSequenceClassification,
        LABELS
        | {
            "vocab_size": 61,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "pad_token_id": 1,
        },
    ),
    "llama": ("causal-lm", t.LlamaForCausalLM, SMALL),
    "llama-classes": ("sequence-classification", t.LlamaForSequenceClassification, SMALL | LABELS),
    "qwen2": ("causal-lm", t.Qwen2ForCausalLM, SMALL | {"num_key_value_heads": 1}),
    "gemma2": ("causal-lm", t.Gemma2ForCausalLM, SMALL | {"head_dim": 8, "num_key_value_heads": 1}),
    "mixtral": (
        "causal-lm",
        t.MixtralForCausalLM,
        SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    "opt": (
        "causal-lm",
        t.OPTForCausalLM,
        {
            "vocab_size": 61,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
        },
    ),
    "neox": ("causal-lm", t.GPTNeoXForCausalLM, SMALL),
    "bloom": (
        "causal-lm",
        t.BloomForCausalLM,
        {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "mamba": (
        "causal-lm",
        t.MambaForCausalLM,
        {"vocab_size": 61, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
    ),
    "t5": ("seq2seq-lm", t.T5ForConditionalGeneration, T5),
    "mt5": ("seq2seq-lm", t.MT5ForConditionalGeneration, T5),
    "bart": ("seq2seq-lm", t.BartForConditionalGeneration, BART),
    "marian": ("seq2seq-lm", t.MarianMTModel, BART),
    "pegasus": ("seq2seq-lm", t.PegasusForConditionalGeneration, BART),
    "regression": ("regression", t.BertForSequenceClassification, SMALL | {"num_labels": 2}),
    "multi-label": (
        "multi-label-classification",
        t.BertForSequenceClassification,
        SMALL | LABELS | {"problem_type": "multi_label_classification"},
    ),
    "embedding": ("embedding", t.BertModel, SMALL),
    "vit": (
        "image-classification",
        t.ViTForImageClassification,
        LABELS
        | {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 8,
            "patch_size": 4,
        },
    ),
    "segformer": (
        "semantic-segmentation",
        t.SegformerForSemanticSegmentation,
        LABELS
        | {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
        },
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    _, cls, settings = MODELS[name]
    return cls(cls.config_class(**settings)).double().eval()


def target(task: str, index: int, ids: Tensor, hidden: Tensor, draw: torch.Generator) -> Tensor:
    if task == "sequence-classification":
        return torch.tensor(-100 if index == 2 else index % 3)
    if task == "token-classification":
        return torch.randint(3, ids.shape, generator=draw).where(hidden, -100)
    if task == "masked-lm":
        return ids.where(hidden, -100)
    if task == "causal-lm":
        return ids.clone()
    if task == "seq2seq-lm":
        return torch.randint(2, 61, (2 + (index * 3) % 11,), generator=draw)
    if task == "multi-label-classification":
        return torch.tensor([1, 0, -100 if index == 3 else 1])
    return torch.randn(16 if task == "embedding" else 2, generator=draw).double()


def ragged(name: str) -> list[dict[str, Tensor]]:
    """Examples of different lengths, without padding; some have no target."""
    task, draw = MODELS[name][0], torch.Generator().manual_seed(1)
    found = []
    for index in range(COUNT):
        if task in ("image-classification", "semantic-segmentation"):
            labels = torch.randint(3, () if task.startswith("image") else (8, 8), generator=draw)
            if task.startswith("semantic"):
                labels[: index % 3] = 255
            elif index == 2:
                labels = torch.tensor(-100)
            found.append({"pixel_values": torch.randn(3, 8, 8, generator=draw).double(), "labels": labels})
            continue
        length = 3 + (index * 5) % (LENGTH - 2)
        ids = torch.randint(2, 61, (length,), generator=draw)
        hidden = torch.rand(length, generator=draw) < 0.4
        hidden[1] = True
        found.append(
            {
                "input_ids": ids,
                "labels": target(task, index, ids, hidden, draw),
            }
        )
    return found


def padded(examples: list[dict[str, Tensor]], task: str) -> dict[str, Tensor]:
    def stack(key: str, fill: float) -> Tensor:
        rows = [e[key] for e in examples]
        if rows[0].ndim != 1 or task in ("regression", "embedding", "multi-label-classification"):
            return torch.stack(rows)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    if "pixel_values" in examples[0]:
        return {k: torch.stack([e[k] for e in examples]) for k in examples[0]}
    ids = nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], batch_first=True, padding_value=1)
    ids = F.pad(ids, (0, 3), value=1)  # more than any example needs
    mask = torch.stack([(torch.arange(ids.shape[1]) < len(e["input_ids"])).long() for e in examples])
    made = {"input_ids": ids, "attention_mask": mask, "labels": stack("labels", -100)}
    if task in ("causal-lm", "masked-lm", "token-classification"):
        more = ids.shape[1] - made["labels"].shape[1]
        made["labels"] = F.pad(made["labels"], (0, more), value=-100)
    return made


def alone(model: nn.Module, task: str, example: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(sum of the losses, number of items) of one example, by the model's class and plain torch."""
    labels = example["labels"][None]
    given = {k: v[None] for k, v in example.items() if k != "labels"}
    call: Any = model
    if task == "seq2seq-lm":
        return call(**given, labels=labels).loss * labels.numel(), labels.numel()
    output = call(**given)
    if task == "embedding":
        return 0.5 * (output[0].mean(1) - labels).square().sum(), 1
    logits = output.logits
    if task == "regression":
        return 0.5 * (logits - labels).square().sum(), 1
    if task == "multi-label-classification":
        keep = labels != -100
        each = F.binary_cross_entropy_with_logits(logits[keep], labels[keep].double(), reduction="sum")
        return each, int(keep.sum())
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if task == "semantic-segmentation":
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear").permute(0, 2, 3, 1)
    missing = 255 if task == "semantic-segmentation" else -100
    kept = labels.reshape(-1) != missing
    rows = logits.reshape(-1, logits.shape[-1])[kept]
    return F.cross_entropy(rows, labels.reshape(-1)[kept], reduction="sum"), int(kept.sum())


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_know_neither_batch_nor_padding(name):
    """Kind: what a column is, is declared by the task, never guessed from its shape; items without a target
    are no items.
    """
    task, model, examples = MODELS[name][0], model_of(name), ragged(name)
    on = Subject(name, model, TASK[task].value(), {"test": padded(examples, task)})
    weights = [p for p in model.parameters() if p.requires_grad]
    parts = [alone(model, task, example) for example in examples]
    items = sum(count for _, count in parts)
    want = sum(loss for loss, _ in parts) / items
    slopes = torch.autograd.grad(want, weights, allow_unused=True)
    for size in (1, 3, COUNT):
        assert on.evaluate("test", batch_size=size)["loss"] == pytest.approx(float(want.detach()), abs=1e-6)
        total, got = 0, [torch.zeros_like(w) for w in weights]
        for batch in on.batches("test", size):
            count = on.task.items(batch)
            if count == 0:
                continue
            total += count
            found = torch.autograd.grad(on.loss(batch) * count, weights, allow_unused=True)
            got = [a if b is None else a + b for a, b in zip(got, found, strict=True)]
        assert total == items
        for mine, true in zip(got, slopes, strict=True):
            assert torch.allclose(mine / items, torch.zeros_like(mine) if true is None else true, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt", "t5", "mt5", "bart", "marian", "pegasus"])
def test_calibration_counts_the_tokens_of_each_sequence(name):
    """Kind 5: an encoder's layers see the source's tokens, a decoder's the target's, and keys and values of
    cross-attention the source's, whatever the padding of either.
    """
    task, model, examples = MODELS[name][0], model_of(name), ragged(name)
    columns = padded(examples, task)
    if task == "seq2seq-lm":  # both sequences of one width: shapes tell nothing
        wide = max(columns["labels"].shape[1], columns["input_ids"].shape[1])
        for key, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100)):
            columns[key] = F.pad(columns[key], (0, wide - columns[key].shape[1]), value=fill)
    on = Subject(name, model, TASK[task].value(), {"calibration": columns})
    layers = on.layers()
    want = {layer.name: torch.zeros(layer.shape[-1], layer.shape[-1]).double() for layer in layers}
    handles = []
    for layer in layers:

        def see(module: nn.Module, given: Any, name: str = layer.name) -> None:
            rows = given[0].detach().flatten(0, -2)
            want[name] += rows.T @ rows

        handles.append(layer.module.register_forward_pre_hook(see))
    with torch.no_grad():
        for example in examples:
            alone(model, task, example)
    for handle in handles:
        handle.remove()
    for size in (1, 4):
        found = second_moments(on, layers, examples=COUNT, batch_size=size)
        for layer in layers:
            gram = found[layer.name].gram
            assert gram is not None and torch.allclose(gram[0].double(), want[layer.name], atol=1e-4), (
                layer.name
            )


def test_a_padded_column_that_nobody_declared_is_left_whole():
    """Kind 5, another example: a column of the mask's width that runs along something else was cut."""
    examples = padded(ragged("bert"), "sequence-classification")
    on = Subject("bert", model_of("bert"), TASK["sequence-classification"].value(), {"test": examples})
    short = {k: v[:1] for k, v in examples.items()}
    assert on.task.trimmed(short)["input_ids"].shape[1] == int(short["attention_mask"].sum())
    extra = short | {"features": torch.ones(1, short["input_ids"].shape[1])}
    assert on.task.trimmed(extra)["features"].shape == extra["features"].shape


def test_padding_on_the_left_is_no_sign_of_a_short_text():
    """Kind 5, another example: with padding on the left the last tokens were cut off."""
    ids = torch.tensor([[1, 1, 1, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids > 1).long(), "labels": torch.tensor([0])}
    assert torch.equal(TASK["sequence-classification"].value().trimmed(batch)["input_ids"], ids)


def test_what_is_predicted_from_padding_is_no_target():
    """Kind 5, another example: the first word of a text with padding on its left counted as one."""
    torch.manual_seed(0)
    config = t.LlamaConfig(**SMALL, num_key_value_heads=2)
    models = [t.LlamaForCausalLM(config).eval() for _ in range(2)]
    lengths, width = (9, 4, 6), 12
    texts = [torch.randint(2, 61, (n,)) for n in lengths]

    def columns(left: bool) -> dict[str, Tensor]:
        ids, mask = torch.ones(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for row, text in enumerate(texts):
            place = slice(width - len(text), None) if left else slice(0, len(text))
            ids[row, place], mask[row, place] = text, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    found = []
    for left in (False, True):
        splits = {"test": columns(left)}
        dense, other = (Subject("llama", m, TASK["causal-lm"].value(), splits) for m in models)
        assert dense.task.items(splits["test"]) == sum(lengths) - len(lengths)
        measures = compare(dense, other, "test", 3).measures()
        found.append({"loss": dense.evaluate("test")["loss"], **measures})
    for name, value in found[0].items():
        if isinstance(value, float):
            assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


class Pixels(nn.Module):
    """(batch, 2, height, width) -> (batch, 4, height, width) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("height, width", [(5, 6), (5, 4), (4, 4)])
def test_the_class_axis_of_a_users_network(height, width):
    """Kind 5: which axis holds the classes is declared; where two fit, the declaration is asked for."""
    net, labels = Pixels(), torch.randint(4, (20, height, width))
    labels[:, :2] = -100
    data = {"inputs": torch.randn(20, 2, height, width), "labels": labels}
    options: dict[str, Any] = {}
    if (height, width) == (4, 4):
        with pytest.raises(BadInput, match="class_axis: the output .* fits the labels .* along axis 1 and"):
            workbench.subject(net, data={"test": data})
        options = {"class_axis": 1}
    on = workbench.subject(net, data={"test": data}, **options)
    want = F.cross_entropy(net(data["inputs"]), labels, ignore_index=-100)
    hits = (net(data["inputs"]).argmax(1) == labels)[labels != -100].double().mean()
    for size in (1, 3, 20):
        found = on.evaluate("test", batch_size=size)
        assert found["loss"] == pytest.approx(float(want.detach()), abs=1e-6)
        assert found["accuracy"] == pytest.approx(float(hits))


def test_another_ignored_label_and_chances_of_classes():
    """Kind 8: the value that marks an item without a target is the user's; kind 47: chances as targets."""
    net, labels = Pixels(), torch.randint(4, (20, 5, 6))
    labels[:7, 2:] = 255
    inputs = torch.randn(20, 2, 5, 6)
    with pytest.raises(BadInput, match="labels: 255 is no class .* ignored=255"):
        workbench.subject(net, data={"test": {"inputs": inputs, "labels": labels}})
    on = workbench.subject(net, data={"test": {"inputs": inputs, "labels": labels}}, ignored=255)
    want = F.cross_entropy(net(inputs), labels, ignore_index=255)
    assert on.evaluate("test", batch_size=3)["loss"] == pytest.approx(float(want.detach()), abs=1e-6)
    chances = torch.rand(20, 4, 5, 6).softmax(1)
    on = workbench.subject(
        net, data={"test": {"inputs": inputs, "labels": chances}}, loss="cross_entropy", class_axis=1
    )
    want = F.cross_entropy(net(inputs), chances)
    for size in (1, 3, 20):
        assert on.evaluate("test", batch_size=size)["loss"] == pytest.approx(float(want.detach()), abs=1e-6)


def test_ignored_labels_of_a_users_module_are_no_items():
    """Kind 8: ignored items are no items, everywhere an average is taken."""
    net, labels = nn.Linear(6, 3), torch.randint(3, (40,))
    labels[::2] = -100
    inputs = torch.randn(40, 6)
    on = workbench.subject(net, data={"test": {"inputs": inputs, "labels": labels}})
    kept = labels != -100
    want = F.cross_entropy(net(inputs)[kept], labels[kept])
    for size in (1, 7, 40):
        found = on.evaluate("test", batch_size=size)
        assert found["loss"] == pytest.approx(float(want.detach()), abs=1e-6)
        assert found["accuracy"] == pytest.approx(
            float((net(inputs)[kept].argmax(-1) == labels[kept]).float().mean())
        )


@pytest.mark.parametrize(
    "loss, fine",
    [
        (lambda output, batch: (output[:, 0] - batch["labels"]).square().mean(), True),
        (lambda output, batch: (output[:, 0] - batch["labels"]).square().sum(), False),
        (
            lambda output, batch: (
                ((output[:, 0] - batch["labels"]).square() * (batch["labels"] > 0)).sum()
                / (batch["labels"] > 0).sum()
            ),
            False,
        ),
    ],
)
def test_a_users_loss_is_a_mean_over_examples_or_says_over_what(loss: Callable[..., Tensor], fine: bool):
    """Kind 8, another example: a sum, or a mean over some examples, was averaged as if it were over all."""
    net, labels = nn.Linear(6, 1), torch.tensor([1.0, -1.0, -1.0, 2.0] * 5)
    data = {"test": {"inputs": torch.randn(20, 6), "labels": labels}}
    if fine:
        workbench.subject(net, data=data, loss=loss)
        return
    with pytest.raises(BadInput, match="loss: is no mean over examples"):
        workbench.subject(net, data=data, loss=loss)
    if loss(torch.zeros(20, 1), data["test"]) == 2.5:  # the mean over the positive ones
        on = workbench.subject(
            net, data=data, loss=loss, items=lambda batch: int((batch["labels"] > 0).sum())
        )
        want = loss(net(data["test"]["inputs"]), data["test"])
        for size in (1, 3, 20):
            assert on.evaluate("test", batch_size=size)["loss"] == pytest.approx(
                float(want.detach()), abs=1e-6
            )


class Mixed(nn.Module):
    """Every example is compared with the others of its batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(6, 3), how
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        if self.how == "normalised":
            return self.norm(found)
        return found - found.mean(0) if self.how == "centred" else found.softmax(0)


@pytest.mark.parametrize("how", ["normalised", "centred", "softmax over the wrong axis"])
def test_a_network_whose_answers_depend_on_the_batch_is_refused(how):
    """Kind 8, another example: losses of such a network differ by the batch size."""
    data = {"inputs": torch.randn(40, 6), "labels": torch.randint(3, (40,))}
    with pytest.raises(
        BadInput, match=r"subject: (what the module computes|the module takes no batch of one)"
    ):
        workbench.subject(Mixed(how), data=data)


def test_columns_are_tensors_of_one_length_and_targets_are_numbers():
    """Kind 7, another example: a target of NaN made the loss of a split NaN; the others were tracebacks."""
    inputs, labels = torch.randn(40, 6), torch.randn(40)
    net = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    with pytest.raises(BadInput, match="columns have not one number of examples .inputs 40, labels 39"):
        workbench.subject(net, data={"inputs": inputs, "labels": labels[:39]})
    with pytest.raises(BadInput, match="the column 'labels' of the split 'test' is a list"):
        workbench.subject(net, data={"test": {"inputs": inputs, "labels": ["a"] * 40}})
    given = {"inputs": inputs.numpy(), "labels": labels.tolist()}
    assert workbench.subject(net, data=given).evaluate("test")["loss"] > 0
    for value in (float("nan"), float("inf")):
        broken = labels.clone()
        broken[30] = value
        with pytest.raises(BadInput, match="labels: example 30 of split 'test' is nan or inf"):
            workbench.subject(net, data={"test": {"inputs": inputs, "labels": broken}})


def test_a_modules_outputs_and_numbers_to_predict_have_one_shape():
    """Kind 5, another example: three outputs against one number were broadcast without a word."""
    data = {"inputs": torch.randn(20, 6), "labels": torch.randn(20)}
    with pytest.raises(BadInput, match="labels: 1 numbers an example, but the model predicts 3"):
        workbench.subject(nn.Linear(6, 3), data=data)


def test_the_settings_of_a_task_are_part_of_the_fingerprint():
    data = {"test": {"inputs": torch.randn(20, 2, 4, 4), "labels": torch.randint(4, (20, 4, 4))}}
    net = Pixels()
    found = {
        workbench.subject(net, data=data, class_axis=axis, ignored=ignored).fingerprint
        for axis in (1, -1)
        for ignored in (-100, 9)
    }
    assert len(found) == 4


def test_hidden_states_at_padding_teach_nothing():
    """Kind 8, another example: the distance of hidden states counted what stands at padding."""
    task, examples = "masked-lm", ragged("albert")[:3]
    columns = padded(examples, task)
    on, teacher = (
        Subject("bert", model_of("deberta"), TASK[task].value(), {"train": columns}) for _ in range(2)
    )
    with torch.no_grad():
        for weight in on.model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    trimmed = on.task.trimmed(columns)
    assert trimmed["input_ids"].shape[1] < columns["input_ids"].shape[1]
    found = [float(distilled_loss(on, teacher, batch).detach()) for batch in (columns, trimmed)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_atoms_are_scored_by_the_tokens_that_are_real():
    """Kind 8, another example: HEAPr counted the activations of padding."""
    columns = padded(ragged("llama"), "causal-lm")
    on = Subject("llama", model_of("llama").float(), TASK["causal-lm"].value(), {"calibration": columns})
    groups = [group for group in discover(on.model) if group.kind == "neurons"]
    found = [atomic_scores(on, groups, examples=COUNT, batch_size=size) for size in (1, COUNT)]
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-9)


def test_a_split_without_targets_is_named():
    on = Subject(
        "bert",
        model_of("bert"),
        TASK["sequence-classification"].value(),
        {"test": {"input_ids": torch.ones(3, 4, dtype=torch.long)}},
    )
    with pytest.raises(BadInput, match="split: 'test' has no column labels"):
        on.evaluate("test")


def test_a_batch_that_is_measured_holds_so_many_tokens_and_the_loss_does_not_depend_on_it(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: memory that grows with the examples of a batch, however long they are."""
    on = workbench.subject(checkpoints["llama"], data="random", max_length=16)
    whole = on.evaluate("test")
    assert on.examples_at_once("test", 64) == 64
    monkeypatch.setattr(sys.modules[Subject.__module__], "TOKENS", 40)
    assert on.examples_at_once("test", 64) == 40 // on.task.longest(on.split("test")) < 4
    assert on.evaluate("test") == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(sys.modules[Subject.__module__], "TOKENS", 1)
    assert on.examples_at_once("test", 64) == 1
    images = workbench.subject(checkpoints["vit"], data="random")
    assert images.task.longest(images.split("test")) == 1
