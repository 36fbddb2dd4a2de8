"""``bytelm`` and ``bytemoe``: causal language models over bytes, and the script that trained them.

    python -m workbench.subjects.builtin.bytelm --folder data/bytelm --tokens 15e6 --minutes 42
    python -m workbench.subjects.builtin.bytelm --folder data/bytemoe --tokens 6e6 --minutes 16 --experts 4

A pre-norm RMSNorm transformer with rotary positions and SwiGLU (``transformers.LlamaForCausalLM``, 1.8 M
parameters) trained on the standard library's own source and help topics. With ``--experts`` every layer is
a top-2 mixture of experts (``transformers.MixtralForCausalLM``, 1.5 M parameters). Weights, log and
provenance go to the folder; no optimizer state is kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.storage import data_folder
from workbench.subjects.builtin import Parts, corpora
from workbench.subjects.checkpoints import quiet_transformers

CONTEXT = 256
#: Windows per split of the subjects; the bounds keep every evaluation to seconds.
WINDOWS = {"train": 4096, "validation": 256, "test": 256}
CALIBRATION = 128


def bytelm(progress: Progress | None = None) -> Parts:
    """The shipped dense model with windows of 256 bytes: train 4096, calibration 128 (of train),
    validation 256, test 256.

    The windows are rebuilt from the running interpreter's standard library. The split of a file depends on
    its name alone, so with another Python version the texts differ a little and no test file was ever trained
    on.
    """
    return shipped("bytelm")


def bytemoe(progress: Progress | None = None) -> Parts:
    """The shipped mixture-of-experts model (4 experts, 2 active), with the data of `bytelm`."""
    return shipped("bytemoe")


def shipped(name: str) -> Parts:
    folder = data_folder() / name
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    record = json.loads((folder / "training.json").read_text())
    documents = corpora.standard_library()
    same = corpora.digest(documents) == record["corpus_sha256"]
    note = "Python standard library source and help topics as bytes, split by file"
    if not same:
        note += (
            f" (trained on Python {record['versions']['python']}'s, "
            f"evaluated on {platform.python_version()}'s)"
        )
    return Parts(
        model, "causal-lm", window_splits(documents), tokenizer, {"note": note, "same_corpus": same} | record
    )


def window_splits(documents: list[corpora.Document]) -> dict[str, dict[str, Tensor]]:
    splits: dict[str, dict[str, Tensor]] = {}
    for split, count in WINDOWS.items():
        ids = corpora.byte_windows([d for d in documents if d.split == split], CONTEXT, count)
        splits[split] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    every = len(splits["train"]["labels"]) // CALIBRATION
    splits["calibration"] = {k: v[::every][:CALIBRATION].clone() for k, v in splits["train"].items()}
    return splits


def byte_tokenizer() -> Any:
    """Byte b is token b, 256 starts a document, 257 pads: as a `transformers` tokenizer,
    so that text goes in and out.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019),
    # here in byte order and without merges
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    vocabulary |= {"<start>": corpora.DOCUMENT_START, "<pad>": corpora.PADDING}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<start>",
        eos_token="<start>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def byte_model(experts: int = 0) -> Any:
    """The untrained model: 4 layers, Llama (hidden 192) if `experts` is 0, else Mixtral
    (hidden 128, top-2 routing).
    """
    hidden = 128 if experts else 192
    common: dict[str, Any] = dict(
        vocab_size=corpora.BYTE_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=corpora.DOCUMENT_START,
        eos_token_id=corpora.DOCUMENT_START,
        pad_token_id=corpora.PADDING,
    )
    if experts == 0:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=512, **common))
    config = transformers.MixtralConfig(
        intermediate_size=192, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None, **common
    )
    return transformers.MixtralForCausalLM(config)


def next_byte_loss(model: Any, windows: Tensor, balance: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of each byte given those before it; windows is (batch, length + 1).

    `balance` adds so much of the load-balancing loss of the routers (Fedus, Zoph & Shazeer 2022, eq. 4 to 6).
    """
    if balance:
        output = model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
    else:
        output = model(input_ids=windows[:, :-1], use_cache=False)
    loss = F.cross_entropy(
        output.logits.flatten(0, 1), windows[:, 1:].flatten()
    )  # (batch * length, vocabulary)
    return loss + balance * routing_imbalance(output.router_logits) if balance else loss


def routing_imbalance(router_logits: Sequence[Tensor], chosen: int = 2) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e: 1 when the E experts share the tokens evenly,
    E when one takes all.

    f_e is the share of routed slots that go to expert e, P_e the mean router probability;
    logits are (tokens, E).
    """
    terms = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        experts = probabilities.shape[-1]
        routed = F.one_hot(probabilities.topk(chosen).indices, experts).sum(-2)  # (tokens, E)
        terms.append(experts * (routed.float().mean(0) / chosen * probabilities.mean(0)).sum())
    return torch.stack(terms).mean()


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Mean next-byte cross-entropy in bits; every window starts with an empty context."""
    model.eval()
    total = sum(next_byte_loss(model, batch).item() * len(batch) for batch in windows.split(16))
    model.train()
    return total / len(windows) / math.log(2)


def training_batches(stream: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches (batch, CONTEXT + 1) for ever: each pass cuts the stream at a new offset and shuffles
    the windows.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - CONTEXT - 1, CONTEXT)
        for chosen in starts[torch.randperm(len(starts), generator=generator)].split(batch):
            if len(chosen) == batch:
                yield torch.stack([stream[s : s + CONTEXT + 1] for s in chosen.tolist()]).long()


def train(
    folder: Path,
    tokens: float,
    minutes: float,
    experts: int = 0,
    batch: int = 8,
    peak: float = 2e-3,
    seed: int = 0,
    compiled: bool = True,
) -> None:
    """Train for ``tokens`` or ``minutes``, whichever ends first, and write the model folder.

    AdamW (Loshchilov & Hutter 2019), linear warm-up over 2 % of the budget, cosine to a tenth of the peak.
    """
    torch.manual_seed(seed)
    documents = corpora.standard_library()
    by_split = {s: [d for d in documents if d.split == s] for s in corpora.SPLITS}
    validation = corpora.byte_windows(by_split["validation"], CONTEXT, count=256)
    test = corpora.byte_windows(by_split["test"], CONTEXT, count=256)
    stream = torch.from_numpy(corpora.byte_stream(by_split["train"]))

    model = byte_model(experts).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    step_model: Any = torch.compile(model) if compiled else model

    folder.mkdir(parents=True, exist_ok=True)
    seen, step, loss_sum, loss_count, start = 0, 0, 0.0, 0, time.perf_counter()
    with open(folder / "log.csv", "w", newline="") as log_file:
        log = csv.writer(log_file)
        log.writerow(
            ["step", "tokens", "seconds", "learning_rate", "train_bits_per_byte", "validation_bits_per_byte"]
        )
        for windows in training_batches(stream, batch, seed):
            seconds = time.perf_counter() - start
            done = max(seen / tokens, seconds / (60 * minutes))
            rate = peak * min(done / 0.02, 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if step % 250 == 0 or done >= 1:
                held_out = bits_per_byte(model, validation[::4] if done < 1 else validation)
                trained = loss_sum / max(loss_count, 1) / math.log(2)
                row = [step, seen, f"{seconds:.1f}", f"{rate:.3e}", f"{trained:.4f}", f"{held_out:.4f}"]
                log.writerow(row)
                log_file.flush()
                print(*row, f"{seen / max(seconds, 1e-9):.0f} tokens/s", flush=True)
                loss_sum, loss_count = 0.0, 0
            if done >= 1:
                break
            loss = next_byte_loss(step_model, windows, balance=0.01 if experts else 0.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
            seen, step = seen + batch * CONTEXT, step + 1

    model.eval()
    model.save_pretrained(folder, safe_serialization=True)
    byte_tokenizer().save_pretrained(folder)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": seen,
        "steps": step,
        "batch": [batch, CONTEXT],
        "peak_learning_rate": peak,
        "seed": seed,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "train_bytes": len(stream),
        "corpus_sha256": corpora.digest(documents),
        "bits_per_byte": {"validation": bits_per_byte(model, validation), "test": bits_per_byte(model, test)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in byte language model.")
    parser.add_argument("--folder", type=Path, required=True, help="model folder to write")
    parser.add_argument("--tokens", type=float, default=15e6, help="stop after this many bytes")
    parser.add_argument("--minutes", type=float, default=60, help="or after this many minutes")
    parser.add_argument("--experts", type=int, default=0, help="0: dense; else experts per layer, top-2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options.tokens, options.minutes, options.experts, compiled=not options.eager)


if __name__ == "__main__":
    main()
