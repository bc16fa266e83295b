"""What a network is like before its first step: one short file a published method."""

from .contract import Affine, Initialization, InitializationMethod, PretrainingMethod
from .initialize import initialize
from .moments import JointMoments, joint_moments
from .svd_init import SVDInit, best_linear_map, linear_factors, svd_initialize

__all__ = [
    "Affine",
    "Initialization",
    "InitializationMethod",
    "JointMoments",
    "PretrainingMethod",
    "SVDInit",
    "best_linear_map",
    "initialize",
    "joint_moments",
    "linear_factors",
    "svd_initialize",
]
