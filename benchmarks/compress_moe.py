"""Every way of making a mixture of experts smaller, on one that the job trains itself: quality, bytes, speed, cost.

A Mixtral of bytes (4 layers of width 128; 8 experts of 128 hidden units, 2 of them for a token) is trained on
WikiText-2 validation, kept in cache/, calibrated on windows of the same text and judged by the loss on WikiText-2 test.
A number behind a name is the fraction of the experts' parameters that is removed. Rows are added to
results/compress_moe.json one by one; what is there is not measured again.

python benchmarks/compress_moe.py
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import Training, add_row, rows, write_table
from common import RESULTS, environment
from compress_lm import Job, Make, by, bytes_of, dense, quantized
from language_model import text
from torch import Tensor, nn

from eckart.compression import compress
from eckart.models import perplexity, save
from eckart.models.experts import expert_banks, route
from eckart.models.geometry import Geometry, set_geometry
from eckart.models.timing import time_per_token
from eckart.structures import EckartWarning

PAGE = Path(__file__).parents[1] / "docs" / "compress-moe.md"
CACHE = Path(__file__).parent / "cache"
RATIOS = (0.25, 0.5)


@dataclass(frozen=True)
class Size:
    """Of the model, of its training in steps of ``batch`` windows, and of what calibrates and judges, in windows."""

    width: int = 128
    layers: int = 4
    experts: int = 8
    length: int = 256
    batch: int = 8
    steps: int = 350
    rate: float = 3e-3
    samples: int = 32
    judged: int = 256
    distil: int = 60
    recovery: int = 60
    timed: bool = True


SMOKE = Size(32, 2, 4, length=32, batch=2, steps=2, samples=4, judged=4, distil=2, recovery=2, timed=False)


def read(name: str) -> bytes:
    source = text(name)
    if source is None:
        raise SystemExit(f"{name} is missing: put it where $ECKART_BENCH_DATA says")
    return source.read_bytes()


def windows(data: bytes, length: int, count: int) -> list[Tensor]:
    """The first ``count`` windows of so many bytes, in batches of 8."""
    whole = torch.frombuffer(bytearray(data[: count * length]), dtype=torch.uint8).long()
    return list(whole[: len(whole) // length * length].reshape(-1, length).split(8))


def train(data: bytes, size: Size) -> Any:
    """A mixture of experts that has seen random windows of a text."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            hidden_size=size.width,
            intermediate_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=size.experts,
            num_experts_per_tok=2,
            max_position_embeddings=size.length,
            sliding_window=None,
            router_aux_loss_coef=0.02,
            initializer_range=size.width**-0.5,
        )
    )
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    training = Training(model.train(), size.rate, size.steps)
    for step in range(size.steps):
        starts = torch.randint(len(whole) - size.length, (size.batch,), generator=generator).tolist()
        ids = torch.stack([whole[start : start + size.length] for start in starts])
        # With the router's logits, the loss has the term that keeps experts about equally busy.
        training.step({"input_ids": ids, "labels": ids, "output_router_logits": True})
        if step % 50 == 49:
            print(f"step {step + 1}: loss {training.losses[-1]:.3f}, {sum(training.seconds):.0f} s", flush=True)
    return model.eval()


def trained(size: Size, name: str) -> Path:
    """Where the trained model is, after it has been trained."""
    path = CACHE / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save(train(read("wikitext2-valid.txt"), size), path)
    return path


def load(size: Size, name: str) -> Job:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained(size, name)).eval()
    data = windows(read("wikitext2-valid.txt"), size.length, size.samples)
    test = windows(read("wikitext2-test.txt"), size.length, size.judged)
    return Job(size, model, None, data, test, [])


def eight_bits(job: Job) -> tuple[nn.Module, dict[str, Any]]:
    """torchao's weight-only integers on the linears of the blocks and on the fused experts."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    made, notes = quantized(8)(job)
    names = [f"{bank.name}.{part}" for bank in expert_banks(made) for part in ("gate_up_proj", "down_proj")]
    quantize_(made, FqnToConfig({name: Int8WeightOnlyConfig() for name in names}), filter_fn=None)
    model: Any = made
    model.set_experts_implementation("eager")  # the other ones do not know such tensors
    return made, notes


def pruned(ratio: float) -> Make:
    """Without the experts that the fewest tokens are sent to; the routers choose among the others."""

    def make(job: Job) -> tuple[nn.Module, dict[str, Any]]:
        made = copy.deepcopy(job.model)
        banks = expert_banks(made)
        batches = [{"input_ids": ids} for ids in job.data]
        for name, used in route(made, banks, batches, progress=False).items():
            bank = next(bank for bank in banks if bank.name == name)
            count = bank.count - round(ratio * bank.count)
            kept = used.frequency.topk(count).indices.sort().values
            gate_up, down = bank.gate_up.detach()[kept], bank.down.detach()[kept]
            shapes = {"gate_up_proj": tuple(gate_up.shape), "down_proj": tuple(down.shape)}
            set_geometry(bank.module, Geometry({"num_experts": count}, shapes=shapes))
            router = made.get_submodule(name.rpartition(".")[0]).get_submodule("gate")
            router.weight = nn.Parameter(router.get_parameter("weight").detach()[kept])
            with torch.no_grad():
                bank.gate_up.copy_(gate_up)
                bank.down.copy_(down)
        return made, {"baseline": "least used experts pruned", "ratio": ratio}

    return make


def student(distilled: bool) -> Make:
    """OneS, whose size follows from the mixture."""

    def make(job: Job) -> tuple[nn.Module, dict[str, Any]]:
        steps = job.size.distil if distilled else 0
        result = compress(copy.deepcopy(job.model), "ones", data=job.data, steps=steps, ratio=0.5, progress=False)
        return result.model, {"method": "ones", "ratio": 0.5, "removed": result.ratio, "distillation steps": steps}

    return make


def contenders() -> dict[str, Make]:
    found: dict[str, Make] = {"dense": dense, "int8": eight_bits}
    for ratio in RATIOS:
        found |= {
            f"sub-moe {ratio}": by("sub-moe", ratio),
            f"sub-moe aligned {ratio}": by("sub-moe", ratio, align=True),
            f"sub-moe low-rank {ratio}": by("sub-moe", ratio, experts="low-rank", intra=0.2),
            # Nothing is merged: every matrix of every expert has its own whitened SVD.
            f"sub-moe low-rank, none merged {ratio}": by("sub-moe", ratio, experts="low-rank", intra=ratio),
            f"sub-moe shared output basis {ratio}": by("sub-moe", ratio, experts="shared"),
            f"sub-moe shared output basis, aligned {ratio}": by("sub-moe", ratio, experts="shared", align=True),
            f"sub-moe shared stream basis {ratio}": by("sub-moe", ratio, experts="shared", basis="stream"),
            f"sub-moe shared stream basis, all {ratio}": by(
                "sub-moe", ratio, experts="shared", basis="stream", group=8
            ),
            f"least used pruned {ratio}": pruned(ratio),
        }
    found["sub-moe shared stream basis recovered 0.5"] = by(
        "sub-moe", 0.5, recovered=True, experts="shared", basis="stream"
    )
    found["ones, gathered only"] = student(distilled=False)
    found["ones"] = student(distilled=True)
    return found


def run(job: Job, name: str, make: Make) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        model, notes = make(job)
    seconds = time.perf_counter() - start
    quality = perplexity(model, job.test, progress=False)
    row = {
        **notes,
        "loss": quality.loss,
        "perplexity": quality.perplexity,
        "bytes": bytes_of(model),
        "ms a token": time_per_token(model, progress=False) if job.size.timed else None,
        "seconds to compress": seconds,
        **environment(),
    }
    print(f"{name}: loss {row['loss']:.4f}, {row['bytes'] / 1e6:.2f} MB, {seconds:.1f} s", flush=True)
    return row


def table(found: dict[str, Any]) -> None:
    columns = {
        "model": lambda name, row: name if row.get("method") else f"*{name}*",
        "loss, nats a byte": lambda name, row: f"{row['loss']:.4f}",
        "perplexity": lambda name, row: f"{row['perplexity']:.3f}",
        "MB": lambda name, row: f"{row['bytes'] / 1e6:.2f}",
        "experts' numbers removed": lambda name, row: f"{row['removed']:.1%}" if "removed" in row else "",
        "ms a token": lambda name, row: "" if row["ms a token"] is None else f"{row['ms a token']:.1f}",
        "to compress, s": lambda name, row: f"{row['seconds to compress']:.1f}",
    }
    write_table(PAGE, columns, dict(sorted(found.items(), key=lambda pair: pair[1]["loss"])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few tokens, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only write the page's table")
    options = parser.parse_args()
    path = CACHE / "compress_moe_smoke.json" if options.smoke else RESULTS / "compress_moe.json"
    if options.draw:
        table(rows(path))
        return
    job = load(SMOKE, "moe-smoke") if options.smoke else load(Size(), "moe")
    known = contenders()
    for name in options.only or [name for name in known if name not in rows(path)]:
        add_row(path, name, run(job, name, known[name]))


if __name__ == "__main__":
    main()
