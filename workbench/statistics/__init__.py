"""Streaming statistics of a subject: input second moments of every layer, per-example gradients,
activation ranges.
"""

from workbench.statistics.experts import ExpertsSeen
from workbench.statistics.factors import GradientFactors, StackedGradients, gradient_factors
from workbench.statistics.gradients import example_gradients
from workbench.statistics.inputs import InputCapture, InputMoments, second_moments
from workbench.statistics.walk import Visit, Walk

__all__ = [
    "ExpertsSeen",
    "GradientFactors",
    "InputCapture",
    "InputMoments",
    "StackedGradients",
    "Visit",
    "Walk",
    "example_gradients",
    "gradient_factors",
    "second_moments",
]
