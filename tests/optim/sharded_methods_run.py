"""Checks in as many processes as torchrun starts that methods on sharded matrices give what they give on whole ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from eckart.optim.contract import Step
from eckart.optim.dct_adamw import DCTProjection
from eckart.optim.lift import LIFT
from eckart.optim.sharding import whole
from processes import run


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_method(method, shape: tuple[int, int], sharded) -> None:
    """Five updates, in which the method selects three times."""
    weight = draw(*shape)
    alone, together = method.allocate(weight), method.allocate(sharded(weight))
    for number in range(1, 6):
        gradient, step = draw(*shape, seed=number), Step(number)
        expected = method.direction(gradient, alone, step, weight)
        found = method.direction(sharded(gradient), together, step, sharded(weight))
        tolerance = 1e-5 if method.bits == 32 else 0.5
        assert torch.allclose(found.full_tensor(), expected, atol=tolerance), (method, shape, number)
        assert torch.equal(alone["indices"], together["indices"]), (method, shape, number)
        mask = method.decay_mask(weight, alone)
        if mask is not None:
            assert torch.equal(whole(method.decay_mask(sharded(weight), together)), mask)
        weight = weight - 0.1 * expected


def main() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.clone(), mesh, [Shard(0)])

    for shape in ((31, 20), (20, 31)):
        for bits in (32, 8):
            for transform in ("dct3", "dct2"):
                options = {"transform": transform, "error_feedback": True, "norm": 2, "update_interval": 2}
                check_method(DCTProjection(rank=4, bits=bits, **options), shape, sharded)
            for selection in ("lift", "magnitude", "gradient", "random"):
                options = {"filter_rank": 3, "selection": selection, "update_interval": 2}
                check_method(LIFT(rank=2, bits=bits, **options), shape, sharded)
    check_method(LIFT(rank=2, filter_rank=4, update_interval=2), (150, 120), sharded)


if __name__ == "__main__":
    run(main)
