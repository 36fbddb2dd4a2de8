"""A causal transformer whose Lipschitz constant has a certificate:
no normalisation, convex residuals, attention scaled by 1 / d (Newhouse et al. 2025).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.subjects import Subject
from workbench.training.models.model_change import MODEL_CHANGE


class Attention(nn.Module):
    """Wo softmax(q k / d) v of one causal head, (batch, tokens, width) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x), is_causal=True, scale=1 / x.shape[-1]
        )
        return self.out(mixed)

    def bound(self, radius: float) -> tuple[float, float]:
        """(Lipschitz constant, largest output) over tokens of norm at most radius sqrt(d).

        Scores q k / d move by at most 2 sq sk r per unit (r = radius, s = spectral norms), the mean absolute
        deviation of scores within +-D is at most D, so a token's mixture of values moves by at most sv
        (1 + 2 sq sk r^2).
        """
        q, k, v, o = (spectral_norm(layer) for layer in (self.query, self.key, self.value, self.out))
        return o * v * (1 + 2 * q * k * radius**2), o * v * radius


class Perceptron(nn.Module):
    """W2 relu(W1 x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())

    def bound(self, radius: float) -> tuple[float, float]:
        both = spectral_norm(self.up) * spectral_norm(self.down)
        return both, both * radius


class LipschitzTransformer(nn.Module):
    """Token and position vectors of length sqrt(d), averaged;
    x <- (1 - 1/L) x + (1/L) f(x) over L = 2 x layers parts f; a linear head.

    forward(input_ids (batch, tokens), ...) -> logits (batch, tokens, vocabulary). `certificate()` bounds,
    over sequences, the largest change of a token's logits by the largest change of a token's embedded vector
    (both Euclidean): |f(x) - f(y)| <= certificate |x - y| for x and y among tokens of length at most sqrt(d),
    as every embedded token is.
    """

    def __init__(self, vocabulary: int, width: int = 32, layers: int = 2, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Attention(width), Perceptron(width)]) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        for part in self.blocks.modules():
            if isinstance(part, nn.Linear):
                nn.init.orthogonal_(part.weight)

    @property
    def parts(self) -> list[Any]:
        return [part for block in self.blocks for part in block]  # type: ignore[attr-defined]

    def embedded(self, input_ids: Tensor) -> Tensor:
        positions = self.positions.weight[: input_ids.shape[1]]
        unit = lambda table: F.normalize(table, dim=-1) * math.sqrt(table.shape[-1])  # noqa: E731
        return (unit(self.tokens(input_ids)) + unit(positions)) / 2

    def transformed(self, x: Tensor) -> Tensor:
        share = 1 / len(self.parts)
        for part in self.parts:
            x = (1 - share) * x + share * part(x)
        return self.head(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.transformed(self.embedded(input_ids))

    def certificate(self) -> float:
        """The product of the parts' bounds at the weights as they are."""
        constant, radius, share = 1.0, 1.0, 1 / len(self.parts)
        for part in self.parts:
            slope, largest = part.bound(radius)
            constant, radius = constant * (1 - share + share * slope), (1 - share) * radius + share * largest
        return constant * spectral_norm(self.head)


def spectral_norm(layer: nn.Linear) -> float:
    return float(torch.linalg.matrix_norm(layer.weight.detach(), 2))


def largest_slope(model: LipschitzTransformer, input_ids: Tensor, ascents: int = 20, seed: int = 0) -> float:
    """A lower bound of the Lipschitz constant by search: max over sequences of |J v| / |v|,
    v moved uphill along the gradient of the ratio.

    |.| is the largest Euclidean length of a token's vector, as in the certificate.
    """
    x = model.embedded(input_ids).detach()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    best = 0.0
    for _ in range(ascents):
        v = (v / v.norm(dim=-1).amax(1)[:, None, None]).requires_grad_()
        image = torch.func.jvp(model.transformed, (x,), (v,))[1]
        ratios = image.norm(dim=-1).amax(1)
        best = max(best, float(ratios.detach().max()))
        (gradient,) = torch.autograd.grad(ratios.sum(), v)
        v = (
            v + gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        ).detach()  # every token at full length may help
    return best


class LipschitzOptions(Options):
    width: int = parameter(32, "width of a token's vector", ge=2)
    layers: int = parameter(2, "blocks of attention and perceptron", ge=1)


@MODEL_CHANGE.add(
    "lipschitz-transformer",
    formula="x <- (1 - 1/L) x + (1/L) f(x), softmax(Q K^T / d) V, no norms",
    source="Newhouse et al. 2025",
    options=LipschitzOptions,
)
def lipschitz_transformer(on: Subject, options: LipschitzOptions) -> Subject:
    """A causal transformer with a certificate in the model's place, with random weights."""
    vocabulary = getattr(getattr(on.model, "config", None), "vocab_size", None)
    if on.task.name != "causal-lm" or vocabulary is None:
        raise BadInput(
            f"model_change: lipschitz-transformer predicts the next token and this subject's task is "
            f"{on.task.name}; take a causal language model, such as bytelm"
        )
    context = on.split("train")["input_ids"].shape[1]
    model = LipschitzTransformer(int(vocabulary), options.width, options.layers, context).to(on.device)
    model.without_file = "lipschitz-transformer"  # type: ignore[assignment]
    return on.with_model(model)
