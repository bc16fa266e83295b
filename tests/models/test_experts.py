from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from eckart.models.experts import Expert, ExpertBank, align, expert_banks, route
from eckart.models.geometry import Geometry, set_geometry
from mixtures import FAMILIES, build
from model_state import assert_unchanged, snapshot

mixtures = pytest.mark.parametrize("family", FAMILIES)


def with_shared_expert() -> transformers.PreTrainedModel:
    config = transformers.Qwen2MoeConfig(
        vocab_size=128, hidden_size=16, intermediate_size=20, moe_intermediate_size=12, num_experts=3,
        num_experts_per_tok=2, shared_expert_intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config).eval()


def routers(model: transformers.PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What each router put out: (logits, gate weights, chosen experts), by hooks on the routers themselves."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: list(out)}))
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Router")
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@mixtures
def test_banks_are_found_with_their_sizes_and_views_share_memory(family):
    model = build(family)
    banks = expert_banks(model)
    width = {"mixtral": 48, "qwen3_moe": 24}[family]
    assert [bank.name for bank in banks] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for bank in banks:
        assert (bank.count, bank.width, bank.shape) == (4, width, (3 * width * 4, 32))
        assert bank.expert_parameters == 3 * width * 32
        assert bank.shape[0] * bank.shape[1] == sum(p.numel() for p in bank.module.parameters())
    gate, up, down = banks[0].expert(2)
    assert (gate.shape, up.shape, down.shape) == ((width, 32), (width, 32), (32, width))
    for view, whole in ((gate, banks[0].gate_up), (up, banks[0].gate_up), (down, banks[0].down)):
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@mixtures
def test_an_expert_alone_is_the_module_with_that_expert_chosen(family):
    bank = expert_banks(build(family))[1]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index in range(4):
        whole = bank.module(x, torch.full((5, 1), index), torch.ones(5, 1).double())
        torch.testing.assert_close(bank.run(index, x), whole, rtol=0, atol=1e-12)


def test_shared_experts_are_no_part_of_a_bank():
    model = with_shared_expert()
    assert [(bank.name, bank.count, bank.width) for bank in expert_banks(model)] == [
        ("model.layers.0.mlp.experts", 3, 12)
    ]
    assert any("shared_expert" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_dense_models_have_no_banks(family):
    assert expert_banks(tiny_models.FAMILIES[family]()) == []


class OtherExperts(nn.Module):
    """The same parameters, put to another use."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 6, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(2, 6, 4, generator=generator))
        self.act_fn, self.kind = nn.SiLU(), kind
        if kind == "biased":
            self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        both = x @ self.gate_up_proj[int(chosen[0, 0])].mT
        gate, up = (both[:, ::2], both[:, 1::2]) if self.kind == "interleaved" else both.chunk(2, dim=1)
        if self.kind == "clamped":
            up = up.clamp(-0.1, 0.1)
        return (self.act_fn(gate) * up) @ self.down_proj[int(chosen[0, 0])].mT * weights


@pytest.mark.parametrize("kind", ["interleaved", "clamped", "biased"])
def test_banks_with_another_formula_are_not_taken_for_one(kind):
    assert expert_banks(nn.Sequential(OtherExperts(kind))) == []
    assert len(expert_banks(nn.Sequential(OtherExperts("plain")))) == 1


@mixtures
def test_frequencies_and_gate_weights_are_those_of_the_routers(family):
    model = build(family)
    batch = tiny_models.inputs(model, 3, 9)
    used = route(model, expert_banks(model), [batch], progress=False)
    for (_, weights, chosen), found in zip(routers(model, batch).values(), used.values(), strict=True):
        for expert in range(4):
            hit = chosen == expert
            assert float(found.frequency[expert]) == pytest.approx(float(hit.any(1).double().mean()), abs=1e-12)
            assert float(found.gate[expert]) == pytest.approx(float((weights * hit).sum(1).mean()), abs=1e-7)
        assert found.tokens == 27
        assert float(found.frequency.sum()) == pytest.approx(2)
        # Mixtral's gate weights sum to one for each token; those of this Qwen3-MoE are bare probabilities.
        total = float(found.gate.sum())
        assert total == pytest.approx(1, abs=1e-6) if family == "mixtral" else 0.3 < total < 0.99


@mixtures
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_and_batches_do_not_matter(family, side):
    model = build(family)
    batch = tiny_models.inputs(model, 4, 9)
    banks = expert_banks(model)
    rows: dict[str, list[torch.Tensor]] = {}

    def collect(bank: ExpertBank, x: torch.Tensor, _: torch.Tensor) -> None:
        rows.setdefault(bank.name, []).append(x)

    def run(batches: list[dict[str, torch.Tensor]]) -> tuple[dict, dict[str, torch.Tensor]]:
        rows.clear()
        used = route(model, banks, batches, see=collect, progress=False)
        return used, {name: torch.cat(parts) for name, parts in rows.items()}

    plain, seen = run([batch])
    filler = torch.full((4, 5), 7)
    order = (lambda a, b: torch.cat([a, b], 1)) if side == "right" else (lambda a, b: torch.cat([b, a], 1))
    padded = {
        "input_ids": order(batch["input_ids"], filler),
        "attention_mask": order(batch["attention_mask"], torch.zeros_like(filler)),
    }
    halves = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    for other in ([padded], halves):
        used, again = run(other)
        for name in plain:
            assert torch.equal(used[name].frequency, plain[name].frequency)
            torch.testing.assert_close(used[name].gate, plain[name].gate, rtol=0, atol=1e-6)
            torch.testing.assert_close(again[name], seen[name], rtol=0, atol=1e-6)


def test_a_sample_of_the_tokens_is_spread_evenly_and_does_not_depend_on_the_batches():
    model = build("mixtral")
    batch = tiny_models.inputs(model, 4, 10)
    (bank, _) = expert_banks(model)
    whole: list[torch.Tensor] = []
    route(model, [bank], [batch], see=lambda _, x, chosen: whole.append(x), progress=False)
    for batches in ([batch], [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]):
        few: list[torch.Tensor] = []
        used = route(model, [bank], batches, see=lambda _, x, chosen, few=few: few.append(x), tokens=8, progress=False)
        torch.testing.assert_close(torch.cat(few), whole[0][::5], rtol=0, atol=1e-12)
        assert used[bank.name].tokens == 40  # routing is counted on all of them


def test_recording_leaves_the_model_as_it_was_and_names_what_is_wrong():
    model = build("mixtral")
    model.train()
    before = snapshot(model)
    banks = expert_banks(model)
    route(model, banks, [{**tiny_models.inputs(model), "labels": torch.zeros(2, 12).long()}], progress=False)
    assert_unchanged(model, before)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no calibration token counts"):
        route(model, banks, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], progress=False)
    with pytest.raises(ValueError, match="calibrated on input_ids, got pixels"):
        route(model, banks, [{"pixels": ids}], progress=False)
    assert_unchanged(model, before)


def test_a_bank_with_fewer_experts_than_its_router_knows_runs_by_stored_number():
    bank = expert_banks(build("mixtral"))[0]
    kept = bank.gate_up[:2].detach().clone(), bank.down[:2].detach().clone()
    shapes = {"gate_up_proj": tuple(kept[0].shape), "down_proj": tuple(kept[1].shape)}
    set_geometry(bank.module, Geometry({"num_experts": 2}, shapes=shapes, experts=(0, 1, 1, 0)))
    with torch.no_grad():
        bank.gate_up.copy_(kept[0])
        bank.down.copy_(kept[1])
    assert bank.count == 2
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    through = bank.module(x, torch.tensor([[2, 1]] * 5), torch.tensor([[0.25, 0.5]] * 5).double())
    # Experts 1 and 2 of the router are both the stored expert 1: their gate weights add up.
    torch.testing.assert_close(through, 0.75 * bank.run(1, x), rtol=0, atol=1e-12)


def test_alignment_undoes_a_permutation_and_never_changes_the_function():
    bank = expert_banks(build("qwen3_moe"))[0]
    one, other = (Expert(*(w.detach() for w in bank.expert(index))) for index in (0, 1))
    generator = torch.Generator().manual_seed(0)
    shuffled = one.permuted(torch.randperm(24, generator=generator))
    for found, expected in zip(align(shuffled, one), one, strict=True):
        assert torch.equal(found, expected)
    x = torch.randn(7, 32, generator=generator, dtype=torch.float64)

    def output(expert: Expert) -> torch.Tensor:
        return (nn.functional.silu(x @ expert.gate.mT) * (x @ expert.up.mT)) @ expert.down.mT

    aligned = align(other, one)
    torch.testing.assert_close(output(aligned), output(other), rtol=0, atol=1e-12)
    distance = [float((a.units() - one.units()).norm()) for a in (aligned, other)]
    assert distance[0] < distance[1]
