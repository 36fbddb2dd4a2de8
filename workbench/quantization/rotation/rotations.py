"""Rotations of the residual stream: drawn, learned, or principal components."""

from __future__ import annotations

import torch

from workbench.axis import Axis, Options, parameter
from workbench.progress import Progress
from workbench.quantization.rotation.fold import random_rotation, rotate, stream_of
from workbench.quantization.rotation.learned import learned_rotation, principal_rotation
from workbench.subjects import Subject

#: `entry(subject, examples, seed, progress, options)` gives the rotated subject, and the loss of every step
#: where there are any.
ROTATION = Axis(
    "rotation",
    "random signs times a Hadamard matrix; Haar; learned for rounded activations; "
    "principal components, the widest features last",
    found_in="workbench.quantization.rotation",
)
Made = tuple[Subject, list[float]]


class Drawn(Options):
    heads: bool = parameter(
        False, "also turn what each block's heads read and write, one draw a block (SpinQuant's R2)"
    )


@ROTATION.add(
    "hadamard", formula="R = H diag(+-1)", source="Ashkboos et al. 2024, QuaRot, section 4", options=Drawn
)
def hadamard_rotation(on: Subject, examples: int, seed: int, progress: Progress, options: Drawn) -> Made:
    return drawn(on, "hadamard", seed, options), []


@ROTATION.add("orthogonal", formula="R from the Haar measure", source="Mezzadri 2007", options=Drawn)
def orthogonal(on: Subject, examples: int, seed: int, progress: Progress, options: Drawn) -> Made:
    return drawn(on, "orthogonal", seed, options), []


def drawn(on: Subject, kind: str, seed: int, options: Drawn) -> Subject:
    """The subject under a random rotation of its stream and, where asked, of each block's heads."""
    stream, generator = stream_of(on.model), torch.Generator().manual_seed(seed + 1)
    blocks = stream.heads if options.heads else []
    return rotate(on, kind, seed, heads=[random_rotation(stream.head_size, kind, generator) for _ in blocks])


class LearnedRotation(Options):
    steps: int = parameter(50, "descent steps on the orthogonal matrices", ge=1, le=10000, scale="log")
    learning_rate: float = parameter(
        1.0, "first step's length in the tangent space; it decays linearly", gt=0, le=100, scale="log"
    )
    activation_bits: int = parameter(
        4, "width of the rounded inputs whose loss is minimised", ge=2, le=8, unit="bits"
    )
    heads: bool = parameter(True, "also turn what each block's heads read and write")
    online: bool = parameter(
        False,
        "learn with the down-projections' inputs turned by a Hadamard matrix (SpinQuant's R4), for a "
        "`quantize` that turns them online",
    )


@ROTATION.add(
    "learned",
    formula="min over orthogonal R of the loss with rounded inputs, by Cayley steps",
    source="Liu et al. 2025, SpinQuant",
    needs="gradients",
    options=LearnedRotation,
)
def learned(on: Subject, examples: int, seed: int, progress: Progress, options: LearnedRotation) -> Made:
    return learned_rotation(
        on,
        options.steps,
        options.learning_rate,
        options.activation_bits,
        examples,
        heads=options.heads,
        online=options.online,
        seed=seed,
        progress=progress,
    )


class Principal(Options):
    share: float = parameter(0.125, "share of the features with the largest variance, put last", gt=0, lt=1)


@ROTATION.add(
    "principal",
    formula="U = [P_low R_low, P_high R_high], P the principal components",
    source="Saxena et al. 2025, ResQ",
    needs="inputs",
    options=Principal,
)
def principal(on: Subject, examples: int, seed: int, progress: Progress, options: Principal) -> Made:
    return principal_rotation(on, options.share, examples, seed, progress), []
