"""LaMDA: the spectral start, columns that are frozen to the bit, and ranks by spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny_models
from eckart.adapters import EckartConfig
from eckart.adapters.lamda import LaMDA, share_out
from eckart.adapters.site import Site

IDS = torch.arange(24).reshape(2, 12) % 60
SITE = Site("layer", "linear", 12, 10)


def weight(rows: int = 12, columns: int = 10, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return (u * decay ** torch.arange(columns)) @ v


def made(method: LaMDA | None = None, scale: float = 0.5):
    method = LaMDA(solver="exact") if method is None else method
    adapter = method.build(SITE, 3, scale)
    adapter.initialize(weight(), None, torch.Generator().manual_seed(0))
    return adapter


def test_the_spectral_start():
    adapter, w = made(), weight()
    assert adapter.num_trainable() == LaMDA().trainable(SITE, 3) == 9 + 3 * 12
    assert float(adapter.delta(w).detach().abs().max()) < 1e-7
    u, s, vh = np.linalg.svd(w.double().numpy(), full_matrices=False)
    product = 0.5 * adapter.left.detach().double() @ adapter.core.detach().double() @ adapter.right.double()
    assert np.abs(product.numpy() - (u[:, :3] * s[:3]) @ vh[:3]).max() < 1e-6
    residual = w.double() - product
    assert abs(float(residual.norm()) - np.sqrt((s[3:] ** 2).sum())) < 1e-6
    for gram in (adapter.left.mT @ adapter.left, adapter.right @ adapter.right.mT):
        assert torch.allclose(gram, torch.eye(3), atol=1e-5)


def test_the_start_of_the_released_code():
    adapter, base, x = made(LaMDA(init="lora")), nn.Linear(10, 12), torch.randn(4, 10)
    assert torch.equal(adapter(x, base), base(x))
    assert float(adapter.left.detach().abs().max()) == 0
    assert 0 < float(adapter.core.detach().abs().max()) <= 3**-0.5
    assert 0 < float(adapter.right.abs().max()) <= 10**-0.5


def test_the_update():
    adapter, w, base = made(), weight(), nn.Linear(10, 12)
    start = (adapter.left @ adapter.core @ adapter.right).detach().double()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    expected = 0.5 * ((adapter.left.double() @ adapter.core.double() @ adapter.right.double()) - start).detach()
    assert torch.allclose(adapter.delta(w).double(), expected, atol=1e-5)
    x = torch.randn(4, 10, generator=generator)
    assert torch.allclose(adapter(x, base), base(x) + x @ expected.float().mT, atol=1e-4)


def test_columns_are_frozen_to_the_bit_under_momentum_and_decay():
    config = EckartConfig(method="lamda", r=4, options={"frozen_by": 0.5})
    model = get_peft_model(tiny_models.FAMILIES["llama"](), config).train()
    coordinator = model.base_model.coordinators()["default"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    right = [adapter.right.clone() for adapter in coordinator.members]
    for step in range(1, 13):
        frozen = min(4, int(4 * (step - 1) / 6))
        before = [adapter.left.detach().clone() for adapter in coordinator.members]
        core = [adapter.core.detach().clone() for adapter in coordinator.members]
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.on_step(step, 12)
        optimizer.zero_grad()
        for adapter, old, old_core in zip(coordinator.members, before, core, strict=True):
            assert torch.equal(adapter.left[:, :frozen], old[:, :frozen])
            if frozen < 4:
                assert not torch.equal(adapter.left[:, frozen:], old[:, frozen:])
            assert not torch.equal(adapter.core, old_core)
    assert not any(adapter.left.requires_grad for adapter in coordinator.members)
    assert all(torch.equal(adapter.right, old) for adapter, old in zip(coordinator.members, right, strict=True))


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_resumed_run_holds_the_same_columns(evaluated):
    method, adapter = LaMDA(frozen_by=0.5), made()
    coordinator = method.coordinate({"layer": adapter}, 0)
    if evaluated:  # before anything is loaded
        coordinator.before_forward({}, training=False)
        adapter.left.data *= 2
    coordinator.state["share"] = torch.tensor(2 / 3, dtype=torch.float64)  # as a checkpoint brings it
    coordinator.before_forward({}, training=True)
    held = adapter.left.detach().clone()
    adapter.left.data += 1
    with torch.no_grad():
        coordinator.on_step(5, 12)
    assert torch.equal(adapter.left[:, :2], held[:, :2])
    assert torch.equal(adapter.left[:, 2:], held[:, 2:] + 1)


def test_ranks_follow_the_spectrum_and_meet_the_budget():
    weights = {
        "flat": weight(decay=1.0),
        "also flat": weight(decay=1.0),
        "falling": weight(decay=0.9),
        "steep": weight(decay=0.3),
    }
    sites = {name: Site(name, "linear", 12, 10) for name in weights}
    ranks = LaMDA(ranks_by="spectrum", solver="exact").ranks(sites, {}, 3, weights.__getitem__)
    assert sum(ranks.values()) == 12
    assert ranks["flat"] == ranks["also flat"] > ranks["falling"] > ranks["steep"] == 1
    assert LaMDA().ranks(sites, {}, 3, weights.__getitem__) is None


def test_sharing_out():
    assert share_out({"a": 0.0, "b": 0.0}, 6, {"a": 9, "b": 9}) == {"a": 3, "b": 3}
    assert share_out({"a": 1.0, "b": 1.0}, 20, {"a": 4, "b": 3}) == {"a": 4, "b": 3}
    assert share_out({"a": 5.0, "b": 1.0}, 12, {"a": 99, "b": 99}) == {"a": 10, "b": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_by": 0.0}, "frozen_by must be a share"),
        ({"init": "zeros"}, "init must be one of svd, lora"),
        ({"ranks_by": "size"}, "ranks_by must be one of fixed, spectrum"),
        ({"solver": "fast"}, "solver must be one of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LaMDA(**options)
