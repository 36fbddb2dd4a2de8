"""Opening a checkpoint accounts for every tensor, keeps a local folder local, and refuses in one line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import workbench
from tests.conftest import tiny
from workbench import BadInput
from workbench.pruning import Prune


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may look for another machine."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a local folder reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture()
def folder(checkpoints, tmp_path):
    """name -> a copy of a checkpoint that may be changed."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints[name], tmp_path / name))

    return copy


def change(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    said = json.loads((folder / file).read_text())
    for field, value in fields.items():
        said.pop(field, None) if value is ... else said.update({field: value})
    (folder / file).write_text(json.dumps(said))
    return folder


def rename(folder: Path, to: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({to(name): value for name, value in tensors.items()}, file, {"format": "pt"})
    return folder


def opened(source: Path, **options: Any) -> workbench.subjects.Subject:
    return workbench.subject(source, data="random", max_length=12, **options)


WRAPPED = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "distributed": lambda n: f"module.{n}",
    "both": lambda n: f"_orig_mod.module.{n}",
    "blocks compiled": lambda n: n.replace("h.0.", "h.0._orig_mod.").replace(
        "layers.0.", "layers.0._orig_mod."
    ),
    "sharded": lambda n: f"_fsdp_wrapped_module.{n.replace('.0.', '.0._fsdp_wrapped_module.')}",
    "a class around it": lambda n: f"net.{n}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("architecture", ["gpt2", "bert", "mixtral"])
def test_the_prefixes_of_wrappers_are_stripped_and_said(architecture, wrapper, checkpoints, folder, tmp_path):
    """Kind 4: prefixes of wrappers are stripped and said; a missing or unused tensor is refused or named."""
    want = opened(checkpoints[architecture])
    got = opened(rename(folder(architecture), WRAPPED[wrapper]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(want.model.state_dict().values(), got.model.state_dict().values(), strict=True)
    )
    renamed = architecture != "bert" or wrapper != "blocks compiled"  # whose blocks are called layer
    assert ("stripped of a wrapper's" in got.data_note) == renamed and "new" not in got.data_note
    got.save(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(checkpoints[architecture] / "model.safetensors").keys()
    )


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "llama", "t5", "vit"])
def test_a_complete_checkpoint_has_no_note(architecture, checkpoints):
    """Kind 4, another example: complete checkpoints carried the note that their head is new."""
    assert (
        opened(checkpoints[architecture]).data_note
        == "random inputs: for shapes and speed only, losses mean nothing"
    )


@pytest.mark.parametrize(
    "lost", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "transformer.ln_f.bias"]
)
def test_a_lost_tensor_is_named(lost, folder):
    place = folder("gpt2")
    tensors = load_file(place / "model.safetensors")
    tensors.pop(lost)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"lacks {lost}|lacks lm_head.weight"):
        opened(place)


def test_a_new_head_and_what_another_head_leaves_are_named(tmp_path):
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "vocab_size": 61,
    }
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    note = opened(tmp_path, task="sequence-classification").data_note
    assert "head of BertForSequenceClassification is new and untrained: classifier.bias" in note
    assert "left over: cls.predictions.bias" in note and "pooler is new and untrained" in note


def test_more_layers_than_the_config_names(folder):
    """Kind 43: a config that names fewer layers than the weights hold opened without a word."""
    for name, field in (("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("t5", "num_layers")):
        with pytest.raises(BadInput, match="a block that config.json does not name"):
            opened(change(folder(name), **{field: 1}))


def test_more_experts_than_the_config_names(folder):
    """Kind 43, another example."""
    with pytest.raises(BadInput, match="config.json"):
        opened(change(folder("mixtral"), num_local_experts=3))


@pytest.mark.parametrize(
    "name, fields",
    [
        ("llama", {"num_hidden_layers": 100000}),
        ("t5", {"num_decoder_layers": 10**9}),
        ("llama", {"vocab_size": 10**9}),
        ("gpt2", {"n_embd": 64}),
        ("llama", {"intermediate_size": 10**12}),
        ("bert", {"max_position_embeddings": 10**8}),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(name, fields, folder):
    """Kind 53: a config's numbers are compared with the weights before memory or time is spent on them."""
    with pytest.raises(BadInput, match="config.json"):
        opened(change(folder(name), **fields))


QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "fp8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_checkpoints_are_named(method, folder):
    """Kind 16: a checkpoint of another quantizer is one clear line."""
    with pytest.raises(BadInput, match=f"is quantized by {method}.* give the checkpoint it was made from"):
        opened(change(folder("llama"), quantization_config=QUANTIZED[method]))


def test_quantized_weights_without_a_word_in_the_config(folder):
    """Kind 16, another example: codes were read as weights when the config did not name the quantizer."""
    place = folder("llama")
    tensors = load_file(place / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"quantized by an unnamed method .it holds {name}"):
        opened(place)
    tensors[name.replace("weight", "qweight")] = tensors.pop(name).to(torch.int32)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="quantized by an unnamed method .it holds .*qweight"):
        opened(place)


@pytest.mark.parametrize(
    "kind, method",
    [("alone", "LORA"), ("alone", "IA3"), ("beside a model", "LORA"), ("beside a model", "OFT")],
)
def test_an_adapter_is_called_one(kind, method, folder, tmp_path):
    """Kind 29: what a folder holds is named, whichever method made it."""
    place = folder("llama")
    if kind == "alone":
        (place / "config.json").unlink()
        (place / "model.safetensors").rename(place / "adapter_model.safetensors")
    said = {"peft_type": method, "base_model_name_or_path": "org/base"}
    (place / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(BadInput, match=f"holds an adapter .{method} of 'org/base'.* merge it"):
        opened(place)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"backbone": "microsoft/resnet-18"}, "backbone"),
        ({"text_config": {"backbone": "org/name"}}, "text_config.backbone"),
        ({"attn_implementation": "org/name"}, "attn_implementation"),
        ({"_attn_implementation": "kernels-community/flash-attn"}, "_attn_implementation"),
        ({"_attn_implementation": {"": "org/name"}}, "_attn_implementation"),
        ({"experts_implementation": "org/name"}, "experts_implementation"),
        ({"transformers_weights": "../../other.safetensors"}, "transformers_weights"),
        ({"kernel_config": {"RMSNorm": "org/name:Norm"}}, "kernel_config"),
    ],
)
def test_a_local_folder_is_local_whatever_its_config_says(fields, word, folder):
    """Kind 36: a local folder is local, whatever it says."""
    with pytest.raises(BadInput, match=rf"config.json: {word} "):
        opened(change(folder("llama"), **fields))


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"text_config": True}, "is a bool and no configuration that bert has"),
        ({"decoder": "word"}, "is a str and no configuration"),
        ({"text_encoder": {"pad_token_id": 0}}, "is a dict and no configuration"),
        ({"generator": [1.5]}, "is a list and no configuration"),
        ({"text_config": 0, "generator": 1}, "Multiple valid text configs"),
    ],
)
def test_parts_of_a_configuration_are_configurations(fields, word, folder):
    """Kind: what a library takes for a part of the configuration, of a file that has another thing there."""
    with pytest.raises(BadInput, match=f"its config.json: .*{word}"):
        opened(change(folder("bert"), **fields))


@pytest.mark.parametrize(
    "fields", [{"auto_map": {"AutoModelForCausalLM": "org/name--file.Class"}}, {"_name_or_path": "org/name"}]
)
def test_names_of_others_that_are_not_followed(fields, folder):
    assert opened(change(folder("llama"), **fields)).evaluate("test")["loss"] > 0


def sharded(place: Path) -> Path:
    tensors = load_file(place / "model.safetensors")
    names, placed = sorted(tensors), {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, place / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (place / "model.safetensors").unlink()
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return place


def test_shards_are_in_their_folder_and_all_of_them(checkpoints, folder, tmp_path):
    """Kind 36: a shard index outside its folder; kind 4: a shard that nobody names."""
    place = sharded(folder("llama"))
    assert opened(place).fingerprint is not None
    index = place / "model.safetensors.index.json"
    first = json.loads(index.read_text())["weight_map"]
    for outside in (
        "../model.safetensors",
        str(tmp_path / "x.safetensors"),
        "sub/x.safetensors",
        "..\\x.safetensors",
    ):
        change(place, index.name, weight_map=first | {"lm_head.weight": outside})
        with pytest.raises(BadInput, match="no file of its own folder"):
            opened(place)
    lost = dict(first)
    lost.pop("lm_head.weight")
    change(place, index.name, weight_map=lost)
    with pytest.raises(BadInput, match="lm_head.weight is in .* says nothing"):
        opened(place)
    change(place, index.name, weight_map=first | {"model.more": "model-00001-of-00002.safetensors"})
    with pytest.raises(BadInput, match="promises model.more, which is in no file"):
        opened(place)
    change(place, index.name, weight_map=first)
    shutil.copy(checkpoints["llama"] / "model.safetensors", place / "model-00003-of-00003.safetensors")
    with pytest.raises(BadInput, match="holds model-00003-of-00003.safetensors, which .* does not name"):
        opened(place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_checkpoint_stays_narrow_where_it_can(dtype, tmp_path):
    """Kind 26: what is saved has the format it was opened from, wherever no weight would be rounded; what is
    said of bytes is said of that format.
    """
    tiny("llama").to(dtype).save_pretrained(tmp_path / "narrow")
    on = opened(tmp_path / "narrow")
    assert next(on.model.parameters()).dtype == torch.float32
    on.save(tmp_path / "again")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("narrow", "again"))
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == dtype for n in before)
    facts = Prune(saliency="magnitude", compensation="none", sparsity=0.5).run(on).facts
    assert facts["dense_bytes"] == 2 * facts["weights"] and facts["packed_bytes"] < 2 * facts["weights"]
    pruned = Prune(saliency="obs", compensation="obs", sparsity=0.5).run(on)
    pruned.subject.save(tmp_path / "pruned")
    kinds = {t.dtype for t in load_file(tmp_path / "pruned" / "model.safetensors").values()}
    assert kinds == {dtype, torch.float32}  # solved weights would be rounded, the others would not
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["dtype"] == "float32"
    assert workbench.subject(tmp_path / "pruned").evaluate("test") == pruned.subject.evaluate("test")


@pytest.mark.parametrize("architecture, kind", [("gpt2", "GPT2"), ("llama", "Llama")])
@pytest.mark.parametrize("pad", [None, -1])
def test_a_classifier_without_a_pad_token(architecture, kind, pad, tmp_path):
    """Kind 15: decoders that look at a text's last token find it whatever pads it."""
    config = tiny(architecture).config
    config.num_labels, config.pad_token_id = 3, None
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "model")
    change(tmp_path / "model", pad_token_id=pad)
    on = opened(tmp_path / "model")
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "".join(f"{'abc ' * (i % 5 + 1)},{i % 3}\n" for i in range(30)))
    told = workbench.subject(
        tmp_path / "model", data=table, text_column="text", label_column="label", tokenizer=letters()
    )
    for each in (on, told):
        losses = [each.evaluate("test", batch_size=size)["loss"] for size in (1, 4)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    whole = 0.0
    split = told.split("test")
    for ids, mask, label in zip(split["input_ids"], split["attention_mask"], split["labels"], strict=True):
        with torch.no_grad():
            logits = model(ids[mask.bool()][None]).logits
        whole += float(torch.nn.functional.cross_entropy(logits, label[None]))
    assert told.evaluate("test")["loss"] == pytest.approx(whole / len(split["labels"]), abs=1e-6)


def letters(pad: str | None = None) -> Any:
    """A tokenizer of letters, without a padding token unless told."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {
        "[UNK]": 0,
        "[EOS]": 1,
        "[PAD]": 2,
    }
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="[EOS]", pad_token=pad, mask_token="[UNK]"
    )


def test_a_padding_token_that_the_model_does_not_know_as_one(tmp_path):
    """Kind 15, another example: the tokenizer pads with one id and the config names another."""
    config = tiny("gpt2").config
    config.num_labels, config.pad_token_id = 3, 50
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "".join(f"{'abc ' * (i % 5 + 1)},{i % 3}\n" for i in range(30)))
    on = workbench.subject(
        tmp_path / "model", data=table, text_column="text", label_column="label", tokenizer=letters("[PAD]")
    )
    losses = [on.evaluate("test", batch_size=size)["loss"] for size in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_network_that_mixes_padding_in_is_refused(tmp_path):
    """Kind 8, another example: FNet has no mask, so its loss depended on the padding and the batch size."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "vocab_size": 61,
        "num_labels": 3,
    }
    transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes)).save_pretrained(
        tmp_path / "model"
    )
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "".join(f"{'abc ' * (i % 5 + 1)},{i % 3}\n" for i in range(30)))
    with pytest.raises(BadInput, match="subject: .*FNet"):
        workbench.subject(
            tmp_path / "model",
            data=table,
            text_column="text",
            label_column="label",
            tokenizer=letters("[PAD]"),
        )


def test_texts_longer_than_the_positions(tmp_path):
    """Kind 21: RoBERTa's positions begin behind its padding id; OPT's table has two more."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, config in {
        "Roberta": transformers.RobertaConfig(**sizes, intermediate_size=24, max_position_embeddings=34),
        "XLMRoberta": transformers.XLMRobertaConfig(
            **sizes, intermediate_size=24, max_position_embeddings=34
        ),
        "OPT": transformers.OPTConfig(
            **sizes, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32
        ),
    }.items():
        head = "CausalLM" if name == "OPT" else "MaskedLM"
        getattr(transformers, f"{name}For{head}")(config).save_pretrained(tmp_path / name)
        on = workbench.subject(tmp_path / name, data="random", max_length=500)
        assert on.split("test")["input_ids"].shape[1] == 32 and on.evaluate("test")["loss"] > 0


@pytest.mark.parametrize(
    "kind, config",
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
        ("MobileNetV2", {"depth_multiplier": 0.25, "image_size": 32}),
        (
            "ViT",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "image_size": [16, 32],
                "patch_size": 8,
            },
        ),
    ],
)
def test_random_images_of_networks_of_any_size(kind, config, tmp_path):
    """Kind 21: `--data random` for models without `image_size`, or with two."""
    made = getattr(transformers, f"{kind}Config")(num_labels=3, **config)
    getattr(transformers, f"{kind}ForImageClassification")(made).save_pretrained(tmp_path)
    on = workbench.subject(tmp_path, data="random")
    assert on.task.name == "image-classification" and on.evaluate("test", limit=4)["loss"] > 0


def test_positions_without_a_number(tmp_path):
    """Kind 21: `max_position_embeddings` of -1."""
    config = transformers.XLNetConfig(
        vocab_size=61, d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3
    )
    transformers.XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    assert opened(tmp_path).evaluate("test")["loss"] > 0


@pytest.mark.parametrize(
    "kind", ["Marian", "BartForConditionalGeneration", "PegasusForConditionalGeneration"]
)
def test_encoder_decoders_are_known_by_their_class(kind, tmp_path):
    """Kind 53: Marian checkpoints were taken for classifiers: tasks come from transformers' own tables."""
    name = "MarianMTModel" if kind == "Marian" else kind
    sizes = {
        "vocab_size": 61,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 32,
        "pad_token_id": 1,
        "decoder_start_token_id": 1,
    }
    cls = getattr(transformers, name)
    cls(cls.config_class(**sizes)).save_pretrained(tmp_path)
    on = opened(tmp_path)
    assert on.task.name == "seq2seq-lm" and on.evaluate("test")["loss"] > 0


def test_a_class_without_a_task_is_named(tmp_path):
    """Kind 53, another example: a question-answering head was taken for embeddings."""
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "vocab_size": 61,
    }
    transformers.BertForQuestionAnswering(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="task: BertForQuestionAnswering is none of the classes"):
        opened(tmp_path)
    on = opened(tmp_path, task="embedding")  # hidden states, not the head's answers
    assert on.split("test")["labels"].shape[1] == 16 and "left over: qa_outputs.bias" in on.data_note


def test_a_multi_label_checkpoint_has_a_loss_of_its_own(tmp_path):
    """Kind 7: multi-label checkpoints were measured with softmax cross-entropy."""
    config = tiny("bert").config
    config.num_labels, config.problem_type = 3, "multi_label_classification"
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    on = opened(tmp_path)
    split = on.split("test")
    with torch.no_grad():
        want = model(split["input_ids"], split["attention_mask"], labels=split["labels"].float()).loss
    assert on.task.name == "multi-label-classification"
    for size in (1, 5):
        assert on.evaluate("test", batch_size=size)["loss"] == pytest.approx(float(want), abs=1e-6)


def test_seeds_that_the_libraries_do_not_take(checkpoints):
    """Kind 53: `--seed` from 2^32 on."""
    for seed in (-1, 2**32):
        with pytest.raises(BadInput, match="seed: .* 4294967295"):
            workbench.subject(checkpoints["bert"], data="random", seed=seed)
