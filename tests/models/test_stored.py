"""Weights read one by one from disk equal those of the loaded model."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_checkpoints
from eckart.models import linears, save
from eckart.models.stored import LayoutError, StoredRef, stored_linears
from tiny_models import FAMILIES, low_rank

# transformers stores the layers of a vision transformer under other names than its model has
CONVERTED = {"vit"}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - CONVERTED))
@pytest.mark.parametrize("rank", [None, 4])
def test_every_family_dense_and_compressed(family, rank, tmp_path):
    model = FAMILIES[family]()
    if rank:
        low_rank(model, rank=rank)
    path = save(model, tmp_path / "model", max_shard_size="20KB")
    found, wanted = stored_linears(path), linears(model)
    assert found.skipped == wanted.skipped
    for ref, other in zip(found.linears, wanted.linears, strict=True):
        assert isinstance(ref, StoredRef)
        assert (ref.name, ref.shape, ref.kind) == (other.name, other.shape, other.kind)
        assert all(parameter.is_meta for parameter in ref.module.parameters())
        assert torch.equal(ref.weight, other.weight.detach())


@pytest.mark.parametrize("family", sorted(CONVERTED))
def test_other_names_are_told(family, tmp_path):
    with pytest.raises(LayoutError, match="the checkpoint has no tensor "):
        stored_linears(save(FAMILIES[family](), tmp_path / "model"))


def test_where_and_what_cannot_be_read(tmp_path):
    path = tiny_checkpoints.write(tmp_path / "model", with_tokenizer=False)
    assert len(stored_linears(path, "*.q_proj").linears) == 2
    with pytest.raises(ValueError, match="matches no layer"):
        stored_linears(path, "*.no_such")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match="is quantized with"):
        stored_linears(path)
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(LayoutError, match="names no architecture"):
        stored_linears(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        stored_linears(path)
