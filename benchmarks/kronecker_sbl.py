"""Kronecker-structured sparse Bayesian learning against the classic method and matching pursuit.

python benchmarks/kronecker_sbl.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import reduce

import torch
from common import record
from torch import Tensor

from eckart.linalg.kronecker_sbl import kronecker_sbl
from eckart.linalg.pursuit import orthogonal_matching_pursuit

SEEDS = 10


def problem(seed: int, rows: list[int], columns: int, nonzeros: int, decibel: float, dtype: torch.dtype):
    """y, the dictionaries, x = x_1 (x) x_2 (x) x_3 with so many nonzeros in each, and the variance of the noise."""
    generator = torch.Generator().manual_seed(seed)
    dictionaries = [torch.randn(m, columns, dtype=dtype, generator=generator) / m**0.5 for m in rows]
    parts = []
    for _ in rows:
        part = torch.zeros(columns, dtype=dtype)
        place = torch.randperm(columns, generator=generator)[:nonzeros]
        part[place] = torch.randn(nonzeros, dtype=dtype, generator=generator)
        parts.append(part)
    x = reduce(torch.kron, parts)
    clean = reduce(torch.kron, [a @ part for a, part in zip(dictionaries, parts, strict=True)])
    noise = float(clean.abs().square().mean()) * 10 ** (-decibel / 10)
    return clean + noise**0.5 * torch.randn(clean.shape, dtype=dtype, generator=generator), dictionaries, x, noise


def compare(figures: dict[str, float], name: str, problems: list, solvers: dict[str, Callable[..., Tensor]]) -> None:
    for solver, run in solvers.items():
        errors, seconds = [], []
        for y, dictionaries, x, noise in problems:
            start = time.perf_counter()
            found = run(y, dictionaries, noise, int((x != 0).sum()))
            seconds.append(time.perf_counter() - start)
            errors.append(float((found - x).abs().square().sum() / x.abs().square().sum()))
        figures[f"{name}: mean squared error / power of x, {solver}"] = statistics.mean(errors)
        figures[f"{name}: the same, median, {solver}"] = statistics.median(errors)
        figures[f"{name}: seconds, {solver}"] = statistics.median(seconds)


def structured(**options) -> Callable[..., Tensor]:
    return lambda y, dictionaries, noise, count: kronecker_sbl(y, dictionaries, noise=noise, **options).x


def classic(y: Tensor, dictionaries: list[Tensor], noise: float, count: int) -> Tensor:
    """One factor, the whole Kronecker product: no structure in the hyperparameters."""
    return kronecker_sbl(y, [reduce(torch.kron, dictionaries)], noise=noise).x


def pursuit(y: Tensor, dictionaries: list[Tensor], noise: float, count: int) -> Tensor:
    """Told how many entries of x are not zero."""
    codes = orthogonal_matching_pursuit(reduce(torch.kron, dictionaries), y[:, None], count)
    return codes.dense()[:, 0]


def main() -> None:
    figures: dict[str, float] = {}
    ours = {
        "svd": structured(),
        "svd, noise unknown": lambda y, dictionaries, noise, count: kronecker_sbl(y, dictionaries).x,
        "am": structured(solver="am"),
        "am, 400 iterations": structured(solver="am", max_iterations=400, tol=1e-6),
    }
    for decibel in (10, 20):
        problems = [problem(seed, [6] * 3, 8, 2, decibel, torch.float64) for seed in range(SEEDS)]
        name = f"216 of 512, {decibel} dB"
        compare(figures, name, problems, {**ours, "classic": classic, "matching pursuit": pursuit})
        figures[f"{name}: error of svd / error of classic (< 1)"] = (
            figures[f"{name}: mean squared error / power of x, svd"]
            / figures[f"{name}: mean squared error / power of x, classic"]
        )
        figures[f"{name}: time of classic / time of svd"] = (
            figures[f"{name}: seconds, classic"] / figures[f"{name}: seconds, svd"]
        )
    problems = [problem(seed, [10, 12, 15], 15, 4, 15, torch.complex128) for seed in range(SEEDS)]
    compare(figures, "1800 of 3375, complex, 15 dB", problems, ours)
    record("kronecker_sbl", figures, method="kronecker-sbl")


if __name__ == "__main__":
    main()
