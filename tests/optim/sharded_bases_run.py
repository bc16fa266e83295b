"""Checks in as many processes as torchrun starts that sharded matrices train the basis that whole ones do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from eckart.optim.coap import COAP
from eckart.optim.contract import Step
from eckart.optim.online_subspace_descent import OnlineSubspace
from processes import run

METHODS = [
    COAP(rank=4, update_interval=1, reproject_factor=3, basis_lr=1.0, restore_state=True),
    COAP(rank=4, update_interval=1, basis_lr=1.0, orthonormalize=True, rule="lion"),
    COAP(rank=4, update_interval=1, normalize=False, rule="adafactor"),
    OnlineSubspace(rank=4, update_interval=20, orthogonality=1.0, rule="lion"),
    OnlineSubspace(rank=4, update_interval=2, basis_rule="sgd"),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(method, shape: tuple[int, int], sharded) -> None:
    weight = draw(*shape)
    alone, together = method.allocate(weight), method.allocate(sharded(weight))
    for number in range(1, 6):
        gradient, step, before = draw(*shape, seed=number), Step(number), alone["basis"].clone()
        expected = method.direction(gradient, alone, step, weight)
        found = method.direction(sharded(gradient), together, step, sharded(weight))
        assert found.placements == sharded(weight).placements
        assert torch.allclose(found.full_tensor(), expected, atol=1e-8), (method, shape, number)
        assert torch.allclose(together["basis"], alone["basis"], atol=1e-10), (method, shape, number)
    assert not torch.allclose(before, alone["basis"], atol=1e-3)  # the last step moved it


def main() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.clone(), mesh, [Shard(0)])

    for method in METHODS:
        for shape in ((31, 20), (20, 31)):
            check(method, shape, sharded)


if __name__ == "__main__":
    run(main)
