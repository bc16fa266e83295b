"""Atomic feature mimicking of two models that predict clicks: DeepFM and a deep and cross network.

Ten categories of 500 ids, whose frequencies fall like Zipf's, and clicks from a logit of low rank in random vectors of
the ids, so that the truth is known and the best AUC with it. Embedding tables and the second layer of the MLP are given
low ranks: by the principal components of what they put out, by the truncated SVD of the weights, and as random
factors; judged before and after an epoch of further training, and beside small networks that are trained from the
start. Mean and deviation over seeds. Rows are added to results/recommenders.json one by one:

python benchmarks/recommenders.py [--only NAME ...] [--smoke] [--draw]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from adapter_job import command, write_table
from common import RESULTS, environment
from small_size import over_seeds, step
from torch import Tensor, nn

from eckart.compression.mimicking import mimic
from eckart.structures import EckartWarning

PAGE = Path(__file__).parents[1] / "docs" / "compress-small.md"
Kind = Literal["deepfm", "dcn"]
KINDS: tuple[Kind, ...] = ("deepfm", "dcn")
RANKS = (4, 2, 1)  # of embeddings of 16; the hidden layer of 64 has four times as many
DENSE = 5  # features that are numbers


@dataclass(frozen=True)
class Size:
    """How much work a row is."""

    seeds: int = 3
    fields: int = 10
    ids: int = 500
    width: int = 16
    hidden: int = 64
    clicks: int = 40000
    epochs: int = 4
    batch: int = 200


SMOKE = Size(2, 3, 20, 16, 64, 400, 1, 50)


@dataclass(frozen=True)
class Clicks:
    """Ids (n, fields), numbers (n, 5), what was clicked (n,), and the logit that it was drawn from (n,)."""

    ids: Tensor
    numbers: Tensor
    clicked: Tensor
    logit: Tensor


def clicks(size: Size, seed: int) -> Clicks:
    """From one world; another seed draws other users in it."""
    world, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    latent = torch.randn(size.fields, size.ids, 2, generator=world)
    odds = 1 / torch.arange(1, size.ids + 1).float()
    count = size.clicks
    ids = torch.multinomial(odds.expand(size.fields, size.ids), count, replacement=True, generator=generator).T
    numbers = torch.randn(count, DENSE, generator=generator)
    vectors = torch.stack([latent[i, ids[:, i]] for i in range(size.fields)], 1)
    logit = _pairs(vectors) / size.fields**0.5 + numbers[:, 0]
    return Clicks(ids, numbers, (torch.rand(count, generator=generator) < logit.sigmoid()).float(), logit)


def _pairs(vectors: Tensor) -> Tensor:
    """The sum of all inner products of two different fields' vectors (n, fields, width) -> (n,)."""
    return (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2


class Recommender(nn.Module):
    """Embeddings and numbers, an MLP, and beside it the factorisation machine or the cross network.

    Args:
        kind: "deepfm" (all pairwise inner products) or "dcn" (x <- x0 (w x + b) + x, twice).
        size: of the tables and the MLP.
        width: of the embeddings; None for the size's.
    """

    def __init__(self, kind: Kind, size: Size, width: int | None = None) -> None:
        super().__init__()
        width = size.width if width is None else width
        inputs = size.fields * width + DENSE
        self.kind = kind
        self.tables = nn.ModuleList(nn.Embedding(size.ids, width) for _ in range(size.fields))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)
        self.first, self.second = nn.Linear(inputs, size.hidden), nn.Linear(size.hidden, size.hidden)
        crossed = inputs if kind == "dcn" else 0
        self.cross = nn.ModuleList(nn.Linear(inputs, 1) for _ in range(2 if crossed else 0))
        self.out = nn.Linear(size.hidden + crossed, 1)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        vectors = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        start = torch.cat([vectors.flatten(1), numbers], 1)
        hidden = self.second(self.first(start).relu()).relu()
        if self.kind == "deepfm":
            return self.out(hidden)[:, 0] + _pairs(vectors)
        crossed = start
        for layer in self.cross:
            crossed = start * layer(crossed) + crossed
        return self.out(torch.cat([hidden, crossed], 1))[:, 0]


def fit(model: nn.Module, size: Size, epochs: int, rate: float, seed: int) -> nn.Module:
    data, generator = clicks(size, 1), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.ids), generator=generator).split(size.batch):
            logit = model(data.ids[batch], data.numbers[batch])
            step(optimizer, F.binary_cross_entropy_with_logits(logit, data.clicked[batch]))
    return model.eval()


def trained(kind: Kind, size: Size, seed: int, width: int | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recommender(kind, size, width)
    return fit(model, size, size.epochs, 1e-3, seed)


def auc(model: nn.Module | None, size: Size) -> float:
    """On other users; of the true logit without a model."""
    from sklearn.metrics import roc_auc_score

    data = clicks(size, 2)
    with torch.no_grad():
        logit = data.logit if model is None else model(data.ids, data.numbers)
    return float(roc_auc_score(data.clicked.numpy(), logit.numpy()))


Make = Callable[[Size, int], nn.Module]


def factored(kind: Kind, rank: int, start: Literal["mimicked", "weights", "random"]) -> Make:
    """Low-rank tables and a low-rank hidden layer."""

    def make(size: Size, seed: int) -> nn.Module:
        model, data = trained(kind, size, seed), clicks(size, 1)
        ranks = {**{f"tables.{i}": rank for i in range(size.fields)}, "second": 4 * rank}
        batches = list(zip(data.ids.split(2000), data.numbers.split(2000), strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EckartWarning)
            mimic(model, batches if start == "mimicked" else None, ranks)
        if start == "random":
            generator = torch.Generator().manual_seed(seed)
            for parameter in (p for name in ranks for p in model.get_submodule(name).parameters()):
                nn.init.normal_(parameter, std=0.1, generator=generator)
        return model

    return make


def contenders() -> dict[str, Make]:
    found: dict[str, Make] = {}
    for kind in KINDS:
        found[f"{kind} dense"] = lambda size, seed, kind=kind: trained(kind, size, seed)
        for rank in RANKS:
            found[f"{kind} afm-ctr, rank {rank}"] = factored(kind, rank, "mimicked")
            found[f"{kind} truncated weights, rank {rank}"] = factored(kind, rank, "weights")
            found[f"{kind} random factors, rank {rank}"] = factored(kind, rank, "random")
            found[f"{kind} narrow embeddings, width {rank}"] = lambda size, seed, kind=kind, rank=rank: trained(
                kind, size, seed, rank
            )
    return found


def run(size: Size, name: str, make: Make) -> dict[str, Any]:
    """One row of the table."""
    figures = []
    for seed in range(size.seeds):
        model = make(size, seed)
        figures.append({"auc": auc(model, size), "parameters": float(sum(p.numel() for p in model.parameters()))})
        figures[-1]["auc tuned"] = auc(fit(model, size, 1, 3e-4, seed + 100), size)
    key, value = ("method", "afm-ctr") if "afm-ctr" in name else ("baseline", name)
    return {key: value, "best auc": auc(None, size), **over_seeds(figures), **environment()}


def table(found: dict[str, Any]) -> None:
    def shown(key: str) -> Callable[[str, dict[str, Any]], str]:
        return lambda name, row: f"{row['test'][key]:.4f} ± {row['spread'][key]:.4f}"

    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "model": lambda name, row: name if "method" in row else f"*{name}*",
        "AUC": shown("auc"),
        "after one more epoch": shown("auc tuned"),
        "parameters": lambda name, row: f"{row['test']['parameters']:,.0f}",
    }
    write_table(PAGE, columns, found, "recommenders")


def main() -> None:
    known = contenders()

    def measure(name: str, smoke: bool) -> dict[str, Any]:
        return run(SMOKE if smoke else Size(), name, known[name])

    command(RESULTS / "recommenders.json", list(known), measure, table)


if __name__ == "__main__":
    main()
