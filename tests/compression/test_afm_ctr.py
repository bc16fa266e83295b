from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from torch import nn

import eckart
import tiny_models
from eckart.compression.afm_ctr import AFM, atoms, centred_gram, mimic_linear
from eckart.compression.mimicking import fuse, mimic
from eckart.compression.svd_llm import SVDLLM
from eckart.linalg import LinalgError, num_parameters
from eckart.models import Statistics, calibrate, linears
from eckart.models.output_moments import Moments, output_moments
from eckart.structures import EckartWarning, LowRank
from eckart.structures.low_rank_embedding import LowRankEmbedding
from model_state import inputs_by_hooks


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(x: torch.Tensor) -> Statistics:
    return Statistics(len(x), gram=x.T @ x, mean=x.mean(0))


def pca(y: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The projection of outputs on their principal components, by the SVD of the centred outputs; all variances."""
    mean = y.mean(0)
    _, s, vh = np.linalg.svd(y - mean, full_matrices=False)
    return mean + (y - mean) @ vh[:rank].T @ vh[:rank], s**2 / len(y)


# ------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(10, 7), (7, 10)], ids=str)
def test_outputs_are_projected_on_their_principal_components(shape, biased):
    weight, x = normal(*shape), normal(90, shape[1], seed=1) + 2
    bias = normal(shape[0], seed=2) if biased else None
    y = x @ weight.T + (0 if bias is None else bias)
    for rank in range(1, shape[0] + 1):
        wanted, variances = pca(y.numpy(), rank)
        found = atoms(Moments.of(y), rank)
        up, down, shift = mimic_linear(weight, bias, found)
        mimicked = x @ (up @ down).T + shift
        np.testing.assert_allclose(mimicked, wanted, atol=1e-10)
        lost = float((y - mimicked).square().sum(1).mean())
        assert lost == pytest.approx(variances[rank:].sum(), abs=1e-10)
        assert found.error == pytest.approx(np.sqrt(lost / float(y.square().sum(1).mean())), abs=1e-7)
        torch.testing.assert_close(mimicked.mean(0), y.mean(0), rtol=0, atol=1e-11)
        # Never worse than the truncated SVD of the weight.
        u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
        by_weight = x.numpy() @ ((u[:, :rank] * s[:rank]) @ vh[:rank]).T + (0 if bias is None else bias.numpy())
        assert lost <= ((y.numpy() - by_weight) ** 2).sum(1).mean() + 1e-10
    torch.testing.assert_close(mimicked, y, rtol=0, atol=1e-10)


def test_without_centring_it_is_svd_llm():
    weight, x = normal(14, 11), normal(60, 11, seed=1) + 1
    layer = AFM(center=False).build(weight, statistics_of(x), num_parameters(14, 11, 4) + 22)
    factors = SVDLLM().factorize(weight, statistics_of(x), layer.rank)
    assert layer.bias is None
    torch.testing.assert_close(layer.dense(), (factors.up @ factors.down).double(), rtol=0, atol=1e-12)


def test_with_centring_the_outputs_of_a_layer_are_the_principal_components():
    weight, x = normal(14, 11), normal(60, 11, seed=1) + 5
    layer = AFM().build(weight, statistics_of(x), num_parameters(14, 11, 4) + 22 + 14)
    assert layer.rank == 4
    wanted, _ = pca((x @ weight.T).numpy(), 4)
    np.testing.assert_allclose(layer(x).detach(), wanted, atol=1e-9)
    uncentred = AFM(center=False).build(weight, statistics_of(x), num_parameters(14, 11, 4) + 22)
    error, other = (float((x @ weight.T - one(x)).detach().norm()) for one in (layer, uncentred))
    assert error < other


@pytest.mark.parametrize("parameters", [25, 60, 100, 153, 154, 1000])
def test_what_is_stored_fits_and_is_the_largest_that_does(parameters):
    weight, x = normal(14, 11).float(), normal(60, 11, seed=1)
    layer = AFM().build(weight, statistics_of(x), parameters)
    fits = [k for k in range(1, 12) if num_parameters(14, 11, k) + 14 + 22 <= parameters]
    if not fits or parameters >= 14 * 11:
        assert layer is None
    else:
        assert layer.rank == max(fits)
        assert layer.nbytes() / 4 <= parameters


def test_inputs_that_do_not_vary_and_few_tokens():
    weight = normal(9, 6)
    for x in (normal(1, 6) + 3, (normal(1, 6) + 3).repeat(5, 1), normal(2, 6)):
        layer = AFM().build(weight, statistics_of(x), num_parameters(9, 6, 2) + 9 + 12)
        assert torch.isfinite(layer.dense()).all()
        # The mean is kept, and with one direction of variance nothing is lost at all.
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-9)


def test_the_covariance_comes_from_gram_and_mean():
    x = normal(50, 4) + 7
    kept = x.T @ x
    found = centred_gram(kept, x.mean(0), 50)
    torch.testing.assert_close(found, torch.tensor(np.cov(x.numpy().T, bias=True) * 50), rtol=0, atol=1e-9)
    assert torch.equal(kept, x.T @ x)
    constant = torch.full((50, 2), 1e4, dtype=torch.float64)
    assert (centred_gram(constant.T @ constant - 1e-3, constant.mean(0), 50).diagonal() >= 0).all()


def test_moments_do_not_cancel_and_do_not_depend_on_the_batches():
    y = normal(300, 3) + 1e7
    one, parts = Moments.of(y), Moments.of(y[:1])
    for start in range(1, 300, 37):
        parts.add(y[start : start + 37])
    parts.add(y[:0])
    truth = np.cov(y.numpy().T, bias=True) * 300
    # By subtracting squares of 1e7, half of the digits of a variance of 1 would be gone, and more.
    for moments in (one, parts):
        np.testing.assert_allclose(moments.scatter, truth, rtol=0, atol=1e-5)
        assert moments.count == 300
    torch.testing.assert_close(parts.mean, y.mean(0))
    torch.testing.assert_close(parts.gram(), y.T @ y)


# ------------------------------------------------------------------------------------------------ recommender models

FIELDS, IDS, WIDTH, DENSE = 6, 40, 8, 3


class CTR(nn.Module):
    """Embeddings of fields and dense features, an MLP, and between them the interaction of a published model."""

    def __init__(self, kind: str, padding_idx: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.tables = nn.ModuleList(nn.Embedding(IDS, WIDTH, padding_idx=padding_idx) for _ in range(FIELDS))
        n = FIELDS * WIDTH + DENSE
        self.first = nn.Linear(n, 32)
        self.second = nn.Linear(32, 32)
        self.out = nn.Linear(32 + (n if kind == "dcn" else 0), 1)
        self.cross = nn.ModuleList(nn.Linear(n, 1) for _ in range(2)) if kind == "dcn" else None
        self.drop = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        vectors = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        x0 = torch.cat([vectors.flatten(1), dense], 1)
        hidden = self.drop(self.second(self.first(x0).relu()).relu())
        if self.kind == "deepfm":  # all pairwise inner products
            pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
            return self.out(hidden)[:, 0] + pairs
        x = x0
        for layer in self.cross:  # x0 (w . x) + b + x
            x = x0 * layer(x) + x
        return self.out(torch.cat([hidden, x], 1))[:, 0]


def clicks(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids with frequencies that fall like Zipf's, dense features, and clicks from a logit of low rank."""
    world, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    latent = torch.randn(FIELDS, IDS, 2, generator=world)
    odds = 1 / torch.arange(1, IDS + 1).float()
    ids = torch.multinomial(odds.expand(FIELDS, IDS), count, replacement=True, generator=generator).T
    dense = torch.randn(count, DENSE, generator=generator)
    vectors = torch.stack([latent[i, ids[:, i]] for i in range(FIELDS)], 1)
    logit = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2 / FIELDS**0.5 + dense[:, 0]
    return ids, dense, (torch.rand(count, generator=generator) < logit.sigmoid()).float()


def fit(model: CTR, epochs: int, seed: int = 0, lr: float = 5e-3) -> CTR:
    ids, dense, y = clicks(4000, 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(y), generator=generator).split(200):
                loss = nn.functional.binary_cross_entropy_with_logits(model(ids[batch], dense[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def auc(model: CTR) -> float:
    ids, dense, y = clicks(4000, 2)
    with torch.no_grad():
        return float(roc_auc_score(y.numpy(), model(ids, dense).numpy()))


def built(kind: str, seed: int = 0, padding_idx: int | None = None) -> CTR:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CTR(kind, padding_idx)
        for table in model.tables:
            nn.init.normal_(table.weight, std=0.1)
            if padding_idx is not None:
                table.weight.data[padding_idx] = 0
    return model.eval()


RANKS = {"second": 8, **{f"tables.{i}": 2 for i in range(FIELDS)}}


@pytest.mark.parametrize("kind", ["deepfm", "dcn"])
def test_layers_of_a_recommender_put_out_their_principal_components(kind):
    model = built(kind).double()
    ids, dense, _ = clicks(500, 3)
    data = [(ids[i : i + 100], dense[i : i + 100].double()) for i in range(0, 500, 100)]
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen.setdefault(name, []).append(y))
        for name in RANKS
    ]
    with torch.no_grad():
        before = model(ids, dense.double())
    outputs = {name: found[0].clone() for name, found in seen.items()}
    tables = {name: model.get_submodule(name).weight.detach().clone() for name in RANKS if "table" in name}
    for handle in handles:
        handle.remove()
    stored = sum(p.numel() for p in model.parameters())
    found = mimic(model, data, RANKS)
    for layer in found:
        wanted, variances = pca(outputs[layer.name].numpy(), layer.rank)
        lost = np.sqrt(variances[layer.rank :].sum() / (outputs[layer.name].numpy() ** 2).sum(1).mean())
        assert layer.error == pytest.approx(lost, rel=1e-8)
    for i in range(FIELDS):
        # Every look-up of the data, so by its frequency.
        wanted, _ = pca(tables[f"tables.{i}"][ids[:, i]].numpy(), 2)
        np.testing.assert_allclose(model.tables[i](ids[:, i]).detach(), wanted, atol=1e-10)
    assert model.tables[0].num_parameters() == IDS * 2 + WIDTH * 2 + WIDTH
    assert model.second.num_parameters() == 8 * (32 + 32) + 32
    saved = FIELDS * (IDS * WIDTH - IDS * 2 - 3 * WIDTH) + 32 * 32 - 8 * 64
    assert stored - sum(p.numel() for p in model.parameters()) == saved
    assert not torch.equal(model(ids, dense.double()), before)
    assert not model.training


def test_all_directions_reproduce_the_model():
    model = built("dcn").double()
    ids, dense, _ = clicks(500, 3)
    before = model(ids, dense.double())
    for name in RANKS:  # these sizes save nothing, so `mimic` would leave them
        module = model.get_submodule(name)
        moments = output_moments(model, [(ids, dense.double())], [name])[name]
        found = atoms(moments, module.weight.shape[1])
        if isinstance(module, nn.Embedding):
            new = LowRankEmbedding.from_table(module.weight.detach(), found.basis, found.mean)
        else:
            up, down, bias = mimic_linear(module.weight.detach(), module.bias.detach(), found)
            new = LowRank.from_factors(up, down, bias=bias)
        model.set_submodule(name, new)
    torch.testing.assert_close(model(ids, dense.double()), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["deepfm", "dcn"])
def test_it_starts_far_above_random_factors_and_ends_near_the_dense_model(kind):
    """The order of the paper: mimicked outputs, truncated weights, random factors; before and after tuning."""
    dense = fit(built(kind), 6)
    ids, features, _ = clicks(4000, 1)
    scores = {"dense": auc(dense)}
    data = [(ids[i : i + 500], features[i : i + 500]) for i in range(0, 4000, 500)]
    for start in ("afm", "weight", "random"):
        model = built(kind)
        model.load_state_dict(dense.state_dict())
        mimic(model, None if start == "weight" else data, RANKS)
        if start == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                for name in RANKS:
                    for parameter in model.get_submodule(name).parameters():
                        nn.init.normal_(parameter, std=0.1)
        scores[start] = auc(model)
        scores[f"{start} tuned"] = auc(fit(model, 1, lr=1e-3))
    assert scores["dense"] > 0.7
    assert scores["afm"] > scores["weight"] > scores["random"] + 0.02
    assert scores["afm tuned"] > scores["random tuned"]
    assert scores["afm tuned"] > scores["dense"] - 0.02


def test_decoders_merged_into_the_first_linear():
    model = built("deepfm").double()
    ids, dense, _ = clicks(300, 3)
    mimic(model, [(ids, dense.double())], {name: rank for name, rank in RANKS.items() if "table" in name})
    merged = fuse(model.first, [*model.tables, DENSE])
    assert merged.in_features == FIELDS * 2 + DENSE
    vectors = torch.cat([*(table(ids[:, i]) for i, table in enumerate(model.tables)), dense.double()], 1)
    codes = torch.cat([*(table.lookup(ids[:, i]) for i, table in enumerate(model.tables)), dense.double()], 1)
    torch.testing.assert_close(merged(codes), model.first(vectors), rtol=0, atol=1e-12)
    unbiased = nn.Linear(model.first.in_features, 32, bias=False).double()
    torch.testing.assert_close(fuse(unbiased, [*model.tables, DENSE])(codes), unbiased(vectors), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="the linear reads 51 numbers, the parts have 48"):
        fuse(model.first, list(model.tables))


def test_the_vector_of_a_padding_id_is_kept_and_does_not_count():
    model = built("deepfm", padding_idx=0).double()
    ids, dense, _ = clicks(300, 3)
    table = model.tables[1].weight.detach().clone()
    looked_up = table[ids[:, 1][ids[:, 1] != 0]]
    mimic(model, [(ids, dense.double())], RANKS)
    layer = model.tables[1]
    assert (ids[:, 1] == 0).sum() > 10
    assert torch.equal(layer(torch.tensor([0, 0])), torch.zeros(2, WIDTH).double())
    wanted, _ = pca(looked_up.numpy(), 2)
    np.testing.assert_allclose(layer(ids[:, 1][ids[:, 1] != 0]).detach(), wanted, atol=1e-10)
    assert torch.equal(layer.dense()[0], torch.zeros(WIDTH).double())
    layer(torch.tensor([0, 3])).sum().backward()
    assert not layer.codes.grad[0].any()
    assert layer.codes.grad[3].any()
    with pytest.raises(ValueError, match="padding id 0 is no decoded code"):
        fuse(model.first, [*model.tables, DENSE])


def test_the_activation_between_is_the_papers_other_network():
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x = normal(200, 12)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    (layer,) = mimic(model, [x], {"0": 4}, activation=nn.ReLU())
    assert layer.form == "activation"
    assert np.isnan(layer.error)
    found = atoms(Moments.of(x @ weight.T + bias), 4)
    inner = ((x @ weight.T + bias) @ found.basis).relu()
    wanted = inner @ found.basis.T + found.mean - found.basis @ (found.basis.T @ found.mean)
    torch.testing.assert_close(model[0](x), wanted, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in model[0].parameters()) == 4 * (12 + 20) + 4 + 20
    assert layer.parameters == 4 * (12 + 20) + 4


def test_without_data_it_is_the_truncated_svd_of_weights_and_tables():
    model = built("deepfm").double()
    weight, table = model.second.weight.detach().clone(), model.tables[0].weight.detach().clone()
    bias = model.second.bias.detach().clone()
    mimic(model, None, RANKS)
    for found, whole, rank in ((model.second.dense(), weight, 8), (model.tables[0].dense(), table, 2)):
        u, s, vh = np.linalg.svd(whole.numpy(), full_matrices=False)
        np.testing.assert_allclose(found.detach(), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-10)
    torch.testing.assert_close(model.second.bias.detach(), bias, rtol=0, atol=1e-12)


def test_what_saves_nothing_or_is_not_seen_stays_with_a_warning():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    with pytest.warns(EckartWarning, match=r"used \(rank 4 saves nothing\), unused \(seen by no batch\)"):
        found = mimic(model, [torch.ones(2, 8)], {"used": 4, "unused": 1})
    assert [layer.form for layer in found] == ["dense", "dense"]
    assert isinstance(model["used"], nn.Linear)


def test_layers_that_cannot_be_replaced_are_refused_before_anything_changes():
    model = built("deepfm")
    data = [clicks(10, 3)[:2]]
    with pytest.raises(ValueError, match=r"no nn.Linear or nn.Embedding 'secnd'; nearest: second"):
        mimic(model, data, {"second": 4, "secnd": 4})
    with pytest.raises(ValueError, match=r"the rank of tables\.0 must be from 1 to 8, not 9"):
        mimic(model, data, {"tables.0": 9})
    model.tables[1].weight = model.tables[0].weight
    with pytest.raises(ValueError, match=r"tables.0.weight is tied with tables.1.weight"):
        mimic(model, data, {"tables.0": 2})
    with pytest.raises(ValueError, match="whole rows"):
        mimic(nn.Sequential(nn.Embedding(9, 8, max_norm=1.0)), None, {"0": 2})
    assert isinstance(model.second, nn.Linear)
    model = built("deepfm")
    model.second.bias.data[3] = torch.nan
    with pytest.raises(LinalgError, match=r"second: .*NaN"):
        mimic(model, data, RANKS)
    assert isinstance(model.tables[0], nn.Embedding)


# ------------------------------------------------------------------------------------------------ transformers models


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_of_a_model_puts_out_its_principal_components(family):
    """With and without biases: the shift of the mean is added to what is there."""
    model = tiny_models.FAMILIES[family]().double()
    data = [tiny_models.inputs(model, 6, 40)]
    refs = {ref.name: (ref.weight.detach().clone(), ref.bias) for ref in linears(model).linears}
    seen = inputs_by_hooks(model, refs, data)
    result = eckart.compress(model, "afm-ctr", ratio=0.5, data=data, progress=False)
    assert result.bytes[1] < result.bytes[0]
    for name, (weight, bias) in refs.items():
        y = seen[name] @ weight.T + (0 if bias is None else bias.detach())
        layer = model.get_submodule(name)
        wanted, _ = pca(y.numpy(), layer.rank)
        np.testing.assert_allclose(layer(seen[name]).detach(), wanted, atol=1e-5)
        plain = y if bias is None else y - bias.detach()
        error = float((layer(seen[name]) - y).detach().norm() / plain.norm())
        assert next(one.error for one in result.layers if one.name == name) == pytest.approx(error, abs=1e-4)


def test_a_compressed_model_is_saved_and_loaded_and_builds_no_dense_weight(tmp_path, monkeypatch):
    model = tiny_models.FAMILIES["llama"]()
    result = eckart.compress(model, "afm-ctr", ratio=0.5, data=[tiny_models.inputs(model, 4, 20)], progress=False)
    assert result.ratio >= 0.5
    logits = tiny_models.logits(model)
    eckart.save(model, tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny_models.logits(again), logits)
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("the dense weight was built"))
    assert torch.equal(tiny_models.logits(model), logits)


def test_the_runners_statistics_are_enough():
    model = tiny_models.FAMILIES["llama"]()
    found = calibrate(model, [tiny_models.inputs(model, 4, 20)], AFM().gathers, progress=False)
    name, ref = next((ref.name, ref) for ref in linears(model).linears)
    assert AFM().build(ref.weight.detach(), found[name], 600).in_features == ref.in_features
    with pytest.raises(ValueError, match="did not gather 'mean'"):
        AFM().build(ref.weight.detach(), Statistics(gram=found[name].gram), 600)


def test_options_are_checked():
    with pytest.raises(ValueError, match="center must be true or false, not 'yes'"):
        AFM(center="yes")
    assert AFM().gathers == {"gram", "mean"}
    assert not AFM().sequential
