"""BA-LoRA's terms against numpy in float64, and what a model in training makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import tiny_models
from eckart.adapters import EckartConfig
from eckart.adapters.ba_lora import BALoRA, consistency, correlation, entropy, spectral_share
from eckart.adapters.pissa import PiSSA
from eckart.adapters.site import Site

IDS = (torch.arange(40).reshape(4, 10) * 7) % 60
WEIGHTS = {"consistency": 0.7, "diversity": 0.5, "spectrum": 0.3}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logs(z, temperature=1.0):
    z = z / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def divergences(z, p, temperature=1.0):
    """KL(P || Z) of each row."""
    ours, theirs = logs(z, temperature), logs(p, temperature)
    return (np.exp(theirs) * (theirs - ours)).sum(axis=-1)


def entropies(z, candidates=None):
    z = np.sort(z, axis=-1)[..., ::-1][..., :candidates]
    return -(np.exp(logs(z)) * logs(z)).sum(axis=-1)


def off_diagonal(z):
    c = np.cov(z, rowvar=False)
    return (c**2).sum() / len(c) - (np.diag(c) ** 2).sum() / len(c)


def share(z, k, norm):
    s = np.linalg.svd(z, compute_uv=False)
    return s[:k].sum() / (s.sum() if norm == "nuclear" else np.sqrt((s**2).sum()))


def test_consistency():
    z, p = draw(6, 5), draw(6, 5, seed=1)
    assert float(consistency(z, z)) == 0
    for temperature in (1.0, 2.5):
        expected = temperature**2 * divergences(z.numpy(), p.numpy(), temperature).mean()
        assert float(consistency(z, p, temperature)) == pytest.approx(expected, rel=1e-10)
    far = torch.tensor([[0.0, 500.0]])  # whose softmax has a zero in float32
    assert float(consistency(far, far.flip(1))) == pytest.approx(500)


def test_correlation():
    z = draw(9, 4)
    assert float(correlation(z)) == pytest.approx(off_diagonal(z.numpy()), rel=1e-10)
    assert float(correlation(z + draw(4, seed=2))) == pytest.approx(float(correlation(z)), rel=1e-9)
    diagonal = torch.cat([torch.eye(3), -torch.eye(3)])
    assert float(correlation(diagonal)) == 0
    assert float(correlation(diagonal + 0.1 * diagonal.flip(1))) > 0
    assert float(correlation(z[:1])) == 0


def test_entropy():
    z = draw(6, 9)
    for candidates in (None, 2, 4, 9, 50):
        assert float(entropy(z, candidates)) == pytest.approx(entropies(z.numpy(), candidates).mean(), rel=1e-10)
    assert float(entropy(torch.zeros(3, 8))) == pytest.approx(np.log(8))
    low = torch.tensor([[0.0, 500.0]], requires_grad=True)
    entropy(low).backward()
    assert low.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (70, 90)])
def test_spectral_share(norm, shape):
    z = draw(*shape).requires_grad_()
    for k in (1, 3, 5):
        found = spectral_share(z, k, norm)
        assert float(found.detach()) == pytest.approx(share(z.detach().numpy(), k, norm), rel=1e-6)
        s = torch.linalg.svdvals(z)
        expected = s[:k].sum() / (s.sum() if norm == "nuclear" else z.norm())
        (mine,), (true,) = torch.autograd.grad(found, z), torch.autograd.grad(expected, z)
        assert torch.allclose(mine, true, atol=1e-6)
    low = (draw(shape[0], 2) @ draw(2, shape[1], seed=1)).requires_grad_()  # rank 2
    whole = spectral_share(low, 2, "nuclear")
    assert float(whole.detach()) == pytest.approx(1, rel=1e-6)
    (gradient,) = torch.autograd.grad(whole, low)
    assert float(gradient.abs().max()) < 1e-6
    assert 0 < float(spectral_share(z.detach(), 1, "nuclear")) < 1


def test_large_logits_take_the_randomized_svd():
    """A language model's: within a percent, and half precision is not what it is computed in."""
    spectrum = torch.logspace(0, -3, 300, dtype=torch.float64)
    z = (torch.linalg.qr(draw(300, 300))[0] * spectrum) @ torch.linalg.qr(draw(2000, 300, seed=1))[0].mT
    found = float(spectral_share(z.float(), 10, "frobenius"))
    assert found == pytest.approx(share(z.numpy(), 10, "frobenius"), rel=1e-2)
    assert found <= share(z.numpy(), 10, "frobenius") * (1 + 1e-5)


def language(**options):
    base = tiny_models.FAMILIES["llama"]().eval()
    model = get_peft_model(base, EckartConfig(method="ba-lora", r=3, options=options)).train()
    return model


def move(model, size=0.05):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def padded():
    """A batch with a prompt that is not learnt and with padding that is labelled by mistake."""
    labels, attention = IDS.clone(), torch.ones_like(IDS)
    labels[:, :3] = -100
    attention[1, 7:] = 0
    return {"input_ids": IDS, "labels": labels, "attention_mask": attention}


@pytest.mark.parametrize("form", ["paper", "code"])
def test_generation(form):
    model = language(form=form, k=2, temperature=2.0, candidates=6, **WEIGHTS)
    move(model)
    batch = padded()
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch).logits.double().numpy()
    output = model(**batch)
    logits = output.logits.detach().double().numpy()
    # Position t predicts label t + 1.
    rows = [(i, t) for i in range(4) for t in range(2, 9 if i != 1 else 6)]
    z, p = (np.array([side[i, t] for i, t in rows]) for side in (logits, reference))
    if form == "paper":
        near = 4 * divergences(z, p, 2.0).mean()
        terms = near, -entropies(z, 6).mean(), -share(z, 2, "frobenius")
    else:
        masked = np.zeros_like(logits)
        for i, t in rows:
            masked[i, t] = logits[i, t]
        terms = divergences(z, p).sum() / 4, -entropies(z).mean(), -share(masked.reshape(4, -1), 2, "nuclear")
    task = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    expected = float(task.detach()) + np.dot([0.7, 0.5, 0.3], terms)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-4)
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"left", "right"}
    assert model.base_model.penalty() is None  # handed over once


class _Classifier(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, classes)
        self.passes = 0

    def forward(self, x, labels=None):
        self.passes += 1
        logits = self.head(self.inner(x).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def classifier(classes=4, **options):
    base = _Classifier(classes)
    config = EckartConfig(method="ba-lora", r=3, target_modules=["inner"], options=options)
    return get_peft_model(base, config).train(), base


X, Y = draw(9, 6).float(), torch.tensor([0, 1, 2, 3, -100, 1, 0, 2, 3])


@pytest.mark.parametrize("form", ["paper", "code"])
def test_classification(form):
    model, base = classifier(form=form, k=2, **WEIGHTS)
    move(model)
    output = model(X, labels=Y)
    assert base.passes == 2
    with model.disable_adapter(), torch.no_grad():
        p = base.eval()(X).logits.double().numpy()[Y != -100]
    z = output.logits.detach().double().numpy()[Y != -100]
    if form == "paper":
        near = divergences(z, p).mean()
    else:
        near = ((z / np.linalg.norm(z, axis=1)[:, None] - p / np.linalg.norm(p, axis=1)[:, None]) ** 2).mean()
    task = float(nn.functional.cross_entropy(output.logits, Y).detach())
    expected = task + 0.7 * near + 0.5 * off_diagonal(z) - 0.3 * share(z, 2, "nuclear")
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    output.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("form", ["paper", "code"])
def test_at_the_start_the_reference_is_the_model(form):
    model, _ = classifier(form=form, consistency=1.0, diversity=0, spectrum=0)
    model(X, labels=Y)
    model(X)
    assert abs(float(model.base_model.penalty().detach())) < 1e-6
    move(model)
    model(X)
    assert float(model.base_model.penalty().detach()) > 1e-4


def test_a_loop_with_a_loss_of_its_own_asks_for_the_terms():
    model, _ = classifier(**WEIGHTS)
    move(model)
    model(X, labels=Y.clamp(min=0))
    assert model.base_model.penalty() is None
    model(X)
    model(X)  # the last pass counts
    terms = model.base_model.penalty()
    loss = model(X, labels=Y.clamp(min=0))
    task = nn.functional.cross_entropy(loss.logits, Y.clamp(min=0))
    assert float(loss.loss.detach()) == pytest.approx(float((task + terms).detach()), rel=1e-6)
    terms.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_consistency_there_is_no_second_pass():
    model, base = classifier(consistency=0)
    model(X, labels=Y)
    assert base.passes == 1
    assert not model.base_model.coordinators()["default"].needs_reference
    model, base = classifier()
    model(X, labels=Y)
    model.eval()
    model(X, labels=Y)
    assert base.passes == 3
    assert model.base_model.penalty() is None


def test_with_all_weights_0_it_is_pissa():
    trained = []
    for method, options in (("ba-lora", dict.fromkeys(WEIGHTS, 0)), ("pissa", {})):
        base = tiny_models.FAMILIES["llama"]().eval()
        model = get_peft_model(base, EckartConfig(method=method, r=3, options=options)).train()
        assert model.base_model.coordinators() == {}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**padded()).loss.backward()
            optimizer.step()
        trained.append(dict(model.named_parameters()))
    assert all(torch.equal(p, trained[1][name]) for name, p in trained[0].items())
    site = Site("layer", "linear", 12, 10)
    assert BALoRA().trainable(site, 3) == PiSSA().trainable(site, 3) == 3 * 22
    assert BALoRA.kinds == PiSSA.kinds


def test_micro_batches_add_up():
    """What is a mean over tokens is the same from one batch and from two that share it unevenly."""
    found = []
    batch = padded()
    batch["attention_mask"] = torch.ones_like(IDS)
    batch["labels"][0, 5:] = -100
    items = int((batch["labels"][:, 1:] != -100).sum())
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        model = language(consistency=0.7, diversity=0.5, spectrum=0)
        move(model)
        for part in parts:
            one = {name: value[part] for name, value in batch.items()}
            model(**one, num_items_in_batch=items).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found, strict=True))


def test_which_rows_count():
    rule = BALoRA(consistency=0, diversity=1.0, spectrum=0, candidates=3)
    z = draw(2, 5, 7).float()
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, -100, -100, 4]])

    def term(method=rule, logits=z, **kwargs):
        coordinator = method.coordinate({}, seed=0)
        coordinator.observe_output({"logits": logits}, kwargs)
        found = coordinator.penalty()
        return None if found is None else -float(found)

    def mean(*rows):
        return pytest.approx(entropies(np.array([z[i, t].double().numpy() for i, t in rows]), 3).mean(), rel=1e-5)

    assert term(labels=labels) == mean((0, 0), (0, 1), (0, 3), (1, 3))
    assert term() == mean(*((i, t) for i in (0, 1) for t in range(4)))
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert term(attention_mask=attention) == mean((0, 0), (0, 1), (0, 2), (1, 0))
    assert term(attention_mask=attention, labels=labels) == mean((0, 0), (0, 1))
    aligned = BALoRA(consistency=0, diversity=1.0, spectrum=0, candidates=3, shift=False)
    assert term(aligned, labels=labels) == mean((0, 1), (0, 2), (0, 4), (1, 4))
    assert term(labels=torch.full_like(labels, -100)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert term(labels=labels) == mean((0, 0), (0, 1), (0, 3), (1, 3))
    with pytest.raises(ValueError, match=r"logits \(2, 5, 7\) and labels \(2, 4\) differ in their tokens"):
        term(labels=labels[:, :4])
    with pytest.raises(ValueError, match="ba-lora compares classes"):
        term(logits=torch.ones(4, 1))
    with pytest.raises(ValueError, match="call it with return_dict=True"):
        rule.coordinate({}, seed=0).observe_output((torch.ones(()), z), {})


def test_k_is_kept_below_the_rank_of_the_logits():
    z = draw(6, 3).float().requires_grad_()
    coordinator = BALoRA(consistency=0, diversity=0, spectrum=1.0).coordinate({}, seed=0)  # k = 5
    coordinator.observe_output(z, {})
    found = coordinator.penalty()
    assert float(found.detach()) == pytest.approx(-share(z.detach().numpy(), 2, "nuclear"), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, z)
    assert float(gradient.abs().max()) > 1e-3


def test_half_precision_logits_are_compared_in_float32():
    z, p = draw(8, 5).bfloat16(), draw(8, 5, seed=1).bfloat16()
    coordinator = BALoRA(**WEIGHTS, k=2).coordinate({}, seed=0)
    coordinator.observe_reference({"logits": p})
    coordinator.observe_output({"logits": z}, {})
    z, p = z.double().numpy(), p.double().numpy()
    expected = 0.7 * divergences(z, p).mean() + 0.5 * off_diagonal(z) - 0.3 * share(z, 2, "nuclear")
    assert float(coordinator.penalty()) == pytest.approx(expected, rel=1e-5)


def test_options():
    assert BALoRA().weights("classification") == (0.15, 0.03, 0.03, 5)
    assert BALoRA().weights("generation") == (0.025, 0.005, 0.005, 10)
    for task in ("classification", "generation"):
        assert BALoRA(form="code").weights(task) == (1e-4, 3e-4, 1e-4, 3)
    assert BALoRA(consistency=0, k=7).weights("generation") == (0, 0.005, 0.005, 7)
    assert BALoRA(solver="exact").build(Site("layer", "linear", 12, 10), 3, 1.0).method.solver == "exact"
    for options, message in (
        ({"form": "v6"}, "form must be one of paper, code, not 'v6'"),
        ({"solver": "fast"}, "solver must be one of"),
        ({"diversity": -1.0}, r"diversity must be a weight of at least 0, not -1\.0"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"temperature": 0.0}, r"temperature must be a number above 0, not 0\.0"),
        ({"candidates": 1}, "candidates must be at least 2, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            BALoRA(**options)
