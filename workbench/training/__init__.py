"""Training: loop, optimizers, schedules, batch-size rules, sweeps,
and what learning rate and batch size do to the loss.
"""

from workbench.training.batch.batch_size import NormTest
from workbench.training.batch.rules import BATCH_RULE
from workbench.training.loop import Training, fit
from workbench.training.losses import TRAINING_LOSS
from workbench.training.models.model_change import MODEL_CHANGE
from workbench.training.optimizer.optimizers import OPTIMIZER
from workbench.training.precision.precision import PRECISION
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE
from workbench.training.studies.critical_batch import CriticalBatch
from workbench.training.studies.gradient_noise import GradientNoise
from workbench.training.studies.learning_rate_batch_size import LearningRateBatchSize
from workbench.training.studies.learning_rate_range import LearningRateRange
from workbench.training.studies.optimizer_comparison import OptimizerComparison
from workbench.training.studies.schedule_study import ScheduleStudy
from workbench.training.studies.self_tuning import SelfTuning
from workbench.training.studies.train import Train
from workbench.training.sweep.sweeps import Range, Sweep, Trial

__all__ = [
    "BATCH_RULE",
    "LEARNING_RATE_SCHEDULE",
    "MODEL_CHANGE",
    "OPTIMIZER",
    "PRECISION",
    "TRAINING_LOSS",
    "CriticalBatch",
    "GradientNoise",
    "LearningRateBatchSize",
    "LearningRateRange",
    "NormTest",
    "OptimizerComparison",
    "Range",
    "ScheduleStudy",
    "SelfTuning",
    "Sweep",
    "Train",
    "Training",
    "Trial",
    "fit",
]
