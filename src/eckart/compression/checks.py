"""What must hold before a model is compressed, and what must hold afterwards."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..models.calibrate import Statistics
from ..models.quantizer import METHOD, specs
from ..models.result import Result
from ..models.select import LinearRef, Selection, Skipped
from ..models.topology import Block, block_of

__all__ = ["check_promises", "check_statistics", "check_untouched", "describe", "inside_blocks"]


def check_untouched(model: nn.Module) -> None:
    """Refuse a model that is compressed or quantized already.

    Raises:
        ValueError: saying with what.
    """
    if specs(model):
        raise ValueError(
            "the checkpoint is compressed by Eckart already; start from the dense one, "
            "or turn this one dense first with `eckart export`"
        )
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method not in (None, METHOD):
        name = getattr(method, "value", method)
        raise ValueError(f"the checkpoint is quantized with {name}; start from the dense one")


def inside_blocks(selection: Selection, blocks: list[Block]) -> Selection:
    """Move linears outside the repeated blocks (a head, a pooler) to the skipped ones.

    Raises:
        ValueError: if nothing is left.
    """
    taken: list[LinearRef] = []
    skipped = list(selection.skipped)
    for ref in selection.linears:
        if block_of(ref.name, blocks) is None:
            reason = "outside the repeated blocks"
            skipped.append(Skipped(ref.name, reason, ref.in_features * ref.out_features))
        else:
            taken.append(ref)
    if not taken:
        raise ValueError("none of the selected layers can be compressed: " + "; ".join(map(describe, skipped)))
    return Selection(taken, skipped)


def check_statistics(given: Mapping[str, Statistics], members: list[LinearRef], needs: frozenset[str]) -> None:
    """Refuse statistics that lack a layer or something that the method needs.

    Raises:
        ValueError: naming it.
    """
    for ref in members if needs else ():
        if ref.name not in given:
            raise ValueError(f"the statistics have no entry for {ref.name}; calibrate with the same `where`")
        for need in needs:
            if getattr(given[ref.name], need) is None:
                raise ValueError(f"the statistics of {ref.name} have no {need!r}; calibrate with needs={sorted(needs)}")


def check_promises(result: Result, selected: int) -> None:
    """Raise unless every selected layer was handled and the model became smaller.

    Raises:
        RuntimeError: saying what was broken; the model must not be used.
    """
    if len(result.layers) != selected:
        raise RuntimeError(f"{selected - len(result.layers)} selected layers were not visited")
    factored = [layer for layer in result.layers if layer.form != "dense"]
    before, after = result.selected_parameters
    if factored and not after < before:
        raise RuntimeError(f"the selected weights hold {after:,} numbers, no fewer than the {before:,} before")
    (p0, p1) = result.parameters
    if p0 - p1 != before - after:
        raise RuntimeError(f"the model lost {p0 - p1:,} numbers, its selected weights {before - after:,}: a tie broke")


def describe(skipped: Skipped) -> str:
    """One line for people."""
    return f"{skipped.name}: {skipped.reason} ({skipped.parameters:,} parameters)"
