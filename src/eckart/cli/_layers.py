"""What commands that print figures of every weight have in common: columns by width, kinds, what was left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

    from eckart.models.select import Skipped

GAP = 2  # between two columns
_SHOWN = 5

Layer = TypeVar("Layer")  # with a name and a shape


class Column(NamedTuple):
    """A figure of a layer.

    Attributes:
        title: at the head.
        figure: of one layer.
        digits: behind the point.
        legend: the line that says what it means; empty if another column's does.
    """

    title: str
    figure: Callable[[Any], float]
    digits: int
    legend: str = ""


def fitting(columns: Sequence[Column], order: Sequence[str], width: int) -> list[Column]:
    """The columns that fit in so many characters, those first whose titles come first in ``order``."""
    by_title = {column.title: column for column in columns}
    taken = set()
    for title in order:
        width -= GAP + max(len(title), by_title[title].digits + 4)
        if width < 0:
            break
        taken.add(title)
    return [column for column in columns if column.title in taken]


def home(name: str) -> str:
    """The list of blocks that a layer is in: its name up to the first number, which is its block's.

    Example:
        >>> home("model.layers.3.mlp.up_proj"), home("lm_head")
        ('model.layers', '')
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]]) if numbers else ""


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The layers of one name but for the numbers in it, and of one shape, under that name and how many they are."""
    from eckart.models.topology import kinds_of

    found: list[Any] = list(layers)
    homes = {home(layer.name) for layer in found}
    made: dict[tuple[str, tuple[int, int]], list[Layer]] = {}
    for layer, kind in zip(found, kinds_of([layer.name for layer in found]).values(), strict=True):
        label = kind.removeprefix(f"{home(layer.name)}.") if len(homes) == 1 else kind
        made.setdefault((label, layer.shape), []).append(layer)
    return {f"{kind} ({len(members)})": members for (kind, _), members in made.items()}


def shape(layer: Any) -> str:
    """Rows and columns."""
    return "x".join(map(str, layer.shape))


def print_skipped(out: Console, skipped: Sequence[Skipped]) -> None:
    """The first few weights that were left alone, with the reason."""
    for entry in skipped[:_SHOWN]:
        line = f"left alone: {entry.name}: {entry.reason} ({entry.parameters:,} parameters)"
        out.print(line, markup=False, soft_wrap=True)
    if len(skipped) > _SHOWN:
        out.print(f"left alone: {len(skipped) - _SHOWN} more, see --json")
