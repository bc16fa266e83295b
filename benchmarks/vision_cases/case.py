"""What every case is: a network that the job has pre-trained, the ways to adapt it, and what is measured of each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from adapter_job import Training
from torch import Tensor, nn

ADAPTER_RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Size:
    """How much work a case is.

    Attributes:
        scale: Of the numbers of steps; never fewer than two.
        seeds: Trained for each row.
        judged: Examples that accuracies are taken on, at most.
    """

    scale: float = 1.0
    seeds: int = 3
    judged: int | None = None

    def steps(self, count: int) -> int:
        return max(2, round(self.scale * count))


SMOKE = Size(scale=0.0, seeds=2, judged=20)


@dataclass(frozen=True)
class Row:
    """One way to adapt.

    Attributes:
        build: Puts it on a copy of the pre-trained network, and gives what is to be trained.
        rates: Learning rates to choose from; none if nothing is trained.
        method: Name in the catalog, if it is ours.
        informed: Whether it is given what the case has beside the examples: their quality, unlabelled ones.
    """

    build: Callable[[Any], Any]
    rates: tuple[float, ...] = ADAPTER_RATES
    method: str | None = None
    informed: bool = False


@dataclass(frozen=True)
class Examples:
    """Inputs and their classes."""

    inputs: Tensor
    labels: Tensor

    def __getitem__(self, which: Any) -> Examples:
        return Examples(self.inputs[which], self.labels[which])

    def __len__(self) -> int:
        return len(self.labels)

    def few(self, each: int, seed: int) -> Examples:
        """So many of each class, drawn."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = [order[self.labels[order] == label][:each] for label in self.labels.unique()]
        return self[torch.cat(chosen)]


class Case(ABC):
    """A pre-trained network and what it is to be adapted to.

    Attributes:
        name: Of the case, in the results and on the page.
        title: Of its part of the picture.
        figures: Names of the accuracies; the learning rate is the one of the largest mean on the validation slice.
        steps: To adapt.
        batch: Examples a step.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    figures: ClassVar[tuple[str, ...]] = ("accuracy",)
    steps: ClassVar[int] = 150
    batch: ClassVar[int] = 32

    def __init__(self, size: Size) -> None:
        self.size = size
        torch.manual_seed(0)
        self.network = self.pretrained().eval()

    @abstractmethod
    def pretrained(self) -> nn.Module:
        """The network, trained on what it knows before."""

    @abstractmethod
    def rows(self) -> dict[str, Row]:
        """The ways to adapt."""

    @abstractmethod
    def batches(self, row: Row, seed: int) -> Iterator[dict[str, Tensor]]:
        """What each step of adapting trains on."""

    @abstractmethod
    def judge(self, model: Any, row: Row, part: str, seed: int) -> dict[str, float]:
        """The figures on "validation" or "test"."""

    def started(self, row: Row, seed: int) -> Any:
        """What is to be trained."""
        torch.manual_seed(seed)
        return row.build(copy.deepcopy(self.network))

    def fit(self, row: Row, rate: float | None, seed: int) -> Any:
        """Adapted with one learning rate; as it was without one."""
        model = self.started(row, seed)
        if rate is not None:
            train(model, self.batches(row, seed), rate, self.size.steps(self.steps))
        return model.eval()

    def pretrain(self, network: nn.Module, rate: float, steps: int, **examples: Tensor) -> nn.Module:
        """Train a new network on the given inputs, by the names that it takes."""
        count, steps = len(next(iter(examples.values()))), self.size.steps(steps)
        chosen = self.drawn(count, seed=0, steps=steps)
        train(network, ({name: value[i] for name, value in examples.items()} for i in chosen), rate, steps)
        return network

    def drawn(self, count: int, seed: int, steps: int | None = None) -> Iterator[Tensor]:
        """Which of ``count`` examples each step takes; as many steps as adapting has, unless given."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps or self.size.steps(self.steps)):
            yield torch.randint(count, (self.batch,), generator=generator)


def train(model: Any, batches: Iterator[dict[str, Tensor]], rate: float, steps: int) -> None:
    model.train()
    training = Training(model, rate, steps)
    for batch in batches:
        training.step(batch)


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def accuracy(model: Any, labels: Tensor, **inputs: Tensor) -> float:
    return float((model(**inputs).logits.argmax(-1) == labels).float().mean())


def of_rank(
    build: Callable[[Any, int], Any], network: nn.Module, parameters: int, largest: int
) -> Callable[[Any], Any]:
    """``build`` with the rank whose trained numbers are nearest to ``parameters``."""

    def distance(rank: int) -> int:
        return abs(trained_parameters(build(copy.deepcopy(network), rank)) - parameters)

    rank = min(range(1, largest + 1), key=distance)
    return lambda model: build(model, rank)


def everything(model: Any) -> Any:
    """Full fine-tuning: what pre-training trained."""
    return model


def nothing(model: Any) -> Any:
    """The network as it is."""
    return model.requires_grad_(False)


def peft_lora(model: Any, rank: int, targets: list[str], saved: list[str], **options: Any) -> Any:
    """PEFT's LoRA with a scale of 1; the modules ``saved`` are trained whole."""
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": targets, "modules_to_save": saved, **options}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **settings))
