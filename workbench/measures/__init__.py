"""How far a changed model is from the dense one: one set of measures for every task.

>>> import torch, workbench
>>> from workbench.measures import compare
>>> from workbench.quantization import Quantize
>>> dense = workbench.subject("bytelm")
>>> compare(dense, dense, limit=2).measures()["kl"]
0.0
>>> changed = Quantize(format="int3", test_examples=0, predict_examples=0).run(dense, cache=False).subject
>>> found = compare(dense, changed, limit=4).measures()
>>> 0 < found["kl_low"] < found["kl"] < found["kl_high"], 0 < found["acceptance"] < 1
(True, True)
"""

from __future__ import annotations

from workbench.measures.attribution import Attribution
from workbench.measures.calibration.calibration_study import CalibrationStudy
from workbench.measures.classification import AnswerPairs, classification_measures
from workbench.measures.embedding import VectorPairs, embedding_measures
from workbench.measures.fidelity import Fidelity
from workbench.measures.floor import Floor, floor_of
from workbench.measures.language import TokenPairs, confidence_table, language_measures
from workbench.measures.reference import Comparison, Reference, compare, reference_of
from workbench.measures.size import Size, size_of, storage_dtype
from workbench.measures.suites.docstring_items import docstring_tasks
from workbench.measures.suites.task_suite import TaskSuite
from workbench.measures.texts.side_by_side import SideBySide
from workbench.measures.texts.token_strip import TokenStrip
from workbench.measures.words import LEGEND, Verdict, verdict, word

__all__ = [
    "LEGEND",
    "AnswerPairs",
    "Attribution",
    "CalibrationStudy",
    "Comparison",
    "Fidelity",
    "Floor",
    "Reference",
    "SideBySide",
    "Size",
    "TaskSuite",
    "TokenPairs",
    "TokenStrip",
    "VectorPairs",
    "Verdict",
    "classification_measures",
    "compare",
    "confidence_table",
    "docstring_tasks",
    "embedding_measures",
    "floor_of",
    "language_measures",
    "reference_of",
    "size_of",
    "storage_dtype",
    "verdict",
    "word",
]
