"""Smaller weights after training: one verb, a runner for each scope, one short file a published method."""

from .auto import choose
from .budget import Budget
from .compress import compress
from .contract import Change, Factors, Job, LayerMethod, ModelMethod, ModuleMethod, StructureMethod, WeightMethod
from .recover import recover
from .stream import compress_checkpoint

__all__ = [
    "Budget",
    "Change",
    "Factors",
    "Job",
    "LayerMethod",
    "ModelMethod",
    "ModuleMethod",
    "StructureMethod",
    "WeightMethod",
    "choose",
    "compress",
    "compress_checkpoint",
    "recover",
]
