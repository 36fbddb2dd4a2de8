"""A bench for people who train and compress transformers:
one subject, many instruments, every number beside its prediction.
"""

from workbench.catalog import Method, catalog, methods
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject, subject
from workbench.version import __version__ as __version__

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
