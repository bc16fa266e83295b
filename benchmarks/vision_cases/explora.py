"""ExPLoRA: masked-autoencoder pre-training on upright digits goes on, unlabelled, on turned, inverted and noisy ones.

What is judged is a logistic regression on the mean of the encoder's last features, from a few labelled digits of the
new kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from eckart import adapt

from .case import FULL_RATES, Case, Examples, Row, everything, nothing, peft_lora
from .digits import digits

SIDE, PATCH = 8, 2
RANK = 8
EACH = 10  # labelled digits of each class


def shifted(images: Tensor, seed: int) -> Tensor:
    """A quarter turned, inverted, and with noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return -images.rot90(1, (2, 3)) + 0.15 * noise


def places(side: int, width: int) -> Tensor:
    """(side², width): sines and cosines of the row and of the column of each patch."""
    frequencies = 0.01 ** (torch.arange(width // 4) * 4 / width)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    """(images, width): the mean over all patches, none of them masked; of a model without patches what it gives."""
    if isinstance(model, nn.Flatten):
        return model(images)
    encoder = (model.get_base_model() if hasattr(model, "peft_config") else model).vit
    masked, encoder.config.mask_ratio = encoder.config.mask_ratio, 0.0
    states = encoder(pixel_values=images).last_hidden_state
    encoder.config.mask_ratio = masked
    return states[:, 1:].mean(1)


class ExPLoRA(Case):
    """Digits of another kind, without labels."""

    name = "explora"
    title = "explora: turned, inverted, noisy digits"
    steps = 400
    batch = 64

    def pretrained(self) -> nn.Module:
        found = digits()
        known, new = found[:700].inputs, found[700:1200]
        self.unlabelled = shifted(new.inputs, seed=1)
        self.labelled = Examples(self.unlabelled, new.labels)
        parts = {"validation": found[1200:1400], "test": found[1400:]}
        self.parts = {
            name: Examples(shifted(part.inputs, seed=2), part.labels)[: self.size.judged]
            for name, part in parts.items()
        }
        network = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=SIDE,
                patch_size=PATCH,
                num_channels=1,
                mask_ratio=0.5,
                initializer_range=0.1,
                decoder_hidden_size=32,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=4,
                decoder_intermediate_size=64,
            )
        )
        # Fixed, and zero in a network that is not loaded.
        network.vit.embeddings.position_embeddings.data[0, 1:] = places(SIDE // PATCH, 64)
        network.decoder.decoder_pos_embed.data[0, 1:] = places(SIDE // PATCH, 32)
        return self.pretrain(network, rate=2e-3, steps=1500, pixel_values=known)

    def rows(self) -> dict[str, Row]:
        def last_block(model: Any) -> Any:
            nothing(model).vit.layers[-1].requires_grad_(True)
            model.decoder.requires_grad_(True)
            return model

        def lora(model: Any) -> Any:
            targets = [f"vit.layers.{i}.attention.{name}" for i in range(4) for name in ("q_proj", "v_proj")]
            return peft_lora(model, RANK, targets, ["decoder"])

        def ours(model: Any) -> Any:
            return adapt(model, "explora", RANK, options={"blocks": (-1,)}, modules_to_save=["decoder"], progress=False)

        return {
            "pixels": Row(lambda model: nn.Flatten(), ()),
            "none": Row(nothing, ()),
            "lora": Row(lora),
            "last block": Row(last_block, FULL_RATES),
            "explora": Row(ours, method="explora"),
            "full": Row(everything, FULL_RATES),
        }

    def batches(self, row: Row, seed: int) -> Iterator[dict[str, Tensor]]:
        for i in self.drawn(len(self.unlabelled), seed):
            yield {"pixel_values": self.unlabelled[i]}

    def judge(self, model: Any, row: Row, part: str, seed: int) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        few, judged = self.labelled.few(EACH, seed), self.parts[part]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(features(model, few.inputs).numpy(), few.labels.numpy())
        return {"accuracy": float(probe.score(features(model, judged.inputs).numpy(), judged.labels.numpy()))}
