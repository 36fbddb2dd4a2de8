"""Roundings that are trained, beside their equations written a second time: closed-form gradients in place of
autograd, whole numbers in place of grids, dense matrices in place of fast transforms.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.quantized_training import joined, leaf, told
from workbench.storage.identity import FP64

DERIVED = dict(kind=FP64, tolerance=1e-9)
WEIGHTS = "24 x 32 normal weights, normal upstream gradients, fp64"


def drawn(draw: Draw) -> tuple[Tensor, Tensor]:
    """Weights (24, 32) and the gradient of a loss by what they are rounded to."""
    return draw.normal(24, 32, dtype=torch.float64), draw.normal(24, 32, dtype=torch.float64)


def half_to_even(numbers: np.ndarray) -> np.ndarray:
    """The nearest whole numbers by floor and remainder."""
    below = np.floor(numbers)
    rest = numbers - below
    up = (rest > 0.5) | ((rest == 0.5) & (below % 2 == 1))
    return below + up


def in_16_bits(numbers: np.ndarray) -> np.ndarray:
    """What 16 bits hold of numbers in 32."""
    return numbers.astype(np.float32).astype(np.float16).astype(np.float64)


@beside(
    "l4q",
    peer="Jeon et al. 2024, L4Q",
    compared="the rounded sum of weights and low-rank term, and the gradients of the term and of the steps",
    inputs=f"{WEIGHTS}, rank 8, 3 bits, a step a row",
    **DERIVED,
)
def l4q(draw: Draw) -> tuple[Tensor, Tensor]:
    """dA = (G o inside) B^T, dB = A^T (G o inside), ds = sum G (q - inside u) / sqrt(n q_max)."""
    from workbench.quantization.trained.trained_rounding import StepOfLowRank
    from workbench.subjects import Layer, LowRank

    weight, upstream = drawn(draw)
    up, down = draw.normal(24, 8, dtype=torch.float64) / 4, draw.normal(8, 32, dtype=torch.float64) / 4
    module = torch.nn.Linear(32, 24, bias=False, dtype=torch.float64)
    module.weight.data = weight.clone()
    layer, settings = Layer("linear", module), told(bits=3, rank=8)
    StepOfLowRank.before([layer], settings, draw.generator)
    ours = StepOfLowRank.begin(layer.weight.detach(), 32, settings)
    layer.attach(ours)
    term = next(change for change in layer.changes if isinstance(change, LowRank))
    term.up.data, term.down.data = up.clone(), down.clone()
    found = layer.weight
    found.backward(upstream)

    steps = 2 * np.abs(weight.numpy()).mean(1, keepdims=True) / math.sqrt(3)
    units = (weight.numpy() + up.numpy() @ down.numpy()) / steps
    inside = (units >= -4) & (units <= 3)
    whole = half_to_even(np.clip(units, -4, 3))
    passed = upstream.numpy() * inside
    by_step = (upstream.numpy() * (whole - inside * units)).sum(1) / math.sqrt(32 * 3)
    theirs = (whole * steps, passed @ down.numpy().T, up.numpy().T @ passed, by_step)
    return (
        joined(*map(torch.from_numpy, theirs)),
        joined(found, term.up.grad, term.down.grad, ours.step.grad),
    )


@beside(
    "double-rounding",
    peer="Huang et al. 2025, double rounding",
    compared="the weights at 8, 6, 4 and 2 bits of one stored integer, with LSQ's gradients of weights and "
    "steps",
    inputs=f"{WEIGHTS}, a step a row",
    **DERIVED,
)
def double_rounding(draw: Draw) -> tuple[Tensor, Tensor]:
    """The wide integer is divided by a power of two with whole-number arithmetic."""
    from workbench.quantization.trained.double_rounding import DoubleRounding

    weight, upstream = drawn(draw)
    ours = DoubleRounding.begin(weight, 32, told(widths=[8, 6, 4, 2]))
    steps = in_16_bits(np.abs(weight.numpy()).max(1, keepdims=True) / 127)
    stored = np.clip(half_to_even(weight.numpy() / steps), -127, 127).astype(int)
    theirs: list[Tensor] = []
    found: list[Tensor | None] = []
    for width in (8, 6, 4, 2):
        ours.drawn, top, parts = width, 2 ** (width - 1) - 1, 2 ** (8 - width)
        quotient, rest = np.divmod(stored, parts)
        up = (2 * rest > parts) | ((2 * rest == parts) & (quotient % 2 == 1) & (parts > 1))
        whole, wide = np.clip(quotient + up, -top, top), steps * parts
        units = weight.numpy() / wide
        inside = np.abs(units) <= top
        by_log = (upstream.numpy() * (whole - inside * units)).sum(1) * steps[:, 0] / math.sqrt(32 * top)
        theirs += map(torch.from_numpy, (whole * wide, upstream.numpy() * inside, by_log))
        second = leaf(weight)
        ours.log_step.grad = None
        values = ours(second)
        values.backward(upstream)
        found += [values, second.grad, ours.log_step.grad]
    return joined(*theirs), joined(*found)


@beside(
    "double-rounding",
    peer="Huang et al. 2025, double rounding",
    compared="the weights of a stored 8-bit model read at 6, 4 and 2 bits",
    inputs="24 x 32 normal weights on an int8 grid, a scale a row",
    **DERIVED,
)
def read_narrower(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.quantization.number.fake_quant import FakeQuant
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import fit
    from workbench.quantization.trained.double_rounding import at_width
    from workbench.subjects import Subject
    from workbench.subjects.tasks import ModuleRegression

    weight = draw.normal(24, 32)
    module = torch.nn.Linear(32, 24, bias=False)
    grid = fit(weight, named("int8-odd"), "channel")
    module.weight.data = grid.round(weight)
    split = {"inputs": torch.zeros(1, 32), "labels": torch.zeros(1, 24)}
    on = Subject("one", torch.nn.Sequential(module), ModuleRegression(), {"train": split, "test": split})
    on.layers("*")[0].attach(FakeQuant.of(grid))
    steps = in_16_bits(np.abs(weight.numpy()).max(1, keepdims=True) / 127)
    stored = half_to_even(weight.double().numpy() / steps).astype(int)
    theirs, found = [], []
    for width in (6, 4, 2):
        top, parts = 2 ** (width - 1) - 1, 2 ** (8 - width)
        quotient, rest = np.divmod(stored, parts)
        up = (2 * rest > parts) | ((2 * rest == parts) & (quotient % 2 == 1))
        theirs.append(torch.from_numpy(np.clip(quotient + up, -top, top) * steps * parts))
        found.append(at_width(on, width, layers="*").layers("*")[0].weight)
    return joined(*theirs), joined(*found)


@beside(
    "qfx",
    peer="Dai et al. 2024, QFX",
    compared="the binary point of least squared error, the weights, the gradients of weights and point",
    inputs=f"{WEIGHTS}, words of 4 bits",
    **DERIVED,
)
def fixed_point(draw: Draw) -> tuple[Tensor, Tensor]:
    """d/df 2^-f q = -ln 2 (q - inside u) 2^-f."""
    from workbench.quantization.trained.fixed_point import LearnedPoint

    weight, upstream = drawn(draw)
    w, g = weight.numpy(), upstream.numpy()

    def rounded(point: int) -> np.ndarray:
        return np.clip(half_to_even(w * 2.0**point), -8, 7) / 2.0**point

    point = min(range(25), key=lambda f: float(np.square(rounded(f) - w).sum()))
    units = w * 2.0**point
    inside = (units >= -8) & (units <= 7)
    slope = -math.log(2) * (g * (rounded(point) * 2.0**point - inside * units)).sum() / 2.0**point
    ours = LearnedPoint.begin(weight, 32, told(bits=4, nonzero_bits=0)).double()
    second = leaf(weight)
    values = ours(second)
    values.backward(upstream)
    theirs = (np.array([point]), rounded(point), g * inside, np.array([slope]))
    return (
        joined(*map(torch.from_numpy, theirs)),
        joined(torch.tensor([float(ours.fraction)]), values, second.grad, ours.place.grad),
    )


@beside(
    "fliqs",
    peer="Dotzel et al. 2024, FLIQS",
    compared="the policies' gradient after a step, and the new baseline",
    inputs="two layers of 768 and 256 weights, four formats, a quarter of the way, fp64",
    **DERIVED,
)
def fliqs(draw: Draw) -> tuple[Tensor, Tensor]:
    """REINFORCE by hand: -(r - b) (1 - pi) - c / 2 dH/dz, dH/dz = -pi (log pi + H)."""
    from workbench.quantization.trained.chosen_widths import FormatPolicy
    from workbench.quantization.trained.trained_rounding import Course

    formats, bits, sizes, loss, before = ["int2", "int3", "int4", "int8"], (2, 3, 4, 8), (768, 256), 0.7, -1.1
    logits = draw.normal(2, 4, dtype=torch.float64)
    ours = [FormatPolicy(row.clone(), formats=formats, group=32) for row in logits]
    ours[0].drawn, ours[1].drawn = 1, 3
    settings = told(budget=3.0, strength=1.0, formats=formats)
    course = Course(settings, draw.generator, done=0.25, kept={"baseline": before})
    extra = FormatPolicy.extra(ours, sizes, torch.tensor(loss, dtype=torch.float64), course)
    assert extra is not None
    extra.backward()
    average = (bits[1] * sizes[0] + bits[3] * sizes[1]) / sum(sizes)
    reward = -loss - abs(average / 3 - 1)
    theirs = []
    for row, pick in zip(logits.numpy(), (1, 3), strict=True):
        chance = np.exp(row) / np.exp(row).sum()
        entropy = -(chance * np.log(chance)).sum()
        by_entropy = -chance * (np.log(chance) + entropy)
        theirs.append(-(reward - before) * (np.eye(4)[pick] - chance))
        theirs[-1] -= 0.05 * math.cos(math.pi / 4) / 2 * by_entropy
    theirs.append(np.array([0.9 * before + 0.1 * reward]))
    kept = torch.tensor([course.kept["baseline"]], dtype=torch.float64)
    return joined(*map(torch.from_numpy, theirs)), joined(ours[0].logits.grad, ours[1].logits.grad, kept)


@beside(
    "csq",
    peer="Xiao et al. 2023, CSQ",
    compared="the weights of soft bit planes, and the gradients of planes, gates and steps",
    inputs=f"{WEIGHTS}, seven planes, gates of sharpness 4, a step a row",
    **DERIVED,
)
def csq(draw: Draw) -> tuple[Tensor, Tensor]:
    """w = s sum_b (f(p_b) - f(q_b)) f(m_b) 2^b, f' = beta f (1 - f)."""
    from workbench.quantization.trained.chosen_widths import BitPlanes

    weight, upstream = drawn(draw)
    ours = BitPlanes.begin(weight, 32, told(budget=3.0, strength=1.0)).double()
    for parameter in (ours.positive, ours.negative, ours.keep):
        parameter.data = parameter.data + draw.normal(*parameter.shape, dtype=torch.float64) / 4
    values = ours(leaf(weight))
    values.backward(upstream)
    beta, powers = 4.0, 2.0 ** np.arange(7)
    p, q, m = (
        1 / (1 + np.exp(-beta * t.detach().numpy())) for t in (ours.positive, ours.negative, ours.keep)
    )
    steps, g = np.exp(ours.log_step.detach().numpy()), upstream.numpy()
    planes = (p - q) * powers[:, None, None]
    found = np.einsum("b,boi->oi", m, planes) * steps
    by_plane = g * steps * (m * powers)[:, None, None]
    theirs = (
        found,
        by_plane * beta * p * (1 - p),
        -by_plane * beta * q * (1 - q),
        np.einsum("oi,boi->b", g * steps, planes) * beta * m * (1 - m),
        (g * found).sum(1),
    )
    gradients = (ours.positive.grad, ours.negative.grad, ours.keep.grad, ours.log_step.grad)
    return joined(*map(torch.from_numpy, theirs)), joined(values, *gradients)


@beside(
    "nipq",
    peer="Shin et al. 2023, NIPQ",
    compared="the noisy weights, and the gradients of weights, bounds and width",
    inputs=f"{WEIGHTS}, a bound a row, 4.2 bits, the same noise",
    **DERIVED,
)
def nipq_noise(draw: Draw) -> tuple[Tensor, Tensor]:
    """D = a / (2^(b-1) - 1): dD/da = D / a, dD/db = -D ln 2 2^(b-1) / (2^(b-1) - 1)."""
    from workbench.quantization.trained.chosen_widths import PseudoNoise

    weight, upstream = drawn(draw)
    bound = weight.abs().amax(1, keepdim=True) * 0.6
    share = torch.tensor(2.2 / 6, dtype=torch.float64)
    ours, second = PseudoNoise(bound.log(), torch.logit(share), group=32), leaf(weight)
    ours.drawn = 11
    values = ours(second)
    values.backward(upstream)
    generator = torch.Generator().manual_seed(11)
    noise = torch.rand(24, 32, generator=generator).numpy().astype(np.float64) - 0.5
    w, g, a = weight.numpy(), upstream.numpy(), bound.numpy()
    wide = 2.0**3.2
    step = a / (wide - 1)
    outside = np.where(np.abs(w) > a, np.sign(w), 0)
    by_bound = (g * (outside + noise * step / a)).sum(1) * a[:, 0]
    by_width = (g * noise * -step * math.log(2) * wide / (wide - 1)).sum()
    by_place = by_width * 6 * float(share * (1 - share))
    theirs = (np.clip(w, -a, a) + step * noise, g * (outside == 0), by_bound, np.array([by_place]))
    return (
        joined(*map(torch.from_numpy, theirs)),
        joined(values, second.grad, ours.log_bound.grad, ours.place.grad),
    )


@beside(
    "halo",
    "rounded",
    peer="Ashkboos et al. 2025, HALO",
    compared="the product of a layer and both its gradients at levels 0, 1 and 2",
    inputs="20 x 64 normal inputs with one of forty times their size, 48 x 64 normal weights, int8, fp64",
    **DERIVED,
)
def halo(draw: Draw) -> tuple[Tensor, Tensor]:
    """Dense Hadamard matrices; tokens are filled up to 32 with zeros, 48 rows are never rotated."""
    from workbench.quantization.number.formats import named
    from workbench.training.quantized_products import QuantizedLinear

    inputs = draw.normal(20, 64, dtype=torch.float64)
    inputs[3, 5] = 40
    weight, upstream = draw.normal(48, 64, dtype=torch.float64), draw.normal(20, 48, dtype=torch.float64)
    x, w, e = inputs.numpy(), weight.numpy(), upstream.numpy()
    features, tokens = hadamard(64) / 8, hadamard(32) / math.sqrt(32)

    def rounded(numbers: np.ndarray) -> np.ndarray:
        step = np.abs(numbers).max() / 127
        return half_to_even(numbers / step) * step

    turned = np.zeros((32, 48))
    turned[:20] = e
    turned = tokens.T @ (rounded(tokens @ turned) @ rounded(w))
    plain = rounded(e) @ rounded(w)
    theirs, found = [], []
    for level in (0, 1, 2):
        way = features if level else np.eye(64)
        theirs.append(rounded(x @ way) @ rounded(w @ way).T)
        theirs.append(turned[:20] if level == 2 else plain)
        theirs.append(rounded(e).T @ rounded(x))
        first, second = leaf(inputs), leaf(weight)
        product = QuantizedLinear.apply(first, second, named("int8"), level)
        product.backward(upstream)
        found += [product, first.grad, second.grad]
    return joined(*map(torch.from_numpy, theirs)), joined(*found)
