"""ExPLoRA: what is trained, what stays, and the rows of fused layers, in float64 where it is arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import tiny_models
from eckart import adapt
from eckart.adapters import EckartConfig
from eckart.adapters.explora import ExPLoRA
from eckart.adapters.layer import EckartLayer
from eckart.adapters.site import Site, site_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
NORMS = ("layernorm_before", "layernorm_after")
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
RANK = 4


def vit():
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SIZES, intermediate_size=48)).eval()


def mae():
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**SIZES, intermediate_size=48, decoder_intermediate_size=32, mask_ratio=0.5, **decoder)
    return ViTMAEForPreTraining(config).eval()


def dinov2():
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)).eval()


# How to make a model, the name of its list of blocks and how many, its norms, where q and v are.
MODELS = {
    "vit": (vit, "layers", 3, NORMS, "attention"),
    "classifier": (tiny_models.FAMILIES["vit"], "vit.layers", 2, NORMS, "attention"),
    "mae": (mae, "vit.layers", 3, NORMS, "attention"),
    "dinov2": (dinov2, "encoder.layer", 3, ("norm1", "norm2"), "attention"),
    "llama": (
        tiny_models.FAMILIES["llama"], "model.layers", 2, ("input_layernorm", "post_attention_layernorm"), "self_attn"
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("kind", MODELS)


def explora(model, rank=RANK, **settings):
    return adapt(model, "explora", rank, progress=False, **settings)


def output(model):
    """Last hidden states or logits, without masks that are drawn."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner.main_input_name == "input_ids":
        inputs = {"input_ids": torch.arange(24).reshape(2, 12)}
    else:
        inputs = {"pixel_values": PIXELS}
    if isinstance(inner, ViTMAEForPreTraining):
        inputs["noise"] = torch.linspace(0, 1, 4).expand(4, 4)
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def train(model, steps=3, rate=0.05):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    target = torch.randn(output(model).shape, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        (output(model) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained_in_base(model):
    """Names of the trained parameters as they are in the base, those of factors as the layer and A or B."""
    names = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            names.add(name.replace(".eckart_adapters.default", ""))
    return names


@every_model
def test_trained_are_u_the_norms_and_the_factors_of_queries_and_values(kind):
    build, blocks, count, norms, attention = MODELS[kind]
    base = build()
    for chosen, first in (((-1,), count - 1), ((0,), 0)):
        last = f"{blocks}.{first}."
        expected = {name for name, _ in base.named_parameters() if name.startswith(last)}
        for index in set(range(count)) - {first}:
            block = f"{blocks}.{index}"
            parts = {f"{block}.{norm}": base.get_submodule(f"{block}.{norm}") for norm in norms}
            expected |= {f"{name}.{key}" for name, norm in parts.items() for key, _ in norm.named_parameters()}
            expected |= {f"{block}.{attention}.{p}_proj.{f}" for p in "qv" for f in ("left", "right")}
        model = explora(build(), options={"blocks": chosen})
        assert trained_in_base(model) == expected


@every_model
def test_the_start_is_the_source_and_keys_outputs_and_mlp_stay(kind):
    build, blocks, count, norms, attention = MODELS[kind]
    base = build()
    reference = output(base).detach()
    weights = copy.deepcopy(base.state_dict())
    model = explora(base).eval()
    assert torch.equal(output(model), reference)
    train(model)
    trained = output(model).detach()
    assert not torch.allclose(trained, reference, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model), reference)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, EckartLayer | ModulesToSaveWrapper) for module in merged.modules())
    assert torch.allclose(output(merged), trained, atol=1e-5)
    assert merged.state_dict().keys() == weights.keys()
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, weights[name])}
    adapted = {f"{blocks}.{i}.{attention}.{p}_proj.weight" for i in range(count - 1) for p in "qv"}
    inside_norms = tuple(f"{blocks}.{i}.{norm}." for i in range(count - 1) for norm in norms)
    last = f"{blocks}.{count - 1}."
    assert {name for name in moved if not name.startswith((last, *inside_norms))} == adapted
    assert any(name.startswith(last) for name in moved)
    # Of the last block only what has no gradient by its mathematics may stand still: the bias of keys.
    still = {name for name in weights if name.startswith((last, *inside_norms))} - moved
    assert all(name.endswith("k_proj.bias") for name in still)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_factors_of_one_layer(scale):
    site = Site("layer", "linear", 6, 5)
    adapter = ExPLoRA().build(site, 2, scale)
    weight = torch.zeros(6, 5)
    adapter.initialize(weight, None, torch.Generator().manual_seed(0))
    assert not adapter.left.any()
    assert 0.5 / 5**0.5 < float(adapter.right.detach().abs().max()) <= 1 / 5**0.5
    adapter.left.data.normal_(generator=torch.Generator().manual_seed(1))
    b, a = (factor.detach().double().numpy() for factor in (adapter.left, adapter.right))
    np.testing.assert_allclose(adapter.delta(weight).detach(), scale * b @ a, atol=1e-6)
    assert adapter.num_trainable() == ExPLoRA().trainable(site, 2) == 2 * (6 + 5)


def test_factors_of_a_fused_layer():
    """As two adapters of their own on a weight that is split into queries, keys and values head by head."""
    rows = (((0, 2), (6, 8)), ((4, 6), (10, 12)))
    method, site = ExPLoRA(rows={"qkv": rows}), Site("qkv", "linear", 12, 5)
    adapter = method.build(site, 3, 0.5)
    adapter.initialize(torch.zeros(12, 5), None, torch.Generator().manual_seed(0))
    adapter.left.data.normal_(generator=torch.Generator().manual_seed(1))
    b, a = (factor.detach().double().numpy() for factor in (adapter.left, adapter.right))
    delta = adapter.delta(torch.zeros(12, 5)).detach().numpy()
    np.testing.assert_allclose(delta[[0, 1, 6, 7]], 0.5 * b[:4] @ a[:3], atol=1e-6)
    np.testing.assert_allclose(delta[[4, 5, 10, 11]], 0.5 * b[4:] @ a[3:], atol=1e-6)
    assert not delta[[2, 3, 8, 9]].any()
    assert np.linalg.matrix_rank(delta) == 5  # above 3: the two do not share a factor
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(adapter.update(x).detach(), x.double().numpy() @ delta.T, atol=1e-5)
    assert adapter.num_trainable() == method.trainable(site, 3) == 2 * 3 * (4 + 5)
    assert method.check(Site("qkv", "linear", 11, 5), 3) == "has 11 rows, but the option rows goes up to 12"


@pytest.mark.parametrize(
    ("family", "name", "keys"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", range(32, 64)),
        ("phi3", "model.layers.0.self_attn.qkv_proj", range(32, 48)),
        (
            "gpt_neox",
            "gpt_neox.layers.0.attention.query_key_value",
            [row for row in range(96) if 8 <= row % 24 < 16],
        ),
    ],
)
def test_keys_of_fused_layers_stay(family, name, keys, tmp_path):
    base = tiny_models.FAMILIES[family]()
    weight = base.get_submodule(name).weight.detach().clone()
    model = train(explora(base, alpha=2 * RANK))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, EckartLayer)}
    assert layers.keys() == {name}  # the other block is trained whole
    adapter = layers[name].eckart_adapters["default"]
    others = [row for row in range(adapter.site.out_features) if row not in keys]
    assert adapter.num_trainable() == RANK * (len(others) + 2 * 32)
    expected = output(model).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_models.FAMILIES[family](), tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    merged = model.merge_and_unload()
    assert torch.allclose(output(merged), expected, atol=1e-4)
    change = (merged.get_submodule(name).weight - weight).detach()
    change = change.mT if family == "gpt2" else change
    assert not change[list(keys)].any()
    assert bool(change[others].any(dim=1).all())


def test_a_masked_autoencoder_goes_on_with_its_own_loss():
    model = explora(mae(), modules_to_save=["decoder"])
    names = trained_in_base(model)
    assert {name for name, _ in mae().named_parameters() if name.startswith("decoder.")} == {
        name for name in names if name.startswith("decoder.")
    } | {"decoder.decoder_pos_embed"}  # sines that transformers does not train either
    assert not any("decoder" in name and "left" in name for name in names)
    noise = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(pixel_values=PIXELS, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    plain = model.eval().merge_and_unload()
    with torch.no_grad():
        assert float(plain(pixel_values=PIXELS, noise=noise).loss) < 0.7 * losses[0]


def test_the_count_on_a_vit_l_is_the_papers():
    with torch.device("meta"):
        base = ViTModel(
            ViTConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        )
    config = EckartConfig(method="explora", r=64)
    method = config.build_method()
    method.configure(base, config)
    whole = sum(p.numel() for name in config.modules_to_save for p in base.get_submodule(name).parameters())
    sites = {name: site_of(name, base.get_submodule(name)) for name in config.target_modules}
    factors = method.total_trainable(sites, dict.fromkeys(sites, 64))
    assert len(sites) == 2 * 23
    assert factors == 23 * 2 * 64 * (1024 + 1024)
    block = 12 * 1024**2 + 13 * 1024  # four square maps, an MLP of twice four, their biases, two norms
    assert whole == block + 23 * 2 * 2 * 1024
    assert whole + factors == pytest.approx(18.7e6, rel=2e-3)


def test_a_mean_teacher_averages_the_trained_parameters():
    student = train(explora(vit()))
    teacher = copy.deepcopy(student)
    starts = {name: p.detach().double() for name, p in teacher.named_parameters()}
    train(student)
    with torch.no_grad():
        for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
            mean.lerp_(new, 0.25)
    for (name, mean), new in zip(teacher.named_parameters(), student.parameters(), strict=True):
        if not new.requires_grad:
            assert torch.equal(mean, new)
        np.testing.assert_allclose(mean.detach(), 0.75 * starts[name] + 0.25 * new.detach().double(), atol=1e-6)
    adapters = [
        module.eckart_adapters["default"]
        for one in (student, teacher)
        for module in one.modules()
        if isinstance(module, EckartLayer)
    ]
    assert len({id(adapter) for adapter in adapters}) == 8
    merged = copy.deepcopy(teacher).merge_and_unload()
    assert torch.allclose(output(teacher), output(merged), atol=1e-5)
    assert not torch.allclose(output(teacher), output(student), atol=1e-4)


def test_what_the_user_trains_whole_is_added_to():
    model = explora(tiny_models.FAMILIES["vit"](), modules_to_save=["classifier"])
    saved = model.peft_config["default"].modules_to_save
    assert saved[0] == "classifier"
    assert "vit.layers.1" in saved
    assert {"classifier.weight", "classifier.bias"} <= trained_in_base(model)
    # A block that the user names is trained whole too and has no factors, but it counts.
    config = EckartConfig(method="explora", modules_to_save=["layers.0"], options={"blocks": [1]})
    config.build_method().configure(vit(), config)
    assert config.modules_to_save[:2] == ["layers.0", "layers.1"]
    assert config.target_modules == {f"layers.2.attention.{p}_proj" for p in "qv"}
    model = explora(vit(), modules_to_save=["layers.0"])
    assert {name for name, m in model.get_base_model().named_modules() if isinstance(m, EckartLayer)} == {
        f"layers.1.attention.{p}_proj" for p in "qv"
    }
    assert {name for name, _ in vit().named_parameters() if name.startswith("layers.0.")} <= trained_in_base(model)


def test_a_model_inside_a_module_and_layers_that_the_user_chose():
    def classifier():
        return nn.ModuleDict({"encoder": tiny_models.FAMILIES["bert"]()})

    config = EckartConfig(method="explora")
    config.build_method().configure(classifier(), config)
    place = "encoder.bert.encoder.layer.0.attention.self"
    assert config.target_modules == {f"{place}.query", f"{place}.value"}
    assert config.modules_to_save[0] == "encoder.bert.encoder.layer.1"
    model = explora(tiny_models.FAMILIES["llama"](), where="*.o_proj")
    layers = [name for name, m in model.get_base_model().named_modules() if isinstance(m, EckartLayer)]
    assert layers == ["model.layers.0.self_attn.o_proj"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"found no queries and values in layers; name those to adapt with target_mod"):
        explora(encoder)
    last = {name for name, _ in encoder.named_parameters() if name.startswith("layers.2.")}
    norms = {f"layers.{i}.{norm}.{key}" for i in range(2) for norm in ("norm1", "norm2") for key in ("weight", "bias")}
    factors = {f"layers.{i}.linear1.{key}" for i in range(2) for key in ("left", "right")}
    assert trained_in_base(explora(encoder, target_modules=["linear1"], rank=2)) == last | norms | factors


def test_no_block_or_several():
    names = trained_in_base(explora(vit(), options={"blocks": ()}))
    assert {name.split(".")[2] for name in names} == {"attention", *NORMS}
    model = explora(vit(), options={"blocks": (0, -1)})
    assert [name for name in model.peft_config["default"].modules_to_save if name.count(".") == 1] == [
        "layers.0",
        "layers.2",
    ]
    t5 = explora(tiny_models.FAMILIES["t5"]())
    saved = t5.peft_config["default"].modules_to_save
    assert {"encoder.block.1", "decoder.block.1"} <= set(saved)
    cross = {name for name in trained_in_base(t5) if "EncDecAttention" in name and name.startswith("decoder.block.0")}
    assert cross == {f"decoder.block.0.layer.1.EncDecAttention.{p}.{f}" for p in "qv" for f in ("left", "right")}


def refused(model, message, **settings):
    """It is, before anything is changed."""
    before = {name: id(module) for name, module in model.named_modules()}
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        explora(model, **settings)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == grads


def test_what_is_refused():
    refused(vit(), r"blocks=\(3,\): layers has 3 blocks, counted from 0", options={"blocks": (3,)})
    refused(vit(), r"blocks=\(0, 1, 2\) of ViTModel: explora finds none left", options={"blocks": (0, 1, 2)})
    refused(nn.Sequential(nn.Linear(4, 4)), r"blocks=\(-1,\) of Sequential: explora finds none")
    refused(vit(), r"layers\.2\.mlp, a part of a block that explora trains whole", modules_to_save=["mlp"])
    with torch.device("meta"):
        meta = GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2))
    refused(meta, r"h\.0\.attn\.c_attn uses the same rows for keys and for queries or values")
    packed = vit()
    packed.layers[2].mlp.fc1.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    refused(packed, r"cannot train layers\.2 whole: mlp\.fc1\.weight is quantized", where="*.q_proj")
    for blocks in (-1, "-1", (0.5,), (True,)):
        with pytest.raises(ValueError, match=r"blocks must be indices of blocks, such as \(-1,\)"):
            ExPLoRA(blocks=blocks)
    assert ExPLoRA(blocks=[0, -1]).blocks == [0, -1]  # as a file has it


def test_names_that_peft_could_not_tell_apart():
    model = nn.ModuleDict({"layers": vit().layers, "more_layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])})
    refused(model, r"more_layers\.2 ends like a module", target_modules=["q_proj"])


def test_further_adapters_on_the_model():
    model = explora(vit())
    train(model)
    first = output(model).detach()
    explora(model, adapter_name="second", rank=2)
    assert not torch.equal(output(model.eval()), first)
    for chosen, message in (((0,), "cannot train layers.0 whole"), ((), "cannot adapt layers.2: another adapter")):
        with pytest.raises(ValueError, match=message):
            explora(model, adapter_name="third", options={"blocks": chosen})
    model.set_adapter("default")
    assert torch.equal(output(model), first)
    other = adapt(vit(), "pissa", 2, progress=False)
    with pytest.raises(ValueError, match=r"cannot train layers\.2 whole: it has adapters of another kind on it"):
        explora(other, adapter_name="second")


def test_half_precision_is_warned_of():
    with pytest.warns(UserWarning, match=r"trains whole is stored as torch\.bfloat16, which loses small steps"):
        explora(vit().to(torch.bfloat16))
