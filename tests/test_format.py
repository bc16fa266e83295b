"""docs/format.md describes every structure that a checkpoint can hold, and what is stored is as it says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.structures import LowRank
from eckart.structures.base import STRUCTURES
from eckart.structures.block_sparse_dictionary import BlockSparseDictionary
from eckart.structures.conv_chain import ConvChain, ConvStep
from eckart.structures.dense import Dense
from eckart.structures.factored_experts import ExpertGroup, FactoredExperts
from eckart.structures.matrix_product_operator import MatrixProductOperator
from eckart.structures.semi_structured_dictionary import SemiStructuredDictionary
from eckart.structures.sparse_dictionary import SparseDictionary
from eckart.structures.sum import Sum

ROOT = Path(__file__).parents[1]


def _sparse(positions: str) -> SparseDictionary:
    index = torch.tensor([[0, 9], [3, 8], [1, 2], [2, 9]])
    return SparseDictionary.from_codes(_normal(5, 10), index, _normal(4, 2, seed=1), positions=positions)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_dictionaries_are_stored_as_described():
    layer = _sparse("index")
    for stored in (layer, _sparse("mask")):
        spec, t, wanted = stored.spec(), stored.state_dict(), torch.zeros(4, 5)
        for output in range(4):
            places = t["index"][output].tolist() if spec["positions"] == "index" else []
            for byte, value in enumerate(t["mask"][output].tolist() if spec["positions"] == "mask" else []):
                places += [8 * byte + bit for bit in range(8) if value >> bit & 1]
            for value, place in zip(t["values"][output], places, strict=True):
                wanted[output] += value * t["dictionary"][:, place]
        torch.testing.assert_close(stored.dense(), wanted)
    blocks = BlockSparseDictionary.from_codes(_normal(5, 7), torch.tensor([[1, 4], [0, 6]]), _normal(2, 2, 3, seed=1))
    t = blocks.state_dict()
    parts = [t["dictionary"][:, t["index"][b].long()] @ t["values"][b] for b in range(2)]
    torch.testing.assert_close(blocks.dense(), torch.cat(parts, 1).T)


def test_operators_are_stored_as_described():
    layer = MatrixProductOperator.from_weight(_normal(12, 10), (3, 4), (2, 5), ranks=4)
    first, second = (layer.state_dict()[f"cores.{k}"] for k in range(2))
    wanted = torch.zeros(12, 10)
    for o1, o2, i1, i2 in itertools.product(range(3), range(4), range(2), range(5)):
        wanted[4 * o1 + o2, 5 * i1 + i2] = (first[:, o1, i1] @ second[:, o2, i2]).item()
    torch.testing.assert_close(layer.dense(), wanted, rtol=1e-4, atol=1e-5)


def test_every_structure_is_described_with_its_entries_and_tensors():
    """Section by section of docs/format.md."""
    plain = LowRank.from_factors(_normal(6, 2), _normal(2, 4))
    chain = ConvChain([ConvStep(4, 2, (1, 3), padding=(0, 1)), ConvStep(2, 8, (3, 1), padding=(1, 0))], bias=True)
    examples: dict[str, Any] = {
        "low_rank": plain,
        "dense": Dense.from_weight(_normal(6, 4)),
        "sum": Sum([plain, Dense.from_weight(_normal(6, 4))]),
        "sparse_dictionary": _sparse("mask"),
        "block_sparse_dictionary": BlockSparseDictionary(4, 6, 4, 2, block=2),
        "semi_structured_dictionary": SemiStructuredDictionary(4, 6, 8, (2, 4)),
        "matrix_product_operator": MatrixProductOperator(6, 4, (2, 2), (2, 3), (2,)),
        "conv_chain": chain,
        "factored_experts": FactoredExperts(
            8, 6, [ExpertGroup((0, 1), (2, 2, 2), ("left", "left", "left"))], nn.SiLU()
        ),
    }
    assert set(STRUCTURES) <= set(examples)
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, flags=re.MULTILINE | re.DOTALL))
    assert set(sections) == set(examples)
    for name, example in examples.items():
        assert example.spec()["type"] == name
        words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", sections[name]))))
        entries = set(example.spec()) - {"type", "in_features", "out_features", "bias"}
        tensors = {part for key in example.state_dict() for part in key.split(".") if not part.isdigit()}
        nested = {"terms": set(), "sum": tensors - {"terms"}}.get(name, set())  # named by their own type
        assert entries | tensors - nested - {"gate", "up", "down"} <= words, name
