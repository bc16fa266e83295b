"""Checks that the wavelet transform of sharded gradients, along either side, is that of whole ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from eckart.optim.contract import Step
from eckart.optim.gwt import GWT
from processes import run


def main() -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    for shape in ((7, 12), (13, 6), (1, 8)):
        for side in ("left", "right"):
            if shape[0] == 1 and side == "left":
                continue
            method = GWT(rank=2, side=side)
            generator = torch.Generator().manual_seed(0)
            parts = state = None
            for t in range(1, 4):
                gradient = torch.randn(shape, generator=generator)
                sharded = distribute_tensor(gradient, mesh, [Shard(0)])
                if state is None:
                    state, parts = method.allocate(gradient), method.allocate(sharded)
                expected = method.direction(gradient, state, Step(t), gradient)
                found = method.direction(sharded, parts, Step(t), sharded)
                assert found.placements == sharded.placements
                assert found.to_local().shape == sharded.to_local().shape
                assert torch.allclose(found.full_tensor(), expected, atol=1e-6), (shape, side, t)
                assert torch.allclose(parts["norm"], state["norm"])
                rows, columns = state["first"].shape
                assert parts["first"].to_local().numel() <= -(-rows // size) * columns


if __name__ == "__main__":
    run(main)
