"""``eckart export``: a dense checkpoint for tools that do not know Eckart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import tiny_checkpoints
from eckart.models import load


def test_the_dense_checkpoint_loads_without_eckart(compressed, tmp_path, run):
    out = tmp_path / "dense"
    code, printed, err = run("export", compressed, "--out", out)
    assert (code, err) == (0, "")
    assert printed.startswith(f"wrote {out}: ")
    model, tokenizer = load(compressed)
    ids = torch.arange(3, 30)[None]
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(out)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
print(len(AutoTokenizer.from_pretrained({str(out)!r})), "eckart" in sys.modules)
"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout == f"{len(tokenizer)} False\n"


def test_json_and_force(compressed, tmp_path, run_json, refused):
    out = tmp_path / "dense"
    found = run_json("export", compressed, "--out", out)
    assert found["out"] == str(out)
    assert found["bytes_on_disk"] == (out / "model.safetensors").stat().st_size
    refused("export", compressed, "--out", out, message=f"{out} exists already; choose another path")
    assert run_json("export", compressed, "--out", out, "--force") == found


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_and_damages_nothing(compressed, tmp_path, refused, monkeypatch, force):
    out = tmp_path / "dense"
    if force:
        tiny_checkpoints.write(out)

    def save_file(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)
    message = f"cannot write {out}: Error while serializing: I/O error: No space left on device"
    refused("export", compressed, "--out", out, *(["--force"] if force else []), message=message)


def test_bad_requests(compressed, tmp_path, refused):
    refused("export", tmp_path / "missing", "--out", tmp_path / "x", message="the path does not exist")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x"
    refused("export", compressed, "--out", out, message=f"cannot write {out}: {tmp_path / 'file'} is a file")
    refused("export", compressed, message="Missing option '--out'", code=2)
