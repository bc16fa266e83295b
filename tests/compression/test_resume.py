"""A streamed compression that was ended and gone on with gives the files of one that ran through."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
import tiny_models
from eckart.compression import compress_checkpoint, runner
from eckart.compression.layer import Fit
from eckart.compression.runner import Walk
from eckart.models import CheckpointError
from eckart.models.calibrate import collect
from eckart.models.journal import UNFINISHED
from eckart.models.stream import StreamedModel
from eckart.structures import EckartWarning

DATA = [{"input_ids": torch.arange(3, 75).reshape(3, 24)}, {"input_ids": torch.arange(90, 120).reshape(2, 15)}]
BLOCKS, LINEARS = 3, 7  # of the Llama, and in each of its blocks


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    made = tiny_checkpoints.model(num_hidden_layers=BLOCKS)
    return tiny_checkpoints.write(tmp_path_factory.mktemp("llama") / "dense", made, with_tokenizer=False)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def go(source: Path, out: Path, method: Any = "svd", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress_checkpoint(source, out, method, **{"data": DATA, "ratio": 0.3, "progress": False, **options})


class Ends:
    """Ends a run at a layer, counted from the first that this run works on; counts the layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, error: BaseException | None = None) -> None:
        self.count, fit = 0, Fit.__call__

        def counted(task: Fit, *args: Any) -> Any:
            self.count += 1
            if self.count == at:
                raise error or KeyboardInterrupt
            return fit(task, *args)

        monkeypatch.setattr(Fit, "__call__", counted)


def ended(monkeypatch: pytest.MonkeyPatch, at: int, *args: Any, **options: Any) -> None:
    with monkeypatch.context() as patch:
        Ends(patch, at)
        with pytest.raises(KeyboardInterrupt):
            go(*args, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {}),
        ("svd-llm", {}),
        ("svd-llm", {"update": True, "form": "plain"}),
        ("asvd", {"allocation": "threshold"}),
        ("pifa", {}),
        ("pifa", {"allocation": "svd-llm-v2", "where": "*.mlp.*"}),
        ("compactifai", {}),
        ("afm-ctr", {}),
    ],
)
def test_the_files_are_those_of_an_uninterrupted_run(method, options, llama, tmp_path, monkeypatch):
    expected = go(llama, tmp_path / "whole", method, **options)
    layers = len(expected.layers) // BLOCKS
    out = tmp_path / "out"
    ended(monkeypatch, layers + 2, llama, out, method, **options)  # in the second block
    assert len(list(partial(out).glob("*.safetensors"))) == 1
    ended(monkeypatch, layers + 1, llama, out, method, resume=True, **options)  # in the third
    assert len(list(partial(out).glob("*.safetensors"))) == 2
    with monkeypatch.context() as patch:
        last = Ends(patch, None)
        if "allocation" in options:
            patch.setattr(Walk, "survey", lambda _: pytest.fail("it measures all weights once more"))
        found = go(llama, out, method, resume=True, **options)
    assert last.count == layers, "what is finished is not factorised again"
    assert files(out) == files(tmp_path / "whole")
    assert not partial(out).exists()
    of_this_run = {"seconds": 0, "peak_memory": 0}
    assert {**found.to_dict(), **of_this_run} == {**expected.to_dict(), **of_this_run}


@pytest.mark.parametrize(("family", "method"), [("t5", "svd-llm"), ("t5", "pifa"), ("gpt2", "pifa"), ("opt", "svd")])
def test_other_families(family, method, tmp_path, monkeypatch):
    model = tiny_models.FAMILIES[family]()
    model.save_pretrained(tmp_path / "dense", max_shard_size="24KB")
    data = [tiny_models.inputs(model, 3, 14), tiny_models.inputs(model, 2, 9)]
    result = go(tmp_path / "dense", tmp_path / "whole", method, data=data)
    # Behind the encoder's last block, or one of two.
    ended(monkeypatch, len(result.layers) // 2 + 2, tmp_path / "dense", tmp_path / "out", method, data=data)
    assert (partial(tmp_path / "out") / UNFINISHED).is_file()
    go(tmp_path / "dense", tmp_path / "out", method, data=data, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_layers_that_no_token_reached_are_still_named(llama, tmp_path, monkeypatch):
    silent = "model.layers.0.mlp.up_proj"

    def without_it(*args: Any) -> Any:
        found, hidden = collect(*args)
        found.pop(silent, None)
        return found, hidden

    monkeypatch.setattr(runner, "collect", without_it)
    expected = go(llama, tmp_path / "whole", "svd-llm")
    ended(monkeypatch, LINEARS + 2, llama, tmp_path / "out", "svd-llm")
    found = go(llama, tmp_path / "out", "svd-llm", resume=True)
    assert found.warnings == expected.warnings == [f"{silent} saw no calibration token and stay dense"]
    assert found.layers == expected.layers
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_full_disk_keeps_finished_shards(shard, llama, tmp_path, monkeypatch):
    """``shard`` 3 is what lies outside the blocks."""
    go(llama, tmp_path / "whole")
    written: list[Path] = []

    def save(tensors: Any, path: Path, **options: Any) -> None:
        if len(written) == shard:
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        written.append(path)
        save_file(tensors, path, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("eckart.models.stream.save_file", save)
        with pytest.raises(CheckpointError) as caught:
            go(llama, out)
    kept = f"what is finished is kept in {partial(out)}: go on with --resume"
    assert str(caught.value) == f"cannot write {out}: No space left on device; {kept}"
    assert sorted(file.name for file in partial(out).iterdir()) == sorted([UNFINISHED, *(p.name for p in written)])
    with monkeypatch.context() as patch:
        count = Ends(patch, None)
        go(llama, out, resume=True)
    assert count.count == LINEARS * (BLOCKS - shard)
    assert files(out) == files(tmp_path / "whole")


def test_a_disk_too_full_for_the_journal_costs_a_block(llama, tmp_path, monkeypatch):
    go(llama, tmp_path / "whole")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if (Path(target).parent / "model-00002-of-00004.safetensors").exists():
            raise OSError(28, os.strerror(28))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("eckart.models.journal.os.replace", full)
        with pytest.raises(CheckpointError, match="No space left on device; what is finished is kept"):
            go(llama, tmp_path / "out")
    with monkeypatch.context() as patch:
        count = Ends(patch, None)
        go(llama, tmp_path / "out", resume=True)
    assert count.count == 2 * LINEARS
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "svd-llm"}, "method (asvd, now svd-llm), options"),
        ({"ratio": 0.5}, 'budget ({"ratio": 0.3}, now {"ratio": 0.5})'),
        ({"ratio": None, "rank": 3}, 'budget ({"ratio": 0.3}, now {"rank": 3})'),
        ({"form": "plain"}, "form (pivoted, now plain)"),
        ({"alpha": 0.75}, "options"),
        ({"where": "*.mlp.*"}, "where (null, now *.mlp.*), layers"),
        ({"allocation": "threshold"}, "allocation (uniform, now threshold)"),
        ({"data": DATA[:1]}, "calibration"),
        ({"source": "touched"}, "model"),
    ],
    ids=str,
)
def test_another_request_is_refused_by_what_differs(options, named, llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ended(monkeypatch, LINEARS + 2, llama, out, "asvd")
    before = files(partial(out))
    source = llama
    if options.pop("source", None):
        source = tmp_path / "touched"
        source.mkdir()
        for file in llama.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="differs in") as caught:
        go(source, out, options.pop("method", "asvd"), resume=True, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert f" differs in {named}" in message
    assert message.endswith("; ask for the same, or start anew with force (--force)")
    assert files(partial(out)) == before


def test_equal_requests_in_other_words_are_the_same(llama, tmp_path, monkeypatch):
    """The default budget and allocation, said or not."""
    out = tmp_path / "out"
    ended(monkeypatch, LINEARS + 2, llama, out, ratio=None)
    go(llama, out, ratio=0.2, allocation="uniform", form="pivoted", resume=True)
    assert out.is_dir()


def test_leftovers_are_refused_gone_on_with_or_replaced(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ended(monkeypatch, LINEARS + 2, llama, out)
    before = files(partial(out))
    monkeypatch.setattr("eckart.compression.stream.StreamedModel", lambda _: pytest.fail("it reads the model"))
    with pytest.raises(FileExistsError, match=r"an earlier run for .*out left .*partial; go on with resume"):
        go(llama, out)
    monkeypatch.setattr("eckart.compression.stream.StreamedModel", StreamedModel)
    with pytest.raises(ValueError, match="matches no layer"):
        go(llama, out, where="nothing", force=True)
    assert files(partial(out)) == before
    count = Ends(monkeypatch, None)
    go(llama, out, "svd", ratio=0.5, force=True)
    assert count.count == BLOCKS * LINEARS
    assert not partial(out).exists()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_shard_is_named(damage, llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ended(monkeypatch, 2 * LINEARS + 2, llama, out)
    shard = partial(out) / "model-00002-of-00004.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"00002-of-00004.safetensors is missing or damaged; start anew"
    ) as caught:
        go(llama, out, resume=True)
    assert not hasattr(caught.value, "__notes__")


def test_a_weight_that_is_refused_in_a_later_block_leaves_nothing(llama, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in llama.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    (weights,) = bad.glob("*.safetensors")
    stored = load_file(weights)
    stored["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(stored, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight has NaN or Inf"):
        go(bad, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_the_journal_is_small_and_json(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ended(monkeypatch, LINEARS + 2, llama, out)
    state = json.loads((partial(out) / UNFINISHED).read_text())
    (part,) = state["parts"]
    assert [entry["name"] for entry in part["layers"]] == list(part["structures"])
    assert part["structures"]["model.layers.0.self_attn.q_proj"]["type"] == "low_rank"
