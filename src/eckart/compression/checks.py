"""What must hold before a model is compressed, and what must hold afterwards."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..models.calibrate import Statistics
from ..models.geometry import geometries
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
    if specs(model) or geometries(model):
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


def check_promises(result: Result, *, biases: int = 0, whole: bool = False) -> None:
    """Raise unless the model became smaller, by what its selected weights lost.

    Args:
        result: what was done.
        biases: numbers that went with biases.
        whole: whether the method worked on the model as a whole, which may have other layers afterwards.

    Raises:
        RuntimeError: saying what was broken; the model must not be used.
    """
    changed = [layer for layer in result.layers if layer.form != "dense"]
    before, after = result.selected_parameters
    if changed and not after < before:
        raise RuntimeError(f"the selected weights hold {after:,} numbers, no fewer than the {before:,} before")
    (p0, p1) = result.parameters
    if whole:
        if changed and not p1 < p0:
            raise RuntimeError(f"the model holds {p1:,} numbers, no fewer than the {p0:,} before")
    elif p0 - p1 != before - after + biases:
        lost = before - after + biases
        raise RuntimeError(f"the model lost {p0 - p1:,} numbers, its selected weights {lost:,}: a tie broke")


def describe(skipped: Skipped) -> str:
    """One line for people."""
    return f"{skipped.name}: {skipped.reason} ({skipped.parameters:,} parameters)"
