"""The randomized SVD driver against scikit-learn and torch, each at the cheapest setting that reaches its error.

Rank 64 of square matrices from 1024 to 8192 and of 8192 x 512, float32, with a flat, a power-law and a step spectrum.
For each competitor the cheapest number of power iterations and extra columns whose error is at most 1.001 times ours
is searched first; then the two are timed in turn.

python benchmarks/randomized.py [--sizes 1024,2048] [--draws 1000]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
from common import interleaved, medians, ratio, record
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from eckart.linalg import svd

RANK = 64
SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (8192, 512))
SPECTRA: dict[str, Callable[[int], np.ndarray]] = {
    "flat": lambda n: np.ones(n),
    "power law": lambda n: 1 / np.arange(1, n + 1),
    "step": lambda n: np.where(np.arange(n) < RANK, 1.0, 0.01),
}


def matrix(rows: int, columns: int, spectrum: str, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """U diag(s) V^T with U and V products of random signs and cosine transforms: orthogonal, and fast to apply."""
    generator = np.random.default_rng(seed)
    s = SPECTRA[spectrum](min(rows, columns))
    a = np.zeros((rows, columns), dtype=np.float32)
    a[: len(s), : len(s)] = np.diag(s)
    for axis, size in ((0, rows), (1, columns)):
        for _ in range(2):
            signs = generator.choice([-1.0, 1.0], size).astype(np.float32)
            order = generator.permutation(size)
            a = np.take(a, order, axis) * (signs[:, None] if axis == 0 else signs)
            a = scipy.fft.dct(a, axis=axis, norm="ortho", overwrite_x=True)
    return torch.from_numpy(np.ascontiguousarray(a)), s


def error_of(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    rows = 1 << 10
    parts = (
        float((x.double() - (y * s).double() @ vh.double()).square().sum())
        for x, y in zip(a.split(rows), u.split(rows), strict=True)
    )
    return sum(parts) ** 0.5


def by_torch(a: Tensor, extra: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(a, q=RANK + extra, niter=iterations)
    return u[:, :RANK], s[:RANK], v[:, :RANK].T


def by_sklearn(a: Tensor, extra: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    found = randomized_svd(a.numpy(), RANK, n_oversamples=extra, n_iter=iterations, random_state=0)
    u, s, vh = (torch.from_numpy(np.ascontiguousarray(part)) for part in found)
    return u, s, vh


def cheapest(run: Callable[..., tuple[Tensor, Tensor, Tensor]], a: Tensor, error: float) -> tuple[int, int] | None:
    """Extra columns and power iterations of the fastest setting that is as accurate; None if there is none."""
    best: tuple[float, tuple[int, int]] | None = None
    for extra in (0, 8, 16, 32, 64):
        for iterations in range(9):
            if best is not None and (iterations + 1) * (RANK + extra) > best[0]:
                break
            if error_of(a, *run(a, extra, iterations)) <= 1.001 * error:
                cost = (iterations + 1) * (RANK + extra)
                if best is None or cost < best[0]:
                    best = cost, (extra, iterations)
                break
    return best[1] if best else None


def compare(rows: int, columns: int, spectrum: str) -> dict[str, float | str]:
    a, s = matrix(rows, columns, spectrum)
    best = float(np.sqrt(np.square(s[RANK:]).sum()))
    ours = svd(a, RANK)
    error = error_of(a, ours.u, ours.s, ours.vh)
    title = f"{rows} x {columns}, {spectrum}"
    figures: dict[str, float | str] = {
        f"{title}: error / best error": error / best,
        f"{title}: reported error / true error": float(ours.error) / error,
    }
    repeats = 11 if rows * columns <= 4096 * 4096 else 5
    # In pairs: whoever follows another library finds its threads spinning and the matrix gone from the cache.
    for name, run, pause in (("torch.svd_lowrank", by_torch, 0.0), ("sklearn randomized_svd", by_sklearn, 0.1)):
        setting = cheapest(run, a, error)
        figures[f"{title}: {name} needs (extra columns, iterations)"] = str(setting)
        if setting is None:
            continue
        contenders = {"eckart": lambda: svd(a, RANK), name: lambda run=run, setting=setting: run(a, *setting)}
        seconds = interleaved(contenders, repeats=repeats, pause=pause)
        figures |= {f"{title}: ms, {who} (with {name})": 1000 * t for who, t in medians(seconds).items()}
        figures[f"{title}: times faster than {name} (>= 1)"] = 1 / ratio(seconds, "eckart", name)
    return figures


def estimates(draws: int) -> dict[str, float]:
    """How often the reported error is within 10 % of the true one, or above it, over random matrices."""
    good, ratios = 0, []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        rows, columns, rank = (int(x) for x in torch.randint(0, 1 << 30, (3,), generator=generator))
        rows, columns, rank = 256 + rows % 257, 256 + columns % 257, 1 + rank % 32
        exponent = 3 * float(torch.rand((), generator=generator))
        left, right = (torch.randn(size, 256, generator=generator) for size in (rows, columns))
        a = (left * torch.arange(1, 257.0).pow(-exponent)) @ right.T / 256
        found = svd(a, rank, driver="randomized", generator=generator)
        true = float((a.double() - found.reconstruct().double()).norm())
        ratios.append(float(found.error) / true)
        good += ratios[-1] >= 0.9
    return {
        f"error estimate at least 0.9 of the true error, share of {draws} draws (>= 0.99)": good / draws,
        "error estimate / true error, least": min(ratios),
        "error estimate / true error, largest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="")
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    wanted = {int(size) for size in options.sizes.split(",") if size}
    figures: dict[str, float | str] = {}
    for (rows, columns), spectrum in itertools.product(SHAPES, SPECTRA):
        if not wanted or rows in wanted:
            figures |= compare(rows, columns, spectrum)
            print(f"{rows} x {columns}, {spectrum}: done", flush=True)
    for name in ("torch.svd_lowrank", "sklearn randomized_svd"):
        gains = [value for key, value in figures.items() if f"than {name}" in key and isinstance(value, float)]
        figures[f"median times faster than {name} (>= 1.3)"] = statistics.median(gains)
    record("randomized", figures | estimates(options.draws))


if __name__ == "__main__":
    main()
