"""Rotations of the residual stream: drawn, learned, or principal components."""

from __future__ import annotations

from workbench.axis import Axis, Options, parameter
from workbench.progress import Progress
from workbench.quantization.rotation.fold import rotate
from workbench.quantization.rotation.learned import learned_rotation, principal_rotation
from workbench.subjects import Subject

#: `entry(subject, examples, seed, progress, options)` gives the rotated subject, and the loss of every step
#: where there are any.
ROTATION = Axis(
    "rotation",
    "random signs times Hadamard blocks; Haar; learned for rounded activations; "
    "principal components, the widest features last",
    found_in="workbench.quantization.rotation",
)
Made = tuple[Subject, list[float]]


@ROTATION.add("hadamard", formula="R = diag(+-1) H", source="Ashkboos et al. 2024, QuaRot")
def hadamard_rotation(on: Subject, examples: int, seed: int, progress: Progress, options: Options) -> Made:
    return rotate(on, "hadamard", seed), []


@ROTATION.add("orthogonal", formula="R from the Haar measure", source="Mezzadri 2007")
def orthogonal(on: Subject, examples: int, seed: int, progress: Progress, options: Options) -> Made:
    return rotate(on, "orthogonal", seed), []


class LearnedRotation(Options):
    steps: int = parameter(50, "descent steps on the orthogonal matrices", ge=1, le=10000, scale="log")
    learning_rate: float = parameter(
        1.0, "first step's length in the tangent space; it decays linearly", gt=0, le=100, scale="log"
    )
    activation_bits: int = parameter(
        4, "width of the rounded inputs whose loss is minimised", ge=2, le=8, unit="bits"
    )
    heads: bool = parameter(True, "also turn what each block's heads read and write")


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
