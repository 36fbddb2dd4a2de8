"""Learning rates of every step beside transformers', torch's, pytorch_optimizer's and authors' schedulers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import source
from tests.identity.scripts import loaded, taken
from workbench.storage.identity import AUTHORS, FP64, PEER
from workbench.training.schedule.schedules import profile, sampled
from workbench.training.schedule.time_budget import TimeBudgetLR

STEPS, WARM, PEAK = 400, 40, 0.1
RATES = dict(kind=PEER, compared="the learning rate of every step", tolerance=1e-12)
WARMED = "400 steps, 40 of them warm-up (theirs read one step later: its step 0 runs at zero)"
WHOLE = "400 steps without warm-up"
HF = dict(peer="transformers", **RATES)
TORCH = dict(peer="torch", inputs=WHOLE, **RATES)


def stepped(make: Callable[[Optimizer], Any], steps: int, peak: float = PEAK) -> Tensor:
    """The rates that an optimizer sees under a scheduler."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def ours(name: str, warmup: float = 0.0, peak: float = PEAK, steps: int = STEPS, **options: Any) -> Tensor:
    return torch.from_numpy(sampled(name, steps, warmup, learning_rate=peak, **options))


def warmed(theirs: Callable[..., Any], name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Our step t of a warm-up of W is their step t + 1 of one of W + 1."""
    later = stepped(lambda optimizer: theirs(optimizer, WARM + 1), STEPS + 1)[1:]
    return later, ours(name, WARM / STEPS, **options)


@beside("linear", inputs=WARMED, **HF)
def linear(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers import get_linear_schedule_with_warmup as theirs

    return warmed(lambda opt, warm: theirs(opt, warm, STEPS + 1), "linear")


@beside("cosine", inputs=WARMED, **HF)
def cosine(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers import get_cosine_schedule_with_warmup as theirs

    return warmed(lambda opt, warm: theirs(opt, warm, STEPS + 1), "cosine")


@beside("rewarm", inputs=f"{WARMED}, to a tenth of the peak", **HF)
def rewarm(draw: Draw) -> tuple[Tensor, Tensor]:
    """Gupta et al. warm up again over a share of the new tokens, then follow a cosine to a tenth."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup as theirs

    return warmed(lambda opt, warm: theirs(opt, warm, STEPS + 1, min_lr_rate=0.1), "cosine", final=0.1)


@beside("wsd", inputs=f"{WARMED}, the last fifth decays by each of three shapes", **HF)
def wsd(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers import get_wsd_schedule as theirs

    fall = (STEPS - WARM) // 5
    found = [
        warmed(
            lambda opt, warm, shape=shape: theirs(
                opt,
                num_warmup_steps=warm,
                num_decay_steps=fall,
                num_training_steps=STEPS + 1,
                decay_type=shape,
            ),
            "wsd",
            shape=mine,
        )
        for shape, mine in (("linear", "linear"), ("cosine", "cosine"), ("1-sqrt", "sqrt"))
    ]
    return torch.cat([theirs for theirs, _ in found]), torch.cat([mine for _, mine in found])


@beside("inverse-sqrt", inputs=f"{WHOLE}, from the start of the fall on", **HF)
def inverse_sqrt(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their fall begins at once; ours at `start`, so our step `start` T + s is their step s."""
    from transformers import get_inverse_sqrt_schedule as theirs

    flat = STEPS // 20
    fall = stepped(lambda opt: theirs(opt, 0, timescale=flat), STEPS - flat)
    return fall, ours("inverse-sqrt")[flat:]


@beside("rise-and-fall", inputs="400 steps: theirs one step later in the rise, as it is in the fall", **HF)
def rise_and_fall(draw: Draw) -> tuple[Tensor, Tensor]:
    from transformers import get_linear_schedule_with_warmup as theirs

    rise = STEPS // 20
    rates = stepped(lambda opt: theirs(opt, rise, STEPS), STEPS)
    return torch.cat([rates[1 : rise + 1], rates[rise:]]), ours("rise-and-fall")


@beside("budgeted-decay", inputs="a budget of 400 seconds, one a step, without warm-up", **HF)
def budgeted_decay(draw: Draw) -> tuple[Tensor, Tensor]:
    """The recipe's schedule, and the same by the clock."""
    from transformers import get_linear_schedule_with_warmup as theirs

    now = [0.0]

    def timed(optimizer: Optimizer) -> Any:
        made = TimeBudgetLR(optimizer, profile("linear"), float(STEPS), clock=lambda: now[0])
        step = made.step

        def later() -> None:
            now[0] += 1.0
            step()

        made.step = later  # type: ignore[method-assign, assignment]
        return made

    rates = stepped(lambda opt: theirs(opt, 0, STEPS), STEPS)
    return torch.cat([rates, rates]), torch.cat([ours("linear"), stepped(timed, STEPS)])


@beside("polynomial", **TORCH)
def polynomial(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.optim.lr_scheduler import PolynomialLR

    return stepped(lambda opt: PolynomialLR(opt, STEPS, power=2.0), STEPS), ours("polynomial")


@beside("step", **TORCH)
def step(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.optim.lr_scheduler import MultiStepLR

    return stepped(lambda opt: MultiStepLR(opt, [STEPS // 2, STEPS * 3 // 4]), STEPS), ours("step")


@beside("exponential", **TORCH)
def exponential(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.optim.lr_scheduler import ExponentialLR

    return stepped(lambda opt: ExponentialLR(opt, 0.01 ** (1 / STEPS)), STEPS), ours("exponential")


@beside("delayed-linear", **TORCH)
def delayed_linear(draw: Draw) -> tuple[Tensor, Tensor]:
    from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

    half = STEPS // 2

    def theirs(opt: Optimizer) -> Any:
        parts = [ConstantLR(opt, 1.0, half), LinearLR(opt, 1.0, 0.0, half)]
        return SequentialLR(opt, parts, [half])

    return stepped(theirs, STEPS), ours("delayed-linear")


@beside(
    "rex", peer="pytorch_optimizer", inputs=f"{WHOLE}, the first left out: theirs starts at zero", **RATES
)
def rex(draw: Draw) -> tuple[Tensor, Tensor]:
    from pytorch_optimizer.lr_scheduler.rex import REXScheduler

    later = stepped(lambda opt: REXScheduler(opt, STEPS, max_lr=PEAK, min_lr=0.0), STEPS)[1:]
    return later, ours("rex")[1:]


@beside(
    "power",
    **source("IBM/dolomite-engine"),
    inputs="two peaks, 400 steps of 32 sequences and 8192 tokens, 40 of them warm-up, before the decay",
    **(RATES | {"kind": AUTHORS}),
)
def power(draw: Draw) -> tuple[Tensor, Tensor]:
    """A peak that the law reaches and one that it never does. They leave the last decay to another run."""
    from torch.optim.lr_scheduler import LambdaLR

    names = ("_linear", "_power", "_LRScheduler", "PowerScheduler")
    found = taken(
        "IBM/dolomite-engine",
        "lm_engine/optimization/scheduler.py",
        *names,
        math=math,
        LambdaLR=LambdaLR,
        Optimizer=Optimizer,
    )
    batch, tokens, a, b = 32, 8192.0, 1.79, -0.7
    pairs = []
    for peak in (0.004, 0.5):
        make = partial(
            found["PowerScheduler"],
            num_warmup_steps=WARM + 1,
            num_constant_steps=0,
            num_decay_steps=0,
            num_training_steps=STEPS,
            lr_decay_factor=1.0,
            a=batch * a,
            b=b,
            c=tokens,
        )
        options: dict[str, Any] = dict(batch=batch, tokens=tokens, a=a, b=b, decay=0.0)
        pairs.append(
            (stepped(make, STEPS + 1, peak)[1:], ours("power", WARM / STEPS, peak=peak, **options)),
        )
    return torch.cat([theirs for theirs, _ in pairs]), torch.cat([mine for _, mine in pairs])


@beside(
    "infinite",
    **source("jdinalt/forgather"),
    inputs=f"{WARMED}, up to the annealing (theirs is not the paper's)",
    **RATES,
)
def infinite(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded(
        "jdinalt/forgather", "src/forgather/ml/optim/infinite_lr_scheduler.py"
    ).InfiniteLRScheduler
    cool = round(0.3 * (STEPS - WARM))
    make = lambda opt: theirs(opt, WARM + 1, cool, constant_lr=0.3 * PEAK)  # noqa: E731
    until = STEPS - round(0.15 * (STEPS - WARM))
    return stepped(make, until + 1)[1:], ours("infinite", WARM / STEPS)[:until]


@beside(
    "infinite",
    peer="Singh et al. 2025, the exponential annealing",
    kind=FP64,
    compared="the learning rates of the annealing",
    inputs="400 steps: the logarithm of the rate falls evenly from 0.3 to 0.01 of the peak",
    tolerance=1e-12,
)
def annealed(draw: Draw) -> tuple[Tensor, Tensor]:
    steps = np.arange(340, STEPS)
    logs = np.interp(steps, [340, STEPS], [math.log(0.3 * PEAK), math.log(0.01 * PEAK)])
    return torch.from_numpy(np.exp(logs)), ours("infinite")[340:]


@beside(
    "uba",
    peer="Tang et al. 2025, the odds of a rate",
    kind=FP64,
    compared="the learning rate of every step but the first",
    inputs="400 steps at phi 0.5, 2 and 5: eta / (peak - eta) = 2 / phi cot(pi p / 2)^2",
    tolerance=1e-12,
)
def uba(draw: Draw) -> tuple[Tensor, Tensor]:
    """cot(x/2)^2 = (1 + cos x) / (1 - cos x): the schedule's odds are those of the cosine times 2 / phi."""
    odds = 1 / np.tan(np.pi * np.arange(1, STEPS) / STEPS / 2) ** 2
    derived = [PEAK * (2 / phi * odds) / (1 + 2 / phi * odds) for phi in (0.5, 2.0, 5.0)]
    mine = [ours("uba", phi=phi)[1:] for phi in (0.5, 2.0, 5.0)]
    return torch.from_numpy(np.concatenate(derived)), torch.cat(mine)


@beside(
    "one-cycle",
    peer="Smith & Topin 2019, two half cosines",
    kind=FP64,
    compared="the learning rate of every step",
    inputs="400 steps, 0.3 of them rising",
    tolerance=1e-12,
)
def one_cycle(draw: Draw) -> tuple[Tensor, Tensor]:
    """Torch counts a last step more, and ends the rise at pct_start times the steps less one."""
    t, turn, end = np.arange(STEPS), 0.3 * (STEPS + 1) - 1, STEPS
    first, last = PEAK / 25, PEAK / 25 / 1e4
    rise = first + (PEAK - first) * np.sin(np.pi / 2 * t / turn) ** 2
    fall = last + (PEAK - last) * np.cos(np.pi / 2 * (t - turn) / (end - turn)) ** 2
    return torch.from_numpy(np.where(t <= turn, rise, fall)), ours("one-cycle", cycle_momentum=False)


@beside(
    "reference-time",
    peer="Kaddour et al. 2023, the clock of a reference machine read step by step",
    kind=FP64,
    compared="the reference time of each optimizer's run, and the rates of a cosine by that clock",
    inputs="AdamW, Lion and Sophia at 2, 1.6 and 3.2 seconds a step, 512 steps of the first; 100 uneven ones",
    tolerance=1e-9,
)
def reference_time(draw: Draw) -> tuple[Tensor, Tensor]:
    """What `optimizer-comparison` would train each for at equal time, stopped before it does."""
    from workbench.training.studies.optimizer_comparison import OptimizerComparison

    seconds = [2.0, 1.6, 3.2]
    study = OptimizerComparison(optimizers=["adamw", "lion", "sophia"], equal="time", examples=512 * 32)
    asked: list[dict[str, Any]] = []

    def stopped(*given: Any) -> Any:
        asked.extend(given[3])
        raise StopIteration

    with (
        patch.object(OptimizerComparison, "kept_seconds", lambda *given: seconds),
        patch.object(OptimizerComparison, "protocol", stopped),
        contextlib.suppress(StopIteration),
    ):
        study._run(None, None)  # type: ignore[arg-type]
    spent = [
        one.get("examples", study.examples) / study.batch_size * s
        for one, s in zip(asked, seconds, strict=True)
    ]
    took = draw.normal(100, dtype=torch.float64).abs().numpy()
    ends = np.concatenate([[0.0], np.cumsum(took)])
    now = [0.0]
    made = TimeBudgetLR(
        SGD([torch.zeros(1, requires_grad=True)], lr=PEAK), profile("cosine"), ends[-1], clock=lambda: now[0]
    )
    rates = []
    for step in took:
        rates.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        now[0] += step
        made.step()
    theirs = [*[math.fsum([2.0] * 512)] * 3, *(PEAK * np.cos(np.pi / 2 * ends[:-1] / ends[-1]) ** 2)]
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor([*spent, *rates], dtype=torch.float64)
