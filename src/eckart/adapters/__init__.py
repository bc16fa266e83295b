"""Adapters on PEFT: one tuner, and one short file a published method.

Importing this package enters the type ``ECKART`` into PEFT's tables, so that ``PeftModel.from_pretrained`` loads what
``save_pretrained`` wrote.
"""

from __future__ import annotations

from .adapt import adapt
from .config import EckartConfig
from .contract import Adapter, AdapterMethod
from .registration import register

__all__ = ["Adapter", "AdapterMethod", "EckartConfig", "adapt"]

register()
