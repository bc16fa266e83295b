"""allocation="fisher" against brute force in float64, and against what a rescaling of the model must not change."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.policies import loss_spectrum
from eckart.linalg import num_parameters
from eckart.models import calibrate, linears
from eckart.structures import EckartWarning
from model_state import assert_unchanged, snapshot


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quiet(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, progress=False, **options)


def model_and_data(family: str = "llama", seed: int = 0):
    model = tiny_models.FAMILIES[family]().double()
    return model, torch.randint(1, 60, (5, 9), generator=torch.Generator().manual_seed(seed))


def information_by_loops(model, ids: torch.Tensor, names: list[str]) -> dict[str, np.ndarray]:
    """F (m, n): the gradient of each sequence's own loss, squared and summed."""
    weights = [model.get_submodule(name).weight for name in names]
    found = {name: np.zeros(tuple(weight.shape)) for name, weight in zip(names, weights, strict=True)}
    for one in ids[:, None]:
        for name, gradient in zip(names, torch.autograd.grad(model(one, labels=one).loss, weights), strict=True):
            found[name] += gradient.square().numpy()
    return found


# ---------------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_half_the_tail_is_the_loss_that_the_information_predicts(shape):
    """Where F = c M for every output, 1/2 sum F E^2 of the truncated weight, entry by entry."""
    m, n = shape
    weight, f = normal(m, n), normal(n, seed=1).square() + 0.1
    information = np.tile(f.numpy(), (m, 1)) * 0.7
    u, s, vh = np.linalg.svd(weight.numpy() * np.sqrt(f.numpy()), full_matrices=False)
    for measure, factor in ((f, 1.0), (3 * f, 3.0), (torch.diag(f), 1.0)):  # the scale of M drops out
        found = loss_spectrum(torch.tensor(s * factor**0.5), measure, float(information.sum()), (m, n)).numpy()
        for k in range(min(m, n)):
            lost = (u[:, k:] * s[k:]) @ vh[k:] / np.sqrt(f.numpy())
            assert (found[k:] ** 2).sum() / 2 == pytest.approx((information * lost**2).sum() / 2, rel=1e-12)


def test_without_a_measure_the_mean_information_counts():
    s = torch.tensor([3.0, 1.0])
    assert torch.allclose(loss_spectrum(s, None, 24.0, (2, 3)), s * 2)


def test_a_layer_without_inputs_or_information_is_worth_nothing():
    s = torch.tensor([3.0, 1.0])
    assert not loss_spectrum(s, torch.zeros(3, 3), 24.0, (2, 3)).any()
    assert not loss_spectrum(s, None, 0.0, (2, 3)).any()


# ------------------------------------------------------------------------------------------------------- brute force

PLACES = [f"model.layers.{block}.self_attn.{name}_proj" for block in (0, 1) for name in ("q", "o")]


@pytest.mark.parametrize("method", ["svd", "fwsvd", "svd-llm"])
@pytest.mark.parametrize("ratio", [0.6, 0.75])
def test_the_ranks_are_the_best_of_all(method, ratio):
    """Four matrices of one shape in plain form: every rank costs the same, so water-filling is exact below the jump to
    dense, which costs as much as rank 16."""
    model, ids = model_and_data()
    information = information_by_loops(model, ids, PLACES)
    grams = calibrate(model, [ids], ["gram"], progress=False)
    losses = []
    for name in PLACES:
        weight, f = model.get_submodule(name).weight.detach().numpy(), information[name].sum(0)
        measure = {"svd": np.eye(32), "fwsvd": np.diag(f), "svd-llm": grams[name].gram.numpy()}[method]
        values, vectors = np.linalg.eigh(measure)
        s = np.linalg.svd(weight @ (vectors * np.sqrt(values.clip(0))), compute_uv=False)
        constant = information[name].sum() / (32 * np.trace(measure))
        losses.append([constant / 2 * (s[k:] ** 2).sum() for k in (*range(16), 32)])
    costs = np.array([*(num_parameters(32, 32, k, "plain") for k in range(16)), 32 * 32])
    budget = (1 - ratio) * 4 * 32 * 32
    best = min(
        sum(loss[k] for loss, k in zip(losses, choice, strict=True))
        for choice in itertools.product(range(1, 17), repeat=4)
        if costs[list(choice)].sum() <= budget
    )
    result = quiet(model, method, ratio=ratio, allocation="fisher", form="plain", data=[ids], where=PLACES)
    ranks = [layer.rank for layer in result.layers]
    found = sum(loss[min(rank, 16)] for loss, rank in zip(losses, ranks, strict=True))
    assert found == pytest.approx(best, rel=1e-6)
    assert len(set(ranks)) > 1, "uniform ranks would prove nothing"


# --------------------------------------------------------------------------------------------------------- invariance


def ranks_of(model, ids, allocation: str) -> list[int]:
    return [layer.rank for layer in quiet(model, "svd", ratio=0.4, allocation=allocation, data=[ids]).layers]


def test_a_rescaling_that_changes_no_output_changes_no_rank():
    """up_proj times 8 and down_proj over 8 are the same model; what a singular value is worth is then another one."""
    found = {}
    for allocation in ("fisher", "threshold"):
        for scale in (1.0, 8.0):
            model, ids = model_and_data()
            with torch.no_grad():
                for block in model.model.layers:
                    block.mlp.up_proj.weight.mul_(scale)
                    block.mlp.down_proj.weight.div_(scale)
            found[allocation, scale] = ranks_of(model, ids, allocation)
    assert found["fisher", 1.0] == found["fisher", 8.0]
    assert found["threshold", 1.0] != found["threshold", 8.0]


def test_what_the_loss_does_not_depend_on_goes_first():
    """A last block whose output is switched off has no gradient."""
    model, ids = model_and_data()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    result = quiet(model, "svd", ratio=0.6, allocation="fisher", data=[ids], where=["*.q_proj", "*.up_proj"])
    ranks = {layer.name: layer.rank for layer in result.layers}
    assert ranks["model.layers.1.self_attn.q_proj"] == ranks["model.layers.1.mlp.up_proj"] == 1
    assert ranks["model.layers.0.self_attn.q_proj"] > 8


# ------------------------------------------------------------------------------------------------ given, and refused


@pytest.mark.parametrize(("method", "needs"), [("svd", []), ("svd-llm", ["gram"]), ("fwsvd", [])])
def test_one_calibration_is_enough(method, needs):
    model, ids = model_and_data()
    statistics = calibrate(model, [ids], [*needs, "fisher"], progress=False)
    ranks = []
    for options in ({"data": [ids]}, {"statistics": statistics}):
        made = tiny_models.FAMILIES["llama"]().double()
        result = quiet(made, method, ratio=0.4, allocation="fisher", **options)
        ranks.append([layer.rank for layer in result.layers])
    assert ranks[0] == ranks[1]
    assert linears(model).linears[0].weight.requires_grad


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("svd", {}, "svd needs calibration data"),
        ("svd-llm", {"statistics": ["gram"]}, "have no 'fisher'; calibrate with needs="),
        ("modegpt", {}, "allocation must be uniform or block-influence, not fisher"),
        ("sub-moe", {}, "sub-moe shares its budget itself; leave out allocation"),
    ],
)
def test_what_it_cannot_do_is_refused(method, options, message):
    model, ids = model_and_data()
    if "statistics" in options:
        options = {"statistics": calibrate(model, [ids], options["statistics"], progress=False)}
    elif method != "svd":
        options = {"data": [ids]}
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        compress(model, method, ratio=0.4, allocation="fisher", progress=False, **options)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
