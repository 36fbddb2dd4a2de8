"""Curvature: Hessian, Gauss-Newton and Fisher operators, their spectra and traces,
and what they predict a change will cost.
"""

from workbench.curvature.attention import twice_differentiable
from workbench.curvature.batch_size import BatchSizeTheory
from workbench.curvature.eigenpairs import Eigenpairs, eigenpairs
from workbench.curvature.eigenvalue_study import TopEigenvalues
from workbench.curvature.operators import CurvatureOperator, DenseOperator, curvature_operator
from workbench.curvature.prediction_study import QuadraticPrediction
from workbench.curvature.quadratic import Prediction, measured_change, predicted_change
from workbench.curvature.sharpness import Sharpness
from workbench.curvature.spectrum import Spectrum
from workbench.curvature.trace_study import Trace
from workbench.curvature.weight_spectrum import WeightSpectrum

__all__ = [
    "BatchSizeTheory",
    "CurvatureOperator",
    "DenseOperator",
    "Eigenpairs",
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
