"""Matrix nuclear norm: against NumPy, against the card's figures, and against its own traps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart import analyze
from eckart.analysis.matrix_nuclear_norm import figures_of_states, normalized_states
from tiny_models import FAMILIES


def _draw(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _twin(states: np.ndarray) -> dict[str, float]:
    """The definition, by NumPy and the entropy through the d x d matrix."""
    rows = states - states.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    n, d = rows.shape
    s = np.linalg.svd(rows, compute_uv=False)
    values = np.clip(np.linalg.eigvalsh(rows.T @ rows / n), 1e-300, None)
    values /= values.sum()
    p = s / s.sum()
    return {
        "mnn": np.sort(np.linalg.norm(rows, axis=0))[::-1][: min(n, d)].sum() / n,
        "nuclear norm": s.sum() / n,
        "entropy": -(values * np.log(values)).sum() / np.log(d),
        "effective rank": np.exp(-(p[p > 1e-12] * np.log(p[p > 1e-12])).sum()),
    }


@pytest.mark.parametrize(("tokens", "width"), [(12, 40), (60, 24), (30, 30)])
def test_figures_equal_the_definition(tokens, width):
    states = _draw(tokens, width) + 2.0
    assert figures_of_states(states) == pytest.approx(_twin(states.numpy()), rel=1e-5)


def test_bounds_hold_only_where_the_card_says():
    wide, tall = normalized_states(_draw(20, 768)), normalized_states(_draw(500, 64))
    short, long = figures_of_states(_draw(20, 768)), figures_of_states(_draw(500, 64))
    assert float(wide.square().sum()) == pytest.approx(20)
    assert short["mnn"] < short["nuclear norm"] / 3  # the truncation under-counts
    assert long["nuclear norm"] <= long["mnn"] <= (64 / 500) ** 0.5 + 1e-12
    assert float(tall.square().sum()) == pytest.approx(500)


def test_rotating_the_hidden_basis_moves_the_published_figure_only():
    states = _draw(200, 16) * torch.logspace(0, -2, 16, dtype=torch.float64)
    turned = states @ torch.linalg.qr(_draw(16, 16, seed=1)).Q
    before, after = figures_of_states(states), figures_of_states(turned)
    for name in ("nuclear norm", "entropy", "effective rank"):
        assert after[name] == pytest.approx(before[name], rel=1e-9)
    assert abs(after["mnn"] / before["mnn"] - 1) > 0.05
    shuffled = states[torch.randperm(200, generator=torch.Generator().manual_seed(2))].flip(1)
    assert figures_of_states(shuffled) == pytest.approx(before, rel=1e-9)


def test_padding_and_batching_do_not_count():
    model = FAMILIES["qwen3"]()
    ids = torch.arange(3, 33).reshape(2, 15)
    alone = [
        analyze(model, "matrix-nuclear-norm", data=[row[:n]], progress=False)
        for row, n in zip(ids, (15, 9), strict=True)
    ]
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    both = analyze(model, "matrix-nuclear-norm", data=[batch], progress=False)
    for row, one in zip(both.rows, alone, strict=True):
        assert {**row, "text": 0} == pytest.approx(one.rows[0], rel=1e-4)
    assert any("differ in length" in line for line in both.warnings)


def test_one_token_is_left_out_and_said():
    model = FAMILIES["llama"]()
    found = analyze(model, "matrix-nuclear-norm", data=[torch.tensor([5]), torch.arange(6)], progress=False)
    assert [row["text"] for row in found.rows] == [1]
    assert "1 texts of fewer than 2 tokens" in found.warnings[0]
    with pytest.raises(ValueError, match="all texts are shorter"):
        analyze(model, "matrix-nuclear-norm", data=[torch.tensor([5])], progress=False)


def test_fixed_length_and_layers():
    model = FAMILIES["gpt2"]()
    found = analyze(model, "matrix-nuclear-norm", data=[torch.arange(20), torch.arange(8)], length=8, progress=False)
    assert [row["tokens"] for row in found.rows] == [8, 8]
    embeddings = analyze(model, "matrix-nuclear-norm", data=[torch.arange(20)], layer=0, progress=False)
    assert embeddings.figures["mnn"] != found.figures["mnn"]
    with pytest.raises(ValueError, match="layer must be from 0 to 2"):
        analyze(model, "matrix-nuclear-norm", data=[torch.arange(20)], layer=9, progress=False)
    with pytest.raises(ValueError, match="length must be at least 2"):
        analyze(model, "matrix-nuclear-norm", data=[torch.arange(20)], length=1, progress=False)
