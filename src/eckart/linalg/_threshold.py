"""The most energy for a budget, when each matrix offers a list of ranks with a cost and an energy each.

    max over choices of sum energy_i(k_i)   subject to   sum cost_i(k_i) <= budget

With plain factors every further rank costs the same m + n, so one threshold on s^2 / (m + n) solves this. With the
pivoted form the cost of one more rank, m + n - 2k - 1, falls with k, and at break-even a plain matrix jumps to dense:
energy as a function of cost is no longer concave, and a step that does not pay alone pays with those after it. So the
steps are the edges of the upper concave hull of each matrix's points, taken in order of slope (this is the Lagrangian
relaxation, optimal at every budget where an edge ends); what the last edge leaves over is spent greedily on the best
affordable step inside the hull. The result is below the optimum by at most the energy of one hull edge.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np

__all__ = ["best_ranks"]

Choice = tuple[np.ndarray, np.ndarray, np.ndarray]  # ranks, costs, energies; all ascending


def best_ranks(choices: Sequence[Choice], budget: int) -> list[int]:
    """One rank for each matrix; the first (cheapest) of all choices must fit into ``budget`` together."""
    position = [0] * len(choices)
    left = budget - sum(int(costs[0]) for _, costs, _ in choices)
    edges = sorted(
        (
            (-slope, index, target)
            for index, (_, costs, energies) in enumerate(choices)
            for slope, target in _hull_edges(costs, energies)
        ),
    )
    for _, index, target in edges:
        costs = choices[index][1]
        price = int(costs[target] - costs[position[index]])
        if price > left:
            break
        position[index], left = target, left - price
    _spend(choices, position, left)
    return [int(ranks[position[index]]) for index, (ranks, _, _) in enumerate(choices)]


def _hull_edges(costs: np.ndarray, energies: np.ndarray) -> list[tuple[float, int]]:
    """(slope, end point) of the edges of the upper concave hull from the first point, by falling slope."""
    hull: list[int] = []
    cost, energy = costs.tolist(), energies.tolist()
    for point in range(len(cost)):
        while len(hull) >= 2:
            first, middle = hull[-2], hull[-1]
            rise = (energy[middle] - energy[first]) * (cost[point] - cost[first])
            if rise > (energy[point] - energy[first]) * (cost[middle] - cost[first]):
                break
            hull.pop()
        hull.append(point)
    return [((energy[end] - energy[start]) / (cost[end] - cost[start]), end) for start, end in itertools.pairwise(hull)]


def _spend(choices: Sequence[Choice], position: list[int], left: int) -> None:
    """Takes, while any is affordable, the step with the most energy per parameter. Changes ``position``."""

    def best(index: int) -> tuple[float, int, int, int] | None:
        _, costs, energies = choices[index]
        here = position[index]
        end = int(np.searchsorted(costs, costs[here] + left, side="right"))
        if end <= here + 1:
            return None
        prices = costs[here + 1 : end] - costs[here]
        slopes = (energies[here + 1 : end] - energies[here]) / prices
        step = int(slopes.argmax())
        return -float(slopes[step]), index, here + 1 + step, int(prices[step])

    heap = [step for index in range(len(choices)) if (step := best(index))]
    heapq.heapify(heap)
    while heap:
        _, index, target, price = heapq.heappop(heap)
        if price <= left:
            position[index], left = target, left - price
        step = best(index)  # from the new place, or with less money
        if step:
            heapq.heappush(heap, step)
