"""Method cards of quantization, from where each kind of method is."""

from __future__ import annotations

from workbench.names import Method
from workbench.quantization.allocation.method_cards import METHODS as ALLOCATION
from workbench.quantization.equalization.method_cards import METHODS as EQUALIZATION
from workbench.quantization.number.method_cards import METHODS as NUMBER
from workbench.quantization.rotation.method_cards import METHODS as ROTATION
from workbench.quantization.rounding.method_cards import METHODS as ROUNDING
from workbench.quantization.trained.method_cards import METHODS as TRAINED
from workbench.quantization.transform.method_cards import METHODS as TRANSFORM

METHODS: list[Method] = [*ROUNDING, *TRANSFORM, *EQUALIZATION, *ROTATION, *NUMBER, *ALLOCATION, *TRAINED]
