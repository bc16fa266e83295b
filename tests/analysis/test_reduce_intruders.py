"""The mitigation on whole models: closed forms, PEFT's own routine, and what is written to disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

import eckart
from eckart.analysis import reduce_intruders
from eckart.models import linears, save
from eckart.models.adapted import adapted_linears
from model_state import assert_unchanged, snapshot
from tiny_models import FAMILIES, logits, low_rank

QUIET: dict[str, Any] = {"progress": False, "threshold": 0.8, "top": 4}


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {ref.name: ref.weight.detach().double().clone() for ref in adapted_linears(model).linears}


def _reduced(w: torch.Tensor, w0: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition, by two full decompositions."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    u0 = torch.linalg.svd(w0, full_matrices=False)[0]
    chosen = torch.nonzero((u[:, :4].mT @ u0).abs().amax(1) < 0.8).squeeze(1)
    return w + (scale - 1) * (u[:, chosen] * s[chosen]) @ vh[chosen]


def _tuned(family: str, seed: int = 5) -> Any:
    model = FAMILIES[family]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ref in linears(model).linears:
            ref.weight.add_(0.1 * torch.randn(ref.shape, generator=generator))
    return model


def _lora(family: str, **options: Any) -> Any:
    base = FAMILIES[family]()
    names = [ref.name for ref in linears(base).linears]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=names, fan_in_fan_out=family == "gpt2", **options)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("scale", [0.0, 0.75, 1.0])
def test_a_fine_tuned_model_is_changed_by_the_definition(family, scale, tmp_path):
    base, model = FAMILIES[family](), _tuned(family)
    before, before_base = _weights(model), snapshot(base)
    done = reduce_intruders(model, base, scale, **QUIET)
    assert done.model is model
    assert done.intruders > 0
    originals = _weights(base)
    for name, weight in _weights(model).items():
        assert torch.allclose(weight, _reduced(before[name], originals[name], scale), atol=1e-5)
    assert_unchanged(base, before_base)
    save(model, tmp_path / "model")
    again, _ = eckart.load(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "eckart"])
def test_an_adapter_becomes_a_dense_model_or_an_adapter_that_equals_it(family, kind, tmp_path):
    def tuned() -> Any:
        if kind == "lora":
            return _lora(family)
        model = eckart.adapt(FAMILIES[family](), "pissa", 2, progress=False)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    originals, before = _weights(FAMILIES[family]()), _weights(tuned())
    wanted = {name: _reduced(before[name], originals[name], 0.5) for name in before}
    dense = reduce_intruders(tuned(), scale=0.5, **QUIET)
    exact = reduce_intruders(tuned(), scale=0.5, form="adapter", **QUIET)
    cut = reduce_intruders(tuned(), scale=0.5, form="same-rank", **QUIET)
    assert dense.intruders == exact.intruders == cut.intruders > 0
    own = 2 if kind == "lora" else 4  # PiSSA's change is the difference of two products
    found, written, near = _weights(dense.model), _weights(exact.model), _weights(cut.model)
    for row, row_cut in zip(exact.rows, cut.rows, strict=True):
        name = row["layer"]
        assert torch.allclose(found[name], wanted[name], atol=1e-5)
        assert torch.allclose(written[name], wanted[name], atol=1e-5)
        assert row["rank"] <= own + row["intruders"]
        assert row["error"] < 1e-6
        assert row_cut["rank"] == own
        best = torch.linalg.svdvals(wanted[name] - originals[name])[own:].norm()
        assert float((near[name] - wanted[name]).norm()) == pytest.approx(float(best), abs=1e-4)
    assert any(row["rank"] == own + row["intruders"] > own for row in exact.rows)

    save(dense.model, tmp_path / "dense")
    assert torch.equal(logits(eckart.load(tmp_path / "dense")[0]), logits(dense.model))
    exact.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(dense.model), atol=1e-4)


def test_the_same_rank_is_what_peft_makes_of_it():
    ours = reduce_intruders(_lora("llama"), scale=0.75, form="same-rank", **QUIET)
    theirs = _lora("llama")
    reduce_intruder_dimension(theirs, top_k=4, threshold_epsilon=0.8, mitigation_lambda=0.75, logging_sink=None)
    assert ours.intruders > 0
    for (name, weight), other in zip(_weights(ours.model).items(), _weights(theirs).values(), strict=True):
        assert torch.allclose(weight, other, atol=1e-4), name


def test_where_says_whose_intruders_and_the_rest_of_the_adapter_stays():
    before = _weights(_lora("llama"))
    done = reduce_intruders(_lora("llama"), scale=0.0, form="adapter", where="*.0.mlp.*", **QUIET)
    assert [row["layer"] for row in done.rows] == [name for name in before if ".0.mlp." in name]
    for name, weight in _weights(done.model).items():
        assert torch.allclose(weight, before[name], atol=1e-5) == (".0.mlp." not in name)


def test_a_full_fine_tuning_as_an_adapter_on_its_base():
    base, model = FAMILIES["llama"](), _tuned("llama")
    before, originals = snapshot(model), _weights(base)
    wanted = {name: _reduced(weight, originals[name], 0.5) for name, weight in _weights(model).items()}
    done = reduce_intruders(model, base, 0.5, form="adapter", **QUIET)
    assert_unchanged(model, before)
    for name, weight in _weights(done.model).items():
        assert torch.allclose(weight, wanted[name], atol=1e-4)


def test_half_precision_is_rounded_once():
    base, model = FAMILIES["llama"]().bfloat16(), _tuned("llama").bfloat16()
    before, originals = _weights(model), _weights(base)
    reduce_intruders(model, base, 0.5, **QUIET)
    for name, weight in _weights(model).items():
        assert weight.isfinite().all()
        assert torch.allclose(weight, _reduced(before[name], originals[name], 0.5), rtol=2**-8, atol=1e-6)


def test_bad_requests_change_nothing():
    base, model = FAMILIES["llama"](), _tuned("llama")
    before = snapshot(model)
    for options, message in (
        ({"scale": -0.1}, "scale must be a finite number of at least 0"),
        ({"scale": float("nan")}, "scale must be"),
        ({"form": "lora"}, "form must be one of dense, adapter, same-rank"),
        ({"base": None}, "pass base="),
        ({"base": FAMILIES["phi3"]()}, "in one of the models only"),
        ({"base": FAMILIES["mistral"](), "where": "*.no_such"}, "matches no layer"),
        ({"base": _lora("llama")}, "the base has adapters on it"),
        ({"top": 0}, "top must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce_intruders(model, **{"base": base, "progress": False, **options})
    with torch.no_grad():
        damaged = FAMILIES["llama"]()
        damaged.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj has NaN or Inf"):
        reduce_intruders(model, damaged, progress=False)
    assert_unchanged(model, before)
    low = FAMILIES["llama"]()
    low_rank(low, rank=4)
    with pytest.raises(ValueError, match="is stored as LowRank, which cannot take a dense change"):
        reduce_intruders(low, base, progress=False)
    whole = _lora("llama", modules_to_save=["lm_head"])
    with pytest.raises(
        ValueError, match="lm_head is trained too and has no form as a LoRA of a linear layer; use form="
    ):
        reduce_intruders(whole, form="adapter", progress=False)


def test_nothing_that_differs_makes_no_adapter():
    base = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="no weight differs"):
        reduce_intruders(copy.deepcopy(base), base, form="adapter", progress=False)
