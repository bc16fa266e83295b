"""Trains a small model under FSDP2 with every optimizer, in as many processes as torchrun starts.

Arguments: "start", "resume" or "accelerate", and a directory. Started, it makes BEFORE steps, saves a distributed
checkpoint and makes AFTER more; resumed, it makes those from the checkpoint; with accelerate, which shards a model
whose optimizer is there already, it makes all of them. The weights are written for the test to read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from eckart import catalog
from eckart.optim import ProjectedOptimizer, low_rank_groups, optimizer_class
from processes import run

METHODS = [(row.name, bits) for row in catalog.select(family="optim") if row.status != "planned" for bits in (32, 8)]
BEFORE, AFTER, EXAMPLES, WIDTH, INNER = 4, 3, 12, 96, 131


class Residual(nn.Module):
    """Matrices taller than wide and wider than tall, rows that do not divide evenly, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.Tanh(), nn.LayerNorm(INNER), nn.Linear(INNER, WIDTH))
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block(x)
        return self.head(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def optimizer(model: nn.Module, method: str, bits: int) -> ProjectedOptimizer:
    kind = optimizer_class(method, bits=bits)
    short = {"update_interval": 3, "warmup": 5}  # what the method does later than in the first steps is to be seen
    options = {name: value for name, value in short.items() if name in kind.method.__dataclass_fields__}
    return kind(low_rank_groups(model, rank=4, where="layers.*"), lr=0.003, **options)


def train(model: nn.Module, chosen: ProjectedOptimizer, first: int, steps: int, share: slice) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(EXAMPLES, WIDTH, generator=generator), torch.randn(EXAMPLES, 5, generator=generator)
        (model(x[share]) - y[share]).square().mean().backward()
        chosen.step()
        chosen.zero_grad()


def with_accelerate(model: nn.Module, chosen: ProjectedOptimizer) -> tuple[nn.Module, Any]:
    """As accelerate's FSDP2 prepares them.

    It takes FSDP to be a matter of accelerators alone, so on processors it is told that it is at work; what it then
    does to model and optimizer is the same.
    """
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Sequential"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    sharded, prepared = accelerator.prepare(model, chosen)
    return sharded, prepared


def by_hand(model: nn.Module, method: str, bits: int, checkpoint: Path, phase: str, share: slice) -> None:
    for block in model.layers:
        fully_shard(block)
    fully_shard(model.head)
    chosen = optimizer(model, method, bits)
    if phase == "start":
        train(model, chosen, 0, BEFORE, share)
    weights, state = get_state_dict(model, chosen)
    saved = {"model": weights, "optimizer": state}
    if phase == "start":
        dcp.save(saved, checkpoint_id=checkpoint)
    else:
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(model, chosen, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(model, chosen, BEFORE, AFTER, share)


def main() -> None:
    phase, directory = sys.argv[1], Path(sys.argv[2])
    rank, size = dist.get_rank(), dist.get_world_size()
    share = slice(rank * EXAMPLES // size, (rank + 1) * EXAMPLES // size)
    for method, bits in METHODS:
        model = build()
        if phase == "accelerate":
            model, chosen = with_accelerate(model, optimizer(model, method, bits))
            train(model, chosen, 0, BEFORE + AFTER, share)
        else:
            by_hand(model, method, bits, directory / f"{method}-{bits}", phase, share)
        found = {name: p.detach().full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}
        if rank == 0:
            torch.save(found, directory / f"{method}-{bits}-{phase}-{size}.pt")


if __name__ == "__main__":
    run(main)
