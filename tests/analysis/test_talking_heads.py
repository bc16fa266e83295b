"""Talking heads: against dense d x d matrices, planted channels, the zero-ablated head, and a head trained to talk."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eckart import analyze
from eckart.analysis import edit_component, steer_component
from eckart.analysis.composition import component_scores, noise_floor, ov_components, reader, whole_score
from eckart.models.head_maps import attention_layers
from model_state import assert_unchanged, snapshot
from tiny_models import FAMILIES, inputs, logits

KINDS = ("llama", "qwen3", "gemma3", "phi3", "gpt2")
on_every_kind = pytest.mark.parametrize("kind", KINDS)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _scores(model, **options):
    return analyze(model, "talking-heads", progress=False, **options)


def _dense(layer, head, kind, offset):
    """M (d, d) of a reader, in full."""
    maps = layer.maps(torch.float64)
    group = head // (layer.heads // layer.groups)
    query, key, value, output = maps.query[head], maps.key[group], maps.value[group], maps.output[head]
    if kind == "value":
        return value.T @ output.T
    if layer.rotation is not None and offset is None:
        return query.T if kind == "query" else key.T
    if layer.rotation is not None:
        key = torch.stack([layer.rotation.turn(column[:, None], -offset)[:, 0] for column in key.T], dim=1)
    return query.T @ key if kind == "query" else key.T @ query


def test_thin_factors_give_the_full_decomposition():
    value, output = _draw(2, 5, 24), _draw(2, 24, 5, seed=1)
    found = ov_components(value, output)
    full = output @ value
    assert (found.u * found.s[..., None, :] @ found.vh - full).abs().max() < 1e-13 * full.abs().max() * 24
    expected = np.linalg.svd(full.numpy(), compute_uv=False)[:, :5]
    assert np.abs(found.s.numpy() - expected).max() < 4e-13


def test_scores_equal_the_matrix_form_and_signs_do_not_matter():
    value, output, left, right = _draw(5, 24), _draw(24, 5, seed=1), _draw(3, 6, 24, seed=2), _draw(3, 6, 24, seed=3)
    parts = ov_components(value, output)
    for read, dense in ((reader(left, right), left.mT @ right), (reader(left), left.mT)):
        scores = component_scores(parts.u.T, read)
        for r in range(3):
            for i in range(5):
                term = parts.s[i] * torch.outer(parts.vh[i], parts.u[:, i])  # row convention: what is read first
                expected = (term @ dense[r]).norm() / (parts.s[i] * dense[r].norm())
                assert abs(float(scores[r, i] - expected)) < 1e-15 * 10
            whole = (output @ value).T
            expected = (whole @ dense[r]).norm() / (whole.norm() * dense[r].norm())
            assert abs(float(whole_score(parts.s, scores)[r] - expected)) < 1e-14
        assert ((scores >= 0) & (scores <= 1)).all()
        flipped = component_scores(-parts.u.T, read)
        assert torch.equal(flipped, scores)


def test_noise_floor_is_that_of_random_directions():
    read = _draw(2, 6, 24) * torch.tensor([1.0, 3.0, 1.0, 1.0, 0.1, 2.0])[:, None]
    random = nn.functional.normalize(_draw(200_000, 24, seed=1), dim=1)
    squared = component_scores(random, read).square()
    assert squared.mean(dim=1).tolist() == pytest.approx([1 / 24] * 2, rel=0.01)
    assert squared.std(dim=1).tolist() == pytest.approx(noise_floor(read, 24).tolist(), rel=0.02)


@pytest.mark.parametrize("offset", [None, 0, 3])
@on_every_kind
def test_all_scores_equal_dense_products(kind, offset):
    model = FAMILIES[kind]().double()
    found = _scores(model, offset=offset)
    first, second = attention_layers(model)[0]
    maps = first.maps(torch.float64)
    for writer in range(first.heads):
        dense = maps.output[writer] @ maps.value[writer // (first.heads // first.groups)]
        u, s, _ = np.linalg.svd(dense.numpy())
        for read in range(second.heads):
            for name in ("query", "key", "value"):
                m = _dense(second, read, name, offset)
                expected = [float((torch.from_numpy(u[:, i]) @ m).norm()) for i in range(8)]
                expected = np.array(expected) / float(m.norm())
                scores = found.tensors[name][0, writer, :, 1, read].numpy()
                assert np.abs(scores - expected).max() < 1e-6
                whole = float((dense.T @ m).norm() / (s**2).sum() ** 0.5 / m.norm())
                assert float(found.tensors[f"{name} whole"][0, writer, 1, read]) == pytest.approx(whole, abs=1e-6)
    assert found.figures["component pairs"] == 3 * 4 * 8 * 4


def test_rows_are_the_highest_and_shared_keys_count_once():
    model = FAMILIES["llama"]()
    found = _scores(model, top=200, order="score")
    for kind in ("query", "key", "value"):
        rows = [row for row in found.rows if row["kind"] == kind]
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert len(rows) == (64 if kind == "key" else 128)
        assert rows[0]["score"] == pytest.approx(found.figures[f"{kind}: highest component score"])
    assert {tuple(row["reader_heads"]) for row in found.rows if row["kind"] == "key"} == {(0, 1), (2, 3)}
    assert all(len(row["reader_heads"]) == 1 for row in _scores(model, top=200, offset=1).rows)
    for order in ("z", "contribution"):
        rows = _scores(model, order=order, top=5).rows
        values = [row["z"] if order == "z" else row["score"] * row["share"] for row in rows[:5]]
        assert values == sorted(values, reverse=True)
    assert any("reconstruction" in line for line in found.warnings)
    assert any("rotated" in line for line in found.warnings)
    assert not any("rotated" in line for line in _scores(FAMILIES["gpt2"]()).warnings)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_planted_channel_is_found(kind):
    """Make a later head ask only for what one component of an early head writes."""
    model = FAMILIES[kind]()
    first, second = attention_layers(model)[0]
    maps = first.maps(torch.float64)
    v = ov_components(maps.value[first.groups // 4], maps.output[1]).u[:, 2].float()
    gain = second._read_gains["query"][0]
    ref, rows = second._projections["query"]
    ref.weight[rows[16:24]] = torch.outer(torch.arange(1.0, 9.0), v / gain)  # head 2 of four
    top = _scores(model, order="score").rows[0]
    assert (top["kind"], top["pair"]) == ("query", "0.1 component 2 -> 1.2")
    assert top["score"] == pytest.approx(1, abs=1e-5)
    assert top["whole"] < 0.8


@on_every_kind
@torch.no_grad()
def test_removing_all_components_is_zero_ablating_the_head(kind):
    model = FAMILIES[kind]()
    before, expected = snapshot(model), logits(model)
    layer = attention_layers(model)[0][0]
    edit = edit_component(model, 0, 2, range(8))
    removed = logits(model)
    edit.undo()
    assert_unchanged(model, before)
    columns = layer.output.weight[:, 16:24]
    kept = columns.clone()
    columns.zero_()
    zeroed = logits(model)
    columns.copy_(kept)
    assert (removed - zeroed).abs().max() < 1e-4 * zeroed.abs().max()
    assert (removed - expected).abs().max() > 1e-2 * expected.abs().max()
    with steer_component(model, 0, 2, range(8), "replace"):
        assert (logits(model) - zeroed).abs().max() < 1e-4 * zeroed.abs().max()
    with steer_component(model, 0, 2, range(8), "keep"):
        assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert_unchanged(model, before)


@on_every_kind
@torch.no_grad()
def test_a_component_is_rescaled_alone_in_weights_and_on_the_way(kind):
    model = FAMILIES[kind]().double()
    layer = attention_layers(model)[0][0]
    maps = layer.maps()
    before = ov_components(maps.value[layer.groups - 1], maps.output[3])
    with edit_component(model, 0, 3, 1, scale=-0.5):
        edited = logits(model)
        changed = layer.maps().output[3]
        after = changed @ maps.value[layer.groups - 1]
    expected = before.u * (before.s * torch.where(torch.arange(8) == 1, -0.5, 1.0)) @ before.vh
    assert (after - expected).abs().max() < 1e-6 * before.s[0]  # gains are measured in float32 in gemma3
    assert torch.equal(layer.maps().output, maps.output)
    seen = []
    other = steer_component(model, 0, 3, 1, "replace", 0.0)
    with other:
        replaced = logits(model)
    with edit_component(model, 0, 3, 1):
        assert (logits(model) - replaced).abs().max() < 1e-6 * replaced.abs().max()
    assert not torch.allclose(replaced, edited)
    handle = layer.output.module.register_forward_hook(lambda _, args, y: seen.append(y))
    outputs = []
    for value, position in ((0.0, None), (2.0, -1)):
        with steer_component(model, 0, 3, 1, "add", value, position):
            watch = layer.output.module.register_forward_hook(lambda _, args, y: outputs.append(y))
            model(**inputs(model))
            watch.remove()
    handle.remove()
    moved = outputs[1] - outputs[0]
    assert moved[:, :-1].abs().max() == 0
    if kind != "gemma3":  # there it is added before a norm with a gain
        torch.testing.assert_close(moved[:, -1], (2 * before.u[:, 1]).expand(2, -1), rtol=1e-5, atol=1e-7)


def test_edits_are_taken_back_to_the_last_bit_also_after_an_error():
    model = FAMILIES["qwen3"]().bfloat16()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), edit_component(model, 1, 0, [0, 3]) as edit:
        raise RuntimeError("stop")
    edit.undo()
    with pytest.raises(RuntimeError, match="stop"), steer_component(model, 1, 0, 0):
        raise RuntimeError("stop")
    assert_unchanged(model, before)


@pytest.mark.parametrize("act", [edit_component, steer_component])
def test_what_does_not_exist_is_named(act):
    model = FAMILIES["llama"]()
    before = snapshot(model)
    for place, message in (
        ((5, 0, 0), "attention layers 0 to 1, not 5"),
        ((0, 4, 0), r"o_proj has the heads 0 to 3, not 4"),
        ((0, 0, 8), r"head 0\.0 has the components 0 to 7, not 8"),
        ((0, 0, []), r"components 0 to 7, not \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            act(model, *place)
    with pytest.raises(ValueError, match="mode must be one of keep, replace, add"):
        steer_component(model, 0, 0, 0, "drop")
    assert_unchanged(model, before)
    for options, message in (
        ({"top": 0}, "top must be at least 1"),
        ({"order": "best"}, "order must be one of score, z, contribution"),
        ({"offset": -1}, "offset must be how many tokens back"),
    ):
        with pytest.raises(ValueError, match=message):
            _scores(model, **options)
    with pytest.raises(ValueError, match="no two of the selected attention layers"):
        _scores(model, where="layers.0.*")


def test_the_direction_of_all_ones_is_no_channel_under_layer_norm():
    model = FAMILIES["gpt2"]()
    before = _scores(model).tensors
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight += _draw(32, 1).float()  # the same for all coordinates of the stream
    after = _scores(model).tensors
    assert all((after[name] - before[name]).abs().max() < 1e-5 for name in before)


_TOKENS, _LENGTH = 16, 12


def _sequences(count, generator):
    """Token 0 stands in a random place and at the end; what followed it is asked for: induction with one trigger."""
    ids = torch.randint(1, _TOKENS, (count, _LENGTH), generator=generator)
    place = torch.randint(0, _LENGTH - 2, (count, 1), generator=generator)
    ids = ids.scatter(1, place, 0)
    ids[:, -1] = 0
    return ids, ids.gather(1, place + 1)[:, 0]


def _loss(model, ids, answer):
    return nn.functional.cross_entropy(model(ids).logits[:, -1], answer)


def test_ablating_the_top_component_kills_induction_and_another_does_not():
    """With one trigger the early head has one bit to pass on, so the channel is one component.

    Two layers of one head and no MLP: "the token before me is the trigger" must reach the keys of the second layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_TOKENS, hidden_size=32, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1,
                head_dim=16, max_position_embeddings=32,
            )
        )  # fmt: skip
    for block in model.model.layers:
        for parameter in block.mlp.parameters():
            parameter.requires_grad_(False).zero_()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        _loss(model, *_sequences(128, generator)).backward()
        optimizer.step()
    model.eval()
    held_out = _sequences(500, generator)
    chance = math.log(_TOKENS - 1)
    with torch.no_grad():
        learned = float(_loss(model, *held_out))
        assert learned < 0.05
        for offset in (None, 1):
            top = next(row for row in _scores(model, offset=offset).rows if row["kind"] == "key")
            assert top["z"] > 8
            assert (top["writer_layer"], top["reader_layer"]) == (0, 1)
        for component in range(16):
            with edit_component(model, 0, 0, component):
                loss = float(_loss(model, *held_out))
            assert loss > chance if component == top["component"] else loss < learned + 0.05
