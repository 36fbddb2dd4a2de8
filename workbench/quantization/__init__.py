"""Quantization: format x granularity x transform x rounding x allocation, post-training or trained."""

from workbench.quantization.allocation.allocate import Allocate
from workbench.quantization.allocation.layer_sensitivity import LayerSensitivity
from workbench.quantization.export import to_compressed_tensors, to_onnx
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.formats import Format, named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.quantize import Quantize
from workbench.quantization.rotation.fold import rotate
from workbench.quantization.rotation.rotate import Rotate
from workbench.quantization.studies.error_anatomy import ErrorAnatomy
from workbench.quantization.studies.ptq_or_qat import PtqOrQat
from workbench.quantization.trained.double_rounding import at_width
from workbench.quantization.trained.train_quantized import TrainQuantized

__all__ = [
    "Allocate",
    "ErrorAnatomy",
    "FakeQuant",
    "Format",
    "Grid",
    "LayerSensitivity",
    "PtqOrQat",
    "Quantize",
    "Rotate",
    "TrainQuantized",
    "at_width",
    "fit",
    "named",
    "rotate",
    "to_compressed_tensors",
    "to_onnx",
]
