"""NLoRA, SLoRA and IntTune against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.nlora import NLoRA, choose
from eckart.adapters.site import Site
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
CHOICES = ["leading", "leverage", "pivot"]


def start(scale=1.0, rank=3, weight=WEIGHT, seed=0, **options):
    site = Site("layer", "linear", *weight.shape)
    adapter = NLoRA(**options).build(site, rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(seed))
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear(weight=WEIGHT):
    base = nn.Linear(weight.shape[1], weight.shape[0])
    base.weight.data = weight
    return base


@pytest.mark.parametrize("variant", ["nlora", "inttune"])
def test_the_start_shifts_the_output_by_the_leading_blocks(variant):
    adapter, base, w = start(0.5, variant=variant), linear(), double(WEIGHT)
    shift = 0.5 * double(X) @ (w[:, :3] @ w[:3, :3] @ w[:3, :]).T
    np.testing.assert_allclose(double(adapter(X, base) - base(X)), shift, atol=1e-4)


def test_slora_starts_as_the_layer_was():
    adapter, base = start(variant="slora"), linear()
    assert torch.equal(adapter(X, base), base(X))
    # Kaiming uniform with a = sqrt 5 is uniform in ± 1 / sqrt(fan in).
    for factor, fan_in in ((adapter.core, 3), (adapter.right, 10)):
        assert 0.7 < float(factor.detach().abs().max()) * fan_in**0.5 <= 1


@pytest.mark.parametrize("variant", ["nlora", "inttune"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("core", ["block", "inverse"])
def test_residual_starts_as_the_layer_was(variant, choice, core):
    adapter, base = start(variant=variant, choice=choice, core=core, residual=True), linear()
    # The parts that cancel are up to ten times the size of W.
    assert torch.allclose(adapter(X, base), base(X), atol=1e-4)
    left, middle, right = double(adapter.left), double(adapter.core), double(adapter.right)
    adapter.core.data += 0.5
    expected = left @ (double(adapter.core) - middle) @ right
    np.testing.assert_allclose(double(adapter.delta(WEIGHT)), expected, atol=1e-4)


def test_trainable():
    assert NLoRA().trainable(SITE, 3) == NLoRA(variant="slora").trainable(SITE, 3) == 3 * 22 + 9
    assert NLoRA(variant="inttune").trainable(SITE, 3) == 9
    # LLaMA-2-7B, r = 128: N adds 3.67 million over LoRA.
    llama = [Site("layer", "linear", 4096, 4096)] * 4 + [Site("layer", "linear", 11008, 4096)] * 3
    assert 32 * sum(NLoRA(variant="inttune").trainable(site, 128) for site in llama) == 3_670_016
    trained = {"nlora": {"left", "core", "right"}, "slora": {"left", "core", "right"}, "inttune": {"core"}}
    for variant, names in trained.items():
        adapter = start(variant=variant)
        assert {name for name, _ in adapter.named_parameters()} == names
        assert adapter.num_trainable() == NLoRA(variant=variant).trainable(SITE, 3)


@pytest.mark.parametrize("choice", CHOICES)
def test_factors_are_rows_and_columns(choice):
    rows, columns = choose(WEIGHT, 3, choice, torch.Generator().manual_seed(0))
    adapter, w, i, j = start(choice=choice), double(WEIGHT), rows.numpy(), columns.numpy()
    assert len(set(i)) == len(set(j)) == 3
    assert np.array_equal(double(adapter.left), w[:, j])
    assert np.array_equal(double(adapter.right), w[i])
    assert np.array_equal(double(adapter.core), w[np.ix_(i, j)])
    inverse = start(choice=choice, core="inverse", residual=True)
    expected = np.linalg.inv(w[np.ix_(i, j)])
    np.testing.assert_allclose(double(inverse.core), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_leverage_follows_the_seed_and_the_scores():
    drawn = [choose(WEIGHT, 3, "leverage", torch.Generator().manual_seed(seed))[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    weight = torch.zeros(12, 10)
    weight[[3, 7], [2, 9]] = torch.tensor([5.0, 4.0])  # the only rows and columns with leverage
    rows, columns = choose(weight, 2, "leverage", torch.Generator().manual_seed(0))
    assert sorted(rows.tolist()) == [3, 7]
    assert sorted(columns.tolist()) == [2, 9]


def test_what_the_start_adds_to_a_gaussian_weight():
    """The card's check: 1.3 % with the block, several times the weight with its inverse, less with pivots."""
    weight = 0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    def relative(**options):
        adapter = start(rank=32, weight=weight, **options)
        return np.linalg.norm(double(adapter.left) @ double(adapter.core) @ double(adapter.right)) / weight.norm()

    assert 0.012 < relative() < 0.014
    assert relative(core="inverse", residual=True) > 5
    assert relative(core="inverse", residual=True, choice="pivot") < 2


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("core", ["block", "inverse"])
@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(6)[:, :4], torch.full((1, 4), 2.0)])
def test_weights_of_small_rank(choice, core, weight):
    rank = min(3, *weight.shape)
    adapter = start(rank=rank, weight=weight, choice=choice, core=core, residual=True)
    assert bool(adapter.core.isfinite().all())
    assert float(adapter.delta(weight).detach().abs().max()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"residual": True}, {"variant": "slora"}, {"variant": "inttune"}, {"variant": "inttune", "residual": True}],
)
def test_training(options):
    """Every trained factor moves within two steps, delta is what the layer does, and a folded LoRA is the same."""
    adapter, base = start(0.5, **options), linear()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(X, base) * weights).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in adapter.named_parameters())
    w = double(WEIGHT)
    expected = double(adapter.left) @ double(adapter.core) @ double(adapter.right)
    if options.get("residual"):
        expected = expected - w[:, :3] @ w[:3, :3] @ w[:3]
    np.testing.assert_allclose(double(adapter.delta(WEIGHT)), 0.5 * expected, atol=1e-4)
    y = double(X) @ (w + 0.5 * expected).T + double(base.bias)
    np.testing.assert_allclose(double(adapter(X, base)), y, atol=1e-4)
    left, right = adapter.low_rank()
    assert left.shape[1] == (6 if options == {"residual": True} else 3)
    np.testing.assert_allclose(double(left) @ double(right), 0.5 * expected, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"variant": "inttune", "choice": "pivot", "residual": True}])
def test_convolution_and_embedding(options):
    for adapter in every_kind(NLoRA(**options), 0.5, atol=1e-4):
        adapter.core.data += 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "lora"}, "variant must be one of nlora, slora, inttune, not 'lora'"),
        ({"choice": "top"}, "choice must be one of leading, leverage, pivot, not 'top'"),
        ({"core": "pinv"}, "core must be one of block, inverse, not 'pinv'"),
        ({"core": "inverse"}, "core='inverse' adds an approximation of the weight to itself; set residual=True"),
        (
            {"variant": "slora", "residual": True},
            "slora starts from random factors; leave out choice",
        ),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        NLoRA(**options)


def test_rank_above_the_width_is_refused():
    assert "must be 1 to 10, not 11" in NLoRA().check(SITE, 11)
