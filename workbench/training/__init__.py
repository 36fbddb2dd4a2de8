"""Training: loop, optimizers, schedules, batch-size rules, sweeps,
and what learning rate and batch size do to the loss.
"""

from workbench.training.batch import NormTest
from workbench.training.comparisons import OptimizerComparison, ScheduleStudy
from workbench.training.critical import CriticalBatch
from workbench.training.loop import Training, fit
from workbench.training.noise_study import GradientNoise
from workbench.training.range_study import LearningRateRange
from workbench.training.surface import LearningRateBatchSize
from workbench.training.sweeps import Range, Sweep, Trial
from workbench.training.train_study import Train

__all__ = [
    "CriticalBatch",
    "GradientNoise",
    "LearningRateBatchSize",
    "LearningRateRange",
    "NormTest",
    "OptimizerComparison",
    "Range",
    "ScheduleStudy",
    "Sweep",
    "Train",
    "Training",
    "Trial",
    "fit",
]
