"""Tells PEFT that there is a method called ECKART."""

from __future__ import annotations

from typing import Any

from .config import PEFT_TYPE, EckartConfig
from .tuner import EckartModel

__all__ = ["register"]


def register() -> None:
    """Enter our configuration and tuner into PEFT's tables. Safe to call again."""
    from peft import mapping

    entries: list[tuple[dict[Any, Any], Any]] = [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, EckartConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, EckartModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, EckartModel.prefix),
    ]
    for table, value in entries:
        table[PEFT_TYPE] = value
