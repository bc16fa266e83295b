"""Names beside the points of a picture that do not lie on one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZE = 6.0  # points


def label(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point (x, y), further up or down where another name is, then with a line to it.

    The limits of the axes must be set: places are those of the picture.
    """
    scale = axis.figure.dpi / 72
    height, right = 1.25 * SIZE * scale, axis.bbox.x1
    taken: list[tuple[float, float, float]] = []  # left end, right end, middle
    for name, point in sorted(points.items(), key=lambda pair: pair[1][1]):
        x, y = axis.transData.transform(point)
        width = 0.55 * SIZE * scale * len(name)
        left = x + 5 * scale if x + 5 * scale + width < right else x - 5 * scale - width
        shifts = sorted(range(-40, 41), key=abs)
        free = (
            s * height / 2
            for s in shifts
            if all(left > b or left + width < a or abs(y + s * height / 2 - middle) > height for a, b, middle in taken)
        )
        shift = next(free, 0.0)
        taken.append((left, left + width, y + shift))
        axis.annotate(
            name,
            point,
            xytext=((left - x) / scale, shift / scale),
            textcoords="offset points",
            fontsize=SIZE,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "gray", "shrinkA": 0, "shrinkB": 2},
        )
