"""Overlaps of subspaces: against known subspaces, against the exact SVD, and from disk as from memory."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_checkpoints
import tiny_models
from eckart import linalg
from eckart.analysis import subspace_overlaps
from eckart.models import linears


def _basis(size: int, rank: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=torch.Generator().manual_seed(seed))).Q


def test_shared_outputs_and_foreign_inputs():
    """Two weights write the same three directions, a third one others; none reads what another reads."""
    left, right = _basis(40, 6, 0), _basis(90, 9, 1)
    strong = torch.tensor([3.0, 2.0, 1.5])
    weights = [
        (u * strong) @ v.mT
        for u, v in [(left[:, :3], right[:, :3]), (left[:, :3].flip(1), right[:, 3:6]), (left[:, 3:], right[:, 6:])]
    ]
    [found] = subspace_overlaps(tiny_models.of_weights(*weights), rank=3, progress=False)
    assert found.names == ("layers.0.0", "layers.1.0", "layers.2.0")
    torch.testing.assert_close(
        found.left, torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).double(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(found.right, torch.eye(3).double(), atol=1e-5, rtol=1e-5)
    assert found.adjacent()[0] == pytest.approx([1, 0], abs=1e-5)
    assert found.mean() == pytest.approx((1 / 3, 0), abs=1e-5)
    assert found.chance == (3 / 40, 3 / 90)
    assert json.loads(json.dumps(found.to_dict()))["pairs"]["left"][0][1] == pytest.approx(1, abs=1e-5)


def test_random_weights_overlap_by_chance():
    draw = torch.Generator().manual_seed(5)
    [found] = subspace_overlaps(
        tiny_models.of_weights(*(torch.randn(64, 96, generator=draw) for _ in range(6))), rank=8, progress=False
    )
    assert found.mean() == pytest.approx(found.chance, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_kind_against_the_exact_decomposition(family):
    model = tiny_models.FAMILIES[family]()
    refs = {ref.name: ref for ref in linears(model).linears}
    found = subspace_overlaps(model, rank=5, progress=False)
    assert sorted(name for one in found for name in one.names) == sorted(refs)
    for one in found:
        u, v = zip(*(torch.linalg.svd(refs[name].weight.detach().double())[::2] for name in one.names), strict=True)
        assert float(one.left[0, 1]) == pytest.approx(
            float(linalg.subspace_overlap(u[0][:, :5], u[1][:, :5])), abs=1e-4
        )
        assert float(one.right[0, 1]) == pytest.approx(
            float(linalg.subspace_overlap(v[0][:5].mT, v[1][:5].mT)), abs=1e-4
        )


def test_from_disk_as_from_memory(tmp_path):
    model = tiny_checkpoints.model()
    path = tiny_checkpoints.write(tmp_path / "model", model, with_tokenizer=False)
    for one, other in zip(
        subspace_overlaps(path, rank=4, progress=False), subspace_overlaps(model, rank=4, progress=False), strict=True
    ):
        assert one.to_dict() == other.to_dict()


def test_bad_requests():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        subspace_overlaps(tiny_checkpoints.model(), rank=0, progress=False)
    weight = torch.eye(4)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^layers\.1\.0 has NaN or Inf"):
        subspace_overlaps(tiny_models.of_weights(torch.eye(4), weight), progress=False)
    [found] = subspace_overlaps(tiny_models.of_weights(torch.eye(4), torch.eye(4)), rank=9, progress=False)
    assert found.rank == 4
