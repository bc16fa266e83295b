"""Robust SVD by density power divergence: subspaces under outliers, the rank, and the background of a video.

python benchmarks/rsvddpd.py
"""

from __future__ import annotations

import math
import statistics

import torch
from common import interleaved, medians, ratio, record

from eckart.linalg import svd
from eckart.linalg.robust_pca import robust_pca
from eckart.linalg.rsvddpd import robust_alpha, robust_rank, robust_svd

SEEDS = 10
HEIGHT, WIDTH, FRAMES = 40, 60, 50


def draw(seed: int, m: int, n: int, s: list[float], share: float, size: float, noise: float):
    """A matrix with entries of size s, and the same with noise and a share of the entries shifted by +-size."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(rows, len(s), dtype=torch.float64, generator=generator) for rows in (m, n))
    u, v = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    clean = (u * torch.tensor(s, dtype=torch.float64) * math.sqrt(m * n)) @ v.T
    hit = torch.rand(m, n, generator=generator) < share
    sign = torch.where(torch.rand(m, n, generator=generator) < 0.5, -1.0, 1.0)
    normal = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return clean, u, clean + noise * normal + hit * sign * size


def angle(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest principal angle, degrees."""
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(found.T @ truth).min()))))


def subspaces(figures: dict[str, float | str]) -> None:
    for share, bar in ((0.1, " (<= 5)"), (0.3, "")):
        angles: dict[str, list[float]] = {"robust_svd": [], "as in the paper": [], "svd": []}
        for seed in range(SEEDS):
            _, u, a = draw(seed, 200, 100, [2.0, 1.5, 1.0], share, 30.0, 0.1)
            angles["robust_svd"].append(angle(robust_svd(a, 3).u, u))
            angles["as in the paper"].append(angle(robust_svd(a, 3, refine=False).u, u))
            angles["svd"].append(angle(svd(a, 3, driver="exact").u, u))
        name = f"{share:.0%} outliers: largest angle of {SEEDS}"
        figures[f"{name}, robust_svd{bar}"] = max(angles["robust_svd"])
        figures[f"{name}, as in the paper"] = max(angles["as in the paper"])
        figures[f"{share:.0%} outliers: smallest angle of {SEEDS}, svd (> 30)"] = min(angles["svd"])


def errors(figures: dict[str, float | str]) -> None:
    """The card's own example: rank 2, 60 x 40, 5 % of the entries shifted by 30."""
    rows: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        clean, _, a = draw(seed, 60, 40, [1.0, 0.7], 0.05, 30.0, 0.1)
        found = {f"robust_svd, alpha {alpha}": robust_svd(a, 2, alpha) for alpha in (0.1, 0.3, 0.5, 1.0)}
        found |= {f"as in the paper, alpha {alpha}": robust_svd(a, 2, alpha, refine=False) for alpha in (0.3, 0.5, 1.0)}
        found["svd"] = robust_svd(a, 2, 0.0)
        for name, result in found.items():
            rows.setdefault(name, []).append(float((result.reconstruct() - clean).norm() / clean.norm()))
        pca = robust_pca(a).low_rank.reconstruct()
        rows.setdefault("robust_pca, cut to rank 2", []).append(
            float((svd(pca, 2, driver="exact").reconstruct() - clean).norm() / clean.norm())
        )
    for name, values in rows.items():
        figures[f"60 x 40, 5 % outliers: median relative error, {name}"] = statistics.median(values)


def choices(figures: dict[str, float | str]) -> None:
    ranks, alphas = [], []
    for seed in range(SEEDS):
        _, _, a = draw(seed, 60, 40, [3.0, 2.0, 1.0][: seed % 4], 0.1, 30.0, 0.5)
        ranks.append(robust_rank(a, max_rank=5) == seed % 4)
        _, _, a = draw(seed, 60, 40, [3.0, 2.0], 0.1 if seed % 2 else 0.0, 30.0, 0.5)
        alphas.append(robust_alpha(a, 2))
    figures["robust_rank: right, of 10 with 0 to 3 (>= 9)"] = sum(ranks)
    figures["robust_alpha: chosen, clean"] = str(alphas[::2])
    figures["robust_alpha: chosen, 10 % outliers"] = str(alphas[1::2])


def video(white: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A static picture, a moving square, noise, and some all-white frames; pixels x frames."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    picture = 0.3 + 0.3 * torch.sin(6 * x) * torch.cos(5 * y) + 0.2 * (x > 0.5)
    frames = picture.repeat(FRAMES, 1, 1)
    for t in range(FRAMES):
        at = (WIDTH - 14) * t // FRAMES
        frames[t, 12:26, at : at + 14] = 0.95
    frames[torch.randperm(FRAMES, generator=generator)[:white]] = 1.0
    frames = (frames + 0.02 * torch.randn(FRAMES, HEIGHT, WIDTH, generator=generator)).clamp(0, 1)
    return picture.flatten(), frames.flatten(1).T.contiguous()


def backgrounds(figures: dict[str, float | str]) -> None:
    def typical(model: torch.Tensor) -> torch.Tensor:
        return model.median(dim=1).values

    for white in (3, 10):
        picture, frames = video(white)
        found = {
            "mean": frames.mean(dim=1),
            "median": frames.median(dim=1).values,
            "svd": typical(svd(frames, 1, driver="exact").reconstruct()),
            "robust_pca": typical(robust_pca(frames).low_rank.reconstruct()),
            "as in the paper": typical(robust_svd(frames, 1, refine=False).reconstruct()),
            "robust_svd": typical(robust_svd(frames, 1).reconstruct()),
        }
        for name, background in found.items():
            decibel = -10 * math.log10(float((background - picture).square().mean()))
            bar = " (> median)" if name == "robust_svd" else ""
            figures[f"video, {white} of {FRAMES} frames white: PSNR of the background, {name}{bar}"] = decibel
    _, frames = video(3)
    seconds = interleaved(
        {
            "robust_svd": lambda: robust_svd(frames, 1),
            "robust_pca": lambda: robust_pca(frames),
            "svd": lambda: svd(frames, 1, driver="exact"),
        },
        repeats=3,
    )
    for name, value in medians(seconds).items():
        figures[f"video: seconds, {name}"] = value
    figures["video: times faster than robust_pca"] = ratio(seconds, "robust_pca", "robust_svd")


def main() -> None:
    figures: dict[str, float | str] = {}
    for part in (subspaces, errors, choices, backgrounds):
        part(figures)
    record("rsvddpd", figures, method="rsvddpd")


if __name__ == "__main__":
    main()
