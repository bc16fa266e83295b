"""Make transformers and PEFT know Eckart's files, without importing either.

For ``AutoModelForCausalLM.from_pretrained`` to load a checkpoint with structures, transformers' table of quantizers
needs an entry for us, and for ``PeftModel.from_pretrained`` PEFT's tables of methods do. Importing those takes seconds
that ``import eckart`` must not take. So if a table is loaded already, the entry is made at once; otherwise an import
finder waits for its module, lets Python load it as usual, and makes the entry then. The entry for transformers is a
stand-in that imports the real classes when a checkpoint of ours is met, so nobody else's ``import transformers`` gets
slower or can fail because of us. PEFT's tables want the classes themselves; it has imported all they need by then.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install"]

_TABLE = "transformers.quantizers.auto"
_CLASSES = "eckart.models.quantizer"  # puts the real classes into the table when it is imported
_METHOD = "eckart"
_PEFT = "peft"
_ADAPTERS = "eckart.adapters"  # enters itself into PEFT's tables when it is imported


def install() -> None:
    """Make the entries now where the tables are loaded, else as soon as they are. Safe to call again."""
    for module, enter in ((_TABLE, _enter), (_PEFT, _enter_adapters)):
        if module in sys.modules:
            # This waits if another thread is in the middle of loading it.
            enter(importlib.import_module(module))
        elif not any(_is_ours(finder, module) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(module, enter))


class _Config:
    """Stands in for ``EckartConfig`` in transformers' table."""

    @staticmethod
    def from_dict(config: dict[str, Any], **kwargs: Any) -> Any:
        return importlib.import_module(_CLASSES).EckartConfig.from_dict(config, **kwargs)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Stand in for ``EckartQuantizer`` in transformers' table, which only calls its entries."""
    return importlib.import_module(_CLASSES).EckartQuantizer(config, **kwargs)


def _enter(table: ModuleType) -> None:
    # setdefault: the real classes, once they are there, stay.
    table.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_METHOD, _Config)
    table.AUTO_QUANTIZER_MAPPING.setdefault(_METHOD, _quantizer)


def _enter_adapters(peft: ModuleType) -> None:
    importlib.import_module(_ADAPTERS)


class _Finder:
    """Finds one module by asking all other finders, and has its loader make the entry afterwards."""

    def __init__(self, module: str, enter: Callable[[ModuleType], None]) -> None:
        self.module = module
        self.enter = enter

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        for finder in list(sys.meta_path):
            find = None if _is_ours(finder, self.module) else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """A loader that does what ``loader`` does and then makes the entry."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if we had never been there.
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        # Only now: a mere look for the module (importlib.util.find_spec) must not use the finder up.
        waited_for = self.finder.module
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder, waited_for)]
        self.finder.enter(module)


def _is_ours(finder: Any, module: str) -> bool:
    # By name: after a reload of this module the class is another one.
    ours = type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__
    return ours and finder.module == module
