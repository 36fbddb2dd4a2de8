"""A bench for people who train and compress transformers:
one subject, many instruments, every number beside its prediction.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("model-workbench")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.1.0"

from workbench.instruments import BadInput, Instrument, Method, Progress, Result, catalog, methods
from workbench.subjects import Subject, subject

__all__ = [
    "BadInput",
    "Instrument",
    "Method",
    "Progress",
    "Result",
    "Subject",
    "catalog",
    "methods",
    "subject",
]
