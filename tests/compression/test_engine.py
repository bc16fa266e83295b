"""A Ray cluster of two workers gives the files of the one process, also when a worker dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import tiny_checkpoints
import tiny_models
from as_before import libraries_as_before
from eckart.cli.main import main
from eckart.compression import compress_checkpoint, engine
from eckart.compression.engine import EngineError, Local
from eckart.compression.svd import SVD
from eckart.linalg import LinalgError
from eckart.models import linears
from eckart.models.calibrate import Statistics
from eckart.models.journal import UNFINISHED
from eckart.models.reader import RemoteLinear
from eckart.models.stream import StreamedModel
from eckart.structures import EckartWarning

__all__ = ["libraries_as_before"]  # a fixture of every test here

DATA = [{"input_ids": torch.arange(3, 75).reshape(3, 24)}, {"input_ids": torch.arange(90, 120).reshape(2, 15)}]
BLOCKS = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    made = tiny_checkpoints.model(num_hidden_layers=BLOCKS)
    return tiny_checkpoints.write(tmp_path_factory.mktemp("llama") / "dense", made, with_tokenizer=False)


@pytest.fixture(scope="module")
def cluster(llama, tmp_path_factory) -> Iterator[None]:
    """Two workers, started and stopped by one engine; the others find them running.

    Starting takes a worker seconds, so what is true of that is asked here.
    """
    assert not ray.is_initialized()
    with engine.Ray(StreamedModel(llama).remote) as solver, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_cpus=2))
        assert printed_by(solver._connected, tmp_path_factory.mktemp("printed") / "stderr") == ""
        patch.undo()
        yield
        assert ray.is_initialized(), "who finds it running leaves it running"
    assert not ray.is_initialized(), "who started it stops it"


def printed_by(function: Callable[[], object], file: Path) -> str:
    """What a function and the processes that it starts write to standard error."""
    before = os.dup(2)
    try:
        with file.open("w") as text:
            os.dup2(text.fileno(), 2)
            function()
    finally:
        os.dup2(before, 2)
        os.close(before)
    return file.read_text()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a worker has: more of them add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def go(source: Path, out: Path, method: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress_checkpoint(source, out, method, **{"data": DATA, "ratio": 0.3, "progress": False, **options})


def remotes(source: Path) -> list[RemoteLinear]:
    streamed = StreamedModel(source)
    return [streamed.remote(ref) for ref in linears(streamed.model).linears]


# ------------------------------------------------------------------------------------------------------ equal results


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {}),
        ("svd", {"energy": 0.8, "ratio": None}),
        ("svd-llm", {"form": "plain"}),
        ("asvd", {"allocation": "threshold", "where": "*.mlp.*"}),
        ("compactifai", {}),
    ],
)
def test_the_files_are_those_of_one_process(method, options, cluster, llama, tmp_path):
    one = go(llama, tmp_path / "local", method, **options)
    two = go(llama, tmp_path / "ray", method, engine="ray", **options)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    of_this_run = {"seconds": 0, "peak_memory": 0}
    assert {**two.to_dict(), **of_this_run} == {**one.to_dict(), **of_this_run}


def test_the_command(cluster, llama, tmp_path, capfd):
    for name in ("local", "ray"):
        out = str(tmp_path / name)
        assert main(["compress", str(llama), "--method", "svd", "--stream", "--engine", name, "--out", out]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert printed.out.count("21 layers: 21 pivoted") == 2
    assert files(tmp_path / "ray") == files(tmp_path / "local")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_biases_transposed_weights_and_types(family, dtype, cluster, tmp_path):
    model = tiny_models.FAMILIES[family]().to(dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size="24KB")
    for name in ("local", "ray"):
        go(tmp_path / "dense", tmp_path / name, "svd-llm", data=[tiny_models.inputs(model, 3, 14)], engine=name)
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_a_worker_reads_what_the_model_has(tmp_path):
    model = tiny_models.FAMILIES["gpt2"]()
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path)
    refs = linears(streamed.model).linears
    assert {ref.kind for ref in refs} == {"conv1d"}
    for ref, dense in zip(refs, linears(model).linears, strict=True):
        read = streamed.remote(ref).load()
        assert (read.name, read.shape, read.dtype) == (dense.name, dense.shape, dense.dtype)
        assert torch.equal(read.weight, dense.weight)
        assert read.bias is not None
        assert torch.equal(read.bias, dense.bias)


def test_each_task_has_one_thread_and_its_own_statistics(cluster, llama):
    streamed = StreamedModel(llama)
    refs = linears(streamed.model).linears
    shared, other = Statistics(count=3), Statistics(count=4)
    given = {ref.name: shared if "mlp" in ref.name else other for ref in refs[1:]}

    def task(ref: Any, statistics: Statistics | None) -> tuple[int, int, int]:
        return torch.get_num_threads(), os.getpid(), 0 if statistics is None else statistics.count

    with engine.Ray(streamed.remote) as solver:
        found = list(solver.map(task, refs, given))
    assert {threads for threads, *_ in found} == {1}
    assert os.getpid() not in {process for _, process, _ in found}
    assert [count for *_, count in found] == [0, *(given[ref.name].count for ref in refs[1:])]


def test_blocks_without_data_are_begun_before_they_are_asked_for(cluster, llama, tmp_path):
    streamed = StreamedModel(llama)
    refs = linears(streamed.model).linears
    groups = [refs[:7], refs[7:14], refs[14:]]
    place = str(tmp_path)

    def task(ref: Any, statistics: Any) -> str:
        (Path(place) / ref.name).touch()
        return str(ref.name)

    with engine.Ray(streamed.remote) as solver:
        results = solver.imap(task, groups)
        assert list(next(results)) == [ref.name for ref in groups[0]]
        begun = solver._pending
        assert len(begun) == 7, "the second block's, which is enough for two workers"
        assert [list(found) for found in results] == [[ref.name for ref in group] for group in groups[1:]]
        assert not begun
    assert len(list(tmp_path.iterdir())) == 21


# ------------------------------------------------------------------------------------------------------ what can fail


def test_workers_that_die_for_good_leave_finished_blocks_to_resume(cluster, llama, tmp_path, monkeypatch):
    results = iter(range(17))  # up to the third linear of the third block

    def get(reference: Any) -> Any:
        if next(results, None) is None:
            raise ray.exceptions.WorkerCrashedError
        return real(reference)

    with monkeypatch.context() as patch:
        real = ray.get
        patch.setattr(ray, "get", get)
        with pytest.raises(EngineError) as caught:
            go(llama, tmp_path / "out", "svd-llm", engine="ray")
    assert str(caught.value) == (
        "Ray gave up a task (WorkerCrashedError: The worker died unexpectedly while executing this task); "
        'look at its workers, or use --engine local (engine="local")'
    )
    partial = tmp_path / ".out.partial"
    assert caught.value.__notes__ == [f"what is finished is kept in {partial}: go on with --resume"]
    assert len(json.loads((partial / UNFINISHED).read_text())["parts"]) == 2
    go(llama, tmp_path / "out", "svd-llm", resume=True)
    go(llama, tmp_path / "local", "svd-llm")
    assert files(tmp_path / "out") == files(tmp_path / "local")


def test_what_a_task_raises_is_raised_here(cluster, llama, tmp_path):
    @dataclass(frozen=True)
    class Fails(SVD):
        def factorize(self, weight: torch.Tensor, statistics: Any, rank: int) -> Any:
            raise LinalgError("no right answer")

    with pytest.raises(LinalgError, match=r"^model\.layers\.0\.self_attn\.q_proj: no right answer$"):
        go(llama, tmp_path / "out", Fails(), engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_named_by_weight(cluster, llama, tmp_path):
    model = tiny_checkpoints.model(num_hidden_layers=BLOCKS)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    bad = tiny_checkpoints.write(tmp_path / "bad", model, with_tokenizer=False)
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj.weight has NaN or Inf in it; repair"):
        go(bad, tmp_path / "out", "svd", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("pifa", {}, "fits each layer to what became of those before it"),
        ("svd-llm", {"update": True}, "fits each layer to what became of those before it"),
        ("modegpt", {}, "does not work weight by weight"),
        ("ones", {}, "does not work weight by weight"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_started(method, options, reason, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it started Ray"))
    message = rf'^{method} {reason}; use --engine local \(engine="local"\)$'
    with pytest.raises(ValueError, match=message):
        go(llama, tmp_path / "out", method, engine="ray", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_not_there(llama, tmp_path, monkeypatch):
    def unreachable(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(EngineError) as caught:
        go(llama, tmp_path / "out", "svd", engine="ray")
    assert str(caught.value) == (
        "Ray cannot be reached or started (ConnectionError: Could not find any running Ray instance); "
        'check RAY_ADDRESS, or use --engine local (engine="local")'
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_engine_and_a_missing_ray(llama, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^engine must be one of local, ray, not 'dask'$"):
        go(llama, tmp_path / "out", "svd", engine="dask")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^the ray engine needs Ray: pip install 'eckart\[ray\]'$"):
        go(llama, tmp_path / "out", "svd", engine="ray")
    assert list(tmp_path.iterdir()) == []


def killing(marker: Path, source: Path, layer: str) -> Any:
    """SVD that kills its own process at a layer, unless the marker says that it has done so."""
    (first,) = (ref.load().weight[0, 0].item() for ref in remotes(source) if ref.name == layer)

    @dataclass(frozen=True)
    class Killing(SVD):
        def factorize(self, weight: torch.Tensor, statistics: Any, rank: int) -> Any:
            if weight[0, 0].item() == first and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().factorize(weight, statistics, rank)

    return Killing()


def test_a_killed_worker_is_replaced(cluster, llama, tmp_path):
    """The last test of the cluster: another worker takes seconds to start."""
    method = killing(tmp_path / "marker", llama, "model.layers.1.mlp.up_proj")
    go(llama, tmp_path / "ray", method, engine="ray")
    assert (tmp_path / "marker").exists(), "it was killed"
    go(llama, tmp_path / "local", method)
    assert files(tmp_path / "ray") == files(tmp_path / "local")


# ---------------------------------------------------------------------------------------------------------- one process


def test_one_worker_has_one_result_at_a_time(llama):
    refs = [ref.load() for ref in remotes(llama)]
    worked: list[str] = []

    def task(ref: Any, statistics: Any) -> str:
        worked.append(ref.name)
        return str(ref.name)

    for number, name in enumerate(Local(1).map(task, refs, {}), start=1):
        assert worked == [ref.name for ref in refs[:number]]
        assert worked[-1] == name
    worked.clear()
    results = Local().imap(task, [refs[:2], refs[2:]])
    first = next(results)
    assert worked == []
    assert list(first) == worked == [ref.name for ref in refs[:2]]
