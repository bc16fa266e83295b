"""Optimizers that keep their moments of a projected gradient: one loop, one short file a published method."""

from .coap import COAPAdamW, COAPAdamW8bit
from .contract import OptimizerMethod, ProjectedMethod
from .dct_adamw import DCTAdamW, DCTAdamW8bit
from .factors import factor_groups
from .fira import FiraAdamW, FiraAdamW8bit
from .galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreLion, GaLoreSGD
from .galore_plus import GaLorePlusAdamW, GaLorePlusAdamW8bit
from .groups import head_groups, low_rank_groups
from .gwt import GWTAdamW, GWTAdamW8bit
from .int8 import float_weights, int8_weights
from .lift import LIFTAdamW, LIFTAdamW8bit
from .online_subspace_descent import OnlineSubspaceDescent, OnlineSubspaceDescent8bit
from .optimizer import ProjectedOptimizer
from .q_galore import QGaLoreAdamW, QGaLoreAdamW32bit
from .trainer import for_trainer, optimizer_class

__all__ = [
    "COAPAdamW",
    "COAPAdamW8bit",
    "DCTAdamW",
    "DCTAdamW8bit",
    "FiraAdamW",
    "FiraAdamW8bit",
    "GWTAdamW",
    "GWTAdamW8bit",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLorePlusAdamW",
    "GaLorePlusAdamW8bit",
    "GaLoreSGD",
    "LIFTAdamW",
    "LIFTAdamW8bit",
    "OnlineSubspaceDescent",
    "OnlineSubspaceDescent8bit",
    "OptimizerMethod",
    "ProjectedMethod",
    "ProjectedOptimizer",
    "QGaLoreAdamW",
    "QGaLoreAdamW32bit",
    "factor_groups",
    "float_weights",
    "for_trainer",
    "head_groups",
    "int8_weights",
    "low_rank_groups",
    "optimizer_class",
]
