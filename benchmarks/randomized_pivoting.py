"""Randomized pivoting: the proven rate, the sweeps it takes, its accuracy on graded matrices, and what LAPACK takes.

python benchmarks/randomized_pivoting.py
"""

from __future__ import annotations

import mpmath
import torch
from common import interleaved, medians, ratio, record

from eckart.linalg.randomized_pivoting import PairKind, factor_by_pairs, pivot_round

RUNS, ROWS, COLUMNS = 60, 20, 16
ROUNDS = (15, 30, 45)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def excess(x: torch.Tensor) -> torch.Tensor:
    """tr(diag(M) M^-1) - n of M = X^T X, which no algorithm needs to know."""
    m = x.mT @ x
    return (m.diagonal() * torch.linalg.inv(m).diagonal()).sum() - len(m)


def potentials(kind: PairKind) -> list[float]:
    """Mean of the excess after some rounds of random matchings, relative to the mean at the start."""
    totals = [0.0] * (len(ROUNDS) + 1)
    for run in range(RUNS):
        x, generator = gaussian(ROWS, COLUMNS, seed=run), torch.Generator().manual_seed(run)
        rows, right = x.mT, torch.eye(COLUMNS, dtype=torch.float64)
        totals[0] += float(excess(x))
        for count in range(1, ROUNDS[-1] + 1):
            pairs = torch.randperm(COLUMNS, generator=generator).view(-1, 2).sort(dim=-1).values
            rows, right = pivot_round(rows, right, pairs, kind)
            if count in ROUNDS:
                totals[1 + ROUNDS.index(count)] += float(excess(rows.mT))
    return [total / totals[0] for total in totals[1:]]


def graded_error(s: torch.Tensor, exact: list[float]) -> float:
    return max(abs(float(found) / true - 1) for found, true in zip(s, exact, strict=True))


def main() -> None:
    figures: dict[str, float | int] = {}
    for kind, name in (("svd", "rotations"), ("qr", "Gram-Schmidt")):
        for count, measured in zip(ROUNDS, potentials(kind), strict=True):
            theory = (1 - 1 / (COLUMNS - 1)) ** count
            figures[f"{name}: excess after {count} rounds / theory (0.8 to 1.25)"] = measured / theory
    for size in (16, 64, 256):
        x = gaussian(size, size, seed=0)
        inputs: dict[PairKind, torch.Tensor] = {
            "svd": x,
            "eigh": x + x.T,
            "qr": x,
            "cholesky": x.T @ x / size + torch.eye(size, dtype=torch.float64),
        }
        for kind, a in inputs.items():
            for order in ("cyclic", "random"):
                figures[f"{kind}, n = {size}: sweeps, {order}"] = factor_by_pairs(a, kind, order=order).sweeps
    mpmath.mp.dps = 60
    generator = torch.Generator().manual_seed(0)
    for name, places in (("sorted", torch.arange(16)), ("shuffled", torch.randperm(16, generator=generator))):
        graded = gaussian(20, 16, seed=1) * torch.logspace(0, -20, 16, dtype=torch.float64)[places]
        exact = [float(s) for s in mpmath.svd_r(mpmath.matrix(graded.tolist()), compute_uv=False)]
        text = f"columns over 20 decades, {name}: largest relative error of s"
        for order in ("cyclic", "random"):
            found = factor_by_pairs(graded, order=order).diagonal
            figures[f"{text}, {order} (<= 1e-13)"] = graded_error(found, exact)
        figures[f"{text}, torch.linalg.svd"] = graded_error(torch.linalg.svdvals(graded), exact)
    a = gaussian(128, 128, seed=2)
    seconds = interleaved(
        {
            "cyclic": lambda: factor_by_pairs(a, order="cyclic"),
            "random": lambda: factor_by_pairs(a),
            "lapack": lambda: torch.linalg.svd(a),
        },
        repeats=5,
    )
    for name, value in medians(seconds).items():
        figures[f"svd, n = 128: milliseconds, {name}"] = 1e3 * value
    for order in ("cyclic", "random"):
        figures[f"svd, n = 128: times slower than torch.linalg.svd, {order}"] = ratio(seconds, order, "lapack")
    record("randomized_pivoting", figures, method="randomized-pivoting")


if __name__ == "__main__":
    main()
