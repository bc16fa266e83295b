"""A plain ``from_pretrained`` finds the structures whatever was imported first, and ``import eckart`` stays light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import tiny_models
from eckart.models import save

LOAD = """
import sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "LowRank", model
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(8)[None]).logits, sys.argv[2])
assert not any(getattr(finder, "module", "") == "transformers.quantizers.auto" for finder in sys.meta_path)
"""
TABLE = """
import sys
import transformers.quantizers.auto as table
assert table.AutoHfQuantizer.supports_quant_method({"quant_method": "eckart"})
assert "eckart" in table.AUTO_QUANTIZER_MAPPING
assert not any(getattr(finder, "module", "") == "transformers.quantizers.auto" for finder in sys.meta_path)
"""
ECKART = "import eckart"
TRANSFORMERS = "from transformers import AutoModelForCausalLM"
ORDERS = {  # these load a model
    "eckart first": [ECKART, TRANSFORMERS],
    "transformers first": [TRANSFORMERS, ECKART],
    "models first": ["import eckart.models.quantizer", TRANSFORMERS],
    "threads": [
        "from concurrent.futures import ThreadPoolExecutor",
        "import importlib",
        # Only one of them imports transformers: two threads in its circular imports fail now and then without Eckart.
        "names = ['transformers.quantizers.auto', 'eckart']",
        "jobs = [ThreadPoolExecutor(1).submit(importlib.import_module, name) for name in names]",
        "[job.result() for job in jobs]",
        TRANSFORMERS,
    ],
}
VARIANTS = {  # these only look at the table of transformers
    "table first": ["import transformers.quantizers.auto", ECKART],
    "installed again and reloaded": [
        "import importlib",
        ECKART,
        "eckart._hooks.install()",
        "importlib.reload(eckart._hooks).install()",
        "importlib.reload(eckart)",
        "import transformers.quantizers.auto",
        "eckart._hooks.install()",
    ],
    "asked for and not imported, then untouched": [
        ECKART,
        "import importlib.util, inspect, sys",
        "assert importlib.util.find_spec('transformers.quantizers.auto').name == 'transformers.quantizers.auto'",
        "import transformers.quantizers.auto as table",
        "assert type(table.__loader__).__module__ == '_frozen_importlib_external', table.__loader__",
        "assert table.__spec__.loader is table.__loader__",
        "assert 'def register_quantizer' in inspect.getsource(table)",
        "assert 'eckart.models' not in sys.modules",  # importing transformers costs nothing more
    ],
    "import error": [
        ECKART,
        "import sys, contextlib",
        "sys.modules['transformers.quantizers.base'] = None",
        "with contextlib.suppress(ImportError):",
        "    import transformers.quantizers.auto",
        "    raise AssertionError('it was imported')",
        "del sys.modules['transformers.quantizers.base']",
    ],
}
WITHOUT = ["import sys; sys.modules['eckart'] = None", TRANSFORMERS]

# Every case needs an interpreter that has imported neither of the two packages. What they import besides takes most of
# the time, so one process imports that once and forks for each case.
FRESH = """
import json, os, sys, traceback
import accelerate, huggingface_hub, numpy, safetensors.torch, scipy.optimize
import torch, torch._dynamo, torch.distributed.fsdp
assert not {"transformers", "eckart"} & set(sys.modules), "the cases would not be fresh"
failed, running = [], {}
cases = json.load(sys.stdin)
while cases or running:
    if cases and len(running) < 2:
        name, code, arguments = cases.pop()
        child = os.fork()
        if child:
            running[child] = name
            continue
        sys.argv[1:] = arguments
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    child, status = os.wait()
    name = running.pop(child)
    if status:
        failed.append(name)
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    path = save(model, tmp_path_factory.mktemp("hook") / "model")
    with torch.no_grad():
        return path, model(input_ids=torch.arange(8)[None]).logits


def test_every_order_of_importing(checkpoint, tmp_path):
    path, expected = checkpoint
    cases = [[name, "\n".join([*lines, TABLE]), []] for name, lines in VARIANTS.items()]
    cases += [
        [name, "\n".join([*lines, LOAD, TABLE]), [str(path), str(tmp_path / f"{name}.pt")]]
        for name, lines in (ORDERS | {"without": WITHOUT}).items()
    ]
    run = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    # Without Eckart the checkpoint is not understood, so the other cases do show something.
    assert json.loads(run.stdout.splitlines()[-1]) == ["without"], run.stderr[-8000:]
    assert "Unknown quantization type, got eckart" in run.stderr
    for name in ORDERS:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected), name


PEFT = """
import sys
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["ECKART"].__name__ == "EckartConfig"
assert PEFT_TYPE_TO_TUNER_MAPPING["ECKART"].__name__ == "EckartModel"
assert not any(getattr(finder, "module", "") == "peft" for finder in sys.meta_path)
"""


@pytest.mark.parametrize("first", [[ECKART, "import peft"], ["import peft", ECKART], ["import eckart.adapters"]])
def test_peft_knows_the_adapters_whatever_was_imported_first(first):
    subprocess.run([sys.executable, "-c", "\n".join([*first, PEFT])], check=True)


def test_import_eckart_imports_neither_torch_nor_transformers():
    code = "import eckart, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
