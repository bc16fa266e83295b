"""``eckart generate``: what transformers would generate, streamed or as JSON."""

from __future__ import annotations

import io

import pytest
import torch

import tiny_checkpoints
from eckart.models import load


def _expected(path, prompt: str, tokens: int) -> str:
    model, tokenizer = load(path)
    batch = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("which", ["tiny", "compressed"])
def test_the_text_is_that_of_transformers(which, request, run, run_json):
    path = request.getfixturevalue(which)
    expected = _expected(path, "import os", 8)
    found = run_json("generate", path, "import os", "--max-tokens", 8)
    assert (found["prompt"], found["text"]) == ("import os", expected)
    assert 0 < found["tokens"] <= 8
    assert found["seconds"] > 0
    code, out, err = run("generate", path, "import os", "--max-tokens", 8)
    assert code == 0
    assert out.rstrip("\n") == f"import os{expected}"
    assert err.startswith(f"[{found['tokens']} tokens, ")


def test_the_prompt_may_come_from_standard_input(tiny, run_json, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("import os"))
    assert run_json("generate", tiny, "-", "--max-tokens", 8)["text"] == _expected(tiny, "import os", 8)


def test_sampling_follows_the_seed_and_touches_no_other_generator(tiny, run_json):
    def sample(seed):
        args = ("--max-tokens", 20, "--temperature", 1.5, "--seed", seed)
        return run_json("generate", tiny, "import os", *args)["text"]

    state = torch.get_rng_state()
    one, two, again = sample(1), sample(2), sample(1)
    assert one == again != two
    assert torch.equal(torch.get_rng_state(), state)


def test_chat_uses_the_template(tmp_path, refused, run_json, run):
    source = tiny_checkpoints.write(tmp_path / "model")
    refused("generate", source, "Hello", "--chat", message=f"{source} has no chat template; leave out --chat")
    (source / "chat_template.jinja").write_text(tiny_checkpoints.CHAT_TEMPLATE)
    found = run_json("generate", source, "Hello", "--chat", "--max-tokens", 8)
    assert found["text"] == _expected(source, "<user> Hello <assistant>", 8)
    assert "<user>" not in run("generate", source, "Hello", "--chat", "--max-tokens", 8)[1]


def test_an_encoder_decoder_answers(tmp_path, run_json, run):
    made = tiny_checkpoints.family("t5", vocab_size=tiny_checkpoints.VOCABULARY)
    source = tiny_checkpoints.write(tmp_path / "t5", made)
    found = run_json("generate", source, "import os", "--max-tokens", 5)
    assert run("generate", source, "import os", "--max-tokens", 5)[1].strip() == found["text"].strip()


def test_the_context_is_not_exceeded(tiny, run_json, refused):
    prompt = "import os " * 30
    given = len(load(tiny)[1](prompt)["input_ids"])
    found = run_json("generate", tiny, prompt, "--max-tokens", 500)
    assert 0 < found["tokens"] <= tiny_checkpoints.CONTEXT - given
    refused("generate", tiny, prompt * 2, message="the model's context 256; shorten it")


def test_bad_requests(tiny, mute, tmp_path, refused):
    refused("generate", tmp_path / "missing", "x", message="the path does not exist")
    refused("generate", tiny, " ", message="the prompt is empty; give some text to continue")
    refused("generate", mute, "x", message=f"{mute} has no tokenizer; add its tokenizer files")
    refused("generate", tiny, message="Missing argument", code=2)
    refused("generate", tiny, "x", "--device", "cuda:99", message="--device cuda:99 is of no use here")
    vit = tiny_checkpoints.write(tmp_path / "vit", tiny_checkpoints.family("vit"), with_tokenizer=False)
    refused("generate", vit, "x", message="ViTForImageClassification cannot generate text")
    model = tiny_checkpoints.model()
    model.model.norm.weight.data[0] = float("nan")
    damaged = tiny_checkpoints.write(tmp_path / "damaged", model)
    refused("generate", damaged, "x", "--temperature", 1, message="model.norm.weight has NaN or Inf in it")
