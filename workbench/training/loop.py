"""The training loop: one readable function for every subject, used by every instrument that trains.

    run = fit(subject, steps=500, batch_size=32, lr=1e-3)         # trains subject.model in place
    run.history, run.diverged, run.validation

It trains whatever is underneath the model's parametrizations:
masks stay masks, fake quantization is trained through.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Batch, Subject
from workbench.subjects.subject import trim
from workbench.training import checkpoint
from workbench.training.data_order import take
from workbench.training.optimizer.optimizers import make_optimizer
from workbench.training.schedule.schedules import make_schedule
from workbench.training.state import Training

Precision = Literal["fp32", "bf16", "fp16", "int8", "int6", "int4", "e4m3fn", "e5m2", "e3m2"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


Callback = Callable[[Training], None]


def fit(
    subject: Subject,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    micro_batch: int = 0,
    lr: float = 1e-3,
    optimizer: str | Callable[[nn.Module], Optimizer] = "adamw",
    optimizer_options: dict[str, Any] | None = None,
    weight_decay: float = 0.01,
    schedule: str | Callable[[Optimizer, int], LRScheduler | ReduceLROnPlateau] = "cosine",
    schedule_options: dict[str, Any] | None = None,
    warmup: float = 0.05,
    clip: float | None = 1.0,
    precision: Precision = "fp32",
    rotation: int = 0,
    ema: float = 0.0,
    loss: Callable[[Subject, Batch], Tensor] | None = None,
    split: str = "train",
    evaluate_every: int = 0,
    evaluate_split: str = "validation",
    evaluate_limit: int | None = None,
    seed: int = 0,
    before_step: Sequence[Callback] = (),
    callbacks: Sequence[Callback] = (),
    checkpoint_folder: str | Path | None = None,
    checkpoint_every: int = 0,
    progress: Progress | None = None,
) -> Training:
    """Train `subject.model` in place for `steps` optimizer steps (or `epochs` passes over `split`).

    batch_size : examples per optimizer step; `micro_batch` of them at once when positive (gradient
        accumulation, exact: every item weighs the same). loss : replaces the task's loss, e.g. for
        distillation; a mean over the batch's items.
    optimizer, schedule : names (see `optimizers.OPTIMIZERS`, `schedules.PROFILES`) or factories.
        warmup : fraction of the steps.
    clip : largest gradient norm, None for none. precision : fp16 scales the loss dynamically (Micikevicius et
        al. 2018); a number format (int8, e4m3fn) rounds the operands of the blocks' matrix products, with
        Hadamard rotations by level `rotation` (see `products`).
    ema : decay of averaged weights; when positive they are what is evaluated and what the model holds at
        the end.
    evaluate_every : steps between evaluations, 0 for none but the last; checkpoint_every likewise, into
        `checkpoint_folder`, from which an interrupted run with the same arguments goes on,
        on one device bit for bit.
    before_step, callbacks : called with the `Training` once gradients are complete, and after the step.

    Several processes started by `accelerate launch` or torchrun share every batch (the result is the same
    mean gradient). A loss or gradient that is not finite ends the run with `diverged` set; it is a result,
    not an error.
    """
    progress = progress or Progress()
    size = subject.size(split)
    steps = (
        steps
        if steps is not None
        else math.ceil((epochs if epochs is not None else 1.0) * size / max(batch_size, 1))
    )
    if steps < 1 or batch_size < 1:
        raise BadInput(
            f"steps: {steps} steps of batch_size {batch_size} are nothing to train; both must be at least 1"
        )
    if not any(p.requires_grad for p in subject.model.parameters()):
        raise BadInput("subject: no parameter requires a gradient; unfreeze the ones to train")
    device, model = subject.device, subject.model
    accelerator = make_accelerator(device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if accelerator:
        model = accelerator.prepare_model(model)
    placed = subject if model is subject.model else subject.with_model(model)

    maker = (
        optimizer
        if callable(optimizer)
        else make_optimizer(optimizer, lr, weight_decay, **(optimizer_options or {}))
    )
    stepper = maker(subject.model)
    planner = (
        schedule if callable(schedule) else make_schedule(schedule, warmup=warmup, **(schedule_options or {}))
    )
    run = Training(subject, model, stepper, planner(stepper, steps), steps, batch_size, split=split)
    # an optimizer that needs more than gradients asks for it here, once they are complete
    prepared = (*before_step, *([stepper.prepare] if hasattr(stepper, "prepare") else []))
    if ema > 0:
        run.averaged = AveragedModel(subject.model, multi_avg_fn=get_ema_multi_avg_fn(ema))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    arithmetic = arithmetic_of(subject, precision, rotation)
    parameters = [p for group in stepper.param_groups for p in group["params"]]
    columns, compute = subject.split(split), loss or (lambda on, batch: on.loss(batch))
    pending: list[tuple[dict[str, Any], Tensor, Tensor]] = []  # rows whose loss is still on the device

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + 7919 * rank)
        folder = Path(checkpoint_folder) if checkpoint_folder else None
        if folder and folder.exists():
            load_checkpoint(folder, run, scaler, device)
        began = time.perf_counter() - run.seconds
        for _ in progress.track(range(run.step, steps), "train", steps - run.step):
            model.train()
            # ---- gradient of the mean loss over the batch, micro-batch by micro-batch
            used = run.batch_size  # callbacks may set another for the next step
            run.chosen = take(size, seed, run.position, used)[rank::world]
            micro = [
                {k: v[part] for k, v in columns.items()}
                for part in run.chosen.split(micro_batch or max(len(run.chosen), 1))
            ]
            counts = [subject.task.items(batch) for batch in micro]
            total = (
                sum(counts)
                if not accelerator
                else int(accelerator.reduce(torch.tensor(sum(counts), device=device), "sum"))
            )
            mean = torch.zeros((), device=device)
            for index, (batch, count) in enumerate(zip(micro, counts, strict=True)):
                if count == 0:
                    continue
                quiet = accelerator is not None and index + 1 < len(micro)
                with accelerator.no_sync(model) if quiet else contextlib.nullcontext():  # type: ignore[union-attr]
                    with arithmetic:
                        part = compute(placed, {k: v.to(device) for k, v in trim(batch).items()}) * (
                            count / total
                        )
                    scaler.scale(part * world).backward()  # distributed gradients are averaged over processes
                mean += part.detach()
            if accelerator:
                mean = accelerator.reduce(mean, "sum")
            # ---- one step
            scaler.unscale_(stepper)
            norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else math.inf)
            for callback in prepared:
                callback(run)
            row = {"step": run.step + 1, "lr": run.lr, "batch_size": used}
            scaler.step(stepper)
            scaler.update()
            stepper.zero_grad(set_to_none=True)
            if run.averaged is not None:
                run.averaged.update_parameters(subject.model)
            run.step, run.position, run.items = run.step + 1, run.position + used, run.items + total
            run.seconds = time.perf_counter() - began
            pending.append(
                (row | {"examples": run.position, "items": run.items, "seconds": run.seconds}, mean, norm)
            )
            last = run.step == steps
            evaluating = last if evaluate_every == 0 else last or run.step % evaluate_every == 0
            if evaluating or len(pending) == 16 or callbacks or checkpoint_every:
                settle(run, pending, skipping=precision == "fp16")
            if evaluating and not run.diverged and evaluate_split in subject.splits:
                measured = evaluated(run).evaluate(evaluate_split, limit=evaluate_limit)
                run.rows[-1] |= {f"validation_{k}": v for k, v in measured.items()}
            if not isinstance(run.schedule, ReduceLROnPlateau):
                run.schedule.step()
            elif evaluating and not run.diverged:
                run.schedule.step(run.validation)
            for callback in callbacks:
                callback(run)
            if (
                folder
                and checkpoint_every
                and run.step % checkpoint_every == 0
                and not run.diverged
                and rank == 0
            ):
                save_checkpoint(folder, run, scaler, device)
            if run.stop or run.diverged:
                break
        settle(run, pending, skipping=precision == "fp16")
    if run.averaged is not None:
        with torch.no_grad():
            for target, source in zip(
                subject.model.parameters(), run.averaged.module.parameters(), strict=True
            ):
                target.copy_(source)
    subject.model.eval()
    return run


def arithmetic_of(subject: Subject, precision: str, rotation: int) -> contextlib.AbstractContextManager[Any]:
    """What the forward pass runs in; it may be entered again and again."""
    if precision not in get_args(Precision):
        raise BadInput(f"precision: {precision!r} is unknown; accepted: {', '.join(get_args(Precision))}")
    if precision not in ("fp32", *AUTOCAST):
        from workbench.training.quantized_products import QuantizedProducts

        return QuantizedProducts(subject.layers("blocks"), precision, rotation)
    if rotation:
        raise BadInput(
            f"rotation: {rotation} rotates the operands of quantized products; "
            f"with precision {precision} there are none, set it to 0"
        )
    return (
        torch.autocast(subject.device.type, AUTOCAST[precision])
        if precision in AUTOCAST
        else contextlib.nullcontext()
    )


def settle(run: Training, pending: list[tuple[dict[str, Any], Tensor, Tensor]], skipping: bool) -> None:
    """Fetch the losses that are still on the device; the first that is not finite marks the run as diverged.

    Under loss scaling a gradient that overflowed was skipped by the scaler and is no divergence.
    """
    for row, loss, norm in pending:
        values = {"loss": float(loss), "gradient_norm": float(norm)}
        if run.diverged:
            break
        run.rows.append(row | values)
        run.diverged = not math.isfinite(values["loss"]) or not (
            skipping or math.isfinite(values["gradient_norm"])
        )
    pending.clear()


def evaluated(run: Training) -> Subject:
    """The subject as it would be used now: with averaged weights when there are."""
    return run.subject if run.averaged is None else run.subject.with_model(run.averaged.module)


def make_accelerator(device: torch.device) -> Any:
    """accelerate's view of the processes of a distributed launch; None for a single process."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu")


def save_checkpoint(folder: Path, run: Training, scaler: Any, device: torch.device) -> None:
    state = {
        "model": run.subject.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": checkpoint.rng_state(device),
        "step": run.step,
        "position": run.position,
        "items": run.items,
        "batch_size": run.batch_size,
        "seconds": run.seconds,
        "steps": run.steps,
    }
    if run.averaged is not None:
        state["averaged"] = run.averaged.state_dict()
    checkpoint.save(folder, state, run.rows)


def load_checkpoint(folder: Path, run: Training, scaler: Any, device: torch.device) -> None:
    state, run.rows = checkpoint.load(folder)
    if state["steps"] != run.steps:
        raise BadInput(
            f"steps: the checkpoint in {str(folder)!r} is of a run of {state['steps']} steps, "
            f"not {run.steps}; delete it or ask for the same"
        )
    run.subject.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    if run.averaged is not None:
        run.averaged.load_state_dict(state["averaged"])
    checkpoint.set_rng_state(state["rng"], device)
    run.step, run.position, run.items = state["step"], state["position"], state["items"]
    run.batch_size, run.seconds = state["batch_size"], state["seconds"]
