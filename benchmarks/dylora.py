"""DyLoRA on the sentiment job: one training for all ranks against a LoRA trained for each.

DyLoRA of rank 4 is trained for twice the steps of one LoRA, half of what the four take together, and evaluated at every
rank; three seeds each, learning rate of both chosen on the dev set at the full rank, as in the job:

python benchmarks/dylora.py [--smoke]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

from adapt_sst2 import RATES, SMOKE, Job, Size, accuracy, finalists, fit, load, search
from adapter_job import lora_config
from common import record

from eckart import adapt

RANK = 4


def dylora(job: Job, model: Any) -> Any:
    return adapt(model, "dylora", RANK, progress=False, modules_to_save=["head"])


def lora(rank: int) -> Any:
    def build(job: Job, model: Any) -> Any:
        from peft import get_peft_model

        return get_peft_model(model, lora_config(model, rank, modules_to_save=["head"]))

    return build


def at_every_rank(job: Job, model: Any) -> dict[int, float]:
    """Test accuracy at rank 4, 3, 2 and 1."""
    found = {}
    for rank in range(RANK, 0, -1):
        one = copy.deepcopy(model)
        one.base_model.truncate(rank)
        found[rank] = accuracy(job, one, job.test)
    return found


def measure(job: Job) -> dict[str, Any]:
    def rate_of(build: Any, steps: int) -> float:
        return next(iter(finalists(job, build, search(job, build, RATES), steps)))

    seeds = range(job.size.seeds)
    rate, time_of_one, nested = rate_of(dylora, 2 * job.size.steps), [], []
    for seed in seeds:
        model, seconds = fit(job, dylora, rate, 2 * job.size.steps, seed)
        nested.append(at_every_rank(job, model))
        time_of_one.append(sum(seconds))
    rate, time_of_all, figures = rate_of(lora(RANK), job.size.steps), 0.0, {}
    for rank in range(1, RANK + 1):
        scores = []
        for seed in seeds:
            model, seconds = fit(job, lora(rank), rate, job.size.steps, seed)
            scores.append(accuracy(job, model, job.test))
            time_of_all += sum(seconds) / job.size.seeds
        ours = [found[rank] for found in nested]
        figures[f"rank {rank}: accuracy of a LoRA trained for it"] = statistics.mean(scores)
        figures[f"rank {rank}: accuracy of DyLoRA truncated to it"] = statistics.mean(ours)
        figures[f"rank {rank}: points that DyLoRA is below (<= 1)"] = 100 * (
            statistics.mean(scores) - statistics.mean(ours)
        )
    figures["training time, one DyLoRA / all LoRAs (<= 0.5)"] = statistics.mean(time_of_one) / time_of_all
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing is written")
    smoke = parser.parse_args().smoke
    figures = measure(load(SMOKE if smoke else Size()))
    if smoke:
        print(figures)
    else:
        record("dylora", figures, method="dylora", seeds=Size.seeds)


if __name__ == "__main__":
    main()
