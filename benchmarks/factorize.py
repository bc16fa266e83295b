"""Factorise the 210 weights of the demo model for svd-llm: ours against the plain recipe, calibration not counted.

The plain recipe is that of the paper's code: for every linear its own Gram matrix, with a Cholesky factor
and its inverse in float64, and a full SVD of the scaled weight in float32. Ours runs as in `eckart compress`,
matrices of a block side by side. Both multiply their two factors at the end, so that perplexity can be compared.

python benchmarks/factorize.py
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from common import record
from language_model import calibration, demo, evaluation

from eckart.compression.svd_llm import SVDLLM
from eckart.linalg import rank_for_ratio
from eckart.models import blocks, calibrate, linears, members_of, perplexity
from eckart.models.parallel import parallel_map


def plain_recipe(
    weight: torch.Tensor, gram: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    m = gram.clone()
    try:
        scale = torch.linalg.cholesky(m)
    except torch.linalg.LinAlgError:
        scale = torch.linalg.cholesky(m + (1e-6 - torch.linalg.eigvalsh(m)[0]) * torch.eye(len(m), dtype=m.dtype))
    inverse = torch.linalg.inv(scale).to(dtype)
    u, s, vh = torch.linalg.svd(weight @ scale.to(dtype), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root) @ (root[:, None] * (vh[:rank] @ inverse))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    model, tokenizer = demo()
    statistics = calibrate(model, calibration(tokenizer), ["gram"], progress=False)
    members = linears(model).linears
    groups = [members_of(block, members) for block in blocks(model)]
    ranks = {ref.name: rank_for_ratio(*ref.shape, 0.2, "plain") for ref in members}
    method = SVDLLM()
    dense = {ref.name: ref.weight.detach().clone() for ref in members}

    def ours() -> dict[str, torch.Tensor]:
        found = {}
        for group in groups:

            def one(ref: Any) -> torch.Tensor:
                factors = method.factorize(ref.weight.detach(), statistics[ref.name], ranks[ref.name])
                return factors.up @ factors.down

            done = parallel_map(one, group, cost=lambda ref: ref.in_features * ref.out_features * min(ref.shape))
            found.update({ref.name: weight for ref, weight in zip(group, done, strict=True)})
        return found

    def plain() -> dict[str, torch.Tensor]:
        return {
            ref.name: plain_recipe(dense[ref.name], statistics[ref.name].require("gram"), ranks[ref.name])
            for ref in members
        }

    results: dict[str, dict[str, torch.Tensor]] = {}
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("plain", plain)):
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    # The independent check: everything in float64, once, not timed.
    results["float64"] = {
        ref.name: plain_recipe(
            dense[ref.name].double(), statistics[ref.name].require("gram"), ranks[ref.name], torch.float64
        )
        for ref in members
    }
    scores = {}
    held_out = evaluation(tokenizer)
    for name, weights in results.items():
        for ref in members:
            ref.weight.data.copy_(weights[ref.name])
        scores[name] = perplexity(model, held_out, progress=False).perplexity
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
    record(
        "factorize",
        {
            "seconds, ours": sorted(seconds["ours"])[rounds // 2],
            "seconds, plain recipe": sorted(seconds["plain"])[rounds // 2],
            "times faster (>= 8)": ratios[rounds // 2],
            "perplexity, ours": scores["ours"],
            "perplexity, plain recipe": scores["plain"],
            "perplexity, plain recipe wholly in float64": scores["float64"],
            "relative difference to plain recipe": math.fabs(scores["ours"] / scores["plain"] - 1),
            "relative difference to float64 (<= 0.01)": math.fabs(scores["ours"] / scores["float64"] - 1),
        },
    )


if __name__ == "__main__":
    main()
