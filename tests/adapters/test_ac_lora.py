"""AC-LoRA: what is kept, what is drawn again, and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.ac_lora import ACLoRA, renew
from eckart.adapters.site import Site


def matrix(rows: int = 40, columns: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return (u * 0.8 ** torch.arange(columns)) @ v


def made(method: ACLoRA) -> dict:
    adapters = {}
    for index in range(2):
        adapter = method.build(Site(f"layer{index}", "linear", 12, 10), 3, 0.5)
        adapter.initialize(torch.zeros(12, 10), None, torch.Generator().manual_seed(index))
        adapters[f"layer{index}"] = adapter
    return adapters


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_the_signal_stays_and_the_noise_has_its_variance(energy):
    m = matrix()
    s = np.linalg.svd(m.double().numpy(), compute_uv=False)
    count = max(1, int((np.cumsum(s**2) < energy * np.cumsum(s**2)[-1]).sum()))
    u, values, vh = np.linalg.svd(m.double().numpy(), full_matrices=False)
    signal = (u[:, :count] * values[:count]) @ vh[:count]
    drawn = [renew(m, energy, torch.Generator().manual_seed(i)).double().numpy() - signal for i in range(200)]
    residual = m.double().numpy() - signal
    # 200 draws of 1200 numbers: the deviation is known to 0.15 %, each mean to 7 % of it.
    assert abs(np.std(drawn) / residual.std() - 1) < 0.01
    assert np.abs(np.mean(drawn, axis=0)).max() < 0.4 * residual.std()
    if energy == 1.0:
        assert count == 29


def test_more_energy_keeps_more():
    m = matrix()
    noise = [float((renew(m, p, torch.Generator().manual_seed(0)) - m).norm()) for p in (0.2, 0.6, 0.9, 0.999)]
    assert noise == sorted(noise, reverse=True)


def test_a_zero_factor_stays_zero():
    assert torch.equal(renew(torch.zeros(5, 3), 0.5, torch.Generator()), torch.zeros(5, 3))
    method = ACLoRA(every=1, schedule="linear")
    adapters = made(method)
    base, x = nn.Linear(10, 12), torch.randn(4, 10)
    with torch.no_grad():
        method.coordinate(adapters, 0).on_step(1, 10)
    assert torch.equal(adapters["layer0"](x, base), base(x))


def test_the_threshold():
    linear = ACLoRA(schedule="linear").coordinate(made(ACLoRA()), 0)
    assert [round(linear.energy(t, 10), 4) for t in (0, 5, 10)] == [0.7, 0.845, 0.99]
    by_loss = ACLoRA().coordinate(made(ACLoRA()), 0)
    with pytest.raises(RuntimeError, match="pass labels, or use schedule='linear'"):
        by_loss.energy(1, 10)
    by_loss.observe(torch.tensor(4.0))
    assert by_loss.energy(5, 10) == 0
    by_loss.observe(torch.tensor(1.0))
    expected = 1 - ((0.9 * 4 + 0.1 * 1) / 4) ** 1.5
    assert abs(by_loss.energy(5, 10) - expected) < 1e-6
    absolute = ACLoRA(relative=False).coordinate(made(ACLoRA()), 0)
    absolute.observe(torch.tensor(0.25))
    assert abs(absolute.energy(10, 10) - (1 - 0.25**2)) < 1e-6


def test_restarts_come_when_they_should_and_repeat_themselves():
    method = ACLoRA(every=2, schedule="linear")
    runs = []
    for _ in range(2):
        adapters = made(method)
        for adapter in adapters.values():
            adapter.left.data = torch.randn(12, 3, generator=torch.Generator().manual_seed(4))
        coordinator = method.coordinate(adapters, seed=7)
        changed = []
        for step in range(1, 11):
            before = adapters["layer0"].right.detach().clone()
            with torch.no_grad():
                coordinator.on_step(step, 10)
            changed.append(not torch.equal(before, adapters["layer0"].right))
        assert changed == [False, True] * 4 + [False, False]  # not in the last tenth
        runs.append([p.detach().clone() for a in adapters.values() for p in a.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][2])


def test_the_formula_and_the_update():
    adapter = made(ACLoRA())["layer0"]
    assert adapter.num_trainable() == ACLoRA().trainable(adapter.site, 3) == 3 * 22
    adapter.left.data = torch.randn(12, 3, generator=torch.Generator().manual_seed(4))
    expected = 0.5 * adapter.left.detach().double().numpy() @ adapter.right.detach().double().numpy()
    assert np.abs(adapter.delta(torch.zeros(1)).detach().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"schedule": "cosine"}, "schedule must be one of loss, linear"),
        ({"start": 0.9, "end": 0.8}, "start and end must rise"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ACLoRA(**options)


def test_a_loss_that_is_not_finite_is_passed_over():
    coordinator = ACLoRA().coordinate(made(ACLoRA()), 0)
    coordinator.observe(torch.tensor(1.0))
    before = coordinator.energy(5, 10)
    for value in (float("nan"), float("inf")):
        coordinator.observe(torch.tensor(value))
    assert coordinator.energy(5, 10) == before
