"""Canonical polyadic decomposition against tensorly's parafac: fit and time, one start from the HOSVD each.

pip install tensorly
python benchmarks/cp.py
"""

from __future__ import annotations

import warnings

import tensorly
import torch
from common import interleaved, medians, ratio, record
from tensorly.decomposition import parafac

from eckart.linalg.tensors import cp


def noisy(*shape: int, rank: int, noise: float) -> torch.Tensor:
    """A sum of ``rank`` random terms, with Gaussian noise of this relative size."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, rank, generator=generator) for n in shape]
    letters = "abcd"[: len(shape)]
    t = torch.einsum(",".join(f"{letter}z" for letter in letters) + "->" + letters, *factors)
    return t + noise * t.std() * torch.randn(shape, generator=generator)


def kernel(channels: int) -> torch.Tensor:
    """A 3 x 3 convolution whose channel modes have singular values from 1 down to 0.01."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(channels, channels, 3, 3, generator=generator)
    for d in (0, 1):
        rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
        t = torch.tensordot(rotation * torch.logspace(0, -2, channels), t, dims=([1], [d])).movedim(0, d)
    return t.contiguous()


def theirs(t: torch.Tensor, rank: int, backend: str) -> torch.Tensor:
    """With its defaults but for the seed: init "svd", tol 1e-8, at most 100 sweeps."""
    tensorly.set_backend(backend)
    found = parafac(t if backend == "pytorch" else t.numpy(), rank, random_state=0)
    return torch.as_tensor(tensorly.cp_to_tensor(found))


def sweeps_to(t: torch.Tensor, rank: int, error: float) -> int:
    """How many of our sweeps it takes to have no larger an error."""
    for sweeps in (5, 10, 25, 50, 75, 100, 125, 150, 200, 300, 400):
        if float(cp(t, rank, max_sweeps=sweeps).error) <= 1.0001 * error:
            return sweeps
    return 500


def main() -> None:
    warnings.filterwarnings("ignore", message="Trying to compute SVD")  # more terms than the kernel has rows
    figures: dict[str, float | str] = {}
    problems = {
        "40 x 50 x 60, rank 5": (noisy(40, 50, 60, rank=5, noise=0.1), 5),
        "100 x 100 x 100, rank 20": (noisy(100, 100, 100, rank=20, noise=0.1), 20),
        "24^4, rank 12": (noisy(24, 24, 24, 24, rank=12, noise=0.5), 12),
        "128 x 128 x 3 x 3, rank 32": (kernel(128), 32),
        "256 x 256 x 3 x 3, rank 64": (kernel(256), 64),
    }
    for name, (t, rank) in problems.items():
        size = float(t.norm())
        other = min(float((t - theirs(t, rank, backend)).norm()) for backend in ("pytorch", "numpy"))
        sweeps = sweeps_to(t, rank, other)
        seconds = interleaved(
            {
                "default": lambda t=t, rank=rank: cp(t, rank),
                "equal": lambda t=t, rank=rank, sweeps=sweeps: cp(t, rank, max_sweeps=sweeps),
                "pytorch": lambda t=t, rank=rank: theirs(t, rank, "pytorch"),
                "numpy": lambda t=t, rank=rank: theirs(t, rank, "numpy"),
            },
            repeats=3,
        )
        error = float(cp(t, rank).error)
        figures[f"{name}: seconds, eckart"] = medians(seconds)["default"]
        figures[f"{name}: error / norm, eckart"] = error / size
        figures[f"{name}: error / tensorly's (<= 1.001)"] = error / other
        figures[f"{name}: sweeps to tensorly's error"] = sweeps
        for backend in ("pytorch", "numpy"):
            figures[f"{name}: time / tensorly on {backend}"] = ratio(seconds, "default", backend)
            figures[f"{name}: time / tensorly on {backend} at equal error (<= 1)"] = ratio(seconds, "equal", backend)
    record("cp", figures, tensorly=tensorly.__version__)


if __name__ == "__main__":
    main()
