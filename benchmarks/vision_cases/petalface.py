"""PETALface: a vision transformer that knows clean digits learns degraded ones and is to keep the clean ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from eckart import adapt
from eckart.adapters.petalface import sharpness

from .case import FULL_RATES, Case, Examples, Row, accuracy, everything, nothing, peft_lora
from .digits import digits, enlarged

SIDE = 32
TARGETS = ["q_proj", "k_proj", "v_proj"]  # the paper's
RANK = 2  # of each of the two branches; LoRA has one of twice the rank


def degraded(images: Tensor) -> Tensor:
    """Brought down to 3 to 5 pixels a side, each to one that is drawn, and smoothly back."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.randint(3, 6, (len(images),), generator=generator).tolist()
    small = [F.adaptive_avg_pool2d(image, side) for image, side in zip(images, sides, strict=True)]
    return torch.cat([enlarged(image[None], SIDE) for image in small])


class PETALface(Case):
    """Clean and degraded digits."""

    name = "petalface"
    title = "petalface: degraded digits"
    figures = ("clean", "degraded")
    steps = 300

    def pretrained(self) -> nn.Module:
        found = digits()
        network = ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=SIDE,
                patch_size=8,
                num_channels=1,
                num_labels=10,
            )
        )
        known, new = found[:800], found[800:1000]
        parts = {"validation": found[1000:1300][: self.size.judged], "test": found[1300:][: self.size.judged]}
        self.parts = {
            name: (enlarged(part.inputs, SIDE), degraded(part.inputs), part.labels) for name, part in parts.items()
        }
        both = torch.cat([enlarged(new.inputs, SIDE), degraded(new.inputs)])
        self.mixed = Examples(both, new.labels.repeat(2))
        self.quality = torch.tensor([1.0, 0.0]).repeat_interleave(len(new))
        score = sharpness(both, reference=1.0)
        self.reference = float((score / (1 - score)).median())
        return self.pretrain(
            network, rate=2e-3, steps=800, pixel_values=enlarged(known.inputs, SIDE), labels=known.labels
        )

    def rows(self) -> dict[str, Row]:
        def lora(**options: Any) -> Callable[[Any], Any]:
            return lambda model: peft_lora(model, 2 * RANK, TARGETS, ["classifier"], **options)

        def ours(model: Any) -> Any:
            options = {"reference": self.reference}
            settings = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
            return adapt(model, "petalface", RANK, options=options, progress=False, **settings)

        return {
            "before": Row(nothing, ()),
            "full fine-tuning": Row(everything, FULL_RATES),
            "lora": Row(lora()),
            "lora, gaussian start": Row(lora(init_lora_weights="gaussian")),  # normal, as that of petalface
            "petalface": Row(ours, method="petalface"),
            "petalface, quality known": Row(ours, method="petalface", informed=True),
        }

    def batches(self, row: Row, seed: int) -> Iterator[dict[str, Tensor]]:
        for i in self.drawn(len(self.mixed), seed):
            batch = {"pixel_values": self.mixed.inputs[i], "labels": self.mixed.labels[i]}
            yield batch | ({"quality": self.quality[i]} if row.informed else {})

    def judge(self, model: Any, row: Row, part: str, seed: int) -> dict[str, float]:
        clean, poor, labels = self.parts[part]
        given = [{"quality": torch.full((len(labels),), q)} if row.informed else {} for q in (1.0, 0.0)]
        return {
            "clean": accuracy(model, labels, pixel_values=clean, **given[0]),
            "degraded": accuracy(model, labels, pixel_values=poor, **given[1]),
        }
