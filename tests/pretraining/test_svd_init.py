"""SVD initialisation: the start is the linear model that NumPy finds, and what is beyond the rank changes nothing."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from eckart.models.chain import perceptron, probe_activation
from eckart.pretraining import SVDInit, best_linear_map, initialize, joint_moments, linear_factors, svd_initialize

P, Q, N = 12, 7, 400


def _data(noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs with means, targets with a linear part and noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix, b = (torch.randn(*shape, generator=generator).double() for shape in ((P, P), (Q, P)))
    x = torch.randn(N, P, generator=generator).double() @ mix + 3
    return x, x @ b.T + noise * 10 * torch.randn(N, Q, generator=generator).double() - 2


def _centred(x: torch.Tensor) -> np.ndarray:
    return (x - x.mean(0)).numpy()


def _loss(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared error, summed over the outputs."""
    with torch.no_grad():
        return float((network(x) - y).square().sum(1).mean())


def _network(*widths: int, activation: type[nn.Module] | None = nn.Tanh, dtype: torch.dtype = torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(a, b, dtype=dtype))
            if activation is not None and i < len(widths) - 2:
                layers.append(activation())
    return nn.Sequential(*layers)


def _reduced_rank_loss(x: torch.Tensor, y: torch.Tensor, rank: int) -> float:
    """||Yc - Yhat||^2 + the tail of the squared singular values of Yhat, by least squares and a full SVD."""
    xc, yc = _centred(x), _centred(y)
    fitted = xc @ np.linalg.lstsq(xc, yc, rcond=None)[0]
    tail = np.linalg.svd(fitted, compute_uv=False)[rank:]
    return (((yc - fitted) ** 2).sum() + (tail**2).sum()) / len(x)


@pytest.mark.parametrize("rank", [1, 3, 6, 7, 20])
def test_the_linear_model_is_the_reduced_rank_regression(rank):
    x, y = _data()
    g, f = linear_factors(joint_moments([(x, y)]), rank)
    b = (g @ f).numpy()
    lost = ((_centred(y) - _centred(x) @ b.T) ** 2).sum() / N
    assert lost == pytest.approx(_reduced_rank_loss(x, y, rank), rel=1e-10)
    assert len(f) == min(rank, Q)
    units = torch.tensor(_centred(x)) @ f.T
    torch.testing.assert_close(units.T @ units / N, torch.eye(len(f), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_truncated_map_of_the_paper_is_best_for_the_coefficients_only(rank):
    x, y = _data()
    moments = joint_moments([(x, y)])
    b, s = best_linear_map(moments), np.linalg.svd(best_linear_map(moments).numpy(), compute_uv=False)
    cut, data = (
        torch.linalg.multi_dot(linear_factors(moments, rank, optimal=kind)) for kind in ("coefficients", "data")
    )
    assert float((b - cut).square().sum()) == pytest.approx((s[rank:] ** 2).sum(), rel=1e-9)
    assert float((b - data).square().sum()) > 1.01 * (s[rank:] ** 2).sum()
    losses = [((_centred(y) - _centred(x) @ one.numpy().T) ** 2).sum() for one in (data, cut)]
    assert losses[0] < 0.99 * losses[1]


def test_the_two_agree_for_white_inputs():
    x, y = _data()
    white = torch.linalg.qr(x - x.mean(0)).Q
    moments = joint_moments([(white, y)])
    data, cut = (torch.linalg.multi_dot(linear_factors(moments, 3, optimal=kind)) for kind in ("data", "coefficients"))
    torch.testing.assert_close(data, cut, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("hidden", [3, 9])
@pytest.mark.parametrize(("activation", "factor"), [(nn.Tanh, 4), (nn.Sigmoid, 4), (nn.GELU, 2), (nn.SiLU, 2)])
def test_the_start_is_the_linear_model_up_to_a_power_of_t(activation, factor, hidden):
    """Halving t quarters the gap in the function for odd-like activations, halves it where there is a square term."""
    x, y = _data()
    gaps = []
    for t in (0.02, 0.01, 0.005):
        network = _network(P, hidden, Q, activation=activation)
        found = svd_initialize(network, x, y, scale=t, ridge=0)
        g, f = linear_factors(joint_moments([(x, y)]), hidden)
        linear = (x - x.mean(0)) @ (g @ f).T + y.mean(0)
        with torch.no_grad():
            gaps.append(float((network(x) - linear).norm() / (linear - y.mean(0)).norm()))
        assert found.error == pytest.approx(_reduced_rank_loss(x, y, hidden), rel=1e-9)
    assert gaps[0] < (0.001 if factor == 4 else 0.04)
    assert gaps[0] / gaps[1] == pytest.approx(factor, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(factor, rel=0.05)
    assert _loss(network, x, y) == pytest.approx(_reduced_rank_loss(x, y, hidden), rel=1e-3)


def test_the_loss_gap_of_tanh_falls_with_the_square_of_t():
    x, y = _data()
    best = _reduced_rank_loss(x, y, 4)
    gaps = []
    for t in (0.01, 0.005):
        network = _network(P, 4, Q)
        svd_initialize(network, x, y, scale=t, ridge=0)
        gaps.append(abs(_loss(network, x, y) - best))
    assert gaps[0] / gaps[1] >= 3.9


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU, None])
@pytest.mark.parametrize("widths", [(8,), (9,), (16, 11, 8)])
def test_homogeneous_activations_start_at_the_linear_model_exactly(activation, widths):
    x, y = _data()
    network = _network(P, *widths, Q, activation=activation).double()
    found = svd_initialize(network, x, y, ridge=0)
    rank = min(min(widths) // (2 if activation else 1), Q)
    assert found.rank == rank
    assert _loss(network, x, y) == pytest.approx(_reduced_rank_loss(x, y, rank), rel=1e-9)
    norms = [float(linear.weight.detach()[:rank].norm()) for linear in perceptron(network).linears[:-1]]
    assert max(norms) < 4 * min(norms)


def test_homogeneous_units_are_balanced():
    x, y = _data()
    network = _network(P, 5, Q, activation=None)
    svd_initialize(network, x, y, optimal="coefficients", ridge=0)
    first, second = (linear.weight.detach() for linear in network)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))
    s = torch.linalg.svdvals(best_linear_map(joint_moments([(x, y)])))
    torch.testing.assert_close(first.norm(dim=1).square().sort(descending=True).values, s[:5])


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Softplus])
def test_pairs_make_smooth_gates_exactly_linear_at_any_scale(activation):
    x, y = _data()
    network = _network(P, 8, Q, activation=activation)
    found = svd_initialize(network, x, y, pairs=True, scale=2.0, ridge=0)
    assert found.rank == 4
    assert _loss(network, x, y) == pytest.approx(_reduced_rank_loss(x, y, 4), rel=1e-7)


def test_full_rank_reproduces_least_squares():
    x, y = _data()
    network = _network(P, Q, Q)
    svd_initialize(network, x, y, scale=1e-3, ridge=0)
    xc, yc = _centred(x), _centred(y)
    residual = np.linalg.lstsq(xc, yc, rcond=None)[1].sum() / N
    assert _loss(network, x, y) == pytest.approx(residual, rel=1e-5)


@pytest.mark.parametrize("rank", [2, 5])
def test_an_autoencoder_starts_as_its_pca(rank):
    x, _ = _data()
    network = _network(P, rank, P)
    svd_initialize(network, x, x, scale=1e-3)
    tail = np.linalg.svd(_centred(x), compute_uv=False)[rank:]
    assert _loss(network, x, x) == pytest.approx((tail**2).sum() / N, rel=1e-4)


@pytest.mark.parametrize("padding", ["random", "pca"])
@pytest.mark.parametrize("hidden", [Q, 10, 30])
def test_units_beyond_the_rank_change_nothing_and_learn(padding, hidden):
    x, y = _data()
    small, large = _network(P, Q, Q), _network(P, hidden, Q)
    svd_initialize(small, x, y)
    svd_initialize(large, x, y, padding=padding)
    torch.testing.assert_close(small(x), large(x))
    first, second = large[0], large[2]
    assert not second.weight[:, Q:].any()
    hidden_values = first(x)
    spread = (hidden_values - hidden_values.mean(0)).square().mean(0).sqrt()
    torch.testing.assert_close(spread, torch.full_like(spread, 0.3), rtol=1e-5, atol=0)
    for _ in range(2):  # outgoing weights in the first step, incoming in the second
        (large(x) - y).square().mean().backward()
        with torch.no_grad():
            for parameter in large.parameters():
                parameter -= 1e-4 * parameter.grad
                still = [bool(row.any()) for row in first.weight.grad]
                parameter.grad = None if parameter is not first.weight else parameter.grad
        if _ == 0:
            first.weight.grad = None
    assert all(still)


def test_pca_rows_see_what_the_other_units_do_not():
    x, y = _data()
    network = _network(P, P, Q)
    svd_initialize(network, x, y, padding="pca")
    hidden = network[0](x).detach()
    hidden = hidden - hidden.mean(0)
    correlation = hidden.T @ hidden / N / 0.09
    torch.testing.assert_close(correlation, torch.eye(P, dtype=torch.float64), atol=2e-3, rtol=0)


def test_signs_and_order_of_the_units_do_not_matter():
    x, y = _data()
    network = _network(P, 5, Q)
    svd_initialize(network, x, y)
    turned = copy.deepcopy(network)
    order, signs = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, -1, -1, 1, -1]).double()
    with torch.no_grad():
        turned[0].weight.copy_(signs[:, None] * network[0].weight[order])
        turned[0].bias.copy_(signs * network[0].bias[order])
        turned[2].weight.copy_(network[2].weight[:, order] * signs)
    torch.testing.assert_close(network(x), turned(x))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_deeper_networks_start_at_the_same_map(activation):
    x, y = _data()
    network = _network(P, 20, 8, 12, Q, activation=activation)
    found = svd_initialize(network, x, y, scale=0.005, ridge=0)
    rank = 4 if activation is nn.ReLU else Q
    assert found.rank == rank
    assert _loss(network, x, y) == pytest.approx(_reduced_rank_loss(x, y, rank), rel=1e-3)


def test_the_measured_example_of_a_mild_teacher():
    """p = 40, q = 20, h = 8, N = 2000: starts just above the linear model and far below a random start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 40, generator=generator)
    inner, outer = torch.randn(8, 40, generator=generator) / 40**0.5, torch.randn(20, 8, generator=generator)
    y = torch.tanh(0.5 * x @ inner.T) @ outer.T
    network = _network(40, 8, 20, dtype=torch.float32)
    random = _loss(network, x, y)
    found = svd_initialize(network, x, y)
    start = _loss(network, x, y)
    assert found.error < start < 1.35 * found.error
    assert start < random / 10


def test_streamed_moments_are_those_of_all_rows():
    x, y = _data()
    x = x + 1e6  # means that are large against the deviations
    whole, parts = joint_moments([(x, y)]), joint_moments(zip(x.split(37), y.split(37), strict=True))
    for name in ("x_mean", "y_mean", "xx", "xy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-8, atol=1e-5)
    np.testing.assert_allclose(parts.xx.numpy(), N * np.cov(x.numpy().T, bias=True), rtol=1e-6)
    assert parts.yy == pytest.approx(whole.yy)
    networks = [_network(P, 4, Q), _network(P, 4, Q)]
    svd_initialize(networks[0], x, y)
    svd_initialize(networks[1], zip(x.split(100), y.split(100), strict=True))
    torch.testing.assert_close(networks[0](x), networks[1](x), rtol=1e-6, atol=1e-6)


def test_constant_repeated_and_differently_scaled_inputs():
    x, y = _data()
    base = linear_factors(joint_moments([(x, y)]), 4, ridge=1e-6)
    fitted = x @ (base[0] @ base[1]).T
    scales = torch.logspace(-6, 6, P, dtype=torch.float64)
    extended = torch.cat([x * scales, torch.ones(N, 2).double(), x[:, :2]], dim=1)
    g, f = linear_factors(joint_moments([(extended, y)]), 4, ridge=1e-6)
    again = extended @ (g @ f).T
    torch.testing.assert_close(again - again.mean(0), fitted - fitted.mean(0), rtol=1e-3, atol=1e-3 * float(y.std()))
    assert not (g @ f)[:, P : P + 2].any()


def test_no_linear_part_gives_random_units_and_learns():
    x = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    y = x.prod(dim=1, keepdim=True)
    network = _network(2, 8, 1)
    found = svd_initialize(network, x, y)
    assert (found.rank, found.explained) == (0, 0.0)
    assert "no linear part" in found.warnings[0]
    assert _loss(network, x, y) == pytest.approx(1.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()
    assert _loss(network, x, y) < 0.01


def test_constant_targets_and_a_single_row():
    x, y = _data()
    network = _network(P, 4, Q)
    assert svd_initialize(network, x, torch.ones_like(y)).rank == 0
    torch.testing.assert_close(network(x), torch.ones_like(y))
    assert svd_initialize(network, x[:1], y[:1]).rank == 0
    torch.testing.assert_close(network(x[:1]), y[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_before_the_first_layer_and_dropout(dtype):
    x, y = _data()
    images = x.reshape(N, 3, 4).to(dtype)
    network = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(P, 5), nn.Tanh(), nn.Dropout(0.5)), nn.Identity(), nn.Linear(5, Q)
    ).to(dtype)
    network.train()
    svd_initialize(network, images, y.to(dtype))
    assert network.training
    assert network[3].weight.dtype == dtype
    network.eval()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    linear = _reduced_rank_loss(x, y, 5)
    assert linear < variance / 4
    assert _loss(network.double(), images.double(), y) < linear + 0.1 * variance


def test_refusals_change_nothing():
    x, y = _data()
    network = _network(P, 4, Q)
    before = copy.deepcopy(network.state_dict())
    spoilt = x.clone()
    spoilt[3, 2] = float("nan")
    for arguments, message in (
        ((spoilt, y), "inputs of the data have NaN"),
        ((x, y[:, 0]), "one_hot"),
        ((x[:5], y), "as many rows"),
        ((x[:, :5], y), "rows of 5 inputs and 7 targets, the network takes 12"),
        (([],), "no rows"),
        ((x,), "pairs"),
        (([(x, y), (x[:, :3], y)],), "batch 1 has other widths"),
    ):
        with pytest.raises(ValueError, match=message):
            svd_initialize(network, *arguments)
    for options, message in (({"scale": 0}, "scale"), ({"ridge": -1}, "ridge"), ({"padding": "zero"}, "padding")):
        with pytest.raises(ValueError, match=message):
            initialize(network, "svd-init", x, y, **options)
    with pytest.raises(ValueError, match="give options to SVDInit"):
        initialize(network, SVDInit(), x, y, scale=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Linear(P, Q), "no plain nn.Sequential"),
        (nn.Sequential(nn.Linear(P, Q)), "at least two"),
        (nn.Sequential(nn.Linear(P, 4), nn.LayerNorm(4), nn.Linear(4, Q)), "not one function of each entry"),
        (nn.Sequential(nn.Linear(P, 4), nn.Softmax(-1), nn.Linear(4, Q)), "not one function of each entry"),
        (nn.Sequential(nn.Linear(P, 4), nn.BatchNorm1d(4), nn.Linear(4, Q)), "keeps statistics"),
        (nn.Sequential(nn.Linear(P, 4), nn.Hardshrink(), nn.Linear(4, Q)), "flat or even"),
        (nn.Sequential(nn.Linear(P, 4), nn.Tanh(), nn.Linear(4, Q), nn.Sigmoid()), "comes after the last Linear"),
        (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(P, 4), nn.Linear(4, Q)), "comes before the first Linear"),
        (nn.Sequential(nn.Linear(P, 4), nn.Tanh(), nn.Linear(5, Q)), "takes 5 inputs, and 4 come"),
        (nn.Sequential(nn.Linear(P, 4, bias=False), nn.Tanh(), nn.Linear(4, Q)), "'0' has no bias"),
    ],
)
def test_networks_that_do_not_fit_are_named(network, message):
    x, y = _data()
    with pytest.raises(ValueError, match=message):
        svd_initialize(network.double(), x, y)


def test_centred_data_needs_no_biases():
    x, y = _data()
    x, y = x - x.mean(0), y - y.mean(0)
    network = nn.Sequential(nn.Linear(P, 4, bias=False), nn.Tanh(), nn.Linear(4, Q, bias=False)).double()
    svd_initialize(network, x, y, scale=1e-3, ridge=0)
    assert _loss(network, x, y) == pytest.approx(_reduced_rank_loss(x, y, 4), rel=1e-5)


@pytest.mark.parametrize(
    ("activation", "value", "gain", "kink", "homogeneous"),
    [
        (nn.Tanh(), 0.0, 1.0, False, False),
        (nn.Sigmoid(), 0.5, 0.25, False, False),
        (nn.GELU(), 0.0, 0.5, False, False),
        (nn.GELU("tanh"), 0.0, 0.5, False, False),
        (nn.SiLU(), 0.0, 0.5, False, False),
        (nn.Softplus(), float(np.log(2)), 0.5, False, False),
        (nn.ReLU6(), 0.0, 0.5, True, False),
        (nn.LeakyReLU(0.2), 0.0, 0.6, True, True),
        (nn.Hardtanh(), 0.0, 1.0, False, False),
    ],
)
def test_activations_are_found_by_calling_them(activation, value, gain, kink, homogeneous):
    found = probe_activation([("1", activation)], 3)
    assert (found.value, found.gain) == pytest.approx((value, gain), abs=1e-8)
    assert (found.kink, found.homogeneous) == (kink, homogeneous)
