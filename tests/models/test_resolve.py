from __future__ import annotations

import importlib
import inspect
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

import eckart
import tiny_checkpoints
from eckart.models import CheckpointError, load, load_tokenizer, resolve


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands for the hub's download: takes from one repository what is asked for."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "some/name"
        for file in repository.rglob("*"):
            place = file.relative_to(repository)
            if file.is_file() and any(fnmatch(str(place), pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / place)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    tiny_checkpoints.write(repository)
    return repository, cache


def test_a_directory_is_itself(tmp_path):
    path = tiny_checkpoints.write(tmp_path / "model")
    assert resolve(path) == resolve(str(path)) == path


def test_the_demo_is_in_the_cache_and_a_directory_of_that_name_is_not_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    place = tiny_checkpoints.write(tmp_path / "cache" / "SmolLM2-135M-Instruct")
    assert resolve("demo") == place
    monkeypatch.chdir(tmp_path)
    own = tiny_checkpoints.write(tmp_path / "demo")
    assert resolve("./demo").resolve() == own


def test_of_a_hub_repository_only_what_is_needed_is_fetched(hub):
    repository, cache = hub
    needed = {str(file.relative_to(repository)) for file in repository.rglob("*")}
    needed |= {"merges.txt", "tokenizer.model", "chat_template.jinja"}
    unneeded = {"consolidated.safetensors", "pytorch_model.bin", "tf_model.h5", "optimizer.pt", "original/model.pth"}
    for name in needed | unneeded:
        (repository / name).parent.mkdir(exist_ok=True)
        if not (repository / name).exists():
            (repository / name).write_text("x")
    assert resolve("some/name") == cache
    assert {str(file.relative_to(cache)) for file in cache.rglob("*")} == needed


def test_old_weights_are_fetched_where_there_are_no_others(hub):
    repository, _ = hub
    (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
    assert (resolve("some/name") / "pytorch_model.bin").is_file()


def test_a_hub_model_loads_with_its_tokenizer(hub):
    model, tokenizer = load("some/name")
    assert model.num_parameters() == tiny_checkpoints.model().num_parameters()
    assert tokenizer("import os") == load_tokenizer("some/name")("import os")


def test_a_hub_repository_without_a_model_is_one_clear_line(hub):
    (hub[0] / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^no model in some/name: it has no config.json$"):
        resolve("some/name")


def test_the_tokenizer_alone(tmp_path):
    path = tiny_checkpoints.write(tmp_path / "model")
    expected = tiny_checkpoints.tokenizer()("import os")["input_ids"]
    (path / "model.safetensors").unlink()  # it needs no weights
    assert load_tokenizer(path)("import os")["input_ids"] == expected
    assert load_tokenizer(tiny_checkpoints.write(tmp_path / "mute", with_tokenizer=False)) is None
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"^cannot read the model in {path}: "):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="the path does not exist"):
        load_tokenizer(tmp_path / "missing" / "model")


@pytest.mark.parametrize("name", [name for name in eckart.__all__ if not name.startswith("_")])
def test_a_verb_is_a_function_although_a_module_may_have_its_name(name):
    """``eckart.models.calibrate`` is the function even after its module has been imported by name."""
    room = importlib.import_module(eckart._LAZY[name])
    assert inspect.isfunction(getattr(eckart, name))
    source = inspect.getmodule(getattr(eckart, name))
    assert importlib.import_module(source.__name__) is source
    assert inspect.isfunction(getattr(room, name))
    assert Path(source.__file__).is_relative_to(Path(room.__file__).parent)
