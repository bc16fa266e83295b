"""Whitened SVD beside the code its authors published: perplexity and time, on a model of LLaMA's shape.

The demo model shares each key and value among three heads, which that code cannot do. Repeated for every head they are
the same function with as many key and value heads as query heads, which it can. Both calibrate on the same windows of
WikiText-2 validation, keep plain factors at the same ratio, and are judged on the same windows of the test text, in
float32 and with the same number of threads. Loading is not counted. Of the published code `profle_svdllm` and
`whitening` run as they are; its rotary embedding has a base of 10,000 written into it, which is set to the model's.

The code needs an old transformers, so it runs in an interpreter of its own:
    git clone https://github.com/AIoT-MLSys-Lab/SVD-LLM
    python -m venv old && old/bin/pip install torch transformers==4.35.2 accelerate sentencepiece
    python benchmarks/svd_llm_official.py --official SVD-LLM --python old/bin/python

python benchmarks/svd_llm_official.py --official DIRECTORY --python PYTHON
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from adapter_job import write_table
from common import RESULTS, record
from language_model import calibration, demo, evaluation
from safetensors.torch import save_file

from eckart.compression import compress
from eckart.models import perplexity

RATIO = 0.2
PAGE = Path(__file__).parents[1] / "docs" / "compress-lm.md"
OFFICIAL = """
import functools, json, math, sys, time, types
from pathlib import Path
code, work, ratio, threads = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, code)
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
import component.svd_llama as svd_llama
sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # only its loaders of data want it
import SVDLLM as official
torch.set_num_threads(threads)
tokens = torch.load(work / "tokens.pt")
config = LlamaConfig(**json.loads((work / "config.json").read_text()))
rotary = svd_llama.LlamaRotaryEmbedding
svd_llama.LlamaRotaryEmbedding = functools.partial(rotary, base=config.rope_theta)

def load(name, config):
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(load_file(work / name), strict=False)
    model.tie_weights()
    left = [key for key in missing if "inv_freq" not in key and key != "lm_head.weight"]
    assert not unexpected and not left, (left, unexpected)
    return model

def run(model, batches):
    gathered = official.profle_svdllm("llama", model, batches, "cpu")
    official.whitening("llama", model, gathered, 1 - ratio, "cpu")

@torch.no_grad()
def perplexity(model):
    losses = []
    for ids in tokens["test"]:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
    return math.exp(sum(losses) / len(losses))

windows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens["calibration"]]
model = load("repeated.safetensors", config)
found = {"dense": perplexity(model)}
start = time.perf_counter()
run(model, windows)
found |= {"seconds": time.perf_counter() - start, "perplexity": perplexity(model)}
grouped = LlamaConfig(**json.loads((work / "grouped.json").read_text()))
try:
    model = load("grouped.safetensors", grouped)
    run(model, windows[:1])
    perplexity(model)
    found["grouped"] = "runs"
except Exception as error:
    found["grouped"] = f"{type(error).__name__}: {error}"
print("found " + json.dumps(found))
"""


def repeated_heads(model: Any) -> Any:
    """The same function with a key and a value head for each query head."""
    made = copy.deepcopy(model)
    config = made.config
    times, head = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    for layer in made.model.layers:
        attention = layer.self_attn
        for linear in (attention.k_proj, attention.v_proj):
            heads = linear.weight.detach().unflatten(0, (-1, head))
            linear.weight = torch.nn.Parameter(heads.repeat_interleave(times, dim=0).flatten(0, 1))
            linear.out_features = linear.weight.shape[0]
        attention.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads
    return made


def old_config(model: Any) -> dict[str, Any]:
    """What LlamaConfig of transformers 4 is made with."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return {
        **{name: getattr(model.config, name) for name in names},
        "rope_theta": model.config.rope_parameters["rope_theta"],
    }


def windows(batches: list[Any]) -> list[torch.Tensor]:
    return [row[None] for batch in batches for row in batch["input_ids"]]


def draw() -> None:
    """Write the table of the page."""
    figures = json.loads((RESULTS / "svd_llm_official.json").read_text(encoding="utf-8"))["figures"]
    shown = {
        "figure": lambda name, value: name,
        "": lambda name, value: value.partition(":")[0] if isinstance(value, str) else f"{value:,.3g}",
    }
    write_table(PAGE, shown, figures, "published")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", required=True, help="directory of the published code")
    parser.add_argument("--python", required=True, help="interpreter with transformers 4.35")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens to calibrate on")
    options = parser.parse_args()
    grouped, tokenizer = demo()
    grouped = grouped.float()
    model = repeated_heads(grouped)
    data, test = calibration(tokenizer, options.samples), evaluation(tokenizer)
    threads = torch.get_num_threads()
    ours: list[float] = []
    theirs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        torch.save({"calibration": windows(data), "test": windows(test)}, work / "tokens.pt")
        for one, label, config in ((model, "repeated", "config.json"), (grouped, "grouped", "grouped.json")):
            kept = {key: value for key, value in one.state_dict().items() if key != "lm_head.weight"}
            save_file({key: value.contiguous() for key, value in kept.items()}, work / f"{label}.safetensors")
            (work / config).write_text(json.dumps(old_config(one)))
        command = [options.python, "-c", OFFICIAL, options.official, name, str(RATIO), str(threads)]
        for _ in range(options.rounds):
            done = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""},
            )
            theirs.append(json.loads(done.stdout.split("found ")[-1]))
            start = time.perf_counter()
            result = compress(copy.deepcopy(model), "svd-llm", ratio=RATIO, data=data, form="plain", progress=False)
            ours.append(time.perf_counter() - start)
    found = perplexity(result.model, test, progress=False).perplexity
    own_grouped = compress(grouped, "svd-llm", ratio=RATIO, data=data, form="plain", progress=False)
    record(
        "svd_llm_official",
        {
            "perplexity, dense, both": theirs[0]["dense"],
            "perplexity at 20 %, published code": theirs[0]["perplexity"],
            "perplexity at 20 %, ours": found,
            "relative difference (<= 0.01)": abs(found / theirs[0]["perplexity"] - 1),
            "seconds, published code": statistics.median(done["seconds"] for done in theirs),
            "seconds, ours": statistics.median(ours),
            "times faster (>= 5)": statistics.median(
                done["seconds"] / own for done, own in zip(theirs, ours, strict=True)
            ),
            "grouped key and value heads, published code": theirs[0]["grouped"],
            "grouped key and value heads, ours, perplexity": perplexity(
                own_grouped.model, test, progress=False
            ).perplexity,
        },
        method="svd-llm",
    )
    draw()


if __name__ == "__main__":
    main()
