from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

import tiny_models
from eckart.models import model_bytes, num_parameters, peak_memory, perplexity, time_per_token
from eckart.models.evaluate import context_length, is_causal

CAUSAL = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe"]


class Given(nn.Module):
    """A model that answers with given logits (batch, length, vocabulary), whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.given = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.given[: len(input_ids), : input_ids.shape[1]])


def _independent(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Summed negative log-likelihood of one sequence (length,), token by token in float64."""
    logits = logits.double()
    return sum(float(logits[t].exp().sum().log() - logits[t, ids[t + 1]]) for t in range(len(ids) - 1))


@pytest.mark.parametrize("family", CAUSAL)
def test_equal_to_an_independent_computation_in_float64(family):
    model = tiny_models.FAMILIES[family]()
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(3, tiny_models.VOCABULARY, size, generator=generator) for size in ((3, 20), (1, 7))]
    found = perplexity(model, batches, progress=False)
    with torch.no_grad():
        total = sum(_independent(model(row[None]).logits[0], row) for ids in batches for row in ids)
    assert found.tokens == 3 * 19 + 6
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-5)  # float32 logits of order 1
    assert found.perplexity == pytest.approx(math.exp(total / found.tokens), rel=1e-4)
    assert found.to_dict()["tokens_per_second"] == pytest.approx(found.tokens / found.seconds)


def test_low_precision_logits_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, 300, generator=generator).bfloat16()
    ids = torch.randint(300, (2, 50), generator=generator)
    found = perplexity(Given(logits), [ids], progress=False)
    total = sum(_independent(row, target) for row, target in zip(logits, ids, strict=True))
    assert found.loss == pytest.approx(total / 98, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    """Neither padding nor, with padding on the left, the first real token, which nothing precedes."""
    model = tiny_models.FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in (12, 5, 9)]
    alone = [perplexity(model, [row[None]], progress=False) for row in rows]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    found = perplexity(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    assert found.tokens == sum(one.tokens for one in alone) == 11 + 4 + 8
    # rotary positions are relative, so that a shift changes nothing but rounding
    assert found.loss == pytest.approx(sum(one.loss * one.tokens for one in alone) / found.tokens, rel=1e-5)


def test_labels_are_left_out_and_the_model_is_left_as_it_was():
    model = tiny_models.FAMILIES["gpt2"]().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    ids = torch.arange(3, 15)[None]
    one = perplexity(model, [{"input_ids": ids, "labels": torch.zeros_like(ids)}], progress=False)
    two = perplexity(model, [ids], progress=False)
    assert one.loss == two.loss  # dropout is off
    assert [module.training for module in model.modules()] == modes
    model(ids, labels=ids).loss.backward()  # nothing that is cached stands in the way of training
    assert model.lm_head.weight.grad is not None


def test_a_hopeless_model_has_infinite_perplexity():
    certain = torch.zeros(1, 4, 5)
    certain[..., 0] = 1000.0  # nats against every other token
    found = perplexity(Given(certain), [torch.ones(1, 4, dtype=torch.long)], progress=False)
    assert (found.loss, found.perplexity) == (1000.0, math.inf)
    excluded = torch.zeros(1, 4, 5)
    excluded[..., 1] = -math.inf
    found = perplexity(Given(excluded), [torch.ones(1, 4, dtype=torch.long)], progress=False)
    assert (found.loss, found.perplexity) == (math.inf, math.inf)


def test_logits_that_are_no_numbers_are_an_error():
    logits = torch.zeros(2, 4, 5)
    logits[1, 2, 3] = math.nan
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^the logits of batch 1 are not numbers .* torch.float32; try float32$"):
        perplexity(Given(logits), [ids, ids.repeat(2, 1)], progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the iterable of batches is empty"),
        ([torch.ones(3, 1, dtype=torch.long)], "windows need at least two tokens"),
        ([{"pixel_values": torch.zeros(1)}], "batch 0 has no input_ids, only pixel_values"),
        ([torch.ones(1, 65, dtype=torch.long)], "windows of 65 tokens are longer than the model's context of 64"),
    ],
    ids=["none", "one token", "no ids", "too long"],
)
def test_data_that_cannot_be_used(data, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_models.FAMILIES["gpt2"](), data, progress=False)


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_a_model_that_is_not_causal_is_refused(family):
    model = tiny_models.FAMILIES[family]()
    assert not is_causal(model)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is no causal language model"):
        perplexity(model, [torch.ones(1, 4, dtype=torch.long)], progress=False)


@pytest.mark.parametrize("family", CAUSAL)
def test_time_per_token_stays_inside_the_context(family):
    model = tiny_models.FAMILIES[family]()
    assert context_length(model) == 64 == context_length(model.config)
    assert 0 < time_per_token(model, prompt=100, tokens=1000, progress=False) < 10_000
    assert 0 < time_per_token(model, tokens=2, progress=False) < 10_000


def test_the_median_step_is_what_counts():
    """A model whose steps take a known time: neither the slow first ones nor one that is held up shows."""

    class Timed(nn.Linear):
        def generate(self, ids, *, streamer, max_new_tokens, min_new_tokens, **_):
            import time

            assert max_new_tokens == min_new_tokens == 25
            streamer.put(ids)
            for token in range(max_new_tokens):
                time.sleep(0.05 if token < 5 or token == 10 else 0.01)
                streamer.put(token)
            streamer.end()

    assert 10 <= time_per_token(Timed(1, 1), tokens=20, progress=False) < 30


def test_context_length_of_models_that_do_not_say():
    assert context_length(nn.Linear(2, 2)) is None
    assert context_length(tiny_models.FAMILIES["vit"]()) is None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_and_bytes_count_tied_weights_once(family, device):
    model = tiny_models.FAMILIES[family]()
    numbers = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    kept = [b for key, b in model.named_buffers() if key in model.state_dict()]
    size = 4 * numbers + sum(b.nbytes for b in kept)
    if device == "meta":
        model = model.to("meta")
        model.tie_weights()
    assert num_parameters(model) == numbers
    assert model_bytes(model) == size


def test_bytes_count_index_tensors_and_types():
    model = tiny_models.FAMILIES["llama"]().bfloat16()
    names = tiny_models.low_rank(model, rank=6)
    factored = sum(model.get_submodule(name).nbytes() for name in names)
    others = sum(p.nbytes for key, p in model.named_parameters() if key.rpartition(".")[0] not in names)
    assert model_bytes(model) == factored + others


def test_peak_memory_is_that_of_the_process():
    held = torch.ones(50_000_000, dtype=torch.uint8)
    # what another test may have held counts too, so there is no upper bound but the machine's
    assert held.nbytes < peak_memory() < psutil.virtual_memory().total
    assert psutil.Process().memory_info().rss <= peak_memory() * 1.01


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(1_000_000_000, dtype=torch.uint8)
    # Linux's ru_maxrss of the child would be at least this process's.
    told = "from eckart.models import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    assert 10_000_000 < int(done.stdout) < held.nbytes
