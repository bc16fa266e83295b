"""EVA against the principal components of the inputs, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.eva import EVA, eva_ranks, principal_components
from eckart.adapters.site import Site
from eckart.models.calibrate import Statistics

OUT, IN, RANK, TOKENS = 12, 10, 3, 60
SITE = Site("layer", "linear", OUT, IN)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int = IN, seed: int = 1, decay: float = 1.5) -> torch.Tensor:
    """Of a large mean, as activations have it, and variances that fall."""
    mixed = (randn(TOKENS, width, seed=seed) * torch.logspace(0, -decay, width)) @ randn(width, width, seed=seed + 1)
    return (mixed + 3 * randn(width, seed=seed + 2)).double()


def seen(x: torch.Tensor) -> Statistics:
    return Statistics(count=x.shape[0], gram=x.mT @ x, mean=x.mean(0))


def start(x: torch.Tensor | None = None, scale: float = 1.0, **options):
    adapter = EVA(**options).build(SITE, RANK, scale)
    weight = randn(OUT, IN)
    adapter.initialize(weight, seen(inputs() if x is None else x), torch.Generator())
    return adapter, weight


def components(x: torch.Tensor, centre: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors of the inputs, and variances."""
    values = x.numpy() - (x.numpy().mean(0) if centre else 0)
    _, s, vh = np.linalg.svd(values, full_matrices=False)
    return vh, s**2 / x.shape[0]


@pytest.mark.parametrize("centre", [True, False])
def test_a_is_the_principal_components(centre):
    adapter, _ = start(centre=centre)
    vh, variances = components(inputs(), centre)
    right = adapter.right.detach().double().numpy()
    # float32 factors, signs aside.
    np.testing.assert_allclose(np.abs(np.diag(right @ vh[:RANK].T)), np.ones(RANK), atol=1e-6)
    np.testing.assert_allclose(right @ right.T, np.eye(RANK), atol=1e-6)
    _, found, total = principal_components(seen(inputs()), RANK, centre=centre)
    np.testing.assert_allclose(found.numpy(), variances[:RANK], rtol=1e-9)
    assert total == pytest.approx(variances.sum(), rel=1e-9)


def test_the_mean_makes_a_difference():
    centred, plain = (start(centre=centre)[0].right.detach() for centre in (True, False))
    assert abs(float(centred[0] @ plain[0])) < 0.9


def test_whitening():
    x = inputs()
    plain = start(x)[0].right.detach().double()
    _, variances = components(x)
    unit = start(x, whiten="variance")[0].right.detach().double()
    inner = x @ unit.mT
    np.testing.assert_allclose(inner.var(dim=0, correction=0).numpy(), np.ones(RANK), rtol=1e-5)
    code = start(x, whiten="code")[0].right.detach().double()
    expected = plain.numpy() / np.sqrt(np.sqrt(TOKENS * variances[:RANK]))[:, None]
    np.testing.assert_allclose(code.numpy(), expected, atol=1e-6)


def test_nothing_changes_at_the_start_and_delta_is_what_forward_does():
    adapter, weight = start(scale=0.5)
    base, x = nn.Linear(IN, OUT), randn(5, IN, seed=7)
    base.weight.data = weight
    assert torch.equal(adapter(x, base), base(x))
    adapter.left.data += 0.1
    assert torch.allclose(adapter(x, base), x @ (weight + adapter.delta(weight)).mT + base.bias, atol=1e-5)
    assert adapter.num_trainable() == EVA().trainable(SITE, RANK) == RANK * (OUT + IN)


def test_the_gradient_of_b_is_largest_for_these_directions():
    """The paper's argument: E ||dL/dB||² is the variance that A keeps, for gradients that know nothing of x."""
    x = inputs()
    centred = (x - x.mean(0)).float()
    adapter, _ = start(x)
    kept = (centred @ adapter.right.detach().mT).square().sum()
    for seed in range(5):
        other, _ = torch.linalg.qr(randn(IN, RANK, seed=seed))
        assert (centred @ other).square().sum() < kept


def test_a_gradient_reaches_both_factors_in_two_steps():
    adapter, weight = start()
    base, x, target = nn.Linear(IN, OUT), randn(5, IN, seed=7), randn(5, OUT, seed=8)
    base.weight.data = weight
    right = adapter.right.detach().clone()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        (adapter(x, base) * target).sum().backward()
        optimizer.step()
    assert float(adapter.left.detach().abs().min()) > 0
    assert not torch.equal(adapter.right.detach(), right)


def test_inputs_of_too_little_variance():
    for x in (torch.ones(5, IN).double(), torch.zeros(5, IN).double(), inputs()[:2]):
        for whiten in ("none", "variance", "code"):
            right = start(x, whiten=whiten)[0].right.detach()
            assert bool(right.isfinite().all())
            assert float(right.norm(dim=1).min()) > 0


def layers() -> dict[str, Statistics]:
    shared = seen(inputs())
    key = Statistics(shared.count, gram=shared.gram, mean=shared.mean)
    return {"q": shared, "k": key, "up": seen(inputs(14, 20, 0.2))}


@pytest.mark.parametrize("metric", ["ratio", "raw", "sum", "max"])
@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_ranks_go_to_the_largest_shares_of_variance(metric, rho):
    found = eva_ranks(layers(), RANK, rho, metric=metric)
    assert list(found) == ["q", "k", "up"]
    assert sum(found.values()) == 3 * RANK
    assert max(found.values()) <= round(rho * RANK)
    scores = {}
    for name, x in {"q": inputs(), "k": inputs(), "up": inputs(14, 20, 0.2)}.items():
        _, variances = components(x)
        capped = variances[: round(rho * RANK)]
        divisor = {"ratio": variances.sum(), "raw": 1.0, "sum": capped.sum(), "max": variances[0]}[metric]
        scores[name] = capped / divisor
    pooled = sorted(((value, name) for name, values in scores.items() for value in values), reverse=True)[: 3 * RANK]
    expected = {name: sum(owner == name for _, owner in pooled) for name in scores}
    if metric == "max" and rho > 1:  # the first values tie at 1 and fall within every budget
        assert min(found.values()) >= 1
    # q and k have the same values: which of the two gets the odd one is a tie, settled for the first.
    assert found["up"] == expected["up"]
    assert 0 <= found["q"] - found["k"] <= 1
    if rho == 1:
        assert set(found.values()) == {RANK}


def test_a_wide_input():
    """Fewer tokens than columns, and values below the cap of which only the sum is known."""
    found = eva_ranks({"a": seen(inputs(300, 30, 2.0)), "b": seen(inputs(300, 40, 0.5))}, 8)
    scores = []
    for name, seed, decay in (("a", 30, 2.0), ("b", 40, 0.5)):
        _, variances = components(inputs(300, seed, decay))
        scores += [(value, name) for value in variances[:16] / variances.sum()]
    expected = [name for _, name in sorted(scores, reverse=True)[:16]]
    assert found == {name: expected.count(name) for name in ("a", "b")}


def test_the_methods_ranks():
    statistics = layers()
    sites = {name: Site(name, "linear", OUT, statistics[name].gram.shape[0]) for name in statistics}

    def never(name: str) -> torch.Tensor:
        raise AssertionError("the weight is of no interest")

    assert EVA(rho=1.0).ranks(sites, statistics, RANK, never) is None
    assert EVA().ranks(sites, statistics, RANK, never) == eva_ranks(statistics, RANK, 2.0)
    narrow = {**sites, "up": Site("up", "linear", 3, 14)}
    assert eva_ranks(statistics, RANK, 2.0)["up"] > 3
    assert EVA().ranks(narrow, statistics, RANK, never)["up"] == 3


def test_messages():
    for rho in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho must be a finite number of at least 1"):
            EVA(rho=rho)
    with pytest.raises(ValueError, match="metric must be one of ratio, raw, sum, max, not 'best'"):
        EVA(metric="best")
    with pytest.raises(ValueError, match="whiten must be one of none, variance, code, not True"):
        EVA(whiten=True)
    with pytest.raises(ValueError, match="did not gather 'mean'"):
        principal_components(Statistics(count=1, gram=torch.eye(IN)), RANK)
    assert "kind embedding" in EVA().check(Site("layer", "embedding", OUT, IN), RANK)
