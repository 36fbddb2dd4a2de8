"""Every quantization method at 2, 3, 4 and 8 bits over three calibration draws, all with the same examples:
the leaderboard as a file.

    python -m tests.benchmarks.leaderboard_quantization minilm-docstrings --steps 20 --examples 32
    --test-examples 256

Every run is cached, so a leaderboard that was ended goes on where it stopped (with the same code). Writes
`data/benchmarks/quantization-leaderboard-SUBJECT.csv`, one row a run, and `.md`, what was set and the means
with 95 % intervals. `--minutes` ends it early with what is finished,
all methods with the first draw before any with the second.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import workbench
from workbench.evidence.quantization.leaderboard import accepted, leaderboard, summary
from workbench.progress import TextProgress

FOLDER = Path(__file__).parents[2] / "data" / "benchmarks"
WIDTHS = (2, 3, 4, 8)


def markdown(board: pd.DataFrame, value: str) -> str:
    """Methods by width: the mean of a measure and the half width of its interval,
    bold where no other mean is smaller; seconds of a run.
    """
    table = summary(board, value)
    table["shown"] = [
        f"{m:.4f}" + ("" if np.isnan(h) else f" ± {h:.4f}")
        for m, h in zip(table["mean"], table["half_width"], strict=True)
    ]
    best = table.groupby("bits")["mean"].transform("min") == table["mean"]
    table.loc[best, "shown"] = "**" + table.loc[best, "shown"] + "**"
    wide = table.pivot(index="method", columns="bits", values="shown").fillna("")
    means = table.pivot(index="method", columns="bits", values="mean")
    seconds, bits = (
        board.groupby("method")["seconds"].median(),
        table[table["bits"] == 3].set_index("method")["average_bits"],
    )
    lines = [
        "| method | "
        + " | ".join(f"{b} bits" for b in wide.columns)
        + " | bits a weight at 3 bits | seconds |",
        "|---|" + "---|" * (len(wide.columns) + 2),
    ]
    for method in means.sort_values(3).index:
        lines.append(
            f"| {method} | "
            + " | ".join(wide.loc[method])
            + f" | {bits[method]:.2f} | {seconds[method]:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    read = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    read.add_argument("subject")
    for name, value in (
        ("steps", 20),
        ("block-steps", 4),
        ("examples", 32),
        ("test-examples", 256),
        ("seeds", 3),
        ("group-size", 64),
        ("minutes", 0),
    ):
        read.add_argument(f"--{name}", type=int, default=value)
    given = read.parse_args()
    torch.set_num_threads(1)
    on = workbench.subject(given.subject)
    shared = {
        "steps": given.steps,
        "calibration_examples": given.examples,
        "test_examples": given.test_examples,
        "group_size": given.group_size,
    }
    methods, refused = accepted(on, WIDTHS, **shared)
    began, progress = time.perf_counter(), TextProgress()
    if given.minutes:
        timer = threading.Timer(60 * given.minutes, progress.stop.set)
        timer.daemon = True
        timer.start()
    board = leaderboard(
        on, methods, WIDTHS, range(given.seeds), progress, block_steps=given.block_steps, **shared
    )
    board.insert(0, "subject", given.subject)
    target = FOLDER / f"quantization-leaderboard-{given.subject}"
    board.to_csv(target.with_suffix(".csv"), index=False, float_format="%.6g")
    said = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in shared.items())
    left = "".join(f"\nLeft out: {name}: {why}" for name, why in refused.items())
    runs = len(methods) * len(WIDTHS) * given.seeds
    stopped = "" if len(board) == runs else f"(stopped after {len(board)} runs) "
    target.with_suffix(".md").write_text(
        f"`python -m tests.benchmarks.leaderboard_quantization {given.subject}`: "
        f"{board['method'].nunique()} methods, {board['seed'].nunique()} draws of the "
        f"calibration examples {stopped}"
        f"(each seen by every method), integers, {said}, block steps {given.block_steps}; learned roundings "
        "and transforms have these few steps, so they are shown below what they can do. "
        f"One thread of {platform.machine()}, torch {torch.__version__}, "
        f"{(time.perf_counter() - began) / 60:.0f} minutes.{left}\n\n"
        "KL(dense || changed) in nats an item, mean ± half a 95 % interval over the draws (none: one draw)."
        f"\n\n{markdown(board, 'kl')}\n\n"
        f"Test loss in nats, likewise; dense {board['dense_loss'].mean():.4f}.\n\n{markdown(board, 'loss')}\n"
    )
    print(target.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
