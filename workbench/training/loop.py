"""The training loop, used by everything that trains: pruning's recovery, training through rounding and
sparse training are losses, callbacks and parameter groups on it.

    run = fit(subject, steps=500, batch_size=32, learning_rate=1e-3)      # trains subject.model in place
    run.history, run.diverged, run.validation

    run = Training.start(subject, steps=500)          # the same in parts, other things between them
    run.advance(200)
    run.advance()
    run.finish()

It trains whatever is underneath the model's parametrizations:
masks stay masks, fake quantization is trained through.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from workbench.axis import warn
from workbench.errors import BadInput, unknown_name
from workbench.progress import Progress
from workbench.subjects import Batch, Subject
from workbench.training import checkpoint
from workbench.training.data_order import DataOrder, Stream
from workbench.training.optimizer.optimizers import make_optimizer
from workbench.training.precision.precision import PRECISION
from workbench.training.resume import WORTH, Stateful, identity, load_run, save_run
from workbench.training.schedule.schedules import make_schedule
from workbench.training.state import TrainingState
from workbench.unfinished import Journal, current

Callback = Callable[["Training"], None]
Scheduler = LRScheduler | ReduceLROnPlateau
#: Losses that may stay on the device before they are fetched together.
PENDING = 16
#: Seconds between two checkpoints of a run, in units of what one takes.
RARELY = 20.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run goes.

    steps : optimizer steps; or `epochs` passes over `split`.
    batch_size : examples per optimizer step; `micro_batch` of them at once when positive (gradient
        accumulation, exact: every item weighs the same). loss : replaces the task's loss, e.g. for
        distillation; a mean over the batch's items.
    optimizer, schedule, precision : a name, a mapping with options, a choice; of the first two also a
        factory, model -> optimizer and (optimizer, steps) -> scheduler. warmup : fraction of the steps.
    clip : largest gradient norm, None for none, over the parameters that are `clipped` (default: those of
        the optimizer).
    ema : decay of averaged weights; when positive they are what is evaluated and what the model holds at
        the end.
    order : which examples a step takes; by default shuffled passes drawn from `seed`.
        own_generator : dropout and other chance of the model draw from a generator of `seed`, and the
        caller's is left alone; else they draw from the caller's.
    evaluate_every : steps between evaluations, 0 for none but the last; checkpoint_every likewise, into
        `checkpoint_folder`, from which an interrupted run with the same arguments goes on,
        on one device bit for bit. Inside the run of an instrument both may be left out: its journal
        (`workbench.unfinished`) says where and, by the clock, how often.
    begun : called when model and optimizer are ready, before a checkpoint is read.
    keeps : whatever else the run's course depends on (`workbench.training.resume.Stateful`); it is in the
        checkpoint, as are a loss, a batch rule and callbacks that have a state.
    before_gradient, batch_rule, before_step, callbacks : called with the run when a step begins, when
        gradients are complete, when they are clipped, and after the step.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batch: int = 0
    learning_rate: float = 1e-3
    optimizer: str | Mapping[str, Any] | Callable[[nn.Module], Optimizer] = "adamw"
    weight_decay: float = 0.01
    schedule: str | Mapping[str, Any] | Callable[[Optimizer, int], Scheduler] = "cosine"
    warmup: float = 0.05
    clip: float | None = 1.0
    clipped: Callable[[], Iterable[Tensor]] | None = None
    precision: str | Mapping[str, Any] = "fp32"
    ema: float = 0.0
    loss: Callable[[Subject, Batch], Tensor] | None = None
    split: str = "train"
    order: DataOrder | None = None
    evaluate_every: int = 0
    evaluate_split: str = "validation"
    evaluate_limit: int | None = None
    seed: int = 0
    own_generator: bool = True
    before_gradient: Sequence[Callback] = ()
    batch_rule: Callback | None = None
    before_step: Sequence[Callback] = ()
    callbacks: Sequence[Callback] = ()
    checkpoint_folder: str | Path | None = None
    checkpoint_every: int = 0
    begun: Callback | None = None
    keeps: Sequence[Stateful] = ()
    progress: Progress | None = None
    label: str = "train"

    def steps_on(self, subject: Subject) -> int:
        """Optimizer steps of the whole run on a subject."""
        if self.steps is not None:
            return self.steps
        passes = 1.0 if self.epochs is None else self.epochs
        return math.ceil(passes * subject.size(self.split) / max(self.batch_size, 1))


def fit(subject: Subject, **settings: Any) -> Training:
    """Train `subject.model` in place, from the first step to the last; `settings` are those of `Settings`.

    Several processes started by `accelerate launch` or torchrun share every batch (the result is the same
    mean gradient). A loss or gradient that is not finite ends the run with `diverged` set; it is a result,
    not an error.
    """
    run = Training.start(subject, **settings)
    run.advance()
    run.finish()
    return run


class Training(TrainingState):
    """A run that is advanced any number of steps at a time; its parts add up to the whole, bit for bit."""

    settings: Settings
    accelerator: Any
    scaler: torch.amp.GradScaler
    generators: dict[str, Any]
    began: float
    folder: Path | None
    journal: Journal | None
    #: Steps that a checkpoint has brought and nobody has asked for yet; whether there was one.
    ahead: int
    resumed: bool
    #: When and at which step the last checkpoint was written, and the seconds that it took.
    kept_at: float
    kept_step: int
    cost: float

    @classmethod
    def start(cls, subject: Subject, **settings: Any) -> Training:
        """A run of `settings` (see `Settings`) before its first step, or where its checkpoint stopped."""
        wanted = Settings(**todays_names(settings))
        steps = wanted.steps_on(subject)
        if steps < 1 or wanted.batch_size < 1:
            raise BadInput(
                f"steps: {steps} steps of batch_size {wanted.batch_size} are nothing to train; "
                "both must be at least 1"
            )
        if not any(p.requires_grad for p in subject.model.parameters()):
            raise BadInput("subject: no parameter requires a gradient; unfreeze the ones to train")
        accelerator = make_accelerator(subject.device)
        model = accelerator.prepare_model(subject.model) if accelerator else subject.model
        optimizer = optimizer_of(wanted)(subject.model)
        schedule = schedule_of(wanted)(optimizer, steps)
        run = cls(subject, model, optimizer, schedule, steps, wanted.batch_size, split=wanted.split)
        run.settings, run.accelerator = wanted, accelerator
        run.begin()
        return run

    def begin(self) -> None:
        """Everything besides model, optimizer and schedule that a run needs."""
        wanted, subject = self.settings, self.subject
        precision = PRECISION.chosen(wanted.precision, "precision")
        self.arithmetic = precision(subject)
        self.skipping = precision.has("loss-scaling")
        self.scaler = torch.amp.GradScaler(subject.device.type, enabled=self.skipping)
        self.rank, self.world = 0, 1
        if self.accelerator:
            self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.placed = subject if self.model is subject.model else subject.with_model(self.model)
        self.order: DataOrder = wanted.order or Stream(wanted.seed)
        self.columns = subject.split(wanted.split)
        self.progress = wanted.progress or Progress()
        # an optimizer that needs more than gradients asks for it here, once they are complete
        own = [self.optimizer.prepare] if hasattr(self.optimizer, "prepare") else []
        self.before_step: tuple[Callback, ...] = (*wanted.before_step, *own)
        #: Rows whose loss and gradient norm are still on the device.
        self.pending: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        if wanted.ema > 0:
            self.averaged = AveragedModel(subject.model, multi_avg_fn=get_ema_multi_avg_fn(wanted.ema))
        with self.forked():
            torch.manual_seed(wanted.seed + 7919 * self.rank)
            self.generators = checkpoint.rng_state(subject.device)
        if wanted.begun is not None:
            wanted.begun(self)
        self.find_checkpoint()

    def find_checkpoint(self) -> None:
        """Where this run's checkpoint is; the state of an earlier process, when it left one there."""
        wanted = self.settings
        self.journal = None
        self.ahead, self.resumed = 0, False
        self.kept_at, self.kept_step, self.cost = time.monotonic(), 0, 0.0
        if wanted.checkpoint_folder:
            self.folder = Path(wanted.checkpoint_folder)
        elif self.world == 1 and (found := current()) is not None and found.usable:
            self.journal, self.folder = found, found.place(identity(self))
        else:
            self.folder = None
        if self.folder is None or not self.folder.exists():
            return
        if self.journal is not None and not (self.folder / checkpoint.NOTE).exists():
            return  # the process was killed while it wrote the first
        load_run(self.folder, self)
        self.resumed, self.kept_step = True, self.step
        if self.journal is None:  # its callbacks are perhaps others
            self.stop = False
        else:
            self.ahead = self.step
            self.progress.say(
                f"{wanted.label}: goes on at step {self.step} of {self.steps}, where an earlier run stopped"
            )

    def forked(self) -> contextlib.AbstractContextManager[None]:
        """What is drawn inside leaves the caller's generators as they were."""
        device = self.subject.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    @contextlib.contextmanager
    def own_generators(self) -> Any:
        """The run's own generators in place of the caller's, and kept for the next part."""
        if not self.settings.own_generator:
            yield
            return
        with self.forked():
            checkpoint.set_rng_state(self.generators, self.subject.device)
            yield
            self.generators = checkpoint.rng_state(self.subject.device)

    def advance(self, steps: int | None = None) -> None:
        """So many steps more, at most all that are left; ends early, keeping the state, when somebody asks
        to stop, a callback sets `stop` or the loss is no longer finite.
        """
        left = self.steps - self.step
        brought = self.ahead if steps is None else min(steps, self.ahead)
        steps = left if steps is None else min(steps - brought, left)
        self.ahead -= brought
        if self.resumed and not self.ahead and not self.settings.own_generator:
            checkpoint.set_rng_state(self.generators, self.subject.device)
            self.resumed = False
        if self.stop or self.diverged:
            return
        if steps or not brought:
            with self.own_generators():
                self.began = time.perf_counter() - self.seconds
                for _ in self.progress.track(range(steps), self.settings.label, steps):
                    self.one_step()
                    if self.stop or self.diverged:
                        break
                self.settle()
                self.keep(at_once=self.progress.stop.is_set())
        self.subject.model.eval()

    def keep(self, at_once: bool = False) -> None:
        """A checkpoint of where the run stands, when a part of it has ended that took long enough to be
        worth one, or at once.
        """
        if self.folder is None or self.diverged or self.step == self.kept_step:
            return
        if self.journal is None:
            if at_once and self.settings.checkpoint_every and self.rank == 0:
                self.save()
            return
        passed = time.monotonic() - self.kept_at
        if at_once or passed >= max(min(self.journal.every, WORTH), RARELY * self.cost):
            self.save()

    def changed(self) -> None:
        """Somebody has changed the model between two parts of the run, and its state is worth keeping."""
        if self.journal is not None and not self.ahead:
            self.kept_step = -1
            with self.own_generators():
                self.keep()

    def save(self) -> None:
        """Write a checkpoint; a disk that does not take it ends no training."""
        assert self.folder is not None
        if self.journal is not None and not self.journal.usable:
            return
        began = time.monotonic()
        try:
            if self.journal is None or self.journal.begin():
                save_run(self.folder, self)
        except (OSError, BadInput, SafetensorError) as error:
            if self.journal is None:
                raise
            self.journal.give_up(error)
        self.kept_at, self.kept_step = time.monotonic(), self.step
        self.cost = self.kept_at - began

    def skip(self, steps: int) -> None:
        """The schedule goes on as if so many steps had been done; the order of the data does not.
        A checkpoint was taken after that.
        """
        if self.resumed:
            self.ahead -= steps
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch: the optimizer has not stepped yet
            for _ in range(steps):
                self.schedule.step()  # type: ignore[call-arg]
        self.step += steps
        self.skipped += steps

    def finish(self) -> None:
        """The averaged weights, where there are any, become the model's."""
        if self.averaged is None:
            return
        with torch.no_grad():
            pairs = zip(self.subject.model.parameters(), self.averaged.module.parameters(), strict=True)
            for target, source in pairs:
                target.copy_(source)

    # ---- one step ------------------------------------------------------------------------------------------
    def one_step(self) -> None:
        wanted = self.settings
        self.model.train()
        for callback in wanted.before_gradient:
            callback(self)
        used = self.batch_size  # callbacks may set another for the next step
        mean, items = self.gradient(used)
        self.scaler.unscale_(self.optimizer)
        if wanted.batch_rule is not None:
            wanted.batch_rule(self)
        limit = wanted.clip if wanted.clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_(self.clipped_parameters(), limit)
        for callback in self.before_step:
            callback(self)
        row = {"step": self.step + 1, "lr": self.lr, "batch_size": used}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update_parameters(self.subject.model)
        self.step, self.position, self.items = self.step + 1, self.position + used, self.items + items
        self.seconds = time.perf_counter() - self.began
        row |= {"examples": self.position, "items": self.items, "seconds": self.seconds}
        self.pending.append((row, mean, norm))
        self.after_step()

    def gradient(self, used: int) -> tuple[Tensor, int]:
        """The gradient of the mean loss over the batch, micro-batch by micro-batch: (loss, items)."""
        device, task = self.subject.device, self.subject.task
        size = self.subject.size(self.split)
        self.chosen = self.order.take(size, self.position, used)[self.rank :: self.world]
        micro = [
            {k: v[part] for k, v in self.columns.items()}
            for part in self.chosen.split(self.settings.micro_batch or max(len(self.chosen), 1))
        ]
        counts = [task.items(batch) for batch in micro]
        total = sum(counts)
        if self.accelerator:
            total = int(self.accelerator.reduce(torch.tensor(total, device=device), "sum"))
        mean = torch.zeros((), device=device)
        for index, (batch, count) in enumerate(zip(micro, counts, strict=True)):
            if count == 0:
                continue
            with self.synchronised(last=index + 1 == len(micro)), torch.enable_grad():
                with self.arithmetic:
                    part = self.loss({k: v.to(device) for k, v in task.trimmed(batch).items()}) * (
                        count / total
                    )
                # distributed gradients are averaged over processes
                self.scaler.scale(part * self.world).backward()
            mean += part.detach()
        return self.accelerator.reduce(mean, "sum") if self.accelerator else mean, total

    def loss(self, batch: Batch) -> Tensor:
        compute = self.settings.loss
        return self.placed.loss(batch) if compute is None else compute(self.placed, batch)

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients after the last micro-batch only."""
        if self.accelerator is None or last:
            return contextlib.nullcontext()
        quiet: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(self.model)
        return quiet

    def clipped_parameters(self) -> list[Tensor]:
        if self.settings.clipped is not None:
            return list(self.settings.clipped())
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def after_step(self) -> None:
        wanted = self.settings
        last = self.step == self.steps
        evaluating = last or (wanted.evaluate_every > 0 and self.step % wanted.evaluate_every == 0)
        if evaluating or len(self.pending) == PENDING or wanted.callbacks or wanted.checkpoint_every:
            self.settle()
        if evaluating and not self.diverged and wanted.evaluate_split in self.subject.splits:
            measured = self.evaluated().evaluate(wanted.evaluate_split, limit=wanted.evaluate_limit)
            self.rows[-1] |= {f"validation_{k}": v for k, v in measured.items()}
        if not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        elif evaluating and not self.diverged:
            self.schedule.step(self.validation)
        for callback in wanted.callbacks:
            callback(self)
        if self.due() and self.rank == 0:
            self.settle()
            if not self.diverged:
                self.save()

    def due(self) -> bool:
        """Whether it is time for a checkpoint: by the steps, or by the journal's clock."""
        if self.folder is None or self.diverged:
            return False
        if self.journal is None:
            every = self.settings.checkpoint_every
            return every > 0 and self.step % every == 0
        return time.monotonic() - self.kept_at >= max(self.journal.every, RARELY * self.cost)

    def settle(self) -> None:
        """Fetch the losses that are still on the device; the first that is not finite marks the run as
        diverged.

        Under loss scaling a gradient that overflowed was skipped by the scaler and is no divergence.
        """
        for row, loss, norm in self.pending:
            values = {"loss": float(loss), "gradient_norm": float(norm)}
            if self.diverged:
                break
            self.rows.append(row | values)
            self.diverged = not math.isfinite(values["loss"]) or not (
                self.skipping or math.isfinite(values["gradient_norm"])
            )
        self.pending.clear()

    def evaluated(self) -> Subject:
        """The subject as it would be used now: with averaged weights when there are."""
        return self.subject if self.averaged is None else self.subject.with_model(self.averaged.module)

    # ---- parameters that come later ------------------------------------------------------------------------
    def learn(self, parameters: Iterable[Tensor], rate: float = 1.0) -> None:
        """Give the optimizer parameters that it does not have yet, at `rate` times the learning rate of its
        first group and without weight decay.
        """
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        fresh = [p for p in parameters if id(p) not in known]
        if not fresh:
            return
        first = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name in first:
                first[name] = first[name] * rate
        self.optimizer.add_param_group({**first, "params": fresh, "weight_decay": 0.0})
        for name in ("base_lrs", "min_lrs"):
            if values := getattr(self.schedule, name, None):
                values.append(values[0] * rate)


def optimizer_of(wanted: Settings) -> Callable[[nn.Module], Optimizer]:
    if callable(wanted.optimizer) and not isinstance(wanted.optimizer, str):
        return wanted.optimizer
    return make_optimizer(wanted.optimizer, wanted.learning_rate, wanted.weight_decay)


def schedule_of(wanted: Settings) -> Callable[[Optimizer, int], Scheduler]:
    if callable(wanted.schedule) and not isinstance(wanted.schedule, str):
        return wanted.schedule
    return make_schedule(wanted.schedule, warmup=wanted.warmup)


def todays_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of today, from those of one release ago; `BadInput` for one that is unknown."""
    found = dict(given)
    if "lr" in found:
        warn("lr: is called learning_rate now; the old name goes with the next release")
        found["learning_rate"] = found.pop("lr")
    for name in ("optimizer", "schedule"):
        if (options := found.pop(f"{name}_options", None)) is not None:
            warn(f"{name}_options: belong to {name} now, as a mapping with name and options")
            chosen = found.get(name, getattr(Settings, name))
            found[name] = {"name": str(chosen), **options}
    if rotation := found.pop("rotation", 0):
        warn("rotation: is an option of precision now; the old name goes with the next release")
        found["precision"] = PRECISION.chosen(
            found.get("precision", Settings.precision), "precision", rotation=rotation
        )
    known = [field.name for field in fields(Settings)]
    for name in found:
        if name not in known:
            raise unknown_name("setting", name, known)
    return found


def make_accelerator(device: torch.device) -> Any:
    """accelerate's view of the processes of a distributed launch; None for a single process."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu")
