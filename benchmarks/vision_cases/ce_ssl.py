"""CE-SSL: a convolutional network that knows heart beats of one recorder learns another's from a few labelled ones.

The beats are synthetic: a sum of Gaussian waves P, Q, R, S, T of 128 samples, whose heights, places and widths make the
class (normal, atrial, ventricular, left or right bundle branch block, ischaemic) and vary from beat to beat. The other
recorder has another gain and offset, a flatter P and R, a taller T, more noise, drift and mains hum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from eckart import adapt
from eckart.adapters.ce_ssl import with_unlabelled

from .case import FULL_RATES, Case, Examples, Row, accuracy, everything, nothing, peft_lora

SAMPLES = 128
RANK = 4
EACH = 5  # labelled beats of each class
# (height, place, width) of P, Q, R, S and T; the unit of time is the whole length.
WAVES = {
    "normal": ((0.15, 0.28, 0.03), (-0.1, 0.46, 0.012), (1.0, 0.5, 0.015), (-0.2, 0.54, 0.012), (0.3, 0.75, 0.05)),
    "atrial": ((-0.1, 0.36, 0.02), (-0.1, 0.46, 0.012), (0.9, 0.5, 0.015), (-0.2, 0.54, 0.012), (0.3, 0.75, 0.05)),
    "ventricular": ((0.0, 0.28, 0.03), (-0.1, 0.4, 0.02), (1.1, 0.48, 0.05), (-0.4, 0.6, 0.04), (-0.3, 0.78, 0.06)),
    "left": ((0.15, 0.28, 0.03), (0.4, 0.46, 0.02), (0.8, 0.53, 0.025), (-0.1, 0.58, 0.012), (-0.2, 0.78, 0.05)),
    "right": ((0.15, 0.28, 0.03), (0.5, 0.47, 0.012), (-0.4, 0.51, 0.015), (0.7, 0.56, 0.02), (-0.15, 0.76, 0.05)),
    "ischaemic": ((0.15, 0.28, 0.03), (-0.1, 0.46, 0.012), (1.0, 0.5, 0.015), (-0.35, 0.6, 0.05), (0.1, 0.78, 0.04)),
}


def beats(count: int, shifted: bool, seed: int) -> Examples:
    """Beats (count, 1, 1, samples) and their classes; ``shifted`` for those of the other recorder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(len(WAVES), (count,), generator=generator)
    height, place, width = torch.tensor(list(WAVES.values()))[labels].unbind(-1)
    height = height * (1 + 0.25 * normal(count, 5)) + 0.03 * normal(count, 5)
    if shifted:
        height = height * torch.tensor([0.5, 1.0, 0.6, 1.0, 1.8])
    place = place + 0.012 * normal(count, 5) + 0.02 * normal(count, 1)
    width = width * (1 + 0.15 * normal(count, 5)).clamp_min(0.4)
    time = torch.linspace(0, 1, SAMPLES)
    waves = height[..., None] * torch.exp(-0.5 * ((time - place[..., None]) / width[..., None]) ** 2)
    drift, hum, noise = (0.2, 0.1, 0.12) if shifted else (0.05, 0.0, 0.05)
    phases = 2 * math.pi * torch.rand(2, count, 1, generator=generator)
    signal = waves.sum(1) + drift * torch.sin(2 * math.pi * time + phases[0])
    signal = signal + hum * torch.sin(2 * math.pi * 40 * time + phases[1]) + noise * normal(count, SAMPLES)
    return Examples((1.5 * signal + 0.4 if shifted else signal)[:, None, None], labels)


class Residual(nn.Module):
    """Two convolutions along time, the first with a stride of 2, and a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, (1, 5), stride=(1, 2), padding=(0, 2), bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, (1, 5), padding=(0, 2), bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride=(1, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class BeatNetwork(nn.Module):
    """Three residual blocks and a linear head on the mean over time; unlabelled beats only go through the blocks."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        pairs = zip((1, *channels), channels, strict=False)
        self.encoder = nn.Sequential(*(Residual(before, after) for before, after in pairs))
        self.head = nn.Linear(channels[-1], len(WAVES))

    def forward(self, beats: Tensor, labels: Tensor | None = None, unlabelled: Tensor | None = None) -> Any:
        if unlabelled is None:
            features = self.encoder(beats)
        else:
            with with_unlabelled(self.encoder, unlabelled):
                features = self.encoder(beats)
        logits = self.head(features.mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class CESSL(Case):
    """Beats of another recorder, few of them labelled."""

    name = "ce-ssl"
    title = "ce-ssl: beats of another recorder"

    def pretrained(self) -> nn.Module:
        known = beats(3000, shifted=False, seed=0)
        self.pool, self.unlabelled = beats(600, shifted=True, seed=1), beats(2000, shifted=True, seed=2).inputs
        judged = {"validation": beats(400, shifted=True, seed=3), "test": beats(2000, shifted=True, seed=4)}
        self.parts = {name: part[: self.size.judged] for name, part in judged.items()}
        return self.pretrain(BeatNetwork(), rate=3e-3, steps=400, beats=known.inputs, labels=known.labels)

    def rows(self) -> dict[str, Row]:
        targets = ["conv1", "conv2"]
        saved = ["head", "norm1", "norm2"]

        @torch.no_grad()
        def statistics(model: Any) -> Any:
            model.train()
            for chunk in self.unlabelled.split(100):
                model.encoder(chunk)
            return nothing(model)

        def lora(model: Any) -> Any:
            return peft_lora(model, RANK, targets, saved)

        def ours(model: Any) -> Any:
            settings = {"target_modules": targets, "modules_to_save": saved}
            return adapt(model, "ce-ssl", RANK, progress=False, **settings)

        return {
            "before": Row(nothing, ()),
            "batch statistics only": Row(statistics, ()),
            "full fine-tuning": Row(everything, FULL_RATES),
            "full fine-tuning, unlabelled": Row(everything, FULL_RATES, informed=True),
            "lora": Row(lora),
            "lora, unlabelled": Row(lora, informed=True),
            "ce-ssl, labelled only": Row(ours, method="ce-ssl"),
            "ce-ssl": Row(ours, method="ce-ssl", informed=True),
        }

    def batches(self, row: Row, seed: int) -> Iterator[dict[str, Tensor]]:
        few = self.pool.few(EACH, seed)
        for i, j in zip(self.drawn(len(few), seed), self.drawn(len(self.unlabelled), seed + 100), strict=True):
            batch = {"beats": few.inputs[i], "labels": few.labels[i]}
            yield batch | ({"unlabelled": self.unlabelled[j]} if row.informed else {})

    def judge(self, model: Any, row: Row, part: str, seed: int) -> dict[str, float]:
        return {"accuracy": accuracy(model, self.parts[part].labels, beats=self.parts[part].inputs)}
