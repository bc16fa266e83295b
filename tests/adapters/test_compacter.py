"""Compacter: the product without its matrix, the counts of the paper, what is shared, and where the adapters sit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import tiny_models
from eckart import adapt
from eckart.adapters.compacter import Compacter, phm
from eckart.adapters.layer import EckartLayer
from eckart.adapters.site import Site

IDS = torch.arange(24).reshape(2, 12) % 60


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(rule: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ S_i ⊗ (L_i R_i), as it is written."""
    return sum(torch.kron(s, a @ b) for s, a, b in zip(rule, left, right, strict=True))


def made(out: int = 12, inputs: int = 10, rank: int = 4, scale: float = 1.0, **options):
    adapter = Compacter(**options).build(Site("layer", "linear", out, inputs), rank, scale)
    adapter.initialize(torch.zeros(out, inputs), None, torch.Generator().manual_seed(0))
    return adapter


def moved(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def model(family: str = "llama", rank: int = 4, **settings) -> PeftModel:
    return adapt(tiny_models.FAMILIES[family](), "compacter", rank=rank, progress=False, **settings).eval()


def adapters(of: PeftModel, name: str = "default") -> dict:
    layers = {key: module for key, module in of.base_model.model.named_modules() if isinstance(module, EckartLayer)}
    return {key: layer.eckart_adapters[name] for key, layer in layers.items() if name in layer.eckart_adapters}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("factor_rank", [1, 3])
def test_the_product_is_that_of_kronecker_factors(n, factor_rank):
    x, rule = draw(2, 5, 16), draw(n, n, n, seed=1)
    left, right = draw(n, 16 // n, factor_rank, seed=2), draw(n, factor_rank, 12 // n, seed=3)
    expected = x @ matrix(rule, left, right)
    assert torch.allclose(phm(x, rule, left, right), expected, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(matrix(rule, left, right)) <= n * n * factor_rank


def test_the_rank_of_a_sum_of_kronecker_products():
    """At most Σ rank(S_i) ρ, which here is met: 4 of 8."""
    h = matrix(draw(2, 2, 2), draw(2, 8, 1, seed=1), draw(2, 1, 4, seed=2))
    assert h.shape == (16, 8)
    assert torch.linalg.matrix_rank(h) == 4


def test_without_division_and_with_full_factors_it_is_a_plain_projection():
    h, x = draw(6, 4), draw(3, 6, seed=1)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    assert torch.allclose(phm(x, 0.5 * one, h[None], torch.eye(4, dtype=torch.float64)[None]), 0.5 * x @ h)


@pytest.mark.parametrize("factor_rank", [1, 2])
def test_an_adapted_layer(factor_rank):
    adapter, base = moved(made(12, 10, 8, scale=0.5, factor_rank=factor_rank, division=2)), nn.Linear(10, 12)
    x = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(2))
    h = base(x).detach().double().numpy()
    t = {name: part.detach().double() for name, part in adapter.named_parameters()}
    z = h @ matrix(t["rule"], t["down_left"], t["down_right"]).numpy() + t["down_bias"].numpy()
    z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    z = z @ matrix(t["rule"], t["up_left"], t["up_right"]).numpy() + t["up_bias"].numpy()
    assert np.abs(0.5 * z).max() > 0.1
    assert np.abs(adapter(x, base).detach().numpy() - (h + 0.5 * z)).max() < 1e-5
    with pytest.raises(ValueError, match="layer: an adapter with a gelu inside is no linear map"):
        adapter.delta(torch.zeros(12, 10))


def test_the_counts_of_the_paper():
    """T5-base: k = 768, d = 24, n = 4; 62 layer norms."""
    method = Compacter()
    assert method.trainable(Site("wo", "linear", 768, 3072), 24) - 4**3 == 2_376
    for count, published in ((24, 104_704), (48, 161_728)):
        sites = {str(i): Site(str(i), "linear", 768, 3072) for i in range(count)}
        total = method.total_trainable(sites, dict.fromkeys(sites, 24))
        assert total + 62 * 768 == published
        built = {name: method.build(site, 24, 1.0) for name, site in sites.items()}
        method.link(built)
        assert sum(adapter.num_trainable() for adapter in built.values()) == total


def test_the_start_is_near_the_model():
    adapter = made(1024, 8, 8)
    assert float(adapter.rule.detach().std()) == pytest.approx(0.01, rel=0.3)
    for part, rows, columns in (("down_left", 256, 1), ("up_right", 1, 256), ("down_right", 1, 2), ("up_left", 2, 1)):
        tensor, bound = getattr(adapter, part).detach(), math.sqrt(2) * math.sqrt(6 / (rows + columns))
        assert tensor.shape[1:] == (rows, columns)
        assert float(tensor.abs().max()) <= bound
        if tensor.numel() > 100:
            assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    x = torch.randn(5, 1024)
    update = adapter.update(x).detach()
    assert 0 < float(update.norm()) < 0.01 * float(x.norm())
    published = made(1024, 8, 8, init_range=1e-4)
    assert torch.allclose(published.rule, adapter.rule / 100)
    assert torch.equal(published.up_right, adapter.up_right)


def test_one_rule_for_all_layers(tmp_path):
    adapted = model()
    found = list(adapters(adapted).values())
    assert len(found) == 4
    assert len({id(adapter.rule) for adapter in found}) == 1
    assert len([name for name, _ in adapted.named_parameters() if name.endswith("rule")]) == 1
    adapted.save_pretrained(tmp_path)
    loaded = list(adapters(PeftModel.from_pretrained(tiny_models.FAMILIES["llama"](), tmp_path)).values())
    assert len({id(adapter.rule) for adapter in loaded}) == 1
    assert torch.equal(loaded[-1].rule, found[0].rule)


def ends(of: PeftModel, name: str = "default") -> set[str]:
    return {key.removeprefix("model.").removeprefix("layers.") for key in adapters(of, name)}


def test_where_the_adapters_sit():
    both = {f"{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert ends(model()) == both
    assert ends(model(options={"plus": True})) == {name for name in both if "mlp" in name}
    assert ends(model(where="*.q_proj")) == {f"{i}.self_attn.q_proj" for i in range(2)}
    t5 = {name for stack in ("encoder", "decoder") for i in range(2)
          for name in (f"{stack}.block.{i}.layer.0.SelfAttention.o",
                       f"{stack}.block.{i}.layer.{2 if stack == 'decoder' else 1}.DenseReluDense.wo")}  # fmt: skip
    assert ends(model("t5")) == t5  # none after cross attention
    assert model("t5").get_nb_trainable_parameters()[0] == 8 * 3 * (32 + 4) + 4**3


def test_a_second_adapter_sits_where_the_first_does():
    adapted = moved(adapt(tiny_models.FAMILIES["llama"](), "pissa", rank=3, progress=False))
    adapt(adapted, "compacter", rank=4, adapter_name="second", progress=False)
    assert ends(adapted, "second") == ends(model())
    adapt(adapted, "compacter", rank=8, adapter_name="third", progress=False)
    assert ends(adapted, "third") == ends(model())


def test_experts_that_cannot_be_found():
    with pytest.warns(UserWarning, match="no linear map that ends a sub-layer of kind mlp, so those get no adapter"):
        assert ends(model("mixtral")) == {f"{i}.self_attn.o_proj" for i in range(2)}
    with pytest.raises(ValueError, match="of kind mlp; name target_modules, or leave out plus"):
        model("mixtral", options={"plus": True})
    layers = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))})
    with pytest.raises(ValueError, match=r"ends of sub-layers, but .*; or name target_modules"):
        adapt(layers, "compacter", rank=4, progress=False)
    assert ends(adapt(layers, "compacter", rank=4, target_modules="all-linear", progress=False)) == {"0.0", "1.0"}


def test_the_division_gives_way_only_if_none_was_named():
    built = {"layer": made(12, 10, 6), "other": made(12, 10, 6)}
    with pytest.warns(UserWarning, match="divides by 3 in place of 4, which does not divide the rank 6 or the 12 out"):
        Compacter().link(built)
    assert built["layer"].rule.shape == (3, 3, 3)
    assert built["other"].rule is built["layer"].rule
    site = Site("layer", "linear", 12, 10)
    assert "has 12 outputs and rank 6, which division = 4 must both divide; choose another rank, such as 8" in str(
        Compacter(division=4).check(site, 6)
    )
    assert "another division" in str(Compacter(division=8).check(site, 8))
    assert Compacter(division=4).check(site, 8) is None
    assert Compacter(factor_rank=2).check(site, 4) == "has rank 4, so factor_rank must be at most 1"


def test_each_division_has_its_rule():
    method = Compacter()
    sites = {"a": Site("a", "linear", 12, 10), "b": Site("b", "linear", 12, 10), "c": Site("c", "linear", 12, 10)}
    ranks = {"a": 4, "b": 2, "c": 8}
    built = {name: method.build(site, ranks[name], 1.0) for name, site in sites.items()}
    with pytest.warns(UserWarning, match="divides by 2 in place of 4"):
        method.link(built)
    assert built["c"].rule is built["a"].rule
    assert built["b"].rule.shape == (2, 2, 2)
    total = sum(adapter.num_trainable() for adapter in built.values())
    assert total == method.total_trainable(sites, ranks) == 3 * (3 * 12 + 14) + 64 + 8


def logits(of: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=IDS, decoder_input_ids=IDS[:, :6]).logits


def test_the_layer_norms_can_be_trained_too(tmp_path):
    base = tiny_models.FAMILIES["t5"]()
    before = logits(base)
    plain = model("t5").get_nb_trainable_parameters()[0]
    adapted = adapt(base, "compacter", rank=4, progress=False, options={"layer_norms": True}).eval()
    # Two in each of two encoder blocks, three in each of two decoder blocks, one at the end of both.
    assert adapted.get_nb_trainable_parameters()[0] == plain + (2 * 2 + 2 * 3 + 2) * 32
    moved(adapted)
    after = logits(adapted)
    assert not torch.allclose(before, after)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_models.FAMILIES["t5"](), tmp_path).eval()), after)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    adapt(adapted, "compacter", rank=8, adapter_name="more", progress=False, options={"layer_norms": True})
    names = adapted.peft_config["more"].modules_to_save
    assert len(names) == 12
    assert sorted(names) == sorted(adapted.peft_config["default"].modules_to_save)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"division": 0}, "division must be at least 1, not 0; the paper has 4"),
        ({"factor_rank": 0}, "factor_rank must be at least 1"),
        ({"init_range": 0.0}, "init_range must be a number above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Compacter(**options)
