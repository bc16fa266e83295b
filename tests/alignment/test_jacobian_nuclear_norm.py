"""Jacobian nuclear norm: the matrix fact, the bound, the estimator's figures, the closed form, and real training."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from eckart.alignment import JacobianNuclearNorm, RegularizedTrainer, jacobian_nuclear_norm, jacobians
from eckart.alignment.jacobian_nuclear_norm import directional_squares, noise_squares
from eckart.models.cut import Cut, cut_at
from tiny_models import FAMILIES


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _mlp(*widths: int, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """Linear layers with tanh between, float64."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(a, b, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(gain * _draw(b, a, seed=seed + i) / a**0.5)
            linear.bias.copy_(0.1 * _draw(b, seed=seed + 50 + i))
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _squares(f, x: torch.Tensor) -> torch.Tensor:
    """||J_f||_F^2 of each row, from torch's own Jacobian."""
    rows = [torch.autograd.functional.jacobian(lambda row: f(row[None])[0], row) for row in x]
    return torch.stack([one.square().sum() for one in rows])


def test_balanced_factors_reach_the_nuclear_norm_and_others_do_not():
    a = _draw(6, 4)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    b, c = u * s.sqrt(), s.sqrt()[:, None] * vh
    assert float((b.square().sum() + c.square().sum()) / 2) == pytest.approx(float(s.sum()), rel=1e-14)
    mix = _draw(4, 4, seed=1)
    other = ((b @ mix).square().sum() + torch.linalg.solve(mix, c).square().sum()) / 2
    assert float(other) > 1.05 * float(s.sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gain", [0.2, 1.0, 4.0])
def test_the_penalty_is_an_upper_bound_at_every_point(seed, gain):
    h, g = _mlp(7, 9, 5, seed=seed, gain=gain), _mlp(5, 8, 6, seed=seed + 7)
    x = _draw(10, 7, seed=seed + 20)
    bound = (_squares(g, h(x)) + _squares(h, x)) / 2
    exact = torch.stack(
        [
            torch.linalg.svdvals(torch.autograd.functional.jacobian(lambda row: g(h(row[None]))[0], row)).sum()
            for row in x
        ]
    )
    assert (bound >= exact).all()
    torch.testing.assert_close(jacobian_nuclear_norm(nn.Sequential(h, g), x), exact)
    found = [
        JacobianNuclearNorm(eta=1.0, estimator=kind, sigma=1e-4, probes=2000).penalty(Cut(h, g), x, _generator())
        for kind in ("noise", "jvp")
    ]
    for one in found:
        assert float(one.value) == pytest.approx(float(bound.mean()), rel=0.05)
        assert float(one.parts["head"]) == pytest.approx(float(_squares(h, x).mean()), rel=0.05)
        torch.testing.assert_close(one.output, g(h(x)))


def test_figures_of_the_estimator():
    """10 -> 20 -> 8 tanh: 20,000 draws come within a few standard errors, and the bias falls with sigma^2."""
    f, x = _mlp(10, 20, 8), _draw(1, 10, seed=3)
    exact = float(_squares(f, x))
    rows = x.expand(20_000, -1)
    unit = float(x.square().mean().sqrt())
    for sigma in (0.1, 0.01, 0.001):
        found = noise_squares(f, rows, f(rows), sigma / unit, _generator())
        error = 4 * float(found.std()) / 20_000**0.5
        assert abs(float(found.mean()) - exact) < error + exact * sigma**2 * 5
    # The same draws at all sigmas: what differs from the exact derivative is the bias alone.
    ideal = float(directional_squares(f, rows, _generator()).mean())
    bias = [
        abs(float(noise_squares(f, rows, f(rows), sigma / unit, _generator()).mean()) - ideal)
        for sigma in (0.4, 0.2, 0.1)
    ]
    assert bias[0] / bias[1] == pytest.approx(4, rel=0.35)
    assert bias[1] / bias[2] == pytest.approx(4, rel=0.35)
    # Relative standard deviation of one draw: sqrt(2 sum s^4) / sum s^2 of the Jacobian's singular values.
    s = torch.linalg.svdvals(jacobians(f, x)[0])
    spread = directional_squares(f, rows, _generator()).std() / exact
    assert float(spread) == pytest.approx(float((2 * s.pow(4).sum()).sqrt() / s.square().sum()), rel=0.05)


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 30.0])
def test_the_estimate_of_a_linear_map_has_no_bias_whatever_the_noise(sigma):
    a, x = _draw(5, 7), _draw(4, 7, seed=1)

    def f(value: torch.Tensor) -> torch.Tensor:
        return value @ a.T

    found = noise_squares(f, x, f(x), sigma, _generator())
    torch.testing.assert_close(found, directional_squares(f, x, _generator()))
    many = noise_squares(f, x[:1].expand(20_000, -1), f(x[:1]), sigma, _generator()).mean()
    assert float(many) == pytest.approx(float(a.square().sum()), rel=0.03)


@pytest.mark.parametrize("estimator", ["noise", "jvp"])
def test_training_a_linear_pair_shrinks_as_the_closed_form(estimator):
    """x ~ N(0, diag c), l = ||f(x) - x||^2 / 2: the optimum is A = diag(max(0, 1 - eta / c))."""
    c, eta = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2], dtype=torch.float64), 0.6
    h, g = _mlp(5, 5, seed=2), _mlp(5, 5, seed=3)
    for linear in (h[0], g[0]):
        linear.bias = None
    parameters = [*h.parameters(), *g.parameters()]
    method, generator = JacobianNuclearNorm(eta=eta, estimator=estimator, probes=4), _generator()
    # Points of exactly this covariance: sqrt(5 c_i) times the unit vectors.
    x = torch.diag((5 * c).sqrt())
    average = [torch.zeros_like(one) for one in parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.02 if step < 500 else 0.002
        optimizer.zero_grad()
        found = method.penalty(Cut(h, g), x, generator)
        ((found.output - x).square().sum(1).mean() / 2 + found.value).backward()
        optimizer.step()
        if step >= 700:
            for total, one in zip(average, parameters, strict=True):
                total += one.detach() / 800
    a = average[1] @ average[0]
    wanted = torch.diag((1 - eta / c).clamp(min=0))
    torch.testing.assert_close(a, wanted, atol=0.02, rtol=0)


def test_gradients_flow_through_both_halves_and_through_z():
    h, g, x = _mlp(4, 6, 3), _mlp(3, 6, 4, seed=4), _draw(5, 4, seed=9)
    method = JacobianNuclearNorm(eta=1.0, estimator="jvp", probes=4000)
    method.penalty(Cut(h, g), x, _generator()).value.backward()
    # The last biases are in no derivative.
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (*h.parameters(), *g.parameters())]
    for parameter in (*h.parameters(), *g.parameters()):
        parameter.grad = None
    exact = (jacobians(h, x).square().sum((1, 2)) + jacobians(g, h(x)).square().sum((1, 2))).mean() / 2
    exact.backward()
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*h.parameters(), *g.parameters())]
    for one, other in zip(found, wanted, strict=True):
        largest = float(torch.cat([w.flatten() for w in wanted]).abs().max())
        torch.testing.assert_close(one, other, atol=0.03 * largest, rtol=0.05)
    assert found[0].abs().sum() > 0
    noise = JacobianNuclearNorm(eta=1.0, sigma=1e-5, probes=4).penalty(Cut(h, g), x, _generator())
    same = JacobianNuclearNorm(eta=1.0, estimator="jvp", probes=4).penalty(Cut(h, g), x, _generator())
    torch.testing.assert_close(noise.value, same.value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("estimator", ["noise", "jvp"])
def test_dropout_uses_the_same_masks_and_the_random_state_of_a_plain_pass(estimator):
    h = nn.Sequential(nn.Linear(6, 200), nn.Dropout(0.5), nn.Linear(200, 5)).double().train()
    g = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 6)).double().train()
    x, method = _draw(3, 6), JacobianNuclearNorm(sigma=1e-4, estimator=estimator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted, plain = g(h(x)), torch.get_rng_state()
        torch.manual_seed(5)
        found = method.penalty(Cut(h, g), x, _generator())
        assert torch.equal(torch.get_rng_state(), plain)
    assert torch.equal(found.output, wanted)
    # With other masks the difference would be of the size of h itself, over sigma^2.
    assert float(found.value) < 10


def test_a_chain_is_split_where_it_is_said():
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4)))
    x = torch.randn(5, 4, generator=_generator())
    for name, wide in (("0", 3), ("0.0", 3), ("1.0", 2)):
        cut, same = cut_at(network, name, x)
        assert same is x
        assert cut.head(x).shape == (5, wide)
        assert torch.equal(cut.tail(cut.head(x)), network(x))
    assert torch.equal(cut_at(network, "0", x)[0].head(x), network[0](x))


class _Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(torch.tanh(self.down(x)))


def test_a_model_with_a_skip_is_cut_by_hooks_and_what_goes_around_stays():
    network, x = _Skip(), torch.randn(5, 4, generator=_generator())
    cut, same = cut_at(network, "down", x)
    assert same is x
    z = cut.head(x)
    assert torch.equal(z, network.down(x))
    assert torch.equal(cut.tail(z), network(x))
    torch.testing.assert_close(cut.tail(z + 1) - cut.tail(z), network.up(torch.tanh(z + 1)) - network.up(torch.tanh(z)))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "phi3", "gpt2"])
@pytest.mark.parametrize("estimator", ["noise", "jvp"])
def test_the_hidden_state_between_blocks_cuts_a_language_model(kind, estimator):
    model = FAMILIES[kind]().double()
    name = "transformer.h.0" if kind == "gpt2" else "model.layers.0"
    ids = torch.arange(3, 13).reshape(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    cut, x = cut_at(model, name, inputs)
    assert torch.equal(x, model.get_input_embeddings()(ids))
    torch.testing.assert_close(cut.tail(cut.head(x)), model(ids, attention_mask=mask).logits)
    method = JacobianNuclearNorm(estimator=estimator, sigma=1e-6)
    found = method.penalty(cut, x, _generator(), mask)
    short = {"input_ids": ids[1:, :3]}
    alone, x_alone = cut_at(model, name, short)
    draws = JacobianNuclearNorm(estimator="jvp", probes=300)
    single = draws.penalty(alone, x_alone, _generator()).value
    row = {key: value[1:] for key, value in inputs.items()}
    padded, x_padded = cut_at(model, name, row)
    torch.testing.assert_close(draws.penalty(padded, x_padded, _generator(), mask[1:]).value, single, rtol=0.25, atol=0)
    found.value.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def _trainer(tmp_path, model, accumulation: int = 1, batch: int = 4, steps: int = 3, **extra):
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(3, 15)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=steps,
        report_to="none", save_strategy="no", use_cpu=True, learning_rate=1e-2, logging_steps=1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    kind = RegularizedTrainer if extra else Trainer
    return kind(model=model, args=arguments, train_dataset=rows, **extra)


def test_in_the_trainer(tmp_path):
    plain, model, again = (FAMILIES["llama"]() for _ in range(3))
    _trainer(tmp_path, plain).train()
    extra = {"method": JacobianNuclearNorm(eta=1e-3), "cut": "model.layers.0"}
    trainer = _trainer(tmp_path, model, **extra)
    trainer.train()
    _trainer(tmp_path, again, **extra).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
    assert any(not torch.equal(p, dict(plain.named_parameters())[name]) for name, p in model.named_parameters())
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["penalty"] > 0 for row in logs)
    assert logs[-1]["penalty"] < logs[0]["penalty"]
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    with torch.no_grad():
        rows = torch.stack([row["input_ids"] for row in trainer.train_dataset])
        assert evaluated == pytest.approx(float(model(rows, labels=rows).loss), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_trainer_adds_what_cut_at_gives(tmp_path):
    model = FAMILIES["llama"]()
    method = JacobianNuclearNorm(eta=1e-3, estimator="jvp")
    trainer = _trainer(tmp_path, model, method=method, cut="model.layers.0")
    ids = torch.arange(3, 13).reshape(2, 5)
    inputs = {"input_ids": ids, "labels": ids}
    model.train()
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    trainer._drawn = (-1, 0)
    cut, x = cut_at(model, "model.layers.0", inputs)
    wanted = outputs.loss + method.penalty(cut, x, trainer._generator()).value
    torch.testing.assert_close(loss, wanted)
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, inputs), model(**inputs).loss)


def test_accumulated_batches_weigh_the_penalty_as_one_batch_does(tmp_path):
    """With a penalty that does not depend on the draw: the gradient of two halves is that of the whole."""

    class Fixed(JacobianNuclearNorm):
        def penalty(self, cut, x, generator, mask=None):
            found = super().penalty(cut, x, torch.Generator().manual_seed(0), mask)
            value = sum(p.square().sum() for p in model.parameters())
            return type(found)(value, found.output, found.parts)

    weights = []
    for accumulation, batch in ((1, 4), (2, 2)):
        model = FAMILIES["llama"]()
        _trainer(tmp_path, model, accumulation, batch, steps=1, method=Fixed(), cut="model.layers.0").train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0}, "eta must be a positive"),
        ({"sigma": -1}, "sigma must be a positive"),
        ({"estimator": "exact"}, "estimator must be one of noise, jvp"),
        ({"probes": 0}, "probes must be at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        JacobianNuclearNorm(**options)


def test_refusals_name_the_place():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    x, method = torch.ones(2, 4), JacobianNuclearNorm()
    with pytest.raises(ValueError, match="'1' normalises over the batch"):
        cut_at(network, "0", x)
    with pytest.raises(ValueError, match="normalises over the batch"):
        Cut(network, nn.Identity())
    network.eval()
    cut_at(network, "0", x)
    with pytest.raises(ValueError, match="'1' is a normalisation"):
        cut_at(network, "1", x)
    with pytest.raises(ValueError, match="Sequential has no module '7'"):
        cut_at(network, "7", x)
    half = nn.Linear(4, 4).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r'lost in the rounding of torch.bfloat16; use estimator="jvp"'):
        method.penalty(Cut(half, half), x.bfloat16(), _generator())
    found = JacobianNuclearNorm(estimator="jvp").penalty(Cut(half, half), x.bfloat16(), _generator())
    assert bool(found.value.isfinite())
    with pytest.raises(ValueError, match=r"lost in the rounding of torch.float32"):
        JacobianNuclearNorm(sigma=1e-5).penalty(Cut(nn.Identity(), nn.Identity()), x, _generator())
    with pytest.raises(ValueError, match=r"int64 inputs makes no sense"):
        method.penalty(Cut(nn.Identity(), nn.Identity()), x.long(), _generator())
    with pytest.raises(ValueError, match="a mask of"):
        method.penalty(Cut(nn.Identity(), nn.Identity()), torch.ones(2, 3, 4), _generator(), torch.ones(2, 4))
    with pytest.raises(ValueError, match="_Skip has no input embeddings"):
        cut_at(_Skip(), "down", {"x": x})
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn
    cut, inputs = cut_at(model, "model.layers.0.mlp.act_fn", {"input_ids": torch.arange(6)[None]})
    state = cut.head(inputs)
    with pytest.raises(ValueError, match=r"act_fn' is run 2 times|no module"):
        cut.tail(state)


def test_the_trainer_refuses_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"has no module 'model\.layers\.9'"):
        _trainer(tmp_path, FAMILIES["llama"](), method=JacobianNuclearNorm(), cut="model.layers.9")
