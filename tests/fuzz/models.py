"""Loaders of models: configs, safetensors, indexes of shards, tokenizers, saved subjects, GGUF files."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workbench
from tests.conftest import tiny
from tests.fuzz import checkpoint_folders, mutation
from tests.fuzz.campaign import Case, Drawing

ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")


def checkpoint(root: Path, name: str) -> Path:
    """A tiny checkpoint of one architecture, written once."""
    folder = root / name
    if not folder.is_dir():
        one_block(name).save_pretrained(folder)
    return folder


def one_block(name: str) -> Any:
    """A model of one block: to build models is what most of the time goes to."""
    config: Any = tiny(name).config
    config.num_hidden_layers = 1
    if name == "t5":
        config.num_decoder_layers = 1
    return type(tiny(name))(config)


def opened(folder: Path, **options: Any) -> None:
    """Open a subject and compute with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on = workbench.subject(folder, **options)
        on.evaluate("test", limit=2)


def copied(original: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(original, place))


RANDOM = {"data": "random", "max_length": 8, "max_examples": 64}


def changed_file(draw: random.Random, file: Path) -> str:
    """One file of any kind damaged; says which and how it begins now."""
    what = draw.random()
    if what < 0.04:
        file.unlink()
        return f"{file.name} is gone"
    if file.suffix == ".json" and what < 0.75:
        said = mutation.as_json(draw, json.loads(file.read_text()))
        file.write_bytes(mutation.encoded(said))
    elif file.suffix == ".safetensors" and what < 0.6:
        checkpoint_folders.header(draw, file)
    else:
        file.write_bytes(mutation.damaged(draw, file.read_bytes(), draw.choice([0, 500])))
    return f"{file.name}: {file.read_bytes()[:1200]!r}"


def configs(root: Path) -> Drawing:
    """config.json of six architectures: fields changed, dropped, added, bytes."""
    folders = [checkpoint(root, name) for name in ARCHITECTURES]
    place = root / "damaged"

    def draw_case(draw: random.Random) -> Case:
        folder = copied(draw.choices(folders, [4, 4, 4, 1, 4, 1])[0], place)
        file = folder / "config.json"
        what = draw.random()
        if what < 0.6:
            checkpoint_folders.fields(draw, file)
        elif what < 0.85:
            file.write_bytes(mutation.encoded(mutation.as_json(draw, json.loads(file.read_text()))))
        else:
            file.write_bytes(mutation.damaged(draw, file.read_bytes()))
        return repr(file.read_bytes()[:1500]), lambda: opened(folder, **RANDOM)

    return draw_case


def safetensors(root: Path) -> Drawing:
    """Headers and bytes of weights."""
    folders = [checkpoint(root, name) for name in ("bert", "gpt2", "llama", "vit")]
    place = root / "damaged"

    def draw_case(draw: random.Random) -> Case:
        folder = copied(draw.choice(folders), place)
        file = folder / "model.safetensors"
        what = draw.random()
        if what < 0.5:
            checkpoint_folders.header(draw, file)
        elif what < 0.7:
            mutation.json_header(draw, file)
        else:
            file.write_bytes(mutation.damaged(draw, file.read_bytes(), draw.choice([0, 8, 2000])))
        return f"{folder.name}: {file.read_bytes()[:1500]!r}", lambda: opened(folder, **RANDOM)

    return draw_case


def indexes(root: Path) -> Drawing:
    """The index of a checkpoint in shards, and its shards."""
    one_block("llama").save_pretrained(root / "shards", max_shard_size="12KB")
    place = root / "damaged"

    def draw_case(draw: random.Random) -> Case:
        folder = copied(root / "shards", place)
        file = folder / "model.safetensors.index.json"
        shards = sorted(folder.glob("*.safetensors"))
        what = draw.random()
        if what < 0.5:
            file.write_bytes(mutation.encoded(mutation.as_json(draw, json.loads(file.read_text()))))
        elif what < 0.7:
            file.write_bytes(mutation.encoded(mutation.text(draw, file.read_text())))
        elif what < 0.8:
            file.write_bytes(mutation.damaged(draw, file.read_bytes()))
        elif what < 0.85:
            draw.choice(shards).unlink()
        elif what < 0.9:
            one, two = draw.sample(shards, 2)
            shutil.copy(one, two)
        elif what < 0.95:
            checkpoint_folders.header(draw, draw.choice(shards))
        else:
            draw.choice(shards).rename(
                folder / draw.choice(["a.safetensors", "model-00009-of-00009.safetensors"])
            )
        return repr(file.read_bytes()[:1000]), lambda: opened(folder, **RANDOM)

    return draw_case


def written_tokenizer(folder: Path) -> Path:
    """A byte-pair tokenizer of the letters beside a checkpoint, as transformers saves it."""
    import tokenizers
    import transformers

    letters = {c: i for i, c in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK]".split())}
    letters |= {c: len(letters) + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ,.0123456789")}
    letters |= {pair: len(letters) + i for i, pair in enumerate(("th", "in", "er"))}
    model = tokenizers.models.BPE(letters, [("t", "h"), ("i", "n"), ("e", "r")], unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.normalizer = tokenizers.normalizers.Lowercase()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )
    fast.save_pretrained(folder)
    return folder


def tokenizer_files(root: Path) -> Drawing:
    """tokenizer.json, tokenizer_config.json and the others of a classifier with data."""
    folder = written_tokenizer(checkpoint(root, "bert"))
    data = root / "data.csv"
    data.write_text("text,label\n" + "".join(f"the line {i} in there,{i % 3}\n" for i in range(12)))
    place = root / "damaged"
    options = {"data": str(data), "text_column": "text", "label_column": "label", "max_length": 8}
    options |= {"task": "sequence-classification"}
    opened(folder, **options)

    def draw_case(draw: random.Random) -> Case:
        copy = copied(folder, place)
        files = [f for f in sorted(copy.glob("*.json")) if f.name != "config.json"]
        file = draw.choices(files, [4 if f.name == "tokenizer.json" else 3 for f in files])[0]
        what = draw.random()
        if what < 0.6:
            file.write_bytes(mutation.encoded(mutation.as_json(draw, json.loads(file.read_text()))))
        elif what < 0.8:
            file.write_bytes(mutation.encoded(mutation.text(draw, file.read_text())))
        elif what < 0.95:
            file.write_bytes(mutation.damaged(draw, file.read_bytes()))
        else:
            file.unlink()
        shown = file.read_bytes()[:1500] if file.exists() else b"gone"
        return f"{file.name}: {shown!r}", lambda: opened(copy, **options)

    return draw_case


def saved_subjects(root: Path) -> Drawing:
    """A folder that a subject was saved in, with changes of its weights: notes, changes, splits, config."""
    from workbench.progress import Progress
    from workbench.pruning import Prune
    from workbench.quantization import Quantize

    on = workbench.subject(checkpoint(root, "bert"), **RANDOM)
    pruned = Prune(method="magnitude", sparsity=0.5).run(on, Progress(), cache=False).subject
    both = Quantize(format="int4", rounding="nearest").run(pruned, Progress(), cache=False).subject
    both.save(root / "both", private=True)
    plain = (
        Prune(method="magnitude").run(workbench.subject("digits-softmax"), Progress(), cache=False).subject
    )
    plain.save(root / "plain", private=True)
    folders = [root / "both", root / "plain"]
    for folder in folders:
        opened(folder)
    place = root / "damaged"

    def draw_case(draw: random.Random) -> Case:
        folder = copied(draw.choice(folders), place)
        files = [f for f in sorted(folder.iterdir()) if f.is_file()]
        named = {"workbench.json": 12, "changes.safetensors": 5, "splits.safetensors": 5}
        file = draw.choices(files, [named.get(f.name, 1) for f in files])[0]
        return changed_file(draw, file), lambda: opened(folder)

    return draw_case


def gguf_files(root: Path) -> Drawing:
    """GGUF files of floats and of blocks: header, fields, bytes, ends."""
    import transformers

    from tests.subjects.test_gguf_files import WORDS, write_gguf

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    assert len(WORDS) < 64
    model = transformers.LlamaForCausalLM(config).eval()
    wholes = [write_gguf(root / f"{kind}.gguf", model, kind) for kind in ("F32", "Q8_0", "Q4_0")]
    place = root / "damaged"
    place.mkdir()

    def draw_case(draw: random.Random) -> Case:
        content = draw.choice(wholes).read_bytes()
        start = content.find(b"blk.0")
        damaged = mutation.damaged(draw, content, draw.choice([0, 24, 600, start + 600, start + 600]))
        file = place / "model.gguf"
        file.write_bytes(damaged)
        return "", lambda: opened(file, **RANDOM)

    return draw_case


LOADERS: dict[str, Callable[[Path], Drawing]] = {
    "configs": configs,
    "safetensors": safetensors,
    "shard-indexes": indexes,
    "tokenizers": tokenizer_files,
    "saved-subjects": saved_subjects,
    "gguf": gguf_files,
}
