"""Scikit-learn's digits (1797 images of 8 x 8 pixels, values 0 to 16, ten classes) as two subjects."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.progress import Progress, TextProgress
from workbench.storage import cache_folder, replacing
from workbench.subjects.builtin import Parts
from workbench.subjects.checkpoints import quiet_transformers

LABELS = [str(digit) for digit in range(10)]


def digit_splits(images: str, flat: bool) -> dict[str, dict[str, Tensor]]:
    """Train 60 %, validation 20 %, test 20 % (fixed shuffle), calibration = the first 256 of train,
    all = every image.

    Pixels are divided by 16, so they lie in [0, 1]. `images` is the column's name; shape (n, 64) if `flat`,
    else (n, 1, 8, 8). The split `all` keeps scikit-learn's order.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.data, dtype=torch.float32) / 16
    if not flat:
        pixels = pixels.view(-1, 1, 8, 8)
    labels = torch.tensor(found.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = int(0.6 * len(order)), int(0.8 * len(order))
    rows = {
        "train": order[:first],
        "calibration": order[:256],
        "validation": order[first:second],
        "test": order[second:],
        "all": torch.arange(len(order)),
    }
    return {name: {images: pixels[chosen], "labels": labels[chosen]} for name, chosen in rows.items()}


def softmax(trained: bool = False, progress: Progress | None = None) -> Parts:
    """Softmax regression without bias, 640 weights.

    Untrained, W = 0: every class has probability 1/C, so the Hessian of the mean cross-entropy over
    the images X (n, 64) is (1/C)(I - 11'/C) kron X'X/n: each eigenvalue of X'X/(Cn) appears C - 1 = 9 times
    and 0 appears 64 times more. On the split `all`: largest eigenvalue 1.0455299687 (nine times),
    trace 13.5127791110.

    `trained=True` fits the training split with an L2 penalty of 1e-4 until its gradient's largest entry is
    below 1e-6.
    """
    splits = digit_splits("inputs", flat=True)
    model = nn.Linear(64, 10, bias=False)
    nn.init.zeros_(model.weight)
    note = "scikit-learn digits, pixels / 16; weights zero"
    if trained:
        model.weight.data.copy_(fit_softmax(splits["train"]["inputs"], splits["train"]["labels"]))
        note = "scikit-learn digits, pixels / 16; fitted to convergence with an L2 penalty of 1e-4"
    return Parts(model, "classification", splits, info={"note": note, "labels": LABELS})


def fit_softmax(pixels: Tensor, labels: Tensor, penalty: float = 1e-4) -> Tensor:
    """The minimiser W (10, 64) of mean cross-entropy + penalty/2 |W|^2, by L-BFGS in float64,
    returned as float32.

    The penalty makes it unique: pixels that are always zero, and the shift common to all classes,
    have no loss.
    """
    weight = torch.zeros(10, pixels.shape[1], dtype=torch.float64, requires_grad=True)
    inputs = pixels.double()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=2000, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().float()


def vit(
    hidden: int = 48, layers: int = 3, epochs: int = 30, seed: int = 0, progress: Progress | None = None
) -> Parts:
    """A vision transformer (Dosovitskiy et al. 2021): 2 x 2 patches, so 16 tokens and a class token.

    Trained once in seconds and kept in the cache folder; the same settings and seed give the same weights.
    """
    import transformers

    splits = digit_splits("pixel_values", flat=False)
    folder = cache_folder() / "subjects" / f"digits-vit-{hidden}-{layers}-{epochs}-{seed}"
    if not (folder / "config.json").is_file():
        train_vit(folder, splits["train"], hidden, layers, epochs, seed, progress or TextProgress())
    with quiet_transformers():
        model = transformers.ViTForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    return Parts(
        model,
        "image-classification",
        splits,
        info={"note": "scikit-learn digits, pixels / 16", "labels": LABELS},
    )


def train_vit(
    folder: Path,
    train: dict[str, Tensor],
    hidden: int,
    layers: int,
    epochs: int,
    seed: int,
    progress: Progress,
) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 16),
        intermediate_size=2 * hidden,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.ViTForImageClassification(config).train()
        count, batch = len(train["labels"]), 32
        steps = epochs * (count // batch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        for _ in progress.track(range(epochs), "train digits-vit"):
            order = torch.randperm(count)
            for chosen in order[: count // batch * batch].split(batch):
                logits = model(pixel_values=train["pixel_values"][chosen]).logits
                loss = F.cross_entropy(logits, train["labels"][chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    if progress.stopped:
        raise KeyboardInterrupt("the training of digits-vit was stopped; nothing was kept")
    with replacing(folder, private=True) as draft, quiet_transformers():
        model.save_pretrained(draft, safe_serialization=True)
