"""The denoiser of the Jacobian nuclear norm's paper, scaled down to handwritten digits; a part of small_networks.py.

A network f = g ∘ h learns from noisy images x alone, by ½ ||f(x) - x||² and a penalty, to leave the noise out. Beside
the published penalty stand none, the squared norm of the whole Jacobian, weight decay, the nuclear norm itself through
singular values (slow; at the strength found for the published one, of which it is the target), and the best that can
be: training with the clean images. Strengths are chosen on validation images with the first seed. Figures: peak
signal-to-noise ratio on test images; of the singular values of the Jacobian how many are above a hundredth of the
largest, and what share of their sum the ten largest have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from adapter_job import best, best_rate
from small_size import Size, over_seeds, split, step
from torch import Tensor, nn
from vision_cases.digits import digits

from eckart.alignment import JacobianNuclearNorm, jacobian_nuclear_norm, jacobians
from eckart.models.cut import Cut

METHOD = "jacobian-nuclear-norm"


class Denoiser:
    """One way to train f = g ∘ h, cut at a linear layer."""

    def __init__(self, size: Size, name: str) -> None:
        self.size, self.name = size, name
        clean = digits().inputs.flatten(1)
        noisy = clean + size.noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        self.clean, self.noisy = split(size, clean), split(size, noisy)
        self.seconds = 0.0

    def penalty(self, cut: Cut, x: Tensor, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is added to the fidelity, and f(x)."""
        if self.name == METHOD:
            found = JacobianNuclearNorm(eta=strength).penalty(cut, x, generator)
            return found.value, found.output

        def whole(inputs: Tensor) -> Tensor:
            return cut.tail(cut.head(inputs))

        if self.name == "nuclear norm by singular values":
            return strength * jacobian_nuclear_norm(whole, x).mean(), whole(x)
        if self.name == "squared norm of the Jacobian":
            y, noise = whole(x), 0.01 * torch.randn(x.shape, generator=generator)
            return strength / 2 * ((whole(x + noise) - y) / 0.01).square().sum(1).mean(), y
        return torch.zeros(()), whole(x)

    def fit(self, strength: float, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(64, 128), nn.Softplus(), nn.Linear(128, 64))
        tail = nn.Sequential(nn.Linear(64, 128), nn.Softplus(), nn.Linear(128, 64))
        network = nn.Sequential(head, tail)
        decay = strength if self.name == "weight decay" else 0.0
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=decay)
        generator = torch.Generator().manual_seed(seed)
        goal = self.clean[0] if self.name == "trained with clean images" else self.noisy[0]
        begin = time.process_time()
        for _ in range(self.size.steps):
            chosen = torch.randint(self.size.train, (self.size.batch,), generator=generator)
            extra, y = self.penalty(Cut(head, tail), self.noisy[0][chosen], strength, generator)
            step(optimizer, (y - goal[chosen]).square().sum(1).mean() / 2 + extra)
        self.seconds = time.process_time() - begin
        return network

    @torch.no_grad()
    def decibels(self, network: nn.Module, part: int) -> float:
        """Peak signal-to-noise ratio: the peak is 2, from black to white."""
        return 10 * math.log10(4 / float(F.mse_loss(network(self.noisy[part]), self.clean[part])))

    def figures(self, network: nn.Module) -> dict[str, float]:
        found = jacobians(network, self.noisy[2][: self.size.denoised]).detach()
        s = torch.linalg.svdvals(found)
        return {
            "decibels": self.decibels(network, 2),
            "values above 1 %": float((s > 0.01 * s[:, :1]).sum(1).double().mean()),
            "share of the ten largest": float((s[:, :10].sum(1) / s.sum(1)).mean()),
        }


def measure_denoisers(
    size: Size, add: Callable[[str, dict[str, Any]], None], known: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Every row that is not known yet."""
    known = known or {}
    variance = size.noise**2  # where singular values of a linear map would be cut: 1 - strength / variance of x
    strengths: dict[str, tuple[float, ...]] = {
        METHOD: (0.3 * variance, variance, 3 * variance),
        "no penalty": (),
        "squared norm of the Jacobian": (0.1 * variance, 0.3 * variance, variance),
        "weight decay": (0.1, 0.3, 1.0),
        "nuclear norm by singular values": (),
        "trained with clean images": (),
    }
    published = known.get(f"denoiser: {METHOD}", {}).get("strength", 0.0)
    for name, grid in strengths.items():
        if f"denoiser: {name}" in known:
            continue
        made = Denoiser(size, name)
        search = best_rate(lambda s, made=made: -made.decibels(made.fit(s, 0), 1), grid) if grid else {}
        strength = best(search) if search else published if "singular values" in name else 0.0
        published = strength if name == METHOD else published
        found = [made.figures(made.fit(strength, seed)) for seed in range(min(3, size.seeds))]
        add(f"denoiser: {name}", {
            "method" if name == METHOD else "baseline": name,
            "strength": strength,
            **over_seeds(found),
            "CPU seconds": made.seconds,
            "noisy images, decibels": made.decibels(nn.Identity(), 2),
        })  # fmt: skip
