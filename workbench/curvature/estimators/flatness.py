"""Flatness study: models with the same pre-training loss, their Hessian trace and top eigenvalue,
and what they learned (Liu et al. 2023).

The corpus (`hidden-markov`) is a hidden Markov chain, so the downstream question has an answer: which hidden
state is the chain in? Small causal transformers are trained with several optimizers and noise levels for the
same number of steps. The paper compares models of one *minimal* loss, and the least that any model can reach
is known here: that of the filter which knows the chain. Models are compared where they are first within
`WITHIN` of it, and a run that does not get there counts for nothing. Without a known least loss they are
compared at the lowest validation loss of the run that got least far. Then the curvature of each is measured
and a linear probe reads the hidden state from its features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from workbench.curvature.estimators.eigenpairs import eigenpairs
from workbench.curvature.estimators.traces import hutchinson
from workbench.curvature.operators.curvature_operator import curvature_operator
from workbench.progress import Progress
from workbench.subjects import Subject
from workbench.subjects.builtin.hidden_markov import Corpus, chain_rules, exact_loss

#: How near to the least loss a model counts as one of minimal loss, as a share of it.
WITHIN = 0.02
#: Splits that the probe is fitted on and judged by.
PROBED = ("read", "asked")

# name -> (optimizer, rate, batch): what varies is how noisy the path to the same loss is
RECIPES: dict[str, tuple[str, float, int]] = {
    "adam, small rate, large batch": ("adam", 1e-3, 128),
    "adam, large rate, small batch": ("adam", 6e-3, 16),
    "momentum, small rate, large batch": ("sgd", 0.05, 128),
    "momentum, large rate, small batch": ("sgd", 0.3, 16),
}


@dataclass(frozen=True)
class Checkpoint:
    """Validation loss (nats a token), the step it was measured after, and the weights there."""

    loss: float
    step: int
    state: dict[str, Tensor]


def train(
    subject: Subject, recipe: tuple[str, float, int], seed: int, steps: int = 1500, every: int = 10
) -> list[Checkpoint]:
    """Train for `steps`; a checkpoint for every evaluation (each `every` steps)
    that is lower than all before, so losses fall.
    """
    kind, rate, batch = recipe
    weights = list(subject.model.parameters())
    rule: torch.optim.Optimizer = (
        torch.optim.Adam(weights, rate) if kind == "adam" else torch.optim.SGD(weights, rate, momentum=0.9)
    )
    draw, columns = torch.Generator().manual_seed(seed), subject.split("train")
    found: list[Checkpoint] = []
    for step in range(steps + 1):
        if step % every == 0:
            loss = subject.evaluate("validation", batch_size=256)["loss"]
            if not found or loss < found[-1].loss:
                found.append(
                    Checkpoint(
                        loss,
                        step,
                        {name: value.clone() for name, value in subject.model.state_dict().items()},
                    )
                )
        rows = torch.randint(subject.size("train"), (batch,), generator=draw)
        rule.zero_grad()
        subject.loss({k: v[rows].to(subject.device) for k, v in columns.items()}).backward()
        rule.step()
    return found


def least_loss(on: Subject) -> float | None:
    """Validation loss of the best predictor there is, None where it is not known."""
    if on.name != "hidden-markov":
        return None
    return exact_loss(on.split("validation")["input_ids"].cpu().numpy(), *chain_rules())


def at_one_loss(runs: Sequence[Sequence[Checkpoint]], goal: float | None = None) -> list[Checkpoint]:
    """Of each run the checkpoint that is first as low as `goal`, or its last where it never is.
    Without a goal it is the lowest loss of the run that got least far.
    """
    if goal is None:
        goal = max((run[-1].loss for run in runs), default=0.0)
    return [next((point for point in run if point.loss <= goal), run[-1]) for run in runs]


@torch.no_grad()
def probe_accuracy(model: nn.Module, fit: Corpus, test: Corpus) -> float:
    """Accuracy of a linear probe that reads the hidden state at the last position from the last layer's
    features.
    """

    import transformers

    assert isinstance(model, transformers.GPT2LMHeadModel)  # what `small_model` makes
    body = model.transformer

    def features(corpus: Corpus) -> np.ndarray:
        return body(corpus.tokens.to(model.device)).last_hidden_state[:, -1].cpu().numpy()

    reader = LogisticRegression(max_iter=500).fit(features(fit), fit.states[:, -1].numpy())
    return float(reader.score(features(test), test.states[:, -1].numpy()))


def untrained(on: Subject, seed: int) -> Subject:
    """The subject's architecture with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return on.with_model(type(on.model)(copy.deepcopy(on.model.config)).to(on.device))


def flatness_study(
    on: Subject,
    seeds: int = 3,
    steps: int = 1500,
    examples: int = 64,
    probes: int = 48,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row a model: recipe, seed, validation loss and step of its checkpoint, whether that is minimal
    (`least_loss` is the bound), trace with standard error, top eigenvalue, probe accuracy.
    """
    progress = progress or Progress()
    least = least_loss(on)
    goal = None if least is None else (1 + WITHIN) * least
    jobs = [(name, recipe, seed) for seed in range(seeds) for name, recipe in RECIPES.items()]
    subjects = [untrained(on, seed) for _, _, seed in jobs]
    read, asked = (Corpus(on.split(name)["input_ids"], on.split(name)["states"]) for name in PROBED)
    runs = []
    for subject, (_, recipe, seed) in zip(progress.track(subjects, "models trained"), jobs, strict=False):
        runs.append(train(subject, recipe, seed, steps))
    rows = []
    measured = zip(
        progress.track(subjects[: len(runs)], "models measured"),
        jobs,
        at_one_loss(runs, goal),
        runs,
        strict=False,
    )
    for subject, (name, _, seed), point, run in measured:
        subject.model.load_state_dict(point.state)
        with curvature_operator(
            subject, split="validation", examples=examples, batch_size=examples
        ) as operator:
            trace = hutchinson(operator, probes, seed)
            top = eigenpairs(operator, 1, tolerance=0.03, block=1, verify=False)
        rows.append(
            {
                "recipe": name,
                "seed": seed,
                "loss": point.loss,
                "steps": point.step,
                "minimal": goal is None or point.loss <= goal,
                "least_loss": np.nan if least is None else least,
                "lowest_loss": run[-1].loss,
                "trace": trace.value,
                "trace_standard_error": trace.error,
                "top_eigenvalue": float(top.values[0]),
                "probe_accuracy": probe_accuracy(subject.model, read, asked),
            }
        )
    return pd.DataFrame(rows)


def rank_correlations(table: pd.DataFrame, tolerance: float = 0.01) -> dict[str, float]:
    """Spearman correlation of trace and top eigenvalue with the probe's accuracy,
    over models of minimal loss whose losses agree within `tolerance` of the median; NaN for fewer than three.
    """
    if "minimal" in table:
        table = table[table["minimal"]]
    middle = float(table["loss"].median())
    matched = table[(table["loss"] - middle).abs() <= tolerance * middle]
    found = {"models": float(len(matched)), "loss": middle}
    for name in ("trace", "top_eigenvalue"):
        from scipy import stats  # slow to import

        if len(matched) < 3:
            found |= {f"{name}_correlation": np.nan, f"{name}_p": np.nan}
            continue
        answer = stats.spearmanr(matched[name], matched["probe_accuracy"])
        found |= {f"{name}_correlation": float(answer.statistic), f"{name}_p": float(answer.pvalue)}
    return found
