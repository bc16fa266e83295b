"""Checks in as many processes as torchrun starts that heads and single entries are found in sharded matrices too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from eckart.optim.contract import Step
from eckart.optim.entries import add_entries, entries, gathered_rows, set_entries, top_entries
from eckart.optim.galore_plus import GaLorePlus
from processes import run

SHAPES = [(28, 20), (20, 28), (2, 30)]  # uneven; fewer rows than there are processes


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_entries(shape: tuple[int, int], axis: int, sharded) -> None:
    """Of a matrix whose rows, or as a transposed gradient's, whose columns are sharded."""
    plain = draw(*shape)
    apart = sharded(plain) if axis == 0 else sharded(plain.mT).mT
    index = torch.randperm(plain.numel(), generator=torch.Generator().manual_seed(1))[:17]
    assert torch.equal(entries(apart, index), plain.flatten()[index])
    rows = torch.tensor([1, 0])
    assert torch.equal(gathered_rows(apart, rows), plain[rows])
    for count in (5, plain.numel()):
        for found, expected in zip(top_entries(apart, count), plain.flatten().topk(count), strict=True):
            assert torch.equal(found, expected)
    values = torch.arange(17, dtype=torch.float64)
    add_entries(apart, index, values)
    expected = plain.flatten().index_add(0, index, values)
    assert torch.equal(apart.full_tensor().flatten(), expected)
    set_entries(apart, index, values)
    assert torch.equal(apart.full_tensor().flatten(), expected.index_copy(0, index, values))


def check_method(method: GaLorePlus, shape: tuple[int, int], sharded) -> None:
    weight = draw(*shape)
    alone, together = method.allocate(weight), method.allocate(sharded(weight))
    for number in range(1, 7):
        gradient, step = draw(*shape, seed=number), Step(number)
        expected = method.direction(gradient, alone, step, weight)
        found = method.direction(sharded(gradient), together, step, sharded(weight))
        assert found.placements == sharded(weight).placements
        assert torch.allclose(found.full_tensor(), expected, atol=1e-8), (method, shape, number)
        assert torch.equal(together["entries"], alone["entries"]), (method, shape, number)


def main() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.clone(), mesh, [Shard(0)])

    for shape in SHAPES:
        for axis in (0, 1):
            check_entries(shape, axis, sharded)
    for side in ("left", "right"):
        for shape in SHAPES[:2]:
            method = GaLorePlus(rank=5, side=side, head_dim=4, density=0.1, warmup=3, update_interval=2)
            check_method(method, shape, sharded)


if __name__ == "__main__":
    run(main)
