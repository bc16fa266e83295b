"""Locally linear maps: how exactly they give the output back, in float32 and float64, and what a prompt costs.

The demo model on prompts of 5 to 10 tokens, and tiny random models of many families, so that norms, gates, attention
scores, experts and biases of all kinds are met. Figures:

    error              ||y - sum_t J_t e_t - c|| / ||y||: the larger of what products with J give, over all prompts and
                       both gatings, and what the matrices J_t themselves give, over a few
    ordinary Jacobian  the same without holding anything constant
    other values       how far the held pass is from an ordinary one: nothing in float32; in float64 the rounding of
                       transformers' norms, which go through float32 and which the held pass does not follow
    constant           ||y - sum_t J_t e_t|| / ||y||, what biases add

Rows that there are already are not measured again:

python benchmarks/locally_linear.py [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from adapter_job import add_row, rows, write_table
from common import RESULTS, environment
from language_model import demo
from torch import Tensor

from eckart import analyze
from eckart.models.hidden import hidden_states
from eckart.models.jacobian import jacobians, linear_part
from eckart.models.recording import recorded

PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"
BARS = {"float32": 1e-4, "float64": 1e-10}
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
    "The opposite of hot is",
    "In the morning, the sun rises in the",
    "Two plus two equals",
    "She opened the door and saw",
    "The largest planet of the solar system is",
    "My favourite colour is",
    "To bake bread, you need flour and",
    "The author of Hamlet is William",
    "The dog chased the",
    "def add(a, b): return",
    "Roses are red, violets are",
    "He was born in the year",
    "The stock market fell sharply after",
    "A triangle has three",
    "Thank you very much for your",
    "The train to Berlin leaves at",
    "If it rains tomorrow, we will",
)

_WIDTHS = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
_QWEN_EXPERTS = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
_OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
# Model types of transformers, each with what its configuration has beside or in place of the common widths.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases of queries, keys and values
    "qwen3": {"head_dim": 8},  # norms of queries and keys
    "mistral": {"sliding_window": 16},
    "gemma2": _HEADS,  # capped scores, norms on both sides
    "gemma3_text": _HEADS,
    "phi3": {},  # fused projections
    "olmo2": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": _QWEN_EXPERTS,
    "gpt2": _GPT2,  # no gates, LayerNorm, biases
    "gpt_neox": {},
    "opt": _OPT,
}


def tiny(kind: str) -> Any:
    """A random model of three layers, with weights of order one and biases that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_WIDTHS, **FAMILIES[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model.float().eval()


def missed(model: Any, ids: Tensor) -> dict[str, float]:
    """Of one prompt: what the held and the ordinary Jacobian miss of the output, and how far the held pass is off."""
    with torch.no_grad():
        plain = hidden_states(model, {"input_ids": ids[None]})[0, -1].double()
    found = {}
    for name, gating in (("gate", "gate"), ("up", "up"), ("ordinary Jacobian", None)):
        with recorded(model, ids, gating) as recording:  # type: ignore[arg-type]
            y = recording.output
            explained = linear_part(y, [recording.embeddings, *recording.additive])
            found[name] = float((y - explained).detach().norm() / y.detach().norm())
            if gating == "gate":
                found["other values"] = float((y.detach().double() - plain).norm() / plain.norm())
    return found


def errors(model: Any, prompts: Sequence[Tensor]) -> dict[str, float]:
    """Worst of the errors over the prompts, and the mean of what the ordinary Jacobian misses."""
    each = [missed(model, ids) for ids in prompts]
    return {
        "error": max(max(one["gate"], one["up"]) for one in each),
        "ordinary Jacobian": fmean(one["ordinary Jacobian"] for one in each),
        "other values": max(one["other values"] for one in each),
    }


def missed_by_matrices(model: Any, ids: Tensor) -> float:
    """The error with every J_t formed, and c from the derivatives for the biases."""
    with recorded(model, ids) as recording:
        y, e = recording.output, recording.embeddings
        (jacobian,) = jacobians(y, [e])
        explained = torch.einsum("otd,td->o", jacobian, e.detach())
        if recording.additive:
            explained = explained + linear_part(y, recording.additive)
        return float((y - explained).detach().norm() / y.detach().norm())


def maps(model: Any, prompts: Iterable[Tensor]) -> dict[str, float]:
    """What the whole analysis of a prompt takes and says."""
    seconds, found = [], []
    for ids in prompts:
        start = time.process_time()  # so that other work on the machine does not count
        found.append(analyze(model, "locally-linear", data=[ids[None]], top=10, progress=False).figures)
        seconds.append(time.process_time() - start)
    return {
        "CPU seconds a prompt": median(seconds),
        **{name: fmean(one[name] for one in found) for name in ("constant", "stable rank", "largest")},
        "predicted token among the first ten": fmean(one["predicted token among the first"] for one in found),
    }


def measure(model: Any, prompts: Sequence[Tensor], whole: int) -> dict[str, Any]:
    """A row: errors over all prompts, and the whole analysis of the first ones."""
    row: dict[str, Any] = {"prompts": len(prompts), "tokens": [len(ids) for ids in prompts]}
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        if dtype == torch.float64 and "grouped_mm" in model.get_experts_implementation().values():
            model.set_experts_implementation("eager")  # torch multiplies by groups in float32 and below only
        name = str(dtype).removeprefix("torch.")
        found = errors(model, prompts) | maps(model, prompts[:whole])
        found["error"] = max(found["error"], *(missed_by_matrices(model, ids) for ids in prompts[:whole]))
        row[name] = found | {"within the bar": found["error"] < BARS[name]}
    return row


def job(name: str) -> tuple[Any, list[Tensor], int]:
    """A model, its prompts, and for how many of them the matrices are formed."""
    if name == "demo":
        model, tokenizer = demo()
        return model.eval(), [torch.tensor(tokenizer(one)["input_ids"]) for one in PROMPTS], 2
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (count,), generator=generator) for count in (6, 12, 24)]
    return tiny(name), prompts, len(prompts)


def draw(found: dict[str, Any]) -> None:
    """Write the table of the page."""
    write_table(PAGE, {
        "model": lambda name, row: name,
        "error, float32": lambda name, row: f"{row['float32']['error']:.1e}",
        "error, float64": lambda name, row: f"{row['float64']['error']:.1e}",
        "ordinary Jacobian misses": lambda name, row: f"{row['float64']['ordinary Jacobian']:.2f}",
        "other values, float32": lambda name, row: f"{row['float32']['other values']:.0e}",
        "other values, float64": lambda name, row: f"{row['float64']['other values']:.0e}",
        "CPU s a prompt, float32": lambda name, row: f"{row['float32']['CPU seconds a prompt']:.1f}",
        "constant": lambda name, row: f"{row['float64']['constant']:.0e}",
    }, found, "locally-linear")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="the tiny models alone, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only write the table of the page")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "locally_linear_smoke.json" if options.smoke else RESULTS / "locally_linear.json"
    names = [] if options.draw else [*FAMILIES] if options.smoke else ["demo", *FAMILIES]
    for name in names:
        if name in rows(path):
            continue
        row = measure(*job(name))
        add_row(path, name, {"method": "locally-linear", **row, "seed": 0, **environment()})
        print(f"{name}: {row['float32']}\n    {row['float64']}", flush=True)
    if not options.smoke:
        draw(rows(path))


if __name__ == "__main__":
    main()
