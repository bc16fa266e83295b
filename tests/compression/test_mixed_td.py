from __future__ import annotations

import copy
import functools
from random import Random

import pytest
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn

import eckart
import tiny_models
from eckart.compression.contract import Job
from eckart.compression.conv_space import Candidate, candidates
from eckart.compression.evolution import Search, evolve, random_choice
from eckart.compression.mixed_td import MixedTD, decompose
from eckart.compression.proxy import Proxy
from eckart.linalg import LinalgError
from eckart.models.convolutions import convolutions
from eckart.structures import EckartWarning
from eckart.structures.conv_chain import ConvChain

# Few candidates and generations: what is tested does not depend on how long the search is.
FEW = {"mac_ratios": (0.3, 0.45, 0.6), "groups": (1, 2)}
FOLDINGS = ("separable", "grouped-pointwise", "pointwise-grouped")
QUICK = {"population": 8, "parents": 3, "generations": 2, "progress": False, "kinds": FOLDINGS, **FEW}


def cnn() -> nn.Sequential:
    def block(c: int, f: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(c, f, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(f), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1), *block(16, 24, 2), *block(24, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )


@functools.cache
def _trained() -> tuple[nn.Sequential, tuple[torch.Tensor, ...]]:
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, order = cnn(), torch.randperm(len(x))
        x, y = x[order], y[order]
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(6):
            for batch in torch.arange(1000).split(50):
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval(), (x, y)


def trained() -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """A network, the batch to search on, and pictures that neither training nor search has seen."""
    model, (x, y) = _trained()
    return copy.deepcopy(model), [(x[1000:1128], y[1000:1128])], (x[1128:], y[1128:])


def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def macs(model: nn.Module, picture: torch.Tensor) -> int:
    """Multiply-adds of all convolutions, counted while they run."""
    total = 0

    def count(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0, 0].numel() * module.weight.numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(picture)
    for handle in handles:
        handle.remove()
    return total


def test_the_multiply_adds_really_fall_by_the_ratio_and_the_accuracy_stays():
    model, batches, held_out = trained()
    picture = batches[0][0][:1]
    before, dense = macs(model, picture), accuracy(model, held_out)
    first = 8 * 8 * 16 * 9
    decompose(model, batches, 0.4, **QUICK)
    assert isinstance(model[0], nn.Conv2d), "the one that reads the picture stays"
    assert macs(model, picture) - first <= 0.6 * (before - first)
    assert dense > 0.95
    # A network of 24 channels has little to spare, and nothing is trained afterwards.
    assert accuracy(model, held_out) > dense - 0.1
    assert not model.training


def test_the_mixture_beats_every_single_scheme_and_random_search_of_the_same_length():
    model, batches, _ = trained()
    measure = Proxy(model, batches)
    method = MixedTD(**FEW)
    space = method.space(model, batches, 0.6)
    costs = space.costs()

    def score(choice: tuple[int, ...]) -> float:
        other = copy.deepcopy(model)
        for name, chain in space.chains(choice).items():
            other.set_submodule(name, chain)
        return measure(other)

    singles = [c for c in space.uniform(0.4) if sum(o[g] for o, g in zip(costs, c, strict=True)) <= space.budget]
    assert len(singles) >= 4
    search = Search(16, 5, 4, 0.2, 0)
    found = evolve(costs, space.budget, score, search, space.uniform(0.4))
    assert found.score >= max(map(score, singles))
    random = Random(1)
    control = max(score(random_choice(costs, space.budget, random)) for _ in range(found.scored))
    assert found.score >= control
    # What a user gets is what the search found, but for the filter, which only leaves options out.
    assert sum(o[g] for o, g in zip(costs, found.choice, strict=True)) <= space.budget


def test_the_same_seed_gives_the_same_network():
    outputs = []
    for _ in range(2):
        model, batches, _ = trained()
        decompose(model, batches, 0.5, seed=3, **QUICK)
        outputs.append((model(batches[0][0]), [str(m) for m in model]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1] == outputs[1][1]


def test_candidates_of_a_layer_with_a_stride():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    (ref,) = convolutions(nn.Sequential(conv), torch.ones(1, 4, 9, 9))
    assert ref.macs == 25 * 8 * 4 * 9
    found = candidates(ref, (0.3, 0.5, 0.7), divisible=False)
    assert found[-1] == Candidate(None, 8, ref.macs)
    for candidate in found[:-1]:
        assert candidate.rank == 1 or candidate.macs <= 0.7 * ref.macs
        assert candidate.macs < ref.macs
    separable = [c for c in found[:-1] if c.scheme.kind == "separable"]
    one = 9 * 5 * 4 * 3 + 25 * 8 * 3  # the first runs on all 9 rows
    assert [c.rank for c in separable] == [int(ref.macs * share / one) for share in (0.3, 0.5, 0.7)]


def test_ranks_with_many_divisors_are_preferred():
    (ref,) = convolutions(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), torch.ones(1, 32, 8, 8))
    plain, smooth = (
        [c.rank for c in candidates(ref, (0.3, 0.5), kinds=("separable",), divisible=flag)[:-1]]
        for flag in (False, True)
    )
    # 9216 * 0.3 / 192 and 9216 * 0.5 / 192; of 15 .. 24, 24 has the most divisors.
    assert plain == [14, 24]
    assert smooth == [14, 24]
    shares = (0.3, 0.49)
    assert [c.rank for c in candidates(ref, shares, kinds=("separable",), divisible=False)[:-1]] == [14, 23]
    assert [c.rank for c in candidates(ref, shares, kinds=("separable",))[:-1]] == [14, 20]


def test_without_labels_the_dense_models_classes_are_right():
    model, batches, _ = trained()
    pictures = batches[0][0]
    measure = Proxy(model, [pictures])
    assert measure(model) == 1
    assert torch.equal(measure.labels[0], model(pictures).argmax(1))
    worse = copy.deepcopy(model)
    worse[-1].bias.data[3] += 100
    assert measure(worse) < 0.3
    worse[-1].bias.data[3] = torch.nan
    assert measure(worse) == -torch.inf


def test_a_score_of_ones_own_decides():
    """One that likes the second convolution dense gets it dense."""
    model, batches, _ = trained()
    found = decompose(model, batches, 0.3, score=lambda m: float(isinstance(m[3], nn.Conv2d)), **QUICK)
    assert [layer.form == "dense" for layer in found] == [True, False]
    assert isinstance(model[6], ConvChain)
    assert found[0].error == 0
    assert 0 < found[1].error < 1
    assert found[1].parameters == model[6].num_parameters() < 24 * 24 * 9


def test_where_chooses_the_layers_and_the_budget_is_theirs():
    model, batches, _ = trained()
    picture = batches[0][0][:1]
    before = macs(model, picture)
    found = decompose(model, batches, 0.5, where="6", **QUICK)
    assert [layer.name for layer in found] == ["6"]
    one = 4 * 4 * 24 * 24 * 9
    assert 0.25 * one <= before - macs(model, picture) - 0.25 * one <= 0.5 * one


def test_the_filter_drops_a_rank_and_all_smaller_ones_of_its_scheme():
    model, batches, _ = trained()
    space = MixedTD(kinds=("separable", "grouped-pointwise"), mac_ratios=(0.2, 0.4, 0.6), groups=(1,)).space(
        model, batches, 0.3
    )
    before = [list(options) for options in space.options]
    ranks = sorted(c.rank for c in before[1] if str(c.scheme) == "separable")

    def measure(changed: nn.Module) -> float:
        """Dislikes one rank in the middle: smaller ones would be fine, but are not asked about."""
        layer = changed[6]
        separable = isinstance(layer, ConvChain) and layer.steps[0].kernel_size == (1, 3)
        return 0.5 if separable and layer.steps[0].out_channels == ranks[1] else 1.0

    assert space.filter(model, measure, 0.1) == 0.1
    assert set(space.options[0]) == set(before[0])
    kept = [c.rank for c in space.options[1] if str(c.scheme) == "separable"]
    assert kept == [ranks[2]]
    assert {c for c in space.options[1] if str(c.scheme) != "separable"} == {
        c for c in before[1] if str(c.scheme) != "separable"
    }
    assert space.options[1][-1].scheme is None
    assert all(candidate in space.options[0] + space.options[1] for _, candidate in space.made)
    assert isinstance(model[6], nn.Conv2d)


def test_a_filter_that_leaves_too_little_is_widened_with_a_warning():
    model, batches, _ = trained()
    with pytest.warns(EckartWarning, match="no mixture within a tolerance of 0.0 a layer reaches the ratio"):
        decompose(model, batches, 0.65, tolerance=0.0, **QUICK)


def test_batch_norms_are_estimated_again_only_if_it_helps():
    scores = {}
    for recalibrate in (False, True):
        model, batches, _ = trained()
        measure = Proxy(model, batches)
        before = [m.running_mean.clone() for m in model if isinstance(m, nn.BatchNorm2d)]
        decompose(model, batches, 0.65, recalibrate=recalibrate, **QUICK)
        after = [m.running_mean for m in model if isinstance(m, nn.BatchNorm2d)]
        if not recalibrate:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        scores[recalibrate] = measure(model)
    assert scores[True] >= scores[False]


def test_specs_and_tensors_give_the_network_back():
    model, batches, _ = trained()
    decompose(model, batches, 0.5, **QUICK)
    specs = {name: m.spec() for name, m in model.named_modules() if isinstance(m, ConvChain)}
    again = cnn().eval()
    for name, spec in specs.items():
        again.set_submodule(name, ConvChain.from_spec(spec))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batches[0][0]), model(batches[0][0]))


def test_a_forward_builds_no_dense_kernel(monkeypatch):
    model, batches, _ = trained()
    decompose(model, batches, 0.5, **QUICK)
    monkeypatch.setattr(ConvChain, "dense", lambda self: pytest.fail("the dense kernel was built"))
    model(batches[0][0])


def resnet() -> transformers.ResNetForImageClassification:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.ResNetForImageClassification(config).eval()


def test_a_transformers_model_through_the_verb(tmp_path):
    model = resnet()
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(8, 3, 32, 32, generator=generator), "labels": torch.arange(8) % 4}
    before = {ref.name: ref.macs for ref in convolutions(model, {"pixel_values": batch["pixel_values"]})}
    options = {name: value for name, value in QUICK.items() if name != "progress"}
    result = eckart.compress(model, "mixed-td", ratio=0.4, data=[batch], progress=False, **options)
    names = [layer.name for layer in result.layers]
    assert len(names) == 6
    assert not any("embedder" in name for name in names)
    after = macs(model, batch["pixel_values"][:1])
    assert sum(before.values()) - after >= 0.4 * sum(before[name] for name in names)
    assert result.bytes[1] < result.bytes[0]
    assert any(isinstance(m, ConvChain) for m in model.modules())

    def logits(one: nn.Module) -> torch.Tensor:
        return one(batch["pixel_values"]).logits

    eckart.save(model, tmp_path / "small")
    again, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(model))
    eckart.export_dense(model, tmp_path / "dense")
    dense = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(m, ConvChain) for m in dense.modules())
    torch.testing.assert_close(logits(dense), logits(model), rtol=0, atol=1e-4)


def test_models_without_convolutions_and_ratios_out_of_reach_are_refused_first():
    llama = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no convolutions"):
        eckart.compress(llama, "mixed-td", data=[tiny_models.inputs(llama)], progress=False)
    model, batches, _ = trained()
    with pytest.raises(ValueError, match=r"no convolution that can be factored \(0: has 3 channels or fewer\)"):
        decompose(model[:2], [batches[0][0]], 0.5)
    with pytest.raises(ValueError, match=r"ratio 0\.95 is out of reach: .* add smaller mac_ratios"):
        MixedTD(groups=(1,)).check(Job(model, 0.95, [], batches))
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1"):
        decompose(model, batches, 1.5)
    with pytest.raises(ValueError, match="needs pictures"):
        decompose(model, [], 0.5)
    model[6].weight.data[0, 0] = torch.nan
    with pytest.raises(LinalgError, match=r"6: .*NaN"):
        decompose(model, batches, 0.5, **QUICK)
    with pytest.raises(ValueError, match="matches no layer"):
        decompose(model, batches, 0.5, where="nowhere")
    assert not any(isinstance(m, ConvChain) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("tucker",)}, "kinds must be some of separable"),
        ({"mac_ratios": (0.5, 1.2)}, "mac_ratios must lie between 0 and 1"),
        ({"groups": (0,)}, "groups must be numbers of at least 1"),
        ({"tolerance": -1}, "tolerance and mutation"),
        ({"population": 0}, "population must be at least 1, not 0"),
        ({"generations": -1}, "generations must be at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MixedTD(**options)


def test_the_search_keeps_the_budget_and_never_gets_worse():
    costs = [[3, 5, 9]] * 4

    def score(choice: tuple[int, ...]) -> float:
        return sum(costs[i][g] * (i + 1) for i, g in enumerate(choice))

    found = [evolve(costs, 24, score, Search(10, 3, n)) for n in (0, 3, 10)]
    assert [f.score for f in found] == sorted(f.score for f in found)
    best = max(score((a, b, c, d)) for a in range(3) for b in range(3) for c in range(3) for d in range(3)
               if costs[0][a] + costs[0][b] + costs[0][c] + costs[0][d] <= 24)  # fmt: skip
    assert found[-1].score == best
    assert sum(costs[i][g] for i, g in enumerate(found[-1].choice)) <= 24
