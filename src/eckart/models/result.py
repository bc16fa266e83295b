"""What a verb did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LayerResult", "Result", "format_bytes"]


@dataclass(frozen=True)
class LayerResult:
    """One selected layer.

    Attributes:
        name: dotted module name.
        shape: (out, in).
        rank: rank it has now; min(out, in) if it stayed dense.
        form: "plain", "pivoted" or "dense".
        parameters: numbers it stores now; it stored ``out * in`` before (bias left out in both).
        error: relative error of its output on the calibration inputs, or of its weight if there were none;
            0 if it stayed dense.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    form: str
    parameters: int
    error: float


@dataclass
class Result:
    """What a verb did to a model.

    Attributes:
        verb: "compress", ...
        method: catalog name.
        settings: everything needed to do it again: options, budget, allocation, form, where.
        parameters: (before, after) of the whole model, tied ones once.
        selected_parameters: (before, after) of the selected weights, which ratios refer to.
        bytes: (before, after) of the whole model.
        layers: one entry a selected layer.
        error_of: what the layers' errors are relative errors of: "output" or "weight".
        seconds: wall time.
        peak_memory: peak resident bytes of the process (of the GPU's allocations, if one is in use).
        warnings: what the user did not ask for and should know.
        skipped: layers left alone, with the reason.
        model: the changed model; None when it was streamed to disk.
    """

    verb: str
    method: str
    settings: dict[str, Any]
    parameters: tuple[int, int]
    selected_parameters: tuple[int, int]
    bytes: tuple[int, int]
    layers: list[LayerResult]
    error_of: str
    seconds: float
    peak_memory: int
    warnings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    model: Any = None

    @property
    def ratio(self) -> float:
        """Fraction of the selected weights' parameters that was removed."""
        before, after = self.selected_parameters
        return 1 - after / before if before else 0.0

    def worst(self, count: int = 5) -> list[LayerResult]:
        """The layers with the largest error."""
        return sorted(self.layers, key=lambda layer: layer.error, reverse=True)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, for JSON."""
        data = {key: value for key, value in vars(self).items() if key not in ("model", "layers")}
        return {**data, "ratio": self.ratio, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        (p0, p1), (b0, b1) = self.parameters, self.bytes
        dense = sum(layer.form == "dense" for layer in self.layers)
        lines = [
            f"{self.verb} with {self.method}: {self.ratio:.1%} of the selected weights removed, "
            f"{len(self.layers) - dense} layers factored, {dense} left dense",
            f"parameters {p0:,} -> {p1:,}, bytes {format_bytes(b0)} -> {format_bytes(b1)}, "
            f"{self.seconds:.1f} s, peak memory {format_bytes(self.peak_memory)}",
        ]
        worst = self.worst(1)
        if worst:
            lines.append(f"largest {self.error_of} error {worst[0].error:.3f} in {worst[0].name}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Decimal units, three digits.

    Example:
        >>> format_bytes(538_090_408)
        '538 MB'
    """
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
