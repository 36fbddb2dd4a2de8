"""Curvature: Hessian, Gauss-Newton and Fisher operators, their spectra and traces,
and what they predict a change will cost.
"""

from workbench.curvature.estimators.eigenpairs import Eigenpairs, eigenpairs
from workbench.curvature.estimators.quadratic import Prediction, measured_change, predicted_change
from workbench.curvature.operators.attention import twice_differentiable
from workbench.curvature.operators.curvature_operator import (
    CurvatureOperator,
    DenseOperator,
    curvature_operator,
)
from workbench.curvature.studies.batch_size_theory import BatchSizeTheory
from workbench.curvature.studies.flatness import Flatness
from workbench.curvature.studies.quadratic_prediction import QuadraticPrediction
from workbench.curvature.studies.sharpness import Sharpness
from workbench.curvature.studies.spectrum import Spectrum
from workbench.curvature.studies.top_eigenvalues import TopEigenvalues
from workbench.curvature.studies.trace import Trace
from workbench.curvature.studies.weight_spectrum import WeightSpectrum

__all__ = [
    "BatchSizeTheory",
    "CurvatureOperator",
    "DenseOperator",
    "Eigenpairs",
    "Flatness",
    "Prediction",
    "QuadraticPrediction",
    "Sharpness",
    "Spectrum",
    "TopEigenvalues",
    "Trace",
    "WeightSpectrum",
    "curvature_operator",
    "eigenpairs",
    "measured_change",
    "predicted_change",
    "twice_differentiable",
]
