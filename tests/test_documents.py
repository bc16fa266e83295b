"""What the documents tell people to type works: every Python example and every ``eckart`` command in them is run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

import tiny_checkpoints
import tiny_models
from eckart.cli.main import COMMANDS, main
from eckart.models import load_tokenizer, save
from eckart.structures import LowRank

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory to work in, with the files that the documents speak of; ``demo`` is a tiny model here."""
    level = transformers.utils.logging.get_verbosity()
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    demo = tiny_checkpoints.write(
        tmp_path / "cache" / "SmolLM2-135M-Instruct", tiny_checkpoints.model(max_position_embeddings=1024)
    )
    assert load_tokenizer("demo").name_or_path == str(demo)
    monkeypatch.chdir(tmp_path)
    text = "Some text of the kind that the model will meet. " * 1000
    Path("text.txt").write_text(text)
    Path("rows.jsonl").write_text(json.dumps({"body": text}))
    yield tmp_path
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if _blocks(path, "python")], ids=lambda path: path.name)
def test_python_examples_run_one_after_the_other(path, elsewhere):
    names: dict[str, object] = {}
    for number, block in enumerate(_blocks(path, "python")):
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if _blocks(path, "sh")], ids=lambda path: path.name)
def test_commands_run_one_after_the_other(path, elsewhere, capsys):
    lines = "".join(_blocks(path, "sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("eckart ")]
    assert commands
    for _, *args in commands:
        assert main(args) == 0, (args, capsys.readouterr().err)


def test_every_option_that_is_named_exists(capsys):
    """Options in running text too, such as `--stream`."""
    known = set()
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        known |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
    others = {"--debug", "--no-deps"}  # of `eckart` itself, and of pip
    for path in DOCUMENTS:
        code = " ".join(re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) <= known | others, path.name


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize(("form", "side"), [("plain", None), ("pivoted", "rows"), ("pivoted", "columns")])
def test_the_format_is_as_described(shape, form, side):
    """The decoder in docs/format.md, applied to what a layer stores, gives the layer's matrix."""
    names: dict = {}
    exec(_blocks(ROOT / "docs" / "format.md", "python")[0], names)
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    up, down = torch.randn(m, 3, generator=generator), torch.randn(3, n, generator=generator)
    layer = LowRank.from_factors(up, down, form=form, side=side)
    found = names["dense"](layer.spec(), layer.state_dict())
    torch.testing.assert_close(found, up @ down, rtol=1e-4, atol=1e-5)  # float32, three terms


def test_the_described_config_is_the_written_one(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    path = save(model, tmp_path / "model", history=[{"verb": "compress"}])
    written = json.loads((path / "config.json").read_text())["quantization_config"]
    described = json.loads("{" + _blocks(ROOT / "docs" / "format.md", "json")[0] + "}")["quantization_config"]
    assert written.keys() == described.keys()
    assert (written["quant_method"], written["version"]) == (described["quant_method"], described["version"])
    [spec] = described["modules"].values()
    assert spec.keys() == written["modules"]["model.layers.0.mlp.down_proj"].keys()
