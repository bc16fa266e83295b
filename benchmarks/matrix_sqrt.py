"""Differentiable square roots of 64 covariances of size 64, forward and backward: against SVD and eigh in autograd.

python benchmarks/matrix_sqrt.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import interleaved, medians, ratio, record
from torch import Tensor

from eckart.linalg.matrix_sqrt import matrix_sqrt

BATCH, SIZE, SAMPLES = 64, 64, 256
PAPER = {"normalization": "frobenius", "polish": 0, "backward": "newton-schulz", "backward_steps": 8}
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=dtype)


def covariances() -> Tensor:
    x = randn(BATCH, SAMPLES, SIZE)
    x = x - x.mean(dim=1, keepdim=True)
    return x.mT @ x / (SAMPLES - 1)


def of_condition(condition: float) -> Tensor:
    """Eigenvalues from 1 to 1 / condition, evenly spaced in the logarithm."""
    q = torch.linalg.qr(randn(BATCH, SIZE, SIZE, dtype=torch.float64))[0]
    return ((q * condition ** -torch.linspace(0, 1, SIZE, dtype=torch.float64)) @ q.mT).float()


def by_svd(a: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(a)
    return (u * s.sqrt()[:, None]) @ u.mT


def by_eigh(a: Tensor) -> Tensor:
    values, q = torch.linalg.eigh(a)
    return (q * values.sqrt()[:, None]) @ q.mT


def gradient(root: Callable[..., Tensor], a: Tensor, g: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    leaf = a.clone().requires_grad_()
    y = root(leaf, **options)
    y.backward(g)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def exact(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    values, q = torch.linalg.eigh(a.double())
    r = values.sqrt()
    inner = (q.mT @ g.double() @ q) / (r[:, None] + r[:, :, None])
    return (q * r[:, None]) @ q.mT, q @ inner @ q.mT


def relative(found: Tensor, true: Tensor) -> float:
    """The largest relative error over the batch, Frobenius norm."""
    norm = torch.linalg.matrix_norm
    return float((norm(found.double() - true) / norm(true)).max())


def main() -> None:
    a, g = covariances(), randn(BATCH, SIZE, SIZE)
    g = (g + g.mT) / 2
    contenders = {
        "default": lambda: gradient(matrix_sqrt, a, g),
        "paper": lambda: gradient(matrix_sqrt, a, g, **PAPER),
        "taylor": lambda: gradient(matrix_sqrt, a, g, method="taylor"),
        "newton": lambda: gradient(matrix_sqrt, a, g, method="newton"),
        "eigh": lambda: gradient(matrix_sqrt, a, g, method="eigh"),
        "autograd of eigh": lambda: gradient(by_eigh, a, g),
        "autograd of svd": lambda: gradient(by_svd, a, g),
    }
    seconds = interleaved(contenders, repeats=15)
    figures: dict[str, float | str] = {
        "covariances: median condition number": float(torch.linalg.cond(a.double()).median()),
        "covariances: times faster than autograd of svd (>= 3)": ratio(seconds, "autograd of svd", "default"),
        "covariances: times faster than autograd of eigh": ratio(seconds, "autograd of eigh", "default"),
    }
    true = exact(a, g)
    for name, run in contenders.items():
        y, z = run()
        figures[f"covariances: milliseconds, {name}"] = 1e3 * medians(seconds)[name]
        figures[f"covariances: error, {name}" + " (< 1e-3)" * (name == "default")] = relative(y, true[0])
        figures[f"covariances: gradient error, {name}" + " (< 1e-3)" * (name == "default")] = relative(z, true[1])
    for condition in (10.0, 1e2, 1e4):
        a = of_condition(condition)
        true = exact(a, g)
        for name, options in {"default": {}, "paper": PAPER}.items():
            y, z = gradient(matrix_sqrt, a, g, **options)
            figures[f"condition {condition:.0f}: error, {name}"] = relative(y, true[0])
            figures[f"condition {condition:.0f}: gradient error, {name}"] = relative(z, true[1])
    record("matrix_sqrt", figures, method="matrix-sqrt")


if __name__ == "__main__":
    main()
