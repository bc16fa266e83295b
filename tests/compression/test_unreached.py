from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart import catalog
from eckart.compression import WeightMethod, compress
from eckart.structures import EckartWarning

ROWS = [row for row in catalog.select(family="compression") if row.target and issubclass(row.load(), WeightMethod)]


def quiet(model: nn.Module, *args: Any, **options: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, progress=False, **options)


class Routed(nn.Module):
    """A small model whose blocks send each token to one of three experts, of which the last never gets any."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(12, 3)
            self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            score, chosen = self.router(flat).softmax(-1).max(-1)
            out = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                mine = chosen == index
                if mine.any():
                    out[mine] = expert(flat[mine]) * score[mine, None]
            return x + out.reshape(x.shape)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = x @ self.embedding.weight.T
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def routed() -> Routed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Routed().eval()
        for layer in model.layers:
            nn.init.normal_(layer.router.weight)
            layer.router.bias.data[2] = -1e4
    return model


@pytest.mark.parametrize("allocation", ["uniform", "threshold"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layers_that_no_token_reaches_stay_dense_and_are_named(row, allocation):
    method = row.name
    model = routed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
    data = [ids[:1, :3], ids]  # the first batch is too short to show every expert
    where = "*.experts.*"
    if not row.needs:
        result = quiet(model, method, ratio=0.3, where=where, allocation=allocation)
        assert result.warnings == []
        return
    with pytest.warns(EckartWarning, match="saw no calibration token and stay dense"):
        result = compress(model, method, ratio=0.3, where=where, data=data, allocation=allocation, progress=False)
    silent = ["layers.0.experts.2", "layers.1.experts.2"]
    assert result.warnings[0] == ", ".join(silent) + " saw no calibration token and stay dense"
    assert [layer.name for layer in result.layers if layer.form == "dense" and layer.name in silent] == silent
    after = model.state_dict()
    for name in silent:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert any(layer.form == "pivoted" for layer in result.layers)
    assert torch.isfinite(model(ids).logits).all()


def test_a_plain_module_can_be_compressed_too():
    model = routed()
    assert not hasattr(model, "config")
    result = quiet(model, "svd", ratio=0.3)
    assert 0.3 <= result.ratio < 0.5
    with pytest.raises(ValueError, match="compressed by Eckart already"):
        compress(model, "svd", progress=False)
