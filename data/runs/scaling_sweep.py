"""The project's own scaling runs: byte-level Llama-style models on Python source, sizes x tokens x learning rates.

    python data/runs/scaling_sweep.py            # fills data/runs/scaling_sweep.csv, resuming where it stopped

Corpus: the source of this interpreter's standard library (tests left out), split by file: every tenth file is
validation. One pass over shuffled training bytes, no byte twice. Loss is in nats per byte on a fixed 131,072 bytes of
validation text. `params` counts everything (the embedding is tied to the output head, so it is real compute).

Decided before any run was looked at: the grid below, the law (Chinchilla, log Huber), the lowest loss among the learning
rates of a cell as that cell's loss, and the held-out run: a larger model with more tokens than any fitted run, at the
learning rate extrapolated from the smaller models' best ones. Long runs use the rate that was best at the longest short run.
The range of rates was widened upwards once, before any long run, because the smallest models preferred its upper end.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SEQUENCE, BATCH = 128, 16
SIZES = ((24, 2), (32, 2), (48, 2), (64, 3))  # width, depth of the fitted models
HELD_OUT_SIZE = (112, 3)
SHORT, LONG = (400_000, 800_000), (1_600_000, 3_200_000)  # training tokens: with all learning rates, with the best one
HELD_OUT_TOKENS = 4_000_000
LEARNING_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
FIELDS = ("name", "width", "depth", "params", "non_embedding_params", "tokens", "batch_tokens", "learning_rate", "seed", "steps",
          "flops", "loss", "train_loss", "seconds", "role")


def corpus() -> tuple[np.ndarray, np.ndarray, str]:
    """Training and validation bytes (uint8) and a fingerprint of the text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3"}
    files = sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
    train, validation = [], []
    for i, file in enumerate(files):
        (validation if i % 10 == 9 else train).append(np.frombuffer(file.read_bytes(), dtype=np.uint8))
    texts = np.concatenate(train), np.concatenate(validation)
    return *texts, hashlib.sha256(b"".join(t.tobytes() for t in texts)).hexdigest()[:16]


class Block(nn.Module):
    """RMSNorm, rotary causal attention, RMSNorm, SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(2, width // 16)
        hidden = 8 * round(width * 8 / 3 / 8)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def rotate(t: torch.Tensor) -> torch.Tensor:
            a, b = t.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

        y = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class ByteModel(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        half = width // self.blocks[0].heads // 2
        angle = torch.arange(SEQUENCE)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                scale = 1.0 / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return functional.linear(self.norm(x), self.embed.weight)


def train(width: int, depth: int, tokens: int, learning_rate: float, seed: int, text: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """One run: AdamW, 10 % warm-up, cosine to zero. Loss of the finished model on the validation bytes."""
    torch.manual_seed(seed)
    model = ByteModel(width, depth)
    params = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=learning_rate, betas=(0.9, 0.95), fused=True)
    steps = tokens // (BATCH * SEQUENCE)
    windows = (len(text[0]) - 1) // SEQUENCE
    order = np.random.default_rng(seed).permutation(windows)[: steps * BATCH].reshape(steps, BATCH)
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.1 * steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = order[step][:, None] * SEQUENCE + np.arange(SEQUENCE + 1)
        batch = torch.from_numpy(text[0][index].astype(np.int64))
        loss = functional.cross_entropy(model(batch[:, :-1]).view(-1, 256), batch[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= steps - 50:
            recent += loss.item() / min(50, steps)
    model.eval()
    rows = np.arange(1024)[:, None] * SEQUENCE + np.arange(SEQUENCE + 1)
    spread = (len(text[1]) - SEQUENCE - 1) // (1024 * SEQUENCE)  # spread the fixed windows over the whole validation text
    rows = rows * 1 + (np.arange(1024) * SEQUENCE * max(0, spread - 1))[:, None]
    total = 0.0
    with torch.inference_mode():
        for part in np.array_split(rows, 16):
            batch = torch.from_numpy(text[1][part].astype(np.int64))
            total += functional.cross_entropy(model(batch[:, :-1]).reshape(-1, 256), batch[:, 1:].reshape(-1)).item() / 16
    trained = steps * BATCH * SEQUENCE
    return {"params": params, "non_embedding_params": params - model.embed.weight.numel(), "tokens": trained, "steps": steps,
            "flops": 6 * params * trained, "loss": total, "train_loss": recent, "seconds": time.perf_counter() - began}


def size_of(width: int, depth: int) -> int:
    return sum(p.numel() for p in ByteModel(width, depth).parameters())


def best_rates(rows: list[dict[str, str]]) -> dict[int, float]:
    """Parameters -> learning rate of the lowest loss at the longest token count that saw every rate."""
    best: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row["role"] == "fit" and abs(int(row["tokens"]) / SHORT[-1] - 1) < 0.01:
            candidate = (float(row["loss"]), float(row["learning_rate"]))
            best[int(row["params"])] = min(best.get(int(row["params"]), candidate), candidate)
    return {n: rate for n, (_, rate) in best.items()}


def save(rows: list[dict[str, object]], file: Path) -> None:
    draft = file.with_suffix(".tmp")
    with draft.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--minutes", type=float, default=30.0, help="start no new run after this long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    *text, fingerprint = corpus()
    began = time.monotonic()
    rows: list[dict[str, object]] = []
    if arguments.out.exists():
        with arguments.out.open() as handle:
            rows = list(csv.DictReader(handle))  # type: ignore[arg-type]
    done = {row["name"] for row in rows}

    def run(width: int, depth: int, tokens: int, rate: float, seed: int, role: str) -> None:
        name = f"{width}x{depth}-{tokens}-lr{rate:.3g}-s{seed}"
        if name in done or time.monotonic() - began > 60 * arguments.minutes:
            return
        measured = train(width, depth, tokens, rate, seed, tuple(text))
        rows.append({"name": name, "width": width, "depth": depth, "batch_tokens": BATCH * SEQUENCE, "learning_rate": rate, "seed": seed, "role": role,
                     **{k: round(v, 6) if isinstance(v, float) else v for k, v in measured.items()}})
        save(rows, arguments.out)
        print(name, f"loss {measured['loss']:.4f}", f"{measured['tokens'] / measured['seconds']:.0f} tokens/s", flush=True)

    def rates() -> dict[int, float]:
        return best_rates([{k: str(v) for k, v in row.items()} for row in rows])

    for tokens in SHORT:
        for width, depth in SIZES:
            for rate in LEARNING_RATES:
                run(width, depth, tokens, rate, 0, "fit")
    for tokens in LONG:
        for width, depth in SIZES:
            run(width, depth, tokens, rates()[size_of(width, depth)], 0, "fit")
    for seed in (1, 2):  # how much of a loss is luck
        run(48, 2, SHORT[-1], LEARNING_RATES[1], seed, "seed")
    chosen = rates()
    slope, intercept = np.polyfit(np.log(list(chosen)), np.log(list(chosen.values())), 1)
    size = size_of(*HELD_OUT_SIZE)
    run(*HELD_OUT_SIZE, HELD_OUT_TOKENS, float(f"{np.exp(intercept + slope * np.log(size)):.2g}"), 0, "held out")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "corpus": fingerprint,
                "training_bytes": len(text[0]), "validation_bytes": len(text[1]), "machine": platform.machine(), "threads": 1}
    arguments.out.with_suffix(".json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
