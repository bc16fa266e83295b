"""Optimizers that keep their moments of a projected gradient: one loop, one short file a published method."""

from .contract import OptimizerMethod, ProjectedMethod
from .galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreLion, GaLoreSGD
from .groups import low_rank_groups
from .optimizer import ProjectedOptimizer
from .trainer import for_trainer, optimizer_class

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLoreSGD",
    "OptimizerMethod",
    "ProjectedMethod",
    "ProjectedOptimizer",
    "for_trainer",
    "low_rank_groups",
    "optimizer_class",
]
