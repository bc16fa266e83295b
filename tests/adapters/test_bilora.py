"""BiLoRA: the start, the three mixtures, two levels that leave each other alone, and the data each of them sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tiny_checkpoints
import tiny_models
from eckart import adapt
from eckart.adapters.adalora import AdaLoRA
from eckart.adapters.bilevel import hypergradient, split_indices
from eckart.adapters.bilora import BiLoRA
from eckart.adapters.site import Site
from eckart.adapters.train import train
from eckart.models import load_tokenizer
from eckart.models.training import Schedule
from every_kind import every_kind

IDS = torch.arange(24).reshape(2, 12) % 60
SITE = Site("layer", "linear", 12, 10)
MIXTURES = ["softmax", "sigmoid", "real"]


def made(mixture: str = "softmax", scale: float = 0.5, rank: int = 3):
    adapter = BiLoRA(mixture=mixture).build(SITE, rank, scale)
    adapter.initialize(torch.zeros(12, 10), None, torch.Generator().manual_seed(0))
    return adapter


def moved(adapter: nn.Module, size: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


def weights_of(theta: np.ndarray, mixture: str) -> np.ndarray:
    if mixture == "softmax":
        return np.exp(theta) / np.exp(theta).sum()
    return 1 / (1 + np.exp(-theta)) if mixture == "sigmoid" else theta


def model(**options):
    return adapt(tiny_models.FAMILIES["llama"](), "bilora", rank=4, progress=False, options=options).train()


def values(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_update_is_the_product_without_its_start(mixture):
    adapter, base = made(mixture), nn.Linear(10, 12)
    assert adapter.num_trainable() == BiLoRA().trainable(SITE, 3) == 3 * (12 + 10 + 1)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(adapter(x, base), base(x), atol=1e-7)

    def product():
        p, theta, q = (part.detach().double().numpy() for part in (adapter.left, adapter.core, adapter.right))
        return (p * weights_of(theta, mixture)) @ q

    start = product()
    assert np.abs(start).max() > 1e-5  # or there would be nothing to take off
    moved(adapter)
    delta = 0.5 * (product() - start)
    expected = base(x).detach().double().numpy() + x.double().numpy() @ delta.T
    assert np.abs(adapter(x, base).detach().numpy() - expected).max() < 1e-5
    assert np.abs(adapter.delta(torch.zeros(1)).detach().numpy() - delta).max() < 1e-5


@pytest.mark.parametrize(("mixture", "start"), [("softmax", 1 / 3), ("sigmoid", 1 / 2), ("real", 1 / 3)])
def test_the_weights_start_equal(mixture, start):
    theta = made(mixture).core.detach().double().numpy()
    assert np.allclose(weights_of(theta, mixture), start)


def test_softmax_weights_are_positive_and_sum_to_one():
    adapter = moved(made("softmax", scale=1.0), size=3.0)
    _, _, both = adapter._operands()
    for weights in both.detach().split(3):  # of now, and of the start
        assert float(weights.min()) > 0
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert not torch.allclose(both[:3], both[3:], atol=0.05)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_convolutions_and_embeddings(mixture):
    for adapter in every_kind(BiLoRA(mixture=mixture), 0.5):
        moved(adapter)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("lower_steps", "upper_steps"), [(1, 1), (2, 3)])
def test_a_level_does_not_move_while_the_other_learns(set_to_none, lower_steps, upper_steps):
    adapted = model(lower_steps=lower_steps, upper_steps=upper_steps)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(10):
        before = values(adapted)
        for _ in range(2):  # micro-batches
            adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        adapted.base_model.on_step(step + 1, 10)
        optimizer.zero_grad(set_to_none=set_to_none)
        lower = step % (lower_steps + upper_steps) < lower_steps
        for name, after in values(adapted).items():
            assert torch.equal(after, before[name]) is (name.endswith("core") is lower), (step, name)


def test_a_step_is_one_of_the_joint_training_on_half_of_the_tensors():
    adapted = model(orthogonality=0.0)
    moved_values = values(moved(adapted, 0.0))
    coordinator = adapted.base_model.coordinators()["default"]
    for adapter in coordinator.members:
        moved(adapter, 0.1)
    adapted.eval()  # nothing is held still, and the model has no dropout
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    joint = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert joint.keys() == moved_values.keys()
    adapted.train()
    for step, level in ((0, "lower"), (1, "upper")):
        coordinator.state["step"] = torch.tensor(step)
        adapted.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and name.endswith("core") is (level == "upper"):
                assert torch.allclose(parameter.grad, joint[name], rtol=1e-4, atol=1e-7), name
            elif parameter.requires_grad:
                assert parameter.grad is None


def test_the_penalty_of_the_lower_level_is_that_of_adalora():
    adapted = model(orthogonality=0.3)
    coordinator = adapted.base_model.coordinators()["default"]
    twins = {}
    for name, adapter in coordinator.adapters.items():
        moved(adapter, 0.5)
        twins[name] = AdaLoRA().build(adapter.site, 4, 1.0)
        twins[name].set_factors(left=adapter.left.data, core=torch.zeros(4), right=adapter.right.data)
    theirs = AdaLoRA(orthogonality=0.3).coordinate(twins, 0).penalty()
    with torch.no_grad():
        bare = adapted.eval()(input_ids=IDS, labels=IDS).loss
    adapted.train()
    losses = []
    for step in (0, 1):
        coordinator.state["step"] = torch.tensor(step)
        losses.append(adapted(input_ids=IDS, labels=IDS).loss.detach())
    assert torch.allclose(losses[0] - bare, theirs.detach(), rtol=1e-4)
    assert torch.allclose(losses[1], bare)


def test_the_penalty_of_nearly_binary_weights():
    method = BiLoRA(mixture="sigmoid", entropy=0.7)
    adapters = {name: moved(made("sigmoid"), size) for name, size in (("a", 1.0), ("b", 4.0))}
    coordinator = method.coordinate(adapters, 0)
    coordinator.state["step"] = torch.tensor(1)
    coordinator.before_forward({}, training=True)
    means = []
    for adapter in adapters.values():
        p = weights_of(adapter.core.detach().double().numpy(), "sigmoid")
        means.append(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())
    assert float(coordinator.penalty().detach()) == pytest.approx(0.7 * np.mean(means), rel=1e-5)
    assert means[1] < means[0]  # nearer to 0 and 1
    coordinator.penalty().backward()
    assert all(a.left.grad is None and a.right.grad is None for a in adapters.values())
    coordinator.state["step"] = torch.tensor(0)
    coordinator.before_forward({}, training=True)
    coordinator.penalty().backward()
    assert all(a.core.grad is None for a in adapters.values())


def test_no_penalty_without_weights_for_it():
    coordinator = BiLoRA(orthogonality=0.0).coordinate({"layer": made()}, 0)
    assert coordinator.penalty() is None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_checkpoints.write(tmp_path_factory.mktemp("tiny") / "model"))


def examples(count: int) -> list[dict[str, list[int]]]:
    """Each begins with its number."""
    rows = [[10 + index, *range(20, 26)] for index in range(count)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]


def test_the_command_gives_each_level_its_own_examples(tokenizer, tmp_path):
    adapted = model(lower_steps=2, upper_steps=1)
    coordinator = adapted.base_model.coordinators()["default"]
    seen: list[tuple[str, int]] = []

    def note(module, args, kwargs):
        if module.training:
            step = int(coordinator.state["step"])
            seen.extend((step, int(first) - 10) for first in kwargs["input_ids"][:, 0])

    adapted.base_model.model.model.register_forward_pre_hook(note, with_kwargs=True)
    schedule = Schedule(epochs=1.5, batch_size=2, accumulation=2, seed=7)
    done = train(adapted, tokenizer, examples(20), tmp_path, schedule, progress=False)
    assert done.steps == 8  # 1.5 times the five steps that 20 examples take
    assert len(seen) == 8 * 4
    lower, upper = split_indices(20, 0.8, seed=7)
    for step, example in seen:
        assert example in (lower if step % 3 < 2 else upper), (step, example)
    assert {example for step, example in seen if step % 3 == 2} == set(upper)
    assert BiLoRA().training_order(20, 4, 8, 7) is not None
    assert AdaLoRA().training_order(20, 4, 8, 7) is None


def test_a_run_that_is_resumed_is_the_same(tokenizer, tmp_path):
    trained = []
    for resume in (False, True):
        adapted = model(upper_steps=2)
        schedule = Schedule(steps=5, batch_size=2, learning_rate=0.02, save_every=2)
        train(adapted, tokenizer, examples(10), tmp_path, schedule, resume=resume, progress=False)
        trained.append(values(adapted))
        # So that the second run goes on from step 4.
        (tmp_path / "checkpoint-5").rename(tmp_path / f"finished-{resume}")
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_hypergradient_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    adapted = adapt(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "bilora", rank=2, where="*",
                    progress=False, options={"mixture": "real"}).eval()  # fmt: skip
    moved(adapted, 0.0)
    for adapter in adapted.base_model.coordinators()["default"].members:
        moved(adapter, 0.5)
    tensors = values(adapted)
    inner, outer = ([name for name in tensors if name.endswith("core") is e] for e in (False, True))
    data = [(torch.randn(9, 6), torch.randn(9, 3)) for _ in range(2)]

    def loss(part):
        def of(v, e):
            x, y = data[part]
            state = dict(zip((*inner, *outer), (*v, *e), strict=True))
            return (torch.func.functional_call(adapted, state, (x,)) - y).square().mean()

        return of

    found = hypergradient(loss(0), loss(1), [tensors[n] for n in inner], [tensors[n] for n in outer], xi=0.2)
    v, e = ([tensors[name].requires_grad_() for name in names] for names in (inner, outer))
    steps = torch.autograd.grad(loss(0)(v, e), v, create_graph=True)
    exact = torch.autograd.grad(loss(1)([p - 0.2 * g for p, g in zip(v, steps, strict=True)], e), e)
    assert (torch.cat(found) - torch.cat(exact)).norm() < 5e-3 * torch.cat(exact).norm()  # float32
    plain = torch.cat(torch.autograd.grad(loss(1)(v, e), e))
    assert (torch.cat(found) - plain).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": "binary"}, "mixture must be one of softmax, sigmoid, real"),
        ({"lower_steps": 0}, "lower_steps must be at least 1"),
        ({"upper_steps": 0}, "upper_steps must be at least 1"),
        ({"fraction": 1.0}, "fraction must be a share between 0 and 1"),
        ({"orthogonality": -1.0}, "orthogonality must be a number of at least 0"),
        ({"entropy": float("nan")}, "entropy must be a number of at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        BiLoRA(**options)
