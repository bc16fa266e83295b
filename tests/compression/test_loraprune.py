"""LoRAPrune: scores from a LoRA's gradients, masks, and the model that is cut out of it."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

import tiny_models
from eckart.compression import compress
from eckart.compression.groups_to_prune import Group, cut_out, groups_of
from eckart.compression.loraprune import LoRAPrune, importance, scheduled
from eckart.models import linears
from eckart.models.parts import AttentionPart, parts
from eckart.structures import EckartWarning

FAST = {"steps": 10, "prune_every": 2, "spared": 0.0, "rank": 2}


def batches(model) -> list[dict[str, torch.Tensor]]:
    return [tiny_models.inputs(model, 2, 12) for _ in range(2)]


def pruned(family: str = "llama", ratio: float = 0.3, **options):
    torch.manual_seed(0)
    model = tiny_models.FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        result = compress(model, LoRAPrune(**(FAST | options)), ratio=ratio, data=batches(model), progress=False)
    return model, result


def test_the_gradient_that_a_lora_sees_is_a_projection_of_the_true_one():
    """With B = 0, g_B = dL/dW A^T c, so G = c dL/dW A^T A."""
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((5, 6), (9, 6), (9, 5)))
    a = torch.randn(3, 6, dtype=torch.float64, generator=generator).requires_grad_()
    b = torch.zeros(5, 3, dtype=torch.float64).requires_grad_()
    scaling = 2.0
    (x @ (weight + scaling * b @ a).mT - y).square().sum().backward()
    true = 2 * (x @ weight.mT - y).mT @ x
    projected = scaling * true @ a.detach().mT @ a.detach()
    found = importance(weight, a.detach(), b.detach(), a.grad, b.grad, scaling, "lora")
    torch.testing.assert_close(found, (projected * weight).abs())
    magnitude = importance(weight, a.detach(), b.detach(), None, None, scaling, "magnitude")
    torch.testing.assert_close(magnitude, weight.abs())


def test_the_schedule_begins_at_zero_ends_at_one_and_never_falls():
    values = [scheduled(step, 100, 0.1, 0.1) for step in range(100)]
    assert values[0] == values[10] == 0
    assert values[90] == values[99] == 1
    assert values == sorted(values)
    assert values[50] == pytest.approx(1 - (1 - 40 / 80) ** 3)


def a_group(count: int = 6, remove: int = 4) -> Group:
    model = tiny_models.FAMILIES["llama"]()
    part = next(p for p in parts(model, linears(model).linears)[0] if not isinstance(p, AttentionPart))
    return Group(part, count, remove)


def test_what_is_gone_stays_gone():
    group = a_group()
    group.observe([(torch.tensor([[1.0], [2], [3], [4], [5], [6]]), False)], momentum=0.0)
    group.mask_lowest(0.5)
    assert group.mask.tolist() == [0, 0, 1, 1, 1, 1]
    group.observe([(torch.tensor([[9.0], [9], [1], [2], [5], [6]]), False)], momentum=0.0)
    group.mask_lowest(1.0)
    assert group.mask.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_score_that_is_no_number_is_not_taken_in():
    group = a_group()
    group.observe([(torch.ones(6, 1), False)], momentum=0.0)
    before = group.scores.clone()
    group.observe([(torch.full((6, 1), torch.nan), False)], momentum=0.0)
    assert torch.equal(group.scores, before)


def test_scores_of_modules_count_the_same_whatever_their_scale():
    one, other = a_group(), a_group()
    first, second = torch.rand(6, 3), torch.rand(4, 6)
    one.observe([(first, False), (second, True)], momentum=0.5)
    other.observe([(1000 * first, False), (second, True)], momentum=0.5)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=0)
    expected = 0.5 * (first.sum(1) / first.sum(1).norm() + second.sum(0) / second.sum(0).norm())
    torch.testing.assert_close(one.scores.float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2"])
def test_the_cut_model_is_the_masked_one(family):
    """Setting rows to zero in place gives the same logits as cutting them out."""
    model = tiny_models.FAMILIES[family]()
    found, _ = parts(model, linears(model).linears)
    groups = []
    for part in found:
        count = part.kv_heads if isinstance(part, AttentionPart) else part.width
        group = Group(part, count, max(1, count // 3))
        group.mask[torch.arange(group.remove)] = 0
        groups.append(group)
    with torch.no_grad():
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _a, y, mask=mask: y * mask().to(y))
            for group in groups
            for name, mask in group.output_masks()
        ]
        masked = tiny_models.logits(model)
        for handle in handles:
            handle.remove()
        cut_out(model, groups)
        torch.testing.assert_close(tiny_models.logits(model), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


def test_the_error_is_the_share_of_the_weight_that_was_cut():
    model = tiny_models.FAMILIES["llama"]()
    part = next(p for p in parts(model, linears(model).linears)[0] if not isinstance(p, AttentionPart))
    weights = {ref.name: ref.weight.detach().clone() for ref in part.linears}
    group = Group(part, part.width, 3)
    group.mask[[0, 2, 5]] = 0
    records = cut_out(model, [group])
    for ref in part.linears:
        kept = weights[ref.name].clone()
        (kept.T if ref is part.output else kept)[[0, 2, 5]] = 0
        error = float((weights[ref.name] - kept).norm() / weights[ref.name].norm())
        assert records[ref.name].error == pytest.approx(error, rel=1e-5)
        assert 0 < error < 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_pruned_model_is_saved_loaded_and_generates(family, tmp_path):
    model, result = pruned(family)
    assert 0.3 <= result.ratio < 0.4
    assert result.bytes[1] < result.bytes[0]
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    prompt = {"input_ids": torch.arange(1, 6)[None], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    long = again.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(long, again.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=False))


def test_queries_keys_and_values_lose_the_same_heads():
    model, _ = pruned("llama", 0.35)
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            rows = {key: getattr(module, key).out_features for key in ("q_proj", "k_proj", "v_proj")}
            assert rows["k_proj"] == rows["v_proj"]
            assert rows["q_proj"] == rows["k_proj"] * module.num_key_value_groups == module.o_proj.in_features


def test_the_last_block_and_the_spared_ones_keep_their_shapes():
    _, result = pruned("llama", 0.2)
    last = [layer for layer in result.layers if ".layers.1." in layer.name]
    assert last
    assert all(layer.form == "dense" for layer in last)
    with pytest.raises(ValueError, match="lower spared"):
        pruned("llama", 0.2, spared=0.9)


def test_too_much_is_refused_before_anything_is_touched():
    model = tiny_models.FAMILIES["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="lower ratio or spared"):
        compress(model, LoRAPrune(**FAST), ratio=0.8, data=batches(model), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failed_training_leaves_the_model_without_a_lora():
    model = tiny_models.FAMILIES["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="is not finite; lower learning_rate"):
        compress(model, LoRAPrune(**(FAST | {"learning_rate": 1e30})), ratio=0.3, data=batches(model), progress=False)
    assert dict.fromkeys(model.state_dict(), True) == dict.fromkeys(before, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before():
    one, _ = pruned(seed=3)
    torch.rand(7)
    other, _ = pruned(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"warmup": 0.6, "cooldown": 0.5}, "leave no step to prune in"),
        ({"score": "fisher"}, "score must be one of lora, magnitude"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAPrune(**options)


def test_more_than_there_is_cannot_go():
    with pytest.raises(ValueError, match="no block may lose heads or channels"):
        groups_of([], 10)
