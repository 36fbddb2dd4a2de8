"""Measurements of what trains through a rounding beside a teacher, by name of the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.evidence.quantization import taught_evidence as evidence
from workbench.progress import Progress

MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "fbi-llm": evidence.distilled_binary,
    "edgeqat": evidence.guided_attention,
    "bipft": evidence.residual_estimates,
}
