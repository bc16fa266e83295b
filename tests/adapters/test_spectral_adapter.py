"""Spectral Adapter against the card's identities, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from eckart.adapters.site import Site
from eckart.adapters.spectral_adapter import SpectralAdapter
from every_kind import every_kind

SITE = Site("layer", "linear", 12, 10)
WEIGHT = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
EVERY = [{"variant": variant, "values": values} for variant in ("additive", "rotational") for values in (False, True)]


def start(scale=1.0, rank=3, weight=WEIGHT, **options):
    adapter = SpectralAdapter(**options).build(Site("layer", "linear", *weight.shape), rank, scale)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    return adapter


def move(adapter, size=0.3):
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return adapter


def double(tensor):
    return tensor.detach().double().numpy()


def linear():
    base = nn.Linear(10, 12)
    base.weight.data = WEIGHT.clone()
    return base


def rotation(p):
    skew = (p - p.T) / 2
    return (np.eye(len(p)) - skew) @ np.linalg.inv(np.eye(len(p)) + skew)


def by_the_paper(adapter, weight=WEIGHT):
    """W' from the paper's formulas, the trained tensors times c."""
    c, u, s, v = adapter.scale, double(adapter.u), double(adapter.s), double(adapter.vh).T
    rest = double(weight) - u * s @ v.T
    left, right = c * double(adapter.left), c * double(adapter.right)
    grown = c * double(adapter.values) if adapter.method.values else np.zeros_like(s)
    if adapter.method.variant == "additive":
        return (u + left) * (s + grown) @ (v + right.T).T + rest
    return (u @ rotation(left)) * (s * (1 + grown)) @ (v @ rotation(right)).T + rest


@pytest.mark.parametrize("options", EVERY)
def test_nothing_changes_at_the_start(options):
    base = linear()
    assert torch.equal(start(**options)(X, base), base(X))


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_layer_has_the_weight_of_the_paper(options, scale):
    adapter, base = move(start(scale, **options)), linear()
    expected = by_the_paper(adapter)
    np.testing.assert_allclose(double(WEIGHT + adapter.delta(WEIGHT)), expected, atol=1e-5)
    np.testing.assert_allclose(double(adapter(X, base)), double(X) @ expected.T + double(base.bias), atol=1e-4)
    left, right = adapter.low_rank()
    inner = 6 if options["variant"] == "additive" else 3
    assert (left.shape, right.shape) == ((12, inner), (inner, 10))


def test_additive_changes_have_twice_the_rank_of_lora():
    adapter = move(start())
    assert np.linalg.matrix_rank(double(adapter.delta(WEIGHT)), tol=1e-4) == 6
    assert adapter.num_trainable() == 3 * (12 + 10)


def test_a_small_additive_change_is_accurate():
    """No difference of large numbers: it is accurate in its own size, here 1e-6 of W."""
    adapter = start(values=True)
    for parameter in adapter.parameters():
        parameter.data += 1e-6
    u, s, v = (double(part) for part in (adapter.u, adapter.s, adapter.vh.mT))
    small = 1e-6 * np.ones(1)
    expected = (u + small) * (s + small) @ (v + small).T - u * s @ v.T
    np.testing.assert_allclose(double(adapter.delta(WEIGHT)), expected, atol=1e-5 * np.abs(expected).max())


def test_a_rotation_keeps_the_singular_values():
    adapter = move(start(variant="rotational"), 2.0)
    before, after = (np.linalg.svd(double(w), compute_uv=False) for w in (WEIGHT, WEIGHT + adapter.delta(WEIGHT)))
    np.testing.assert_allclose(after, before, atol=2e-6 * before[0])
    assert np.abs(double(adapter.delta(WEIGHT))).max() > 0.5


def test_a_rotation_is_found_from_its_result():
    """The card's teacher: the top vectors of W turned. LoRA of rank r cannot reach it, 2 r² numbers do."""
    generator = torch.Generator().manual_seed(5)
    adapter, teacher = (start(variant="rotational", rank=4) for _ in range(2))
    for parameter in teacher.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    wanted = teacher.delta(WEIGHT).detach()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (adapter.delta(WEIGHT) - wanted).square().sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-4 * float(wanted.square().sum())


def test_trainable():
    """r (out + in) and 2 r², and r more where the values are trained."""
    for options, expected in zip(EVERY, (66, 69, 18, 21), strict=True):
        assert start(**options).num_trainable() == SpectralAdapter(**options).trainable(SITE, 3) == expected


@pytest.mark.parametrize(
    ("position", "offset", "first"), [("top", 0, 0), ("top", 3, 3), ("top", 7, 7), ("bottom", 0, 7), ("bottom", 2, 5)]
)
def test_position(position, offset, first):
    adapter = start(position=position, offset=offset)
    u, s, vh = np.linalg.svd(double(WEIGHT), full_matrices=False)
    np.testing.assert_allclose(double(adapter.s), s[first : first + 3], atol=1e-6 * s[0])
    signs = np.sign((u[:, first : first + 3] * double(adapter.u)).sum(0))
    # Vectors are good to eps s_1 over the gap to the next value, here at least 0.1.
    np.testing.assert_allclose(double(adapter.u) * signs, u[:, first : first + 3], atol=1e-4)
    np.testing.assert_allclose(double(adapter.vh) * signs[:, None], vh[first : first + 3], atol=1e-4)


def test_fusion():
    """Two concepts in blocks of their own: (U + [A_U, B_U]) diag(S) (V + [A_V, B_V])ᵀ has the sum of the changes."""
    one, two = move(start(solver="exact")), move(start(offset=3))
    pairs = (one.u, two.u), (one.s, two.s), (one.vh.mT, two.vh.mT)
    u, s, v = (np.concatenate([double(a), double(b)], -1) for a, b in pairs)
    np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-5)
    left = np.concatenate([double(one.left), double(two.left)], 1)
    right = np.concatenate([double(one.right), double(two.right)]).T
    fused = double(WEIGHT) - u * s @ v.T + (u + left) * s @ (v + right).T
    np.testing.assert_allclose(double(WEIGHT + one.delta(WEIGHT) + two.delta(WEIGHT)), fused, atol=1e-5)
    base = linear()
    np.testing.assert_allclose(
        double(two(X, lambda x: one(x, base))), double(X) @ fused.T + double(base.bias), atol=1e-4
    )


@pytest.mark.parametrize("options", EVERY)
def test_a_gradient_reaches_everything(options):
    adapter, base = start(**options), linear()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    (adapter(X, base) * weights).sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


@pytest.mark.parametrize("options", EVERY)
def test_convolution_and_embedding(options):
    for adapter in every_kind(SpectralAdapter(**options), 0.5):
        move(adapter)


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4)])
def test_weights_of_small_rank(options, weight):
    adapter = move(start(weight=weight, **options))
    np.testing.assert_allclose(double(weight + adapter.delta(weight)), by_the_paper(adapter, weight), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "A"}, "variant must be one of additive, rotational, not 'A'"),
        ({"position": "middle"}, "position must be one of top, bottom, not 'middle'"),
        ({"offset": -1}, "offset must be at least 0, not -1; count from the bottom with position"),
        ({"solver": "fast"}, "solver must be one of auto, exact, lanczos, randomized, not 'fast'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralAdapter(**options)


def test_check():
    assert SpectralAdapter(offset=7).check(SITE, 3) is None
    assert SpectralAdapter(offset=8).check(SITE, 3) == "has 10 singular triplets, too few for offset 8 and rank 3"
    assert "rotational variant takes 2 or more" in SpectralAdapter(variant="rotational").check(SITE, 1)
    assert "must be 1 to 10, not 11" in SpectralAdapter(variant="rotational").check(SITE, 11)
