"""One training run as a sweep's objective: opens the subject in the worker, trains a fresh model,
returns losses and costs.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.storage import cache_folder
from workbench.subjects import Subject, subject
from workbench.training.loop import Training, fit
from workbench.training.optimizer.optimizers import state_bytes
from workbench.training.sweep.sweeps import Range, Sampling, Sweep, Trial
from workbench.unfinished import without_journal

Start = Literal["weights", "random"]


def reinitialised(on: Subject, seed: int) -> Subject:
    """The same architecture with fresh random weights, by the model's own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(on.model, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return on.with_model(type(on.model)(copy.deepcopy(config)).to(on.device))
        model = copy.deepcopy(on.model)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise BadInput(
                    f"start: {type(module).__name__} cannot re-initialise itself; use start='weights'"
                )
        return on.with_model(model)


def begun(on: Subject, start: Start, seed: int) -> Subject:
    """A subject of its own for one run: with the same weights or with fresh ones."""
    return reinitialised(on, seed) if start == "random" else on.copy()


#: Subjects of sweeps that run in this process, by fingerprint: they need no folder, so any module will do.
HERE: dict[str, Subject] = {}


@functools.lru_cache(2)
def opened(folder: str) -> Subject:
    return HERE[folder] if folder in HERE else subject(folder)


@dataclass(frozen=True)
class TrainingObjective:
    """`params` override `fixed`, both are arguments of `fit`; further keys:
    `examples` (budget instead of steps), `start`, `seed`.

    Facts: value (validation loss), test, steps, examples, train_seconds, state_bytes, diverged,
    best step time.
    """

    folder: str
    fixed: dict[str, Any] = field(default_factory=dict)
    start: Start = "random"
    device: str = "cpu"
    reports: int = 0  # intermediate evaluations that a pruner sees
    test: bool = True

    def prepared(self, params: dict[str, Any]) -> tuple[Subject, dict[str, Any]]:
        """The subject of one run on its device, and the arguments of the run."""
        torch.set_num_threads(1)
        arguments = {**self.fixed, **params}
        if "lr" in arguments:  # as it is called in tables of runs
            arguments["learning_rate"] = arguments.pop("lr")
        base = opened(self.folder)
        mine = begun(base, self.start, int(arguments.get("seed", 0)))
        mine.model.to(self.device)
        return mine, arguments

    def __call__(self, params: dict[str, Any], trial: Trial) -> dict[str, Any]:
        mine, arguments = self.prepared(params)
        examples = arguments.pop("examples", None)
        if examples is not None:
            arguments["steps"] = max(1, round(examples / arguments["batch_size"]))
        every = max(1, arguments["steps"] // self.reports) if self.reports else 0

        def report(run: Training) -> None:
            if every and run.step % every == 0 and "validation_loss" in run.rows[-1]:
                run.stop = trial.report(run.rows[-1]["validation_loss"], run.step)

        with without_journal():  # finished trials are in the ledger
            run = fit(
                mine,
                **arguments,
                evaluate_every=every,
                callbacks=[report] if every else (),
                progress=trial.progress,
            )
        facts: dict[str, Any] = {
            "value": run.validation,
            "diverged": run.diverged,
            "steps": run.step,
            "train_seconds": run.seconds,
            "state_bytes": state_bytes(run.optimizer),
            "train_loss": float(run.history.loss.iloc[-max(1, run.step // 20) :].mean()),
        }
        if every:
            facts["curve"] = [
                [row["step"], row["items"], row["validation_loss"]]
                for row in run.rows
                if "validation_loss" in row
            ]
        if self.test and not run.diverged and "test" in mine.splits and not trial.progress.stopped:
            facts["test"] = mine.evaluate("test", limit=arguments.get("evaluate_limit"))["loss"]
        return facts


def prepared_folder(on: Subject, workers: int) -> str:
    """Where workers find the subject: a folder saved once under its fingerprint,
    or this process's memory for a single worker.
    """
    if workers == 1:
        HERE.clear()
        opened.cache_clear()
        HERE[on.fingerprint] = on
        return on.fingerprint
    if not on.has_file:
        raise BadInput(
            f"workers: {workers} processes cannot open {on.name!r}, a plain module whose code no folder "
            "holds; use workers=1"
        )
    folder = cache_folder() / "sweeps" / "subjects" / on.fingerprint
    if not (folder / "workbench.json").exists():
        on.save(folder, private=True)
    return str(folder)


def swept(
    instrument: Instrument,
    on: Subject,
    label: str,
    space: dict[str, Any],
    objective: TrainingObjective,
    progress: Progress,
    workers: int,
    storage: str = "",
    backend: str = "loky",
    sampling: Sampling = "grid",
    trials: int | None = None,
    on_change: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Run (or go on with) one sweep of an instrument's runs;
    its name holds the instrument's key, so the same request finds it again.
    """
    note = json.dumps({"fixed": objective.fixed, "start": objective.start}, default=str, sort_keys=True)
    sweep = Sweep(
        f"{label}-{instrument.key(on)[:12]}",
        space,
        objective,
        sampling=sampling,
        trials=trials,
        storage=storage or None,
        seed=instrument.seed,
        note=note,
    )
    table = sweep.run(workers=workers, backend=backend, progress=progress, on_change=on_change)
    check_stands(table, label, progress.stopped)
    for column in ("value", "test", "diverged"):
        if column not in table:
            table[column] = math.nan
    return table


def check_stands(table: pd.DataFrame, label: str, stopped: bool) -> None:
    """`BadInput` for a sweep without a single finished trial: nothing can be concluded from it."""
    states = table.state if "state" in table else pd.Series([], dtype=object)
    if (states == "done").any() or stopped:
        return
    said = [str(words) for words in table.error.dropna().unique()] if "error" in table else []
    counted = ", ".join(f"{n} {word}" for word, n in states.value_counts().items()) or "there is none"
    raise BadInput(
        f"{label}: no trial finished ({counted}){'; ' + said[0].splitlines()[0][:200] if said else ''}; mend "
        "the settings, or the cause of the failure, and run it again"
    )


def language_subject(width: int = 48, layers: int = 2, context: int = 64, corpus: str = "bytelm") -> Subject:
    """A small member of the `bytelm` family: the same data cut to `context` bytes,
    the same architecture at another size, untrained.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

    base = subject(corpus)
    splits = {
        name: {k: v[:, : v.shape[1] // context * context].reshape(-1, context) for k, v in columns.items()}
        for name, columns in base.splits.items()
    }
    assert isinstance(base.model, PreTrainedModel)  # as every built-in language model is
    given = base.model.config.to_dict()
    kept = {
        k: given[k]
        for k in (
            "vocab_size",
            "rms_norm_eps",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
        if k in given
    }
    heads = max(1, width // 16)
    config = LlamaConfig(
        **kept,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
    return Subject(
        f"{corpus}-{width}x{layers}",
        model,
        base.task,
        splits,
        tokenizer=base.tokenizer,
        data_note=base.data_note,
    )


def learning_rates(low: float, high: float, points: int) -> Range:
    """Learning rates evenly spaced in the logarithm."""
    if not 0 < low <= high:
        raise BadInput(
            f"learning_rate_high: the range {low:g} to {high:g} is empty; "
            "learning_rate_low must be positive and at most learning_rate_high"
        )
    return Range(low, high, log=True, points=points)


def saved_table(name: str) -> pd.DataFrame:
    """A sweep table that the project measured, from `data/runs`."""
    from workbench.storage import data_folder

    file: Path = data_folder() / "runs" / f"{name}.csv"
    if not file.exists():
        raise BadInput(f"table: {name!r} is not among data/runs")
    return pd.read_csv(file)
