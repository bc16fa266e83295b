"""1000 new rows for a 100,000 x 20,000 sparse matrix at rank 64: an update against a new SVD by SciPy.

python benchmarks/svd_update.py
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import scipy.sparse
import torch
from common import interleaved, medians, ratio, record
from scipy.sparse.linalg import svds

from eckart.linalg.svd_update import SVDUpdate, UpdatableSVD

ROWS, COLUMNS, NEW, RANK, DENSITY = 100_000, 20_000, 1000, 64, 1e-4
Sparse = scipy.sparse.csr_array


def uniform() -> Sparse:
    """Entries uniform in (0, 1), anywhere: a flat spectrum, so the leading vectors depend on every row."""
    rng = np.random.default_rng(0)
    return scipy.sparse.random_array((ROWS + NEW, COLUMNS), density=DENSITY, format="csr", rng=rng)


def communities() -> Sparse:
    """Counts of a catalogue with 200 groups of customers and of goods, popular goods first, and 20 % of chance."""
    rng, groups = np.random.default_rng(0), 200
    size, count = COLUMNS // groups, int((ROWS + NEW) * COLUMNS * DENSITY)
    rows, group = rng.integers(0, ROWS + NEW, count), rng.integers(0, groups, ROWS + NEW)
    popularity = np.arange(1, size + 1) ** -0.8
    columns = rng.permutation(COLUMNS).reshape(groups, size)[
        group[rows], rng.choice(size, count, p=popularity / popularity.sum())
    ]
    chance = rng.random(count) < 0.2
    columns[chance] = rng.integers(0, COLUMNS, chance.sum())
    return Sparse((np.ones(count), (rows, columns)), shape=(ROWS + NEW, COLUMNS))


def zha_simon(start: UpdatableSVD, new: Sparse) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right vectors of [diag(s) vᵀ; e], dense."""
    stacked = torch.cat([start.s[:, None] * start.vh, torch.from_numpy(new.toarray())])
    q, r = torch.linalg.qr(stacked.mT)
    _, s, gh = torch.linalg.svd(r.mT)
    return s[:RANK].numpy(), (q @ gh[:RANK].mT).numpy()


def distance(v: np.ndarray, other: np.ndarray) -> float:
    """Frobenius norm of the sines of the principal angles."""
    return float(np.linalg.norm(v - other @ (other.T @ v)))


def captured(a: Sparse, v: np.ndarray) -> float:
    """||a v||_F^2: what is left of the squared norm of a after projection on the space."""
    return float(np.linalg.norm(a @ v) ** 2)


def measure(name: str, a: Sparse) -> dict[str, Any]:
    old, new = a[:ROWS], a[ROWS:]
    begin = time.perf_counter()
    starts = {"exact": SVDUpdate(RANK)(old)}
    figures: dict[str, Any] = {f"{name}: seconds, first SVD": time.perf_counter() - begin}
    starts |= {method: SVDUpdate(RANK, method=method)(old) for method in ("rpi", "gkl")}
    states: dict[str, UpdatableSVD] = {}

    def update(method: str) -> None:
        states[method].add_rows(new)

    def fresh() -> None:
        states.update((method, copy.deepcopy(start)) for method, start in starts.items())

    seconds = interleaved(
        {
            "copies": fresh,  # every update starts from the same state
            "exact": lambda: update("exact"),
            "rpi": lambda: update("rpi"),
            "gkl": lambda: update("gkl"),
            "svds": lambda: svds(a, k=RANK),
        }
    )
    s, v = zha_simon(starts["exact"], new)
    _, t, vh = svds(a, k=RANK)
    best = float((t**2).sum())
    figures |= {f"{name}: seconds, {method}": medians(seconds)[method] for method in ("exact", "rpi", "gkl", "svds")}
    figures[f"{name}: times faster than svds (>= 10)"] = ratio(seconds, "svds", "exact")
    for method, state in states.items():
        vectors, bar = state.vh.mT.numpy(), " (<= 1e-10)" * (method == "exact")
        error = float(np.abs(state.s.numpy() - s).max() / s[0])
        figures[f"{name}: error of s against dense Zha-Simon, {method}{bar}"] = error
        figures[f"{name}: subspace distance to dense Zha-Simon, {method}{bar}"] = distance(vectors, v)
        figures[f"{name}: subspace distance to svds, {method}"] = distance(vectors, vh.T)
        figures[f"{name}: energy captured / that of svds, {method}"] = captured(a, vectors) / best
    vectors = starts["exact"].vh.mT.numpy()
    figures[f"{name}: subspace distance to svds, no update"] = distance(vectors, vh.T)
    figures[f"{name}: energy captured / that of svds, no update"] = captured(a, vectors) / best
    return figures


def main() -> None:
    record("svd_update", measure("uniform", uniform()) | measure("communities", communities()), method="svd-update")


if __name__ == "__main__":
    main()
