from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from eckart.models import Statistics, blocks, calibrate, input_groups, linears
from model_state import assert_unchanged, snapshot

NEEDS = ("gram", "absmean", "absmax", "mean")
EVERY_FAMILY = pytest.mark.parametrize("family", tiny_models.FAMILIES)


def build(family: str) -> nn.Module:
    """A float64 model, so that sums in another order agree to rounding."""
    model = tiny_models.FAMILIES[family]().double()
    model.config._experts_implementation = "eager"  # the fused kernel for experts has no float64
    return model


def padded(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """A batch with padding on both sides, and a longer one without."""
    first, second = tiny_models.inputs(model, 3, 10), tiny_models.inputs(model, 2, 13)
    if "attention_mask" in first:
        first["attention_mask"][0, 7:] = 0
        # Gemma 2's own attention gives NaN in float64 for a query that may look at nothing.
        first["attention_mask"][1, slice(2) if model.config.model_type != "gemma2" else slice(6, None)] = 0
    if "decoder_input_ids" in first:
        first["decoder_attention_mask"] = torch.ones_like(first["decoder_input_ids"])
        first["decoder_attention_mask"][2, 3:] = 0
    return [first, second]


def mask_of(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Which tokens of a layer's input count, told from its name: the truth for the tiny models only."""
    if name.startswith("decoder") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
        return batch.get("decoder_attention_mask")
    return batch.get("attention_mask")


@torch.no_grad()
def inputs_by_hooks(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All rows that count of the input of every linear, from an ordinary forward pass."""
    rows: dict[str, list[torch.Tensor]] = {}
    for batch in batches:

        def see(name: str, x: torch.Tensor, batch: dict[str, torch.Tensor] = batch) -> None:
            mask, x = mask_of(name, batch), x.reshape(-1, x.shape[-1])
            rows.setdefault(name, []).append(x if mask is None else x[mask.reshape(-1).bool()])

        handles = [
            ref.module.register_forward_pre_hook(lambda _, args, name=ref.name: see(name, args[0]))
            for ref in linears(model).linears
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).double() for name, parts in rows.items()}


@EVERY_FAMILY
def test_statistics_equal_those_of_hooks_on_every_layer(family):
    model = build(family)
    batches = padded(model)
    truth = inputs_by_hooks(model, batches)
    found = calibrate(model, batches, NEEDS, progress=False)
    assert found.keys() == truth.keys() == {ref.name for ref in linears(model).linears}
    for name, x in truth.items():
        entry = found[name]
        assert entry.count == len(x), name
        expected = {"gram": x.T @ x, "absmean": x.abs().mean(0), "absmax": x.abs().amax(0), "mean": x.mean(0)}
        for need, value in expected.items():
            given = entry.require(need)
            assert given.dtype == torch.float64
            # The same numbers summed in another order.
            torch.testing.assert_close(given, value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert (entry.fisher, entry.compressed_gram, entry.cross_gram) == (None, None, None)


@EVERY_FAMILY
def test_layers_with_one_input_share_one_object(family):
    model = tiny_models.FAMILIES[family]()
    found = calibrate(model, [tiny_models.inputs(model)], progress=False)
    groups = input_groups(model)
    assert len({id(entry) for entry in found.values()}) == len(groups)
    for group in groups:
        assert len({id(found[name]) for name in group}) == 1, group


def test_only_what_is_asked_for_is_gathered():
    model = tiny_models.FAMILIES["llama"]()
    data = [tiny_models.inputs(model)]
    for need in NEEDS:
        entry = next(iter(calibrate(model, data, [need], progress=False).values()))
        assert [name for name in NEEDS if getattr(entry, name) is not None] == [need]
        with pytest.raises(ValueError, match="calibration did not gather 'fisher'"):
            entry.require("fisher")
    chosen = calibrate(model, data, where="*.down_proj", progress=False)
    assert list(chosen) == [f"model.layers.{index}.mlp.down_proj" for index in range(tiny_models.LAYERS)]


def test_half_precision_inputs_are_summed_in_float64():
    model = tiny_models.FAMILIES["llama"]().bfloat16()
    batches = [tiny_models.inputs(model, 8, 40)]
    found = calibrate(model, batches, progress=False)
    for name, x in inputs_by_hooks(model, batches).items():
        # Products of bfloat16 numbers are exact in float32; 320 of them are summed in float32, then in float64.
        torch.testing.assert_close(found[name].gram, x.T @ x, rtol=1e-5, atol=1e-5 * float((x.T @ x).diagonal().max()))


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "opt"])
def test_padding_does_not_count(family):
    """A batch padded to twice its length, garbage in the padding, against the batch itself."""
    model = build(family)
    short = tiny_models.inputs(model, 2, 6)
    noise = torch.full((2, 6), 5)
    ids, zeros = short["input_ids"], torch.zeros_like(noise)
    long = {**short, "input_ids": torch.cat([ids, noise], 1)}
    long["attention_mask"] = torch.cat([torch.ones_like(ids), zeros], 1)
    if family == "t5":
        decoder = short["decoder_input_ids"]
        long["decoder_input_ids"] = torch.cat([decoder, noise], 1)
        long["decoder_attention_mask"] = torch.cat([torch.ones_like(decoder), zeros], 1)
    expected, found = (calibrate(model, [batch], NEEDS, progress=False) for batch in (short, long))
    for name, entry in expected.items():
        assert found[name].count == entry.count, name
        torch.testing.assert_close(found[name].gram, entry.gram, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[name].absmax, entry.absmax, rtol=1e-9, atol=1e-9)


def test_a_batch_of_nothing_but_padding_adds_nothing():
    model = build("llama")
    batch = tiny_models.inputs(model)
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    expected, found = (calibrate(model, data, NEEDS, progress=False) for data in ([batch], [batch, empty]))
    for name in expected:
        assert found[name].count == expected[name].count
        assert torch.equal(found[name].gram, expected[name].gram)


# ------------------------------------------------------------------------------------------------ Fisher information


def labelled(family: str, model: nn.Module, batch: int = 4) -> dict[str, torch.Tensor]:
    data = tiny_models.inputs(model, batch, 8)
    if family == "vit":
        data["labels"] = torch.arange(batch) % model.config.num_labels
    elif family == "bert":
        data["labels"] = data["input_ids"].clone()
        data["labels"][:, ::2] = -100
        data["labels"][0, 1:5] = -100  # sequences with different numbers of labels
    elif family == "t5":
        data["labels"] = data["input_ids"][:, :5].clone()
        data.pop("decoder_input_ids")
    return data


def fisher_by_autograd(model: nn.Module, sequences: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One sequence at a time, the gradient of every weight, squared and summed over outputs and sequences."""
    refs = linears(model).linears
    total = {ref.name: torch.zeros(ref.in_features, dtype=torch.float64) for ref in refs}
    for sequence in sequences:
        ids = sequence.get("input_ids")
        labels = sequence.get("labels")
        if labels is None:
            labels = ids.masked_fill(sequence["attention_mask"] == 0, -100)
        loss = model(**{**sequence, "labels": labels}).loss
        for ref, gradient in zip(refs, torch.autograd.grad(loss, [r.module.weight for r in refs]), strict=True):
            oriented = gradient.mT if ref.kind == "conv1d" else gradient
            total[ref.name] += oriented.square().sum(0)
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bert", "t5", "vit", "mixtral"])
def test_fisher_is_the_sum_over_single_sequences(family):
    model = build(family)
    batch = labelled(family, model)
    if family in ("llama", "opt"):
        batch["attention_mask"][1, 5:] = 0  # padded on the right, so that labels differ in number
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    truth = fisher_by_autograd(model, singles)
    before = snapshot(model)
    found = calibrate(model, [batch], ["fisher"], progress=False)
    assert_unchanged(model, before)
    assert found.keys() == truth.keys()
    for name, f in truth.items():
        assert found[name].count == 4
        assert found[name].fisher.dtype == torch.float64
        torch.testing.assert_close(found[name].fisher, f, rtol=1e-9, atol=1e-12 * float(f.max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_fisher_does_not_depend_on_how_sequences_are_batched(family):
    model = build(family)
    batch = tiny_models.inputs(model, 4, 8)
    pairs = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    one, two = (calibrate(model, data, ["fisher"], progress=False) for data in ([batch], pairs))
    for name in one:
        torch.testing.assert_close(one[name].fisher, two[name].fisher, rtol=1e-9, atol=0)


def test_fisher_takes_a_large_batch_apart(monkeypatch):
    """A backward pass keeps all activations and the logits several times: its peak is that of a few sequences."""
    model = tiny_models.FAMILIES["llama"]().double()
    data = [torch.arange(60).reshape(5, 12) % 50 + 3]
    whole = calibrate(model, data, ["fisher"], progress=False)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr("eckart.models.fisher._TOKENS", 24)
    parts = calibrate(model, data, ["fisher"], progress=False)
    assert sizes == [2, 2, 1]
    for name, entry in whole.items():
        torch.testing.assert_close(parts[name].fisher, entry.fisher, rtol=1e-9, atol=0)
        assert parts[name].count == entry.count == 5


def test_fisher_and_gram_come_together():
    model = build("llama")
    data = [tiny_models.inputs(model)]
    both = calibrate(model, data, ["gram", "fisher"], progress=False)
    gram, fisher = (calibrate(model, data, [need], progress=False) for need in ("gram", "fisher"))
    for name, entry in both.items():
        assert torch.equal(entry.gram, gram[name].gram)
        assert torch.equal(entry.fisher, fisher[name].fisher)
    q, k = (both[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert q.gram is k.gram
    assert q.fisher is not k.fisher


def test_fisher_of_an_unpredictable_batch_is_refused():
    vit = tiny_models.FAMILIES["vit"]()
    with pytest.raises(ValueError, match="ViTForImageClassification returned no loss; give batches with `labels`"):
        calibrate(vit, [tiny_models.inputs(vit)], ["fisher"], progress=False)
    llama = tiny_models.FAMILIES["llama"]()
    before = snapshot(llama)
    with pytest.raises(ValueError, match="the loss of LlamaForCausalLM is nan on a batch"):
        calibrate(llama, [torch.ones(2, 1, dtype=torch.long)], ["fisher"], progress=False)
    assert_unchanged(llama, before)


# ------------------------------------------------------------------------------------- the model is left as it was


@EVERY_FAMILY
def test_the_model_is_left_as_it_was(family):
    model = tiny_models.FAMILIES[family]().train()
    blocks(model)[0].module.eval()  # a mixture, as in fine-tuning with frozen blocks
    next(model.parameters()).requires_grad_(False)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = snapshot(model)
    calibrate(model, [tiny_models.inputs(model)], NEEDS, progress=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("needs", ["gram", "fisher"])
def test_an_interruption_leaves_the_model_as_it_was(error, needs):
    model = tiny_models.FAMILIES["llama"]().train()
    last = model.model.layers[1].mlp.down_proj
    handle = last.register_forward_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
    before = snapshot(model)
    with pytest.raises(error, match="stop"):
        calibrate(model, [tiny_models.inputs(model)], [needs], progress=False)
    assert_unchanged(model, before)
    handle.remove()
    assert calibrate(model, [tiny_models.inputs(model)], [needs], progress=False)


def test_a_forward_that_someone_else_put_there_stays():
    model = tiny_models.FAMILIES["llama"]()
    block = model.model.layers[0]
    calls: list[int] = []
    ordinary = block.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return ordinary(*args, **kwargs)

    block.forward = counted
    calibrate(model, [tiny_models.inputs(model)], progress=False)
    assert calls
    assert block.__dict__["forward"] is counted


def test_bad_requests_are_refused():
    model = tiny_models.FAMILIES["llama"]()
    data = [tiny_models.inputs(model)]
    with pytest.raises(ValueError, match="cannot calibrate grams: choose from absmax, absmean, fisher, gram, mean"):
        calibrate(model, data, ["gram", "grams"], progress=False)
    with pytest.raises(ValueError, match="cannot calibrate cross_gram"):
        calibrate(model, data, ["cross_gram"], progress=False)
    with pytest.raises(ValueError, match="no data: the iterable of batches is empty"):
        calibrate(model, [], progress=False)
    with pytest.raises(ValueError, match="matches no layer"):
        calibrate(model, data, where="nothing", progress=False)


def test_statistics_of_rows():
    x = torch.tensor([[1.0, -4.0], [3.0, 0.0]])
    entry = Statistics()
    entry.update(x[:1], frozenset(NEEDS))
    entry.update(x[1:], frozenset(NEEDS))
    entry.update(x[:0], frozenset(NEEDS))
    entry.finish()
    assert entry.count == 2
    assert entry.gram.tolist() == [[10.0, -4.0], [-4.0, 16.0]]
    assert (entry.absmean.tolist(), entry.absmax.tolist()) == ([2.0, 2.0], [3.0, 4.0])
    assert entry.mean.tolist() == [2.0, -2.0]
