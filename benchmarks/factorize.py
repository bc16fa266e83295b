"""Factorise the 210 weights of the demo model for svd-llm: ours against the plain recipe, calibration not counted.

The plain recipe is that of the paper's code: for every linear its own Gram matrix, with a Cholesky factor
and its inverse in float64, and a full SVD of the scaled weight, in float32 as there, and wholly in float64 as the
independent check of the result. Ours runs as in `eckart compress`, matrices of a block side by side. All multiply
their two factors at the end, so that perplexity can be compared.

python benchmarks/factorize.py
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from common import medians, ratio, record
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

    def recipe(dtype: torch.dtype) -> Any:
        def run() -> dict[str, torch.Tensor]:
            return {
                ref.name: plain_recipe(
                    dense[ref.name].to(dtype), statistics[ref.name].require("gram"), ranks[ref.name], dtype
                )
                for ref in members
            }

        return run

    contenders = {"ours": ours, "float32 SVD": recipe(torch.float32), "float64 SVD": recipe(torch.float64)}
    results: dict[str, dict[str, torch.Tensor]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    scores = {}
    held_out = evaluation(tokenizer)
    for name, weights in results.items():
        for ref in members:
            ref.weight.data.copy_(weights[ref.name])
        scores[name] = perplexity(model, held_out, progress=False).perplexity
    figures = {f"seconds, {name}": time for name, time in medians(seconds).items()}
    figures |= {f"perplexity, {name}": score for name, score in scores.items()}
    for name in ("float32 SVD", "float64 SVD"):
        figures[f"times faster than the recipe with a {name} (>= 8)"] = 1 / ratio(seconds, "ours", name)
    figures["relative difference of perplexity to float64 (<= 0.01)"] = math.fabs(
        scores["ours"] / scores["float64 SVD"] - 1
    )
    record("factorize", figures)


if __name__ == "__main__":
    main()
