"""Batch sizes: norms over parts of a batch, gradient noise, growth and accumulation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench
from tests.identity.pairs import Draw, beside
from tests.identity.repositories import part_of, source
from tests.identity.scripts import Torch, loaded, taken
from tests.identity.training.layer_optimizers import network
from workbench.storage.identity import AUTHORS, FP64, PEER
from workbench.subjects import Subject
from workbench.training.batch.batch_size import NormTest, gradient_variance, log_slope, noise_scale
from workbench.training.data_order import take
from workbench.training.loop import fit
from workbench.training.losses import TRAINING_LOSS
from workbench.training.models.model_change import MODEL_CHANGE

PLAIN: dict[str, Any] = dict(schedule="constant", warmup=0.0, clip=None, weight_decay=0.0)


def on_bench(model: nn.Module, inputs: Tensor, labels: Tensor, **options: Any) -> Subject:
    columns = {"inputs": inputs, "labels": labels}
    splits = dict.fromkeys(("train", "calibration", "validation", "test"), columns)
    return workbench.subject(model, data=splits, loss="cross_entropy", **options)


@beside(
    "ghost-batch-norm",
    peer="pytorch-tabnet",
    kind=PEER,
    compared="the output in training, and the running statistics",
    inputs="a batch of 96 x 12 normal numbers, ghosts of 32, a batch norm of normal scale and shift, fp64",
    tolerance=1e-12,
)
def ghost_batch_norm(draw: Draw) -> tuple[Tensor, Tensor]:
    from pytorch_tabnet.tab_network import GBN

    x = draw.normal(96, 12, dtype=torch.float64) * 3 + 1
    norm = nn.BatchNorm1d(12).double()
    norm.weight.data, norm.bias.data = (draw.normal(12, dtype=torch.float64) for _ in range(2))
    peer = GBN(12, virtual_batch_size=32, momentum=norm.momentum).double()
    peer.bn.load_state_dict(norm.state_dict())
    model = nn.Sequential(nn.Identity(), norm)
    on = on_bench(model, x, torch.zeros(96, dtype=torch.int64))
    ours = MODEL_CHANGE.chosen("ghost-batch-norm", "model_change")(on).model.train()
    sides = [peer.train()(x), peer.bn.running_mean, peer.bn.running_var]
    mine = [ours(x), ours[1].running_mean, ours[1].running_var]
    return torch.cat([t.flatten() for t in sides]), torch.cat([t.flatten() for t in mine])


def standardised(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs, the product's output of a layer with the change)."""
    layer = nn.Linear(32, 64, bias=False).double()
    weight = draw.normal(64, 32, dtype=torch.float64)
    layer.weight.data = weight.clone()
    x = draw.normal(10, 32, dtype=torch.float64)
    on = on_bench(nn.Sequential(nn.Identity(), layer), x, torch.zeros(10, dtype=torch.int64))
    made = MODEL_CHANGE.chosen("weight-standardization", "model_change", layers="*")(on)
    return weight, x, made.model(x)


@beside(
    "weight-standardization",
    peer="timm",
    kind=PEER,
    compared="the output of a layer, eps 1e-10",
    inputs="a 64 x 32 normal matrix as a convolution of one pixel, 10 normal inputs, fp64",
    tolerance=1e-12,
)
def weight_standardization(draw: Draw) -> tuple[Tensor, Tensor]:
    """Its package imports torchvision, so its `__init__` is passed by."""
    theirs = part_of("timm", "timm.layers.std_conv", ("timm", "timm.layers")).StdConv2d
    weight, x, ours = standardised(draw)
    conv = theirs(32, 64, 1, eps=1e-10).double()
    conv.weight.data = weight[:, :, None, None].clone()
    return conv(x[:, :, None, None])[:, :, 0, 0], ours


@beside(
    "weight-standardization",
    **source("joe-siyuan-qiao/pytorch-classification"),
    kind=AUTHORS,
    compared="the output of a layer",
    inputs="a 64 x 32 normal matrix as a convolution of one pixel, 10 normal inputs, fp64",
    tolerance=1e-12,
    finding="theirs divides by n - 1 and adds 1e-5 to the deviation; ours is the paper's equation 8, as "
    "timm's is; sqrt(n / (n - 1)) apart, which a scale after the layer takes up",
)
def standardised_by_authors(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("joe-siyuan-qiao/pytorch-classification", "models/layers.py").Conv2d
    weight, x, ours = standardised(draw)
    conv = theirs(32, 64, 1, bias=False).double()
    conv.weight.data = weight[:, :, None, None].clone()
    return conv(x[:, :, None, None])[:, :, 0, 0], ours


@beside(
    "noise-scale",
    **source("EleutherAI/gpt-neox"),
    kind=PEER,
    compared="tr(Sigma), |G|^2 and their ratio (theirs averaged over which gradient is its small batch)",
    inputs="8 gradients of 200 normal numbers about a common one, batches of 16 examples, fp64",
    tolerance=1e-9,
)
def gradient_noise(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs takes |G_small|^2 of one of the batches, ours the mean of all."""
    module = loaded("EleutherAI/gpt-neox", "megatron/gradient_noise_scale/gradient_noise_scale.py")
    module.torch = Torch(float=torch.float64)  # type: ignore[attr-defined]
    mean = draw.normal(200, dtype=torch.float64)
    rows = mean + 2 * draw.normal(8, 200, dtype=torch.float64)
    sides = []
    for last in range(8):
        model = SimpleNamespace(stored_gradients=None)
        settings = SimpleNamespace(is_pipe_parallel=False)
        meter = module.GradientNoiseScale(model, 16, n_batches=8, beta=0.0, neox_args=settings)
        for row in rows.roll(last, 0):
            model.stored_gradients = [row]
            meter._update()
        sides.append(torch.cat([meter.ema_scale.view(1), meter.ema_noise.view(1)]))
    trace, square = torch.stack(sides).mean(0)
    found = noise_scale((rows @ rows.T).numpy(), 16)
    ours = torch.tensor([found.trace, found.square_norm, found.simple], dtype=torch.float64)
    return torch.stack([trace, square, trace / square]), ours


@beside(
    "adadagrad",
    **source("timlautk/AdAdaGrad"),
    kind=AUTHORS,
    compared="variance and squared norm of the gradient, and the next batch size",
    inputs="batches of 8 and 32 examples, a 6-8-3 network with cross-entropy, eta 0.1, 0.3 and 1, fp64",
    tolerance=1e-9,
)
def norm_test(draw: Draw) -> tuple[Tensor, Tensor]:
    names = ("compute_loss", "compute_per_sample_gradients", "var_sample_grad", "norm_test")
    peer = taken("timlautk/AdAdaGrad", "tests.py", *names, torch=torch, F=F, math=math)
    model = network(draw, 6, 8, 3)
    x, y = draw.normal(32, 6, dtype=torch.float64), draw.normal(32, 3).argmax(1)
    on = on_bench(model, x, y)
    theirs, ours = [], []
    for size in (8, 32):
        batch = {"inputs": x[:size], "labels": y[:size]}
        rows = peer["compute_per_sample_gradients"](model, x[:size], y[:size])
        on.model.zero_grad()
        on.loss(batch).backward()
        flat = torch.cat([r.flatten(1) for r in rows.values()], 1)
        for eta in (0.1, 0.3, 1.0):
            theirs += list(peer["norm_test"](rows, eta))
            run = SimpleNamespace(
                subject=on,
                step=0,
                batch_size=size,
                chosen=range(size),
                batch=lambda limit, batch=batch: batch,
            )
            NormTest(eta=eta, largest=10**6)(run)  # type: ignore[arg-type]
            ours += [run.batch_size, *map(float, gradient_variance(flat))]
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@beside(
    "large-batch-accumulation",
    peer="the gradient of the whole batch in closed form",
    kind=FP64,
    compared="the weights",
    inputs="5 steps of momentum, 16 sequences of 6 tokens in micro-batches of 3, a fifth of them no target",
    tolerance=1e-12,
)
def accumulation(draw: Draw) -> tuple[Tensor, Tensor]:
    """A micro-batch counts by its targets, not by its sequences."""
    start = draw.normal(4, 5, dtype=torch.float64)
    x, y = draw.normal(48, 6, 5, dtype=torch.float64), draw.normal(48, 6, 4).argmax(-1)
    y[draw.normal(48, 6) > 0.84] = -100
    w, moment = start.numpy().copy(), np.zeros((4, 5))
    for step in range(5):
        rows = take(48, 0, 16 * step, 16)
        inputs, labels = x[rows].numpy().reshape(-1, 5), y[rows].numpy().ravel()
        error = softmax(inputs @ w.T) - np.eye(4)[labels.clip(0)]
        moment = 0.9 * moment + error[labels >= 0].T @ inputs[labels >= 0] / (labels >= 0).sum()
        w -= 0.1 * moment
    layer = nn.Linear(5, 4, bias=False).double()
    layer.weight.data = start.clone()
    on = on_bench(
        nn.Sequential(layer), x, y, class_axis=2, items=lambda batch: int((batch["labels"] >= 0).sum())
    )
    fit(on, steps=5, batch_size=16, micro_batch=3, optimizer="sgd", learning_rate=0.1, **PLAIN)
    return torch.from_numpy(w), layer.weight


@beside(
    "large-batch-accumulation",
    peer="accelerate",
    kind=PEER,
    compared="the weights",
    inputs="5 steps of momentum on a 6-8-3 network, 16 examples in micro-batches of 4, fp64",
    tolerance=1e-12,
)
def accumulated(draw: Draw) -> tuple[Tensor, Tensor]:
    from accelerate import Accelerator

    model = network(draw, 6, 8, 3)
    x, y = draw.normal(48, 6, dtype=torch.float64), draw.normal(48, 3).argmax(1)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    peer, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for position in range(0, 80, 4):
        rows = take(48, 0, position, 4)
        with accelerator.accumulate(peer):
            accelerator.backward(F.cross_entropy(peer(x[rows]), y[rows]))
            optimizer.step()
            optimizer.zero_grad()
    theirs = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    model.load_state_dict(start)
    fit(
        on_bench(model, x, y),
        steps=5,
        batch_size=16,
        micro_batch=4,
        optimizer="sgd",
        learning_rate=0.1,
        **PLAIN,
    )
    return theirs, torch.cat([p.detach().flatten() for p in model.parameters()])


@beside(
    "concurrent-adversary",
    peer="Liu et al. 2022, the gradients of a softmax regression in closed form",
    kind=FP64,
    compared="the weights, adversaries by sign and by length, of weights none, one and two steps old",
    inputs="6 steps of momentum, batches of 10 of 50 examples of 8 normal numbers, epsilon 0.05",
    tolerance=1e-12,
)
def concurrent_adversary(draw: Draw) -> tuple[Tensor, Tensor]:
    x, y = draw.normal(50, 8, dtype=torch.float64), draw.normal(50, 3).argmax(1)
    start = draw.normal(3, 8, dtype=torch.float64)
    theirs, ours = [], []
    for norm in ("sign", "l2"):
        for delay in (0, 1, 2):
            past, moment = [start.numpy()], np.zeros((3, 8))
            for step in range(6):
                w, old = past[-1], past[max(0, step - delay)]
                rows = take(50, 0, 10 * step, 10)
                inputs, target = x[rows].numpy(), np.eye(3)[y[rows].numpy()]
                uphill = (softmax(inputs @ old.T) - target) @ old
                length = np.linalg.norm(uphill, axis=1, keepdims=True)
                away = inputs + 0.05 * (np.sign(uphill) if norm == "sign" else uphill / length)
                slopes = [(softmax(at @ w.T) - target).T @ at / 10 for at in (inputs, away)]
                moment = 0.9 * moment + (slopes[0] + slopes[1]) / 2
                past.append(w - 0.1 * moment)
            theirs.append(torch.from_numpy(past[-1]))
            layer = nn.Linear(8, 3, bias=False).double()
            layer.weight.data = start.clone()
            on = on_bench(nn.Sequential(layer), x, y)
            loss = TRAINING_LOSS.chosen("concurrent-adversary", "loss", delay=delay, norm=norm)
            fit(on, steps=6, batch_size=10, loss=loss(on), optimizer="sgd", learning_rate=0.1, **PLAIN)
            ours.append(layer.weight.detach())
    return torch.stack(theirs), torch.stack(ours)


@beside(
    "sqrt-rule",
    peer="numpy",
    kind=PEER,
    compared="the exponent of the best rate over batch sizes, and its standard error",
    inputs="batches 8 to 128, rates 0.003 sqrt(B) times normal noise of 0.1 in the logarithm",
    tolerance=1e-9,
)
def sqrt_rule(draw: Draw) -> tuple[Tensor, Tensor]:
    from scipy import stats

    batches = np.array([8.0, 16.0, 32.0, 64.0, 128.0])
    rates = 0.003 * batches**0.5 * np.exp(0.1 * draw.normal(5, dtype=torch.float64).numpy())
    line, spread = np.polyfit(np.log(batches), np.log(rates), 1, cov=True)
    found = log_slope(batches, rates, 0.9)
    error = (found["high"] - found["slope"]) / stats.t.ppf(0.95, 3)
    theirs = [line[0], line[1], spread[0, 0] ** 0.5]
    ours = [found["slope"], found["intercept"], error]
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)


@beside(
    "step-law",
    **source("step-law/steplaw"),
    kind=AUTHORS,
    compared="the exponents and the logarithms of the constants of both laws",
    inputs="4 sizes at 4 numbers of tokens, 5 % of normal noise about the published law",
    tolerance=1e-6,
)
def step_law(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their regression in logarithms, the batch on tokens alone as in their equation 1."""
    import pandas as pd
    from sklearn.linear_model import LinearRegression

    from workbench.scaling.hyperparameters import fit_step_law
    from workbench.scaling.hyperparameters import step_law as published

    sizes, tokens = np.geomspace(6e7, 1e9, 4), np.geomspace(2e9, 1e11, 4)
    noise = 0.05 * draw.normal(16, 2, dtype=torch.float64).numpy()
    grid = [(n, d) for n in sizes for d in tokens]
    table = pd.DataFrame(
        [(n, d, *np.array(published(n, d)) * np.exp(e)) for (n, d), e in zip(grid, noise, strict=True)],
        columns=["params", "tokens", "learning_rate", "batch_tokens"],
    )
    logs = pd.DataFrame(np.log(table.to_numpy()), columns=["logN", "logD", "loglr", "logbs"])
    given = dict(pd=pd, List=list, LinearRegression=LinearRegression)
    regress = taken("step-law/steplaw", "code/fit_tool.py", "fit_models", **given)["fit_models"]
    rate, batch = regress(logs, ["logN", "logD"], "loglr", ["logD"], "logbs")
    laws = fit_step_law(table.assign(loss=1.0))
    lr, size = laws["learning_rate"].params, laws["batch_tokens"].params
    theirs = [rate.intercept_, *rate.coef_, batch.intercept_, *batch.coef_]
    ours = [math.log(lr["c"]), -lr["x"], lr["y"], math.log(size["c"]), size["y"]]
    return torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)
