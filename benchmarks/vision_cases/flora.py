"""FLoRA: a convolutional network that knows the digits 0 to 4 learns 5 to 9 from a few examples, with a new head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from eckart import adapt

from .case import Case, Examples, Row, accuracy, everything, nothing, of_rank, peft_lora, trained_parameters
from .digits import digits

CHANNELS = (16, 32, 32, 64)
RANK = 2  # LoRA's
EACH = 10  # examples of each new class
SCALE = 4.0  # the paper's, of its update of convolutions


class DigitNetwork(nn.Module):
    """Four convolutions and a linear head on the mean of the last features."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if len(layers) == 6 else []
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Linear(CHANNELS[-1], 5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(pixel_values).mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class FLoRA(Case):
    """New digits."""

    name = "flora"
    title = "flora: digits 5 to 9"
    steps = 300

    def pretrained(self) -> nn.Module:
        found = digits()
        known, new = found[found.labels < 5], found[found.labels >= 5]
        self.new = Examples(new.inputs, new.labels - 5)
        self.parts = {
            "validation": self.new[300:500][: self.size.judged],
            "test": self.new[500:][: self.size.judged],
        }
        network = self.pretrain(DigitNetwork(), rate=3e-3, steps=300, pixel_values=known.inputs, labels=known.labels)
        network.head = nn.Linear(CHANNELS[-1], 5)
        # The first convolution has one channel, which has no rank to choose.
        convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        self.targets = convolutions[1:]
        return network

    def rows(self) -> dict[str, Row]:
        def probe(model: Any) -> Any:
            nothing(model).head.requires_grad_(True)
            return model

        def lora(model: Any) -> Any:
            return peft_lora(model, RANK, self.targets, ["head"])

        def ours(model: Any, rank: int) -> Any:
            settings = {"target_modules": self.targets, "modules_to_save": ["head"]}
            return adapt(model, "flora", rank, alpha=SCALE * rank, progress=False, **settings)

        count = trained_parameters(self.started(Row(lora), 0))
        return {
            "linear probe": Row(probe, (3e-2, 1e-1, 3e-1)),
            "full fine-tuning": Row(everything, (3e-3, 1e-2, 3e-2)),
            "lora": Row(lora, (1e-2, 3e-2, 1e-1)),
            "flora": Row(of_rank(ours, self.network, count, largest=CHANNELS[0]), method="flora"),
        }

    def batches(self, row: Row, seed: int) -> Iterator[dict[str, Tensor]]:
        few = self.new[:300].few(EACH, seed)
        for i in self.drawn(len(few), seed):
            yield {"pixel_values": few.inputs[i], "labels": few.labels[i]}

    def judge(self, model: Any, row: Row, part: str, seed: int) -> dict[str, float]:
        return {"accuracy": accuracy(model, self.parts[part].labels, pixel_values=self.parts[part].inputs)}
