"""The tuner: what it refuses, what it leaves alone, and that it is a PEFT tuner like any other."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import tiny_models
from eckart import adapt, compress
from eckart.adapters import EckartConfig
from eckart.adapters.contract import Adapter
from eckart.adapters.layer import EckartLayer
from eckart.catalog import UnknownMethodError

IDS = torch.arange(24).reshape(2, 12) % 60


def base() -> nn.Module:
    return tiny_models.FAMILIES["llama"]().eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def untouched(model: nn.Module) -> bool:
    return not any(isinstance(module, EckartLayer) for module in model.modules())


def test_the_default_is_every_linear_map_of_the_blocks():
    model = adapt(base(), rank=2, progress=False)
    names = {name for name, module in model.named_modules() if isinstance(module, EckartLayer)}
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"where": "*.q_proj"}, {"q_proj"}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"target_modules": r".*\.(up|down)_proj"}, {"up_proj", "down_proj"}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"q_proj"}),
    ],
)
def test_layers_are_chosen_in_our_words_or_in_pefts(settings, expected):
    model = adapt(base(), rank=2, progress=False, **settings)
    layers = [name for name, module in model.named_modules() if isinstance(module, EckartLayer)]
    assert {name.rpartition(".")[2] for name in layers} == expected


def test_single_blocks_and_ranks_of_single_layers():
    pattern = {"model.layers.0.self_attn.q_proj": 1}
    model = adapt(
        base(), rank=3, target_modules=["q_proj"], layers_to_transform=[0], rank_pattern=pattern, progress=False
    )
    ((_, layer),) = [(name, m) for name, m in model.named_modules() if isinstance(m, EckartLayer)]
    assert layer.eckart_adapters["default"].rank == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "pisa"}, UnknownMethodError, "unknown method 'pisa'; did you mean pissa"),
        ({"method": "svd-llm"}, UnknownMethodError, "'svd-llm' belongs to compression, not to adapters"),
        ({"rank": 0}, ValueError, "r must be at least 1, not 0"),
        ({"options": {"sover": "exact"}}, ValueError, "'pissa' has no option sover; it has: solver"),
        ({"target_modules": ["q_prj"]}, ValueError, r"target_modules=\{'q_prj'\} matches no layer; nearest: .*q_proj"),
        ({"where": "*.q_prj"}, ValueError, "matches no layer; nearest: .*q_proj"),
        ({"where": "*.q_proj", "target_modules": ["q_proj"]}, ValueError, "either where or target_modules, not both"),
        ({"target_modules": ["input_layernorm"]}, ValueError, "has no weight that can be adapted; exclude it"),
        ({"bias": "all"}, ValueError, "bias must be 'none'"),
        ({"format_version": 99}, ValueError, "format version 99, this Eckart reads up to 1; upgrade"),
    ],
)
def test_a_bad_request_is_one_line_and_changes_nothing(arguments, error, message):
    model = base()
    expected = logits(model)
    with pytest.raises(error, match=message) as caught:
        adapt(model, **{"method": "pissa", "rank": 2, "progress": False, **arguments})
    assert "\n" not in str(caught.value)
    assert untouched(model)
    assert torch.equal(logits(model), expected)


def test_nan_in_a_weight_names_the_layer_and_changes_nothing():
    model = base()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj has NaN or Inf in its weight"):
        adapt(model, rank=2, progress=False)
    assert untouched(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_that_cannot_be_made_leaves_the_first(tmp_path):
    model = adapt(base(), rank=2, progress=False)
    expected = logits(model)
    with pytest.raises(ValueError, match="matches no layer"):
        adapt(model, rank=2, adapter_name="two", target_modules=["nothing"], progress=False)
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits(model), expected)


def test_another_base_is_refused(tmp_path):
    adapt(base(), rank=2, progress=False).save_pretrained(tmp_path)
    other = base()
    other.model.layers[1].mlp.up_proj.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    message = r"the adapter was made for another base model: the weight of .*layers\.1\.mlp\.up_proj has norm"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    # Rounding the base is not another base.
    PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    adapt(base(), rank=2, progress=False).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state[next(key for key in state if key.endswith(".left"))]
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the adapter file has no tensor .*\.left; it is damaged"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_the_saved_configuration_is_plain_json(tmp_path):
    adapt(base(), rank=2, options={"solver": "exact"}, task_type="CAUSAL_LM", progress=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["method"], saved["r"]) == ("ECKART", "pissa", 2)
    assert saved["options"] == {"solver": "exact"}
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, EckartConfig)
    assert config.initialized


def test_a_compressed_base_is_adapted_like_any():
    model = base()
    compress(model, "svd", ratio=0.3, progress=False)
    expected = logits(model)
    adapted = adapt(model, rank=2, progress=False)
    # The start is exact but for one float32 rounding of the two products.
    assert torch.allclose(logits(adapted), expected, atol=1e-5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01)
    assert not torch.allclose(logits(adapted), expected, atol=1e-3)
    with pytest.raises(ValueError, match="is a LowRank, which cannot hold a merged weight"):
        adapted.merge_adapter()
    assert torch.equal(logits(adapted.unload()), expected)


def test_merging_what_is_not_finite_changes_nothing():
    model = adapt(base(), rank=2, where="*.q_proj", progress=False)
    layers = [module for module in model.modules() if isinstance(module, EckartLayer)]
    weights = [layer.get_base_layer().weight.clone() for layer in layers]
    layers[0].eckart_adapters["default"].left.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="gives NaN or Inf; nothing was changed"):
        model.merge_adapter(safe_merge=True)
    assert all(
        torch.equal(layer.get_base_layer().weight, weight) for layer, weight in zip(layers, weights, strict=True)
    )


class _Counted(Adapter):
    """Adds nothing, has a penalty of one, and counts its steps."""

    def __init__(self, site, rank):
        super().__init__(site, rank)
        self.parameter("unit", 1)
        self.steps = []

    def update(self, x):
        return self.unit * torch.zeros(*x.shape[:-1], self.site.out_features)

    def delta(self, weight):
        return torch.zeros_like(weight)

    def initialize(self, weight, statistics, generator):
        self.fill(unit=torch.ones(1))

    def penalty(self):
        return self.unit.sum()

    def on_step(self, step, total):
        self.steps.append((step, total))


def counted(model: PeftModel) -> list[_Counted]:
    """Puts a counting adapter on every adapted layer."""
    found = []
    for layer in model.modules():
        if isinstance(layer, EckartLayer):
            adapter = _Counted(layer.site, 1)
            adapter.initialize(torch.zeros(1), None, torch.Generator())
            layer.eckart_adapters["default"] = adapter
            found.append(adapter)
    return found


def test_penalties_are_added_to_the_loss_while_training_only():
    model = adapt(base(), rank=1, where="*.q_proj", progress=False)
    adapters = counted(model)
    model.eval()
    plain = float(model(input_ids=IDS, labels=IDS).loss)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    assert float(loss) == pytest.approx(plain + len(adapters), rel=1e-6)
    loss.backward()
    assert all(float(adapter.unit.grad) == 1 for adapter in adapters)
    assert float(model.base_model.penalty()) == len(adapters)
    with torch.no_grad():
        assert float(model(input_ids=IDS, labels=IDS).loss) == pytest.approx(plain, rel=1e-6)
    with model.disable_adapter():
        assert model.base_model.penalty() is None


def test_accumulated_penalties_are_those_of_one_big_batch():
    model = adapt(base(), rank=1, where="*.q_proj", progress=False)
    adapters = counted(model)
    model.train()
    labels = IDS.clone()
    labels[0, :7] = -100
    items = labels.ne(-100).sum()
    for row in range(2):
        model(input_ids=IDS[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=items).loss.backward()
    assert all(float(adapter.unit.grad) == pytest.approx(1, rel=1e-6) for adapter in adapters)


def test_the_trainer_drives_the_schedule(tmp_path):
    from transformers import Trainer, TrainingArguments

    from eckart.adapters.callback import EckartCallback

    model = adapt(base(), rank=1, where="*.q_proj", progress=False, task_type="CAUSAL_LM")
    adapters = counted(model)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[EckartCallback()]).train()
    assert {tuple(adapter.steps) for adapter in adapters} == {((1, 3), (2, 3), (3, 3))}


def test_generation_works_through_an_adapter():
    model = adapt(base(), rank=2, progress=False, task_type="CAUSAL_LM").eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mine = model.generate(input_ids=IDS[:, :5], **options)
    theirs = base().generate(input_ids=IDS[:, :5], **options)
    assert torch.equal(mine, theirs)


def test_a_head_can_be_trained_beside_it(tmp_path):
    model = adapt(base(), rank=2, where="*.q_proj", modules_to_save=["lm_head"], progress=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_get_peft_model_alone_is_enough():
    model = get_peft_model(base(), EckartConfig(method="pissa", r=2, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] > 0


def test_layers_to_transform_counts_blocks_where_no_targets_are_named():
    model = adapt(base(), "pissa", rank=2, layers_to_transform=[1], progress=False)
    names = [name for name, module in model.named_modules() if isinstance(module, EckartLayer)]
    assert names
    assert all(".layers.1." in name for name in names)
    with pytest.raises(ValueError, match="layers_to_transform=7 is none of the 2 blocks"):
        adapt(base(), "pissa", rank=2, layers_to_transform=7, progress=False)
