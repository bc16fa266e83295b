"""Low-rank and spectral methods for large neural networks.

Rooms are nouns and verbs are functions: ``eckart.compress`` does what the room ``eckart.compression`` holds.
Importing this package imports neither torch nor transformers; a public name imports what it needs once used.

Example:
    >>> import eckart
    >>> "compress" in dir(eckart)
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eckart._hooks import install as _install_hooks

if TYPE_CHECKING:
    from eckart.adapters import adapt
    from eckart.analysis import analyze, spectra
    from eckart.compression import compress
    from eckart.linalg import allocate, svd
    from eckart.models import calibrate, export_dense, load, save

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "adapt",
    "allocate",
    "analyze",
    "calibrate",
    "compress",
    "export_dense",
    "load",
    "save",
    "spectra",
    "svd",
]

# Where each public name lives. Nothing here is imported before it is asked for.
_LAZY = {
    "adapt": "eckart.adapters",
    "analyze": "eckart.analysis",
    "allocate": "eckart.linalg",
    "calibrate": "eckart.models",
    "compress": "eckart.compression",
    "export_dense": "eckart.models",
    "load": "eckart.models",
    "save": "eckart.models",
    "spectra": "eckart.analysis",
    "svd": "eckart.linalg",
}
_ROOMS = ("adapters", "analysis", "compression", "linalg", "models", "optim", "structures")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"eckart.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'eckart' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})


# A plain `AutoModelForCausalLM.from_pretrained` must understand the checkpoints that Eckart writes.
_install_hooks()
