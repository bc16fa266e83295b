"""Structured linear maps: weights stored as something smaller than a dense matrix."""

from __future__ import annotations

from .arithmetic import add, round_rank, to_lora
from .base import STRUCTURES, Structure, structure_from_spec
from .block_sparse_dictionary import BlockSparseDictionary
from .dense import Dense
from .low_rank import LowRank
from .matrix_product_operator import MatrixProductOperator
from .semi_structured_dictionary import SemiStructuredDictionary
from .sparse_dictionary import SparseDictionary
from .sum import Sum
from .warnings import EckartWarning

__all__ = [
    "STRUCTURES",
    "BlockSparseDictionary",
    "Dense",
    "EckartWarning",
    "LowRank",
    "MatrixProductOperator",
    "SemiStructuredDictionary",
    "SparseDictionary",
    "Structure",
    "Sum",
    "add",
    "round_rank",
    "structure_from_spec",
    "to_lora",
]
