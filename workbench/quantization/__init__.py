"""Quantization: format x granularity x transform x rounding x allocation, post-training or trained."""

from workbench.quantization.activations.activations import ACTIVATION_QUANTIZER
from workbench.quantization.allocation.allocate import Allocate
from workbench.quantization.allocation.allocation_scores import AllocationScores
from workbench.quantization.allocation.layer_sensitivity import LayerSensitivity
from workbench.quantization.allocation.solver import WIDTH_SOLVER
from workbench.quantization.allocation.width_cost import WIDTH_COST
from workbench.quantization.equalization.equalizations import EQUALIZATION
from workbench.quantization.equalization.equalize import Equalize
from workbench.quantization.export import to_compressed_tensors, to_onnx
from workbench.quantization.export_gguf import to_gguf
from workbench.quantization.number.elements import Codebook
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.formats import Format, named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.number.split_grid import SALIENT
from workbench.quantization.quantize import Quantize
from workbench.quantization.rotation.fold import rotate
from workbench.quantization.rotation.rotate import Rotate
from workbench.quantization.rotation.rotations import ROTATION
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.studies.error_anatomy import ErrorAnatomy
from workbench.quantization.studies.ptq_or_qat import PtqOrQat
from workbench.quantization.trained.double_rounding import at_width
from workbench.quantization.trained.settings import TRAINED_ROUNDING
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.quantization.transform.coordinates import Transform
from workbench.quantization.transform.transform import TRANSFORM

__all__ = [
    "ACTIVATION_QUANTIZER",
    "EQUALIZATION",
    "NUMBER_FORMAT",
    "ROTATION",
    "ROUNDING",
    "SALIENT",
    "TRAINED_ROUNDING",
    "TRANSFORM",
    "WIDTH_COST",
    "WIDTH_SOLVER",
    "Allocate",
    "AllocationScores",
    "Codebook",
    "Equalize",
    "ErrorAnatomy",
    "FakeQuant",
    "Format",
    "Grid",
    "LayerSensitivity",
    "Problem",
    "PtqOrQat",
    "Quantize",
    "Rotate",
    "TrainQuantized",
    "Transform",
    "at_width",
    "fit",
    "named",
    "rotate",
    "to_compressed_tensors",
    "to_gguf",
    "to_onnx",
]
