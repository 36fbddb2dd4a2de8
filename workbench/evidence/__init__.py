"""Measurements of the claims on the method cards; nothing but the command line imports this."""

from workbench.evidence.measuring import code, measurable, measure

__all__ = ["code", "measurable", "measure"]
