"""Quantization: format x granularity x transform x rounding x allocation, post-training or trained."""

from workbench.quantization.allocate import Allocate
from workbench.quantization.anatomy import ErrorAnatomy
from workbench.quantization.aware import TrainQuantized
from workbench.quantization.bit_switching import at_width
from workbench.quantization.export import to_compressed_tensors, to_onnx
from workbench.quantization.fake_quant import FakeQuant
from workbench.quantization.formats import Format, named
from workbench.quantization.grid import Grid, fit
from workbench.quantization.quantize import Quantize
from workbench.quantization.rotating import Rotate
from workbench.quantization.rotation import rotate
from workbench.quantization.sensitivity import LayerSensitivity

__all__ = [
    "Allocate",
    "ErrorAnatomy",
    "FakeQuant",
    "Format",
    "Grid",
    "LayerSensitivity",
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
