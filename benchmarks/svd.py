"""Rank-64 SVD of a 2048 x 2048 float32 matrix: against LAPACK, and against torch.svd_lowrank at equal accuracy.

python benchmarks/svd.py
"""

from __future__ import annotations

import torch
from common import interleaved, medians, ratio, record

from eckart.linalg import svd

SIZE, RANK = 2048, 64


def matrix(decay: str) -> torch.Tensor:
    """Q1 diag(s) Q2^T with a known spectrum: s_i = 1/i, or exp(-i/100)."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(2))
    index = torch.arange(1, SIZE + 1, dtype=torch.float32)
    s = 1 / index if decay == "harmonic" else torch.exp(-index / 100)
    return (left * s) @ right


def lowrank_at(a: torch.Tensor, error: float) -> dict[str, int]:
    """The cheapest parameters of torch.svd_lowrank whose error is no larger than ours."""
    for iterations in range(12):
        for extra in (6, 16, 32):
            u, s, v = torch.svd_lowrank(a, q=RANK + extra, niter=iterations)
            got = (a - (u[:, :RANK] * s[:RANK]) @ v[:, :RANK].T).norm()
            if float(got) <= error:
                return {"q": RANK + extra, "niter": iterations}
    return {"q": RANK + 32, "niter": 12}


def main() -> None:
    figures: dict[str, float | str] = {}
    for decay in ("harmonic", "exponential"):
        a = matrix(decay)
        ours = svd(a, RANK)
        exact = torch.linalg.svdvals(a.double())
        best = float(exact[RANK:].square().sum().sqrt())
        achieved = float((a.double() - ours.reconstruct().double()).norm())
        equal = lowrank_at(a, achieved)
        seconds = interleaved(
            {
                "eckart": lambda a=a: svd(a, RANK),
                "svd_lowrank": lambda a=a, equal=equal: torch.svd_lowrank(a, **equal),
            },
            repeats=9,
        )
        full = interleaved(
            {"eckart": lambda a=a: svd(a, RANK), "full": lambda a=a: torch.linalg.svd(a, full_matrices=False)},
            repeats=3,
        )
        figures |= {
            f"{decay}: seconds, eckart": medians(seconds)["eckart"],
            f"{decay}: seconds, torch.linalg.svd": medians(full)["full"],
            f"{decay}: times faster than torch.linalg.svd (>= 30)": 1 / ratio(full, "eckart", "full"),
            f"{decay}: error / best error (<= 1.01)": achieved / best,
            f"{decay}: reported error / true error": float(ours.error) / achieved,
            f"{decay}: time / torch.svd_lowrank at equal error (<= 1)": ratio(seconds, "eckart", "svd_lowrank"),
            f"{decay}: torch.svd_lowrank needs": str(equal),
        }
    record("svd", figures)


if __name__ == "__main__":
    main()
