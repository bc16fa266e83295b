"""The configuration of an adapter, as PEFT wants it: plain data that travels with the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from .. import catalog
from ..options import make
from .contract import AdapterMethod

__all__ = ["FORMAT_VERSION", "PEFT_TYPE", "EckartConfig", "make_method"]

PEFT_TYPE = "ECKART"
FORMAT_VERSION = 1


def make_method(name: str, options: dict[str, Any]) -> AdapterMethod:
    """The method ``name`` with options.

    Raises:
        UnknownMethodError: No adapter of that name; the message has the nearest names.
        ValueError: The method is planned, has no such option, or refuses its value.

    Example:
        >>> make_method("pissa", {"solver": "exact"})
        PiSSA(solver='exact')
    """
    method: AdapterMethod = make(catalog.get(name, family="adapters"), options, label=f"method {name!r}")
    return method


@dataclass
class EckartConfig(PeftConfig):
    """What an Eckart adapter is, for `peft.get_peft_model` and `save_pretrained`.

    Args:
        method: Name in the catalog, family adapters.
        r: Rank; what it means is the method's business, always from 1 to min(out, in).
        alpha: The update is scaled by alpha / r; None for alpha = r, a scale of 1.
        target_modules: Names, name endings, one regular expression or "all-linear", as in PEFT; None for every linear
            map of the repeated blocks.
        exclude_modules: Names or endings, or one regular expression, to leave out.
        options: Options of the method, see ``eckart methods NAME``.
        rank_pattern: Rank by full module name, where it differs from ``r``.
        seed: Of everything that is drawn.
        modules_to_save: Modules trained and saved whole, such as a new head.
        layers_to_transform: Indices of the blocks to adapt.
        layers_pattern: Name of the list of blocks that those indices count in.
        bias: Always "none"; PEFT asks for it.
        initialized: Whether values come from a file instead of being computed. Set by saving.
        format_version: Version of the saved format.

    Raises:
        ValueError: An unknown method or option, a rank below 1, a file of a newer version.

    Example:
        >>> EckartConfig(method="pissa", r=4).r
        4
    """

    method: str = "pissa"
    r: int = 16
    alpha: float | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    initialized: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"the adapter has format version {self.format_version}, this Eckart reads up to {FORMAT_VERSION}; "
                "upgrade Eckart"
            )
        if self.r < 1:
            raise ValueError(f"r must be at least 1, not {self.r}")
        if self.bias != "none":
            raise ValueError(f"bias must be 'none', not {self.bias!r}: Eckart's adapters train no biases")
        self.method = catalog.get(self.method, family="adapters").name
        make_method(self.method, self.options)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # as PEFT's own configurations

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file: what is read back from one has its values in that file."""
        return {**super().to_dict(), "initialized": True}

    def build_method(self) -> AdapterMethod:
        """The method with its options."""
        return make_method(self.method, self.options)

    def rank_of(self, name: str) -> int:
        """Rank of the adapter at the module ``name``."""
        return self.rank_pattern.get(name, self.r)

    def scale_of(self, rank: int) -> float:
        """alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / rank
