"""Smaller weights after training: one verb, one runner, one short file a published method."""

from .budget import Budget
from .compress import compress
from .contract import Factors, WeightMethod
from .stream import compress_checkpoint

__all__ = ["Budget", "Factors", "WeightMethod", "compress", "compress_checkpoint"]
