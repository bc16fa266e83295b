"""Compress a 3 GB bfloat16 checkpoint from disk to disk, and watch the peak memory of the process that does it.

The checkpoint is a random Llama, written shard by shard by this script and removed afterwards.

python benchmarks/stream.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import record
from safetensors.torch import save_file

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 60, 1536, 4096, 32000

WORKER = """
import json, resource, sys, torch
from eckart.compression import compress_checkpoint
source, out, method = sys.argv[1:4]
ids = (torch.arange(2048).reshape(4, 512) * 7919) % 32000
data = [{"input_ids": row[None]} for row in ids]
result = compress_checkpoint(source, out, method, ratio=0.3, data=data, progress=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "ratio": result.ratio, "seconds": result.seconds}))
"""


def write_checkpoint(path: Path) -> int:
    """Random weights in bfloat16, one shard a layer. Returns bytes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=24,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    key_value = HIDDEN // 3
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_value, HIDDEN),
        "self_attn.v_proj": (key_value, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    weight_map: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        write(f"model-{layer:05}.safetensors", tensors)
    write(
        "model-outside.safetensors",
        {
            "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            "lm_head.weight": random(VOCABULARY, HIDDEN),
        },
    )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="svd-llm")
    method = parser.parse_args().method
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "dense", Path(scratch) / "compressed"
        source.mkdir()
        size = write_checkpoint(source)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", WORKER, str(source), str(out), method], check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        figures = json.loads(done.stdout.splitlines()[-1])
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    record(
        "stream",
        {
            "method": method,
            "checkpoint, GB": size / 1e9,
            "peak resident memory, GB (< 1.2)": figures["peak"] / 1e9,
            "ratio removed from the selected weights": figures["ratio"],
            "written, GB": written / 1e9,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
