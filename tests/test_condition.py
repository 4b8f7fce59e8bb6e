"""Models that are given labels and covariates: an exact likelihood, every network, every source, the command line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from sigma_vae import VAE, Fixed, FlatNetwork, Gaussian, models, runs
from sigma_vae.cli import main
from sigma_vae.conditions import Conditions, Variable
from sigma_vae.config import ClipConfig, DataConfig, EvaluationSettings, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling, as_splits
from sigma_vae.data.load import load
from sigma_vae.data.stores import InMemory, Labelled
from sigma_vae.evaluation import Evaluation, evaluate
from sigma_vae.evaluation.classifier import best_temperature, calibration_error, class_bounds, log_probabilities
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.plots import sampled_per_class
from sigma_vae.priors import ClassMixturePrior, ConditionalFlowPrior, LearnedPrior, MixturePrior
from sigma_vae.training import NonFiniteLossError, fit
from sigma_vae.vae import keyed_noise

LABEL = Conditions((Variable("label", ("a", "b", "c"), (0.5, 0.25, 0.25)),))
MIX = Conditions((Variable("label", ("a", "b")), Variable("age", mean=40.0, std=10.0)))
NETWORKS = ("mlp", "conv", "residual", "hierarchical:8,8d8/1,8m1", "sequence")
FAST = {"latent_dim": 2, "width": 4}


def shape_of(network: str) -> tuple[int, ...]:
    return (1, 8, 8)


def examples(network: str, n: int, seed: int = 0) -> Tensor:
    shape = (n, 5, 1, 8, 8) if network == "sequence" else (n, 1, 8, 8)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def conditional(network: str, conditions: Conditions = LABEL) -> VAE:
    torch.manual_seed(0)
    decoder = Gaussian(1, Fixed(0.3), levels=None)
    return VAE(models.network(network, shape_of(network), decoder.in_channels, **FAST, conditions=conditions), decoder)


# -- against an exact likelihood -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The exact posterior of z ~ N(m_c, diag(v_c)), x = W z + b_c + σ ε, for the class that the embedding says."""

    def __init__(self, exact: "LinearGaussian") -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        rows = []
        for row, one_hot in zip(x.numpy(), embedding.detach().numpy(), strict=True):
            mean, variance = self.exact.posterior(row, int(one_hot[:3].argmax()))
            rows.append(np.concatenate([mean, np.log(variance)]))
        return torch.from_numpy(np.stack(rows))


class Decoder(nn.Module):
    def __init__(self, exact: "LinearGaussian") -> None:
        super().__init__()
        self.weight, self.offsets = torch.from_numpy(exact.weight), torch.from_numpy(exact.offsets)

    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        return z @ self.weight.T + embedding[:, :3] @ self.offsets


class LinearGaussian:
    """A linear-Gaussian model given a class, in NumPy; columns of W are orthogonal, so that posteriors are diagonal."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.sigma = 0.7
        self.weight = np.linalg.qr(random.standard_normal((5, 2)))[0] * np.array([2.0, 0.5])
        self.offsets, self.means = random.standard_normal((3, 5)), random.standard_normal((3, 2))
        self.variances = np.exp(random.standard_normal((3, 2)))

    def log_prob(self, x: np.ndarray, c: int) -> float:
        covariance = self.weight @ np.diag(self.variances[c]) @ self.weight.T + self.sigma**2 * np.eye(5)
        return float(stats.multivariate_normal.logpdf(x, self.weight @ self.means[c] + self.offsets[c], covariance))

    def posterior(self, x: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
        variance = 1 / (1 / self.variances[c] + (self.weight**2).sum(0) / self.sigma**2)
        residual = self.weight.T @ (x - self.offsets[c]) / self.sigma**2
        return variance * (self.means[c] / self.variances[c] + residual), variance

    def vae(self) -> VAE:
        prior = LearnedPrior(2, LABEL)
        network = FlatNetwork(Encoder(self), Decoder(self), 2, prior, LABEL)
        vae = VAE(network, Gaussian(5, Fixed(self.sigma), spatial_dims=0, levels=None, mean="identity")).double()
        with torch.no_grad():
            for embedding in (network.embedding, prior.embedding):
                for parameter in embedding.parameters():
                    parameter.zero_()
                embedding.linear.weight[:3] = torch.eye(3)
            prior.linear.weight[:, :3] = torch.from_numpy(np.concatenate([self.means, np.log(self.variances)], 1)).T
        return vae.eval()


def test_the_bound_of_a_linear_gaussian_model_is_its_likelihood_given_the_class() -> None:
    exact = LinearGaussian()
    vae, x = exact.vae(), np.random.default_rng(1).standard_normal((12, 5)) * 2
    classes = np.arange(12) % 3
    truth = [exact.log_prob(row, c) for row, c in zip(x, classes, strict=True)]
    condition = torch.from_numpy(classes)[:, None].double()
    # With the exact posterior, log p(x|z) + log p(z|c) − log q(z) is the likelihood at every single draw.
    x = torch.from_numpy(x)
    one = vae.network.infer(x, None, None, keyed_noise(torch.arange(12)), condition)
    with torch.no_grad():
        np.testing.assert_allclose(vae.likelihood(one.h).log_prob(x) + one.log_ratio, truth, rtol=1e-9)
    draws = [vae.elbo(x, noise=keyed_noise(torch.arange(12), s), condition=condition) for s in range(400)]
    bound = torch.stack([elbo.total for elbo in draws])
    error = bound.std(0) / math.sqrt(400)
    assert ((bound.mean(0) - torch.tensor(truth)).abs() < 4.5 * error).all()


def test_classes_by_bayes_rule_are_those_of_the_exact_likelihoods() -> None:
    exact = LinearGaussian()
    x = np.random.default_rng(2).standard_normal((30, 5)) * 2
    bounds = np.array([[exact.log_prob(row, c) for c in range(3)] for row in x])
    found = log_probabilities(torch.from_numpy(bounds), LABEL.variables[0]).exp().numpy()
    joint = np.exp(bounds) * np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(found, joint / joint.sum(1, keepdims=True), rtol=1e-9)


# -- conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column", "classes"),
    [
        ("words", ["b", "a", "b"], ("a", "b")),
        ("numbers", [3, 1, 2], ("1", "2", "3")),
        ("counted", list(range(100)), tuple(map(str, range(100)))),
        ("flags", [True, False, True], ("False", "True")),
        ("gaps", [None, "x", "y"], ("x", "y")),
        ("years:class", [1990.0, 2020.0, math.nan], ("1990", "2020")),
        ("ages", list(range(20, 90)), None),
        ("ages:number", [1, 2, 3], None),
        ("reals", [0.5, 1.5, 2.0], None),
    ],
)
def test_a_column_is_classes_or_a_covariate(name: str, column: list[Any], classes: tuple[str, ...] | None) -> None:
    variable = Variable.of(name, np.asarray(column, dtype=None if None not in column else object))
    assert variable.name == name.partition(":")[0]
    assert variable.classes == classes
    if classes is None:
        assert variable.mean == pytest.approx(np.mean(column))
        assert variable.std == pytest.approx(np.std(column))


def test_rows_are_made_of_names_numbers_and_words() -> None:
    assert torch.equal(MIX.rows({"label": "b", "age": 50}, 2), torch.tensor([[1.0, 50.0]] * 2))
    assert torch.equal(MIX.rows(torch.tensor([1.0, 50.0]), 3), torch.tensor([[1.0, 50.0]] * 3))
    assert torch.equal(LABEL.rows(torch.tensor([0, 2]), 2), torch.tensor([[0.0], [2.0]]))
    encoded = MIX.encode({"label": ["a", None], "age": [1, 2]})
    assert encoded[0].tolist() == [0.0, 1.0]
    assert math.isnan(encoded[1, 0])


WRONG = {
    "class": (lambda: LABEL.rows({"label": "d"}, 1), "has the classes a, b, c, got 'd'"),
    "name": (lambda: LABEL.rows({"lable": "a"}, 1), "no condition 'lable'; known: label"),
    "shape": (lambda: MIX.rows(torch.zeros(3, 3), 3), "a row of 2 for each of 3"),
    "number": (lambda: LABEL.check(torch.tensor([[3.0]])), "0 to 2 .NaN: missing., got 3"),
    "no text": (lambda: LABEL.parse(["label"]), "NAME=VALUE, as in label=3"),
    "twice": (lambda: Conditions(LABEL.variables * 2), "different names"),
    "shares": (lambda: Variable("label", ("a",), (math.nan,)), "shares from 0 to 1"),
    "constant": (lambda: Variable.of("age:number", np.ones(3)), "one value alone"),
    "words": (lambda: Variable.of("age:number", np.array(["x"], dtype=object)), "write age:class"),
    "keys": (lambda: Variable.of("key", np.array([str(i) for i in range(1001)], dtype=object)), "1001 different values"),
    "none given": (lambda: conditional("mlp").elbo(torch.zeros(2, 1, 8, 8)), "reads the condition label, and none is given"),
    "no reader": (
        lambda: VAE(models.network("mlp", (1, 8, 8), 1), Gaussian(1)).elbo(torch.zeros(2, 1, 8, 8), condition={"label": "a"}),
        "reads no condition",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_condition_is_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_drawn_conditions_have_the_frequencies_of_the_training_data() -> None:
    drawn = LABEL.draw(4000, torch.Generator().manual_seed(0))[:, 0].long().bincount() / 4000
    assert ((drawn - torch.tensor([0.5, 0.25, 0.25])).abs() < 0.03).all()


# -- networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("conditions", [LABEL, MIX], ids=["label", "mix"])
def test_every_network_reads_its_condition(name: str, conditions: Conditions) -> None:
    vae = conditional(name, conditions).eval()
    x, rows = examples(name, 3), conditions.rows({"label": "a"}, 3)
    other = conditions.rows({"label": "b"}, 3)
    noise = keyed_noise(torch.arange(3))
    with torch.no_grad():
        for parameter in vae.network.parameters():  # layers that start at 0 would hide it
            parameter.add_(0.05)
    same, changed = (vae.network.infer(x, None, None, keyed_noise(torch.arange(3)), each) for each in (rows, other))
    assert not torch.equal(same.h, changed.h)
    assert torch.equal(same.h, vae.network.infer(x, None, None, noise, rows).h)
    mixed = torch.cat([rows[:1], other[1:]])  # each example has its own
    both = vae.network.infer(x, None, None, keyed_noise(torch.arange(3)), mixed)
    torch.testing.assert_close(both.h[:1], same.h[:1])
    torch.testing.assert_close(both.h[1:], changed.h[1:])
    unknown = torch.full_like(rows, math.nan)
    hidden = vae.network.infer(x, None, None, keyed_noise(torch.arange(3)), unknown).h
    assert hidden.isfinite().all()
    assert not torch.equal(hidden, same.h)
    (-vae.elbo(x, condition=torch.cat([mixed[:2], unknown[2:]])).total.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.network.embedding.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_saves_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    labels = torch.arange(24) % 3
    data = as_splits((examples(name, 24), examples(name, 6, 1), examples(name, 6, 2)), condition=by_split(labels))
    config = TrainingConfig(max_steps=4, batch_size=8, validate_every=2, condition_dropout=0.3, logger=())
    whole, halves = (VAE(network_for(name, data.conditions), Gaussian(1, levels=None)) for _ in range(2))
    fit(whole, data, config, out=tmp_path / "whole", progress=False, device="cpu")
    fit(halves, data, TrainingConfig(**{**vars(config), "max_steps": 2}), out=tmp_path / "halves", progress=False, device="cpu")
    again = VAE(network_for(name, data.conditions), Gaussian(1, levels=None))
    fit(again, data, config, out=tmp_path / "halves", progress=False, device="cpu", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    named = ModelConfig(network=name, prior="standard", **FAST)
    models.save(tmp_path / "model", whole, named, data.shape, data.scaling)
    loaded = models.load(tmp_path / "model").vae
    assert loaded.network.conditions == data.conditions
    noise = keyed_noise(torch.arange(3))
    x, rows = examples(name, 3), data.conditions.rows({"label": 1}, 3)
    assert torch.equal(
        loaded.network.infer(x, None, None, noise, rows).h,
        whole.network.infer(x, None, None, keyed_noise(torch.arange(3)), rows).h,
    )


def network_for(name: str, conditions: Conditions | None) -> Any:
    torch.manual_seed(3)
    return models.network(name, (1, 8, 8), 1, **FAST, conditions=conditions)


def by_split(labels: Tensor) -> dict[str, Tensor]:
    return {"train": labels, "validation": labels[:6], "test": labels[:6]}


@pytest.mark.parametrize("name", ["mlp", "hierarchical:8,8d8/1,8m1"])
def test_a_counterfactual_has_the_latents_of_its_example_and_another_condition(name: str) -> None:
    vae = conditional(name).eval()
    with torch.no_grad():
        for parameter in vae.network.parameters():
            parameter.add_(0.05)
    x, noise = examples(name, 2), lambda: keyed_noise(torch.arange(2))
    own = {"condition": {"label": "a"}, "noise": noise()}
    torch.testing.assert_close(
        vae.reconstruct(x, **own, shown_as={"label": "a"}), vae.reconstruct(x, **own | {"noise": noise()})
    )
    other = vae.reconstruct(x, **own | {"noise": noise()}, shown_as={"label": "b"})
    assert not torch.equal(other, vae.reconstruct(x, **own | {"noise": noise()}))


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_the_best_linear_vae_starts_a_conditional_one_without_its_condition(name: str) -> None:
    x = examples(name, 64)
    starts = [conditional(name), VAE(models.network(name, (1, 8, 8), 1, **FAST), Gaussian(1, Fixed(0.3), levels=None))]
    stds = [vae.start_from([x]) for vae in starts]
    assert stds[0] == pytest.approx(stds[1])
    noise = [keyed_noise(torch.arange(64)) for _ in range(3)]
    given = [starts[0].elbo(x, noise=noise[i], condition={"label": label}).total for i, label in enumerate("ab")]
    assert torch.equal(*given)
    torch.testing.assert_close(given[0], starts[1].elbo(x, noise=noise[2]).total)


def test_samples_of_each_class_share_their_latents() -> None:
    vae = conditional("mlp").eval()
    z = vae.network.prior.sample(4, torch.Generator().manual_seed(7))
    expected = torch.cat([vae.decode(z, condition={"label": name}) for name in "abc"])
    torch.testing.assert_close(sampled_per_class(vae, 4, seed=7), expected)


def test_hidden_conditions_are_a_share_of_the_examples() -> None:
    from sigma_vae.training.objective import _partly_hidden

    torch.manual_seed(0)
    hidden = _partly_hidden(torch.zeros(4000, 2), 0.25).isnan()
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert hidden[:, 0].double().mean() == pytest.approx(0.25, abs=0.03)


# -- priors --------------------------------------------------------------------------------------------------------------


def latents_of_classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    classes = torch.arange(n) % 3
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) * (1.0 + classes[:, None])
    return z + 5.0 * classes[:, None], classes[:, None].float()


def test_a_mixture_for_each_class_is_scipys_gaussian_of_that_class() -> None:
    z, classes = latents_of_classes(3000, 0)
    prior = ClassMixturePrior(2, LABEL, components=1)
    prior.fit_given(z, classes)
    within = sum(np.cov(z[classes[:, 0] == c].numpy().T, bias=True) / 3 for c in range(3))
    density = np.zeros(5)
    for c in range(3):
        mine = z[classes[:, 0] == c].double().numpy()
        covariance = (len(mine) * np.cov(mine.T, bias=True) + 2 * within) / (len(mine) + 2)
        truth = stats.multivariate_normal(mine.mean(0), covariance)
        rows = torch.full((5, 1), float(c))
        np.testing.assert_allclose(prior.given(rows).log_prob(z[:5]), truth.logpdf(z[:5].numpy()), rtol=2e-4)
        density += np.exp(truth.logpdf(z[:5].numpy())) / 3
        drawn = prior.given(rows[:1].expand(4000, -1)).sample(4000, torch.Generator().manual_seed(0))
        np.testing.assert_allclose(drawn.mean(0), truth.mean, atol=0.25)
    np.testing.assert_allclose(prior.given(torch.full((5, 1), math.nan)).log_prob(z[:5]), np.log(density), rtol=2e-4)
    np.testing.assert_allclose(prior.log_prob(z[:5]), np.log(density), rtol=2e-4)


def test_held_out_latents_choose_the_number_of_components_of_each_class() -> None:
    random = torch.Generator().manual_seed(0)
    classes = (torch.arange(1200) % 3)[:, None].float()
    z = torch.randn(1200, 2, generator=random) + 12 * torch.randint(2, (1200, 1), generator=random)
    prior = ClassMixturePrior(2, LABEL)
    prior.fit_given(z[:900], classes[:900], z[900:], classes[900:])
    assert prior.components == 2
    plain = MixturePrior(2, components=1)
    plain.fit(z[:900])
    assert prior.given(classes[900:]).log_prob(z[900:]).mean() > plain.log_prob(z[900:]).mean() + 0.5


def test_a_mixture_for_each_class_needs_one_label() -> None:
    with pytest.raises(ValueError, match="needs one class label, got the condition label, age"):
        models.prior("class-mixture", 2, conditions=MIX)
    with pytest.raises(ValueError, match="depends on a condition, and the model has none"):
        models.prior("learned", 2)


def shifted_latents(n: int, seed: int, unknown: float) -> tuple[Tensor, Tensor, np.ndarray]:
    """Latents of Gaussians whose mean is linear in a covariate and whose spread depends on a class; exact log-densities."""
    random = np.random.default_rng(seed)
    classes, ages = random.integers(0, 2, n), random.normal(40, 10, n)
    means = np.stack([(ages - 40) / 5, 4.0 * classes], 1)
    factors = np.array([[[1.0, 0.0], [0.8, 0.5]], [[0.7, 0.0], [0.0, 2.0]]])[classes]
    units = random.standard_normal((n, 2))
    z = means + np.einsum("nij,nj->ni", factors, units)
    exact = -0.5 * (units**2).sum(1) - np.log(np.linalg.det(factors)) - np.log(2 * np.pi)
    condition = np.stack([classes, ages], 1)
    condition[random.random(n) < unknown] = np.nan
    return torch.from_numpy(z).float(), torch.from_numpy(condition).float(), exact


def test_a_flow_given_the_condition_is_the_exact_density_of_linear_gaussian_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigma_vae.priors.flow.STEPS", 250)
    prior = ConditionalFlowPrior(2, MIX)
    z, condition, _ = shifted_latents(6000, 0, unknown=0.1)
    held, held_condition, _ = shifted_latents(1000, 1, unknown=0.1)
    fresh, fresh_condition, exact = shifted_latents(2000, 2, unknown=0.0)
    prior.fit_given(z, condition, held, held_condition)
    found = prior.given(fresh_condition).log_prob(fresh).double().numpy()
    assert 0 <= (exact - found).mean() + 3 * (exact - found).std() / 2000**0.5  # KL(p‖q) is not below 0
    assert (exact - found).mean() < 0.05
    assert np.abs(exact - found).mean() < 0.2

    one = torch.tensor([[1.0, 44.0]])
    draws = prior.given(one.expand(4000, -1)).sample(4000, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(draws.mean(0), [0.8, 4.0], atol=0.2)
    np.testing.assert_allclose(draws.std(0), [0.7, 2.0], atol=0.15)
    # Without a condition it is the mixture over all of them: its density integrates to one, and is lower where c is known.
    axis = torch.linspace(-14, 14, 140)
    grid = torch.cartesian_prod(axis, axis)
    assert prior.log_prob(grid).exp().sum() * (28 / 139) ** 2 == pytest.approx(1, abs=0.02)
    assert prior.log_prob(fresh).mean() < found.mean() - 0.5


def test_a_flow_given_the_condition_needs_it_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigma_vae.priors.flow.STEPS", 20)
    with pytest.raises(ValueError, match="call fit_given"):
        ConditionalFlowPrior(2, LABEL).fit(torch.zeros(30, 2))
    with pytest.raises(ValueError, match="give condition"):
        ConditionalFlowPrior(2, LABEL).fit_given(torch.zeros(30, 2), None)
    with pytest.raises(ValueError, match="depends on a condition, and the model has none"):
        models.prior("conditional-flow", 2)
    config = ModelConfig("mlp", "gaussian/fixed:0.3", **FAST)
    x, labels = examples("mlp", 60), torch.arange(60)[:, None].float() % 3
    data = as_splits(x, condition=labels[:, 0], levels=None)
    vae = models.vae(config, data.shape, data.scaling, conditions=data.conditions)
    vae.fit_prior(data.batches("train", 20), models.prior("conditional-flow", 2, conditions=data.conditions))
    models.save(tmp_path, vae, config, data.shape, data.scaling)
    again, z = models.load(tmp_path).vae.network.prior, torch.randn(60, 2)
    assert models.prior_name(again) == "conditional-flow"
    assert torch.equal(again.given(labels).log_prob(z), vae.network.prior.given(labels).log_prob(z))
    assert not torch.equal(again.given(labels).log_prob(z), again.given((labels + 1) % 3).log_prob(z))


# -- information ---------------------------------------------------------------------------------------------------------

GAIN, SPREAD, SHIFTS = np.array([[0.8, 0.3, 0.0], [0.0, -0.6, 0.9]]), np.array([0.6, 0.9]), np.array([[2.0, 0.0], [-1.0, 1.5]])


class ShiftedEncoder(nn.Module):
    """q(z|x, c) = N(gain x + shift of the class, spread²), in float64; a covariate is not read."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        mean = x.double() @ torch.from_numpy(GAIN).T + embedding[:, :2].double() @ torch.from_numpy(SHIFTS)
        return torch.cat([mean, 2 * torch.from_numpy(SPREAD).log().expand_as(mean)], 1)


class ConstantEncoder(nn.Module):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2)


class Nothing(nn.Module):
    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        return z.new_zeros(len(z), 3)


def shifted(conditions: Conditions) -> VAE:
    vae = VAE(
        FlatNetwork(ShiftedEncoder(), Nothing(), 2, conditions=conditions), Gaussian(3, Fixed(1.0), spatial_dims=0, levels=None)
    )
    with torch.no_grad():
        for parameter in vae.network.embedding.parameters():
            parameter.zero_()
        vae.network.embedding.linear.weight[:2, :2] = torch.eye(2)
    return vae


def labelled_batches(n: int, conditions: Conditions, seed: int) -> Batches:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.standard_normal((n, 3))).float()
    rows = torch.stack([torch.arange(n) % 2, 40 + 10 * torch.from_numpy(random.standard_normal(n))], 1).float()
    store = Labelled(InMemory(x), conditions, rows[:, : len(conditions.variables)])
    return Batches(store, Scaling(), 256)


@pytest.mark.parametrize("conditions", [Conditions(MIX.variables[:1]), MIX], ids=["class", "class and covariate"])
def test_the_rate_given_a_class_falls_into_its_closed_forms(conditions: Conditions) -> None:
    """Within a class q(z|c) is a Gaussian: I(x; z | c) and KL(q(z|c)‖N(0, I)) by their formulas in NumPy."""
    aggregate = GAIN @ GAIN.T + np.diag(SPREAD**2)
    log_det = np.linalg.slogdet(aggregate)[1]
    mutual = 0.5 * (log_det - 2 * np.log(SPREAD).sum())
    marginal = 0.5 * (np.trace(aggregate) - 2 - log_det + np.square(SHIFTS).sum(1).mean())
    found = information(shifted(conditions), labelled_batches(2000, conditions, 0), labelled_batches(2000, conditions, 1))
    error = 4 * found.mean_kl_nats.standard_error
    assert found.mean_kl_nats.mean == pytest.approx(mutual + marginal, abs=error)
    assert found.marginal_kl_at_least_nats < marginal + error
    assert found.mutual_information_at_most_nats > mutual - error
    if len(conditions.variables) > 1:
        assert found.log_sum_exp is None
        return
    assert found.marginal_kl_held_out_nats.mean == pytest.approx(marginal, abs=error)
    assert found.marginal_kl_moments_nats < marginal - 0.5  # a Gaussian of all classes
    bracket = found.log_sum_exp
    assert bracket.log_n_nats == pytest.approx(math.log(1000))
    assert bracket.mutual_information_at_least_nats - 0.05 < mutual < bracket.mutual_information_at_most_nats + 0.05


@pytest.mark.parametrize("name", NETWORKS[:4])
def test_every_network_of_single_examples_splits_its_rate_given_the_condition(name: str) -> None:
    vae, x = conditional(name), examples(name, 40)
    store = Labelled(InMemory(x), LABEL, torch.arange(40)[:, None].float() % 3)
    batches = Batches(store, Scaling(), 16)
    found = information(vae, batches, batches)
    mean_kl = found["mean_kl_nats"]
    with torch.no_grad():
        rows = [vae.network.infer(b.x, None, None, keyed_noise(b.positions), b.condition).kl.sum(1) for b in batches]
    assert (mean_kl if isinstance(mean_kl, float) else mean_kl.mean) == pytest.approx(float(torch.cat(rows).mean()), rel=1e-4)


# -- the classifier ------------------------------------------------------------------------------------------------------


def test_its_numbers_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    bounds = torch.from_numpy(5 * random.standard_normal((400, 3)))
    classes = torch.from_numpy(random.integers(0, 3, 400))
    label = LABEL.variables[0]
    found = log_probabilities(bounds, label)
    assert (found.argmax(1) == classes).double().mean() == accuracy_score(classes, found.argmax(1))

    def loss(temperature: float) -> float:
        return float(log_loss(classes, log_probabilities(bounds, label, temperature).exp().numpy(), labels=[0, 1, 2]))

    best = best_temperature(bounds, classes, label)
    assert loss(best) <= min(loss(t) for t in (0.5, 1.0, 0.9 * best, 1.1 * best))


def test_the_calibration_error_of_probabilities_that_hold_goes_to_zero() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), 20_000)
    classes = torch.tensor([random.choice(3, p=p) for p in probabilities[:4000]])
    log = torch.from_numpy(probabilities[:4000]).log()
    assert calibration_error(log, classes) < 0.03
    assert calibration_error((4 * log).log_softmax(1), classes) > 0.15


TWO = Conditions((Variable("sign", ("minus", "plus"), (0.25, 0.75)), Variable("place", ("a", "b", "c")), MIX.variables[1]))


class TwoLabels(nn.Module):
    """Decodes to a mean for each pair of classes, whatever the latents."""

    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        return embedding[:, :5] @ torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 0], [0, 1]]).double()


def test_each_of_several_labels_is_classified_with_the_others_held() -> None:
    """Latents that say nothing: the bound is exactly log N(x; mean of both classes, I), and Bayes' rule is SciPy's."""
    network = FlatNetwork(ConstantEncoder(), TwoLabels(), 1, conditions=TWO)
    vae = VAE(network, Gaussian(2, Fixed(0.7), spatial_dims=0, levels=None, mean="identity")).double().eval()
    with torch.no_grad():
        for parameter in network.embedding.parameters():
            parameter.zero_()
        network.embedding.linear.weight[:5, :5] = torch.eye(5)
    random, n = np.random.default_rng(0), 300
    signs, places = (random.random(n) < 0.75).astype(int), random.integers(0, 3, n)
    means = lambda sign, place: np.stack(np.broadcast_arrays(2.0 * sign - 1, place - 1.0), -1)  # noqa: E731
    x = means(signs, places) + 0.7 * random.standard_normal((n, 2))
    rows = torch.from_numpy(np.stack([signs, places, np.full(n, 40.0)], 1))
    rows[:7, 0] = math.nan
    batches = Batches(Labelled(InMemory(torch.from_numpy(x)), TWO, rows), Scaling(), 64)
    vae.calibrate(batches)
    own = means(signs, places) * np.where(np.arange(n) < 7, 0, 1)[:, None] ** [1, 0]  # an unknown sign adds nothing
    sigma = np.sqrt(np.square(x - own).mean())
    bounds, classes = class_bounds(vae, batches, name="place")
    expected = [stats.norm.logpdf(x, means(signs, np.full(n, c)), sigma).sum(1) for c in range(3)]
    np.testing.assert_allclose(bounds[7:], np.stack(expected, 1)[7:], atol=1e-5)
    assert torch.equal(classes, rows[:, 1])
    with pytest.raises(ValueError, match="of one class label, got no name; the model is given: sign, place"):
        class_bounds(vae, batches)

    report = evaluate(vae, batches, settings=EvaluationSettings(metrics=("classifier",)))
    sign = np.stack([stats.norm.logpdf(x, means(np.full(n, c), places), sigma).sum(1) for c in range(2)], 1) + np.log(
        [0.25, 0.75]
    )
    assert report.classifier["sign"].accuracy.mean == accuracy_score(signs[7:], sign.argmax(1)[7:])
    assert report.classifier["sign"].examples == n - 7
    assert report.classifier["place"].classes == 3
    truth = log_loss(signs[7:], np.exp(sign - np.logaddexp.reduce(sign, 1, keepdims=True))[7:])
    assert report.classifier["sign"].log_loss_at_1_nats.mean == pytest.approx(truth, rel=1e-4)
    assert Evaluation.from_json(json.loads(json.dumps(report.to_json()))).classifier["sign"].examples == n - 7


# -- data ----------------------------------------------------------------------------------------------------------------


def rows_of(splits: Any, split: str = "train") -> Tensor:
    return splits.store(split).condition(torch.arange(len(splits.store(split))))


def test_labels_stay_with_their_examples_through_hold_out_and_shuffling() -> None:
    values = np.arange(200, dtype=np.uint8).reshape(-1, 1, 1, 1)
    splits = as_splits(np.broadcast_to(values, (200, 1, 2, 2)).copy(), condition=np.arange(200) % 4, levels=256)
    for split in ("train", "validation", "test"):
        for batch in splits.batches(split, 8, shuffle=True, rank=1, world_size=2):
            assert torch.equal((batch.x[:, 0, 0, 0] * 255).round() % 4, batch.condition[:, 0])


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_stratified_splits_have_the_shares_of_the_whole(fraction: float) -> None:
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    splits = as_splits(np.zeros((200, 1, 2, 2), np.uint8), condition=labels, stratify=True, test_fraction=fraction)
    counts = rows_of(splits, "test")[:, 0].long().bincount()
    np.testing.assert_allclose(counts, fraction * np.array([100, 60, 40]), atol=1)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 200
    assert "in proportion to label" in splits.record["preprocessing"]


def test_whole_files_are_not_stratified(tmp_path: Path) -> None:
    from PIL import Image

    pages = [Image.fromarray(np.full((8, 8), 50 * page, np.uint8)) for page in range(3)]
    for number in range(6):
        place = tmp_path / "scans" / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        pages[0].save(place / f"{number}.tif", save_all=True, append_images=pages[1:])
    config = DataConfig(str(tmp_path / "scans"), condition=("label",))
    assert load(config).conditions.variables[0].frequencies == (0.5, 0.5)
    with pytest.raises(ValueError, match="held out by whole files"):
        load(DataConfig(config.source, condition=("label",), stratify=True))


def test_other_labels_are_other_data() -> None:
    x = np.zeros((20, 1, 2, 2), np.uint8)
    marks = [as_splits(x, condition=labels).record["fingerprint"] for labels in (np.arange(20) % 2, np.arange(20) % 4 // 2)]
    assert marks[0] != marks[1]


def table(folder: Path) -> str:
    frame = pd.DataFrame({"height": np.linspace(1, 2, 40), "age": np.arange(40) + 20, "sex": ["f", "m"] * 20, "no": range(40)})
    frame.to_csv(folder / "table.csv", index=False)
    frame.to_parquet(folder / "table.parquet")
    return str(folder / "table.csv")


def pictures(folder: Path) -> str:
    from PIL import Image

    for number in range(20):
        place = folder / "pictures" / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 10 * number, np.uint8)).save(place / f"{number}.png")
    return str(folder / "pictures")


def arrays(folder: Path) -> str:
    for number in range(20):
        place = folder / "arrays" / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{number}.npy", np.full((8, 8), number, np.uint8))
    return str(folder / "arrays")


def videos(folder: Path, split: str = "") -> str:
    """Two clips of two frames for each video, in GIFs and in folders of frames; class cat is dark."""
    from PIL import Image

    for number in range(8):
        place = folder / "videos" / split / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        frames = [Image.fromarray(np.full((8, 8), (20 if number % 2 else 200) + 4 * i, np.uint8)) for i in range(4)]
        if number < 4:
            frames[0].save(place / f"{number}.gif", save_all=True, append_images=frames[1:])
        else:
            (place / str(number)).mkdir()
            for i, frame in enumerate(frames):
                frame.convert("RGB").save(place / str(number) / f"{i}.png")
    return str(folder / "videos")


def archive(folder: Path) -> str:
    values = np.arange(20, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((20, 1, 8, 8), np.uint8)
    np.savez(folder / "a.npz", x_train=values, y_train=np.arange(20) % 2, x_test=values, y_test=np.arange(20) % 2)
    return str(folder / "a.npz")


def hdf5(folder: Path) -> str:
    import h5py

    with h5py.File(folder / "a.h5", "w") as file:
        file["images"] = np.zeros((20, 4, 4), np.uint8)
        file["kind"] = ["p", "q"] * 10
    return str(folder / "a.h5")


SOURCES = {
    "csv": (table, ("age:number,sex",), (None, ("f", "m")), {}),
    "parquet": (lambda f: table(f).replace("csv", "parquet"), ("sex",), (("f", "m"),), {}),
    "pictures": (pictures, ("label",), (("cat", "dog"),), {}),
    "arrays": (arrays, ("label",), (("cat", "dog"),), {}),
    "videos": (videos, ("label",), (("cat", "dog"),), {"clips": ClipConfig(frames=2)}),
    "npz": (archive, ("y",), (("0", "1"),), {"layout": "n-c-h-w"}),
    "hdf5": (hdf5, ("kind",), (("p", "q"),), {"columns": ("images",)}),
    "digits": (lambda f: "digits", ("label",), (tuple("0123456789"),), {}),
}


@pytest.mark.parametrize(("make", "condition", "classes", "options"), SOURCES.values(), ids=SOURCES.keys())
def test_every_kind_of_source_brings_its_labels(
    make: Any, condition: tuple[str, ...], classes: Any, options: Any, tmp_path: Path
) -> None:
    splits = load(DataConfig(make(tmp_path), condition=condition, **options))
    assert splits.conditions is not None
    assert tuple(each.classes for each in splits.conditions.variables) == classes
    assert all(rows_of(splits, split).isfinite().all() for split in ("train", "validation", "test"))


def test_columns_that_are_given_are_not_modelled(tmp_path: Path) -> None:
    splits = load(DataConfig(table(tmp_path), condition=("age", "sex")))
    assert splits.record["columns"] == ["height", "no"]


def test_labels_of_pictures_are_their_folders(tmp_path: Path) -> None:
    splits = load(DataConfig(pictures(tmp_path), condition=("label",)))
    for name, row in zip(splits.names["train"], rows_of(splits), strict=True):
        assert name.startswith(splits.conditions.variables[0].classes[int(row)])


@pytest.mark.parametrize("split", ["", "train"])
def test_labels_of_videos_are_their_folders(tmp_path: Path, split: str) -> None:
    splits = load(DataConfig(videos(tmp_path, split), condition=("label",), clips=ClipConfig(frames=2)))
    assert splits.clips
    for part in ("train", "validation", "test"):
        clips = splits.store(part).take(torch.arange(len(splits.store(part)))).float()
        assert torch.equal((clips.flatten(1).mean(1) > 128).float(), rows_of(splits, part)[:, 0])  # cat is 0


def test_videos_without_subfolders_have_no_labels(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(4):
        (tmp_path / "train").mkdir(exist_ok=True)
        frames = [Image.fromarray(np.full((8, 8), 9 * i, np.uint8)) for i in range(4)]
        frames[0].save(tmp_path / "train" / f"{number}.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has no label to condition on"):
        load(DataConfig(str(tmp_path), condition=("label",), clips=ClipConfig(frames=2)))


@pytest.mark.parametrize(
    ("source", "message"),
    [("digits", "has no wrong to condition on, only label"), ("csv", "has no column wrong to condition on, only height, age")],
)
def test_a_condition_that_is_not_there_is_told(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(DataConfig(table(tmp_path) if source == "csv" else source, condition=("wrong",)))


def test_objects_bring_their_labels() -> None:
    from datasets import Dataset

    frame = pd.DataFrame({"x": np.linspace(0, 1, 20), "y": ["u", "v"] * 10})
    table = Dataset.from_dict({"x": [[0.0, i / 20] for i in range(20)], "y": ["u", "v"] * 10})
    tensors = torch.utils.data.TensorDataset(torch.zeros(20, 1, 8, 8), torch.arange(20) % 2)
    found = [
        as_splits(frame, condition="y"),
        as_splits(frame[["x"]], condition={"y": frame["y"]}),
        as_splits(table, condition="y", columns=["x"]),
        as_splits(tensors, condition="label"),
        as_splits(torch.zeros(20, 1, 8, 8), condition=["u", "v"] * 10),
    ]
    assert [each.conditions.variables[0].classes for each in found] == [("u", "v")] * 3 + [("0", "1"), ("u", "v")]


# -- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditions") / "digits"
    config = RunConfig(
        DataConfig("digits", condition=("label",), stratify=True),
        ModelConfig(network="mlp", latent_dim=4, width=64),
        TrainingConfig(max_steps=300, learning_rate=3e-3, validate_every=150, logger=()),
        device="cpu",
    )
    runs.train(config, folder, progress=False)
    runs.evaluate_run(folder, EvaluationSettings(metrics=("classifier", "iwae"), draws=4), device="cpu")
    return folder


def test_a_run_says_what_its_bounds_are_given_and_classifies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((run / "evaluation.json").read_text())
    assert report["condition"] == ["label"]
    assert report["classifier"]["accuracy"]["mean"] > 0.85
    assert report["classifier"]["log_loss_nats"]["mean"] < math.log(10) / 2
    assert main(["evaluate", str(run), "--metrics", "classifier"]) == 0
    assert "bounds are on log p(x | label)" in " ".join(capsys.readouterr().out.split())


def test_scores_of_all_classes_are_bounds_of_each(run: Path) -> None:
    assert main(["score", str(run)]) == 0
    scores = pd.read_csv(run / "scores-test.csv")
    probabilities = scores[[f"probability[label={c}]" for c in range(10)]]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-9)
    opened = runs.open_run(run)
    bounds, classes = class_bounds(opened.vae, opened.data.batches("test", 50))
    np.testing.assert_allclose(scores[[f"bound_nats[label={c}]" for c in range(10)]], bounds, rtol=1e-5, atol=1e-4)
    own = bounds[torch.arange(len(bounds)), classes.long()] / (-64 * math.log(2))
    np.testing.assert_allclose(scores["bits_per_dim"], own, rtol=1e-4)


def test_the_command_line_makes_samples_grids_codes_and_counterfactuals(run: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "s.npz")]
    assert main(["sample", str(run), "--condition", "label=3", "--n", "5", *options]) == 0
    assert np.load(tmp_path / "s.npz")["samples"].shape == (5, 1, 8, 8)
    assert main(["sample", str(run), "--per-class", "4", "--prior", "standard", *options]) == 0
    assert np.load(tmp_path / "s.npz")["samples"].shape == (40, 1, 8, 8)
    assert main(["encode", str(run), "--out", str(tmp_path / "c.npz")]) == 0
    assert main(["reconstruct", str(run), "--condition", "label=3", "--n", "8", *options]) == 0
    other = np.load(tmp_path / "s.npz")["reconstructions"]
    assert main(["reconstruct", str(run), "--n", "8", *options]) == 0
    assert np.abs(np.load(tmp_path / "s.npz")["reconstructions"] - other).max() > 0.1
    assert main(["sample", str(run), "--condition", "label=11"]) == 1
    assert (run / "samples-per-class.png").exists()
    for seen in (["--condition", "label=3"], ["--condition", "label=8"], []):
        assert main(["traverse", str(run), "--n", "2", "--steps", "3", *seen, *options]) == 0
    assert np.load(tmp_path / "s.npz")["traversals"].shape == (2, 3, 1, 8, 8)
    assert main(["interpolate", str(run), "--n", "2", "--steps", "4", *options]) == 0
    assert np.load(tmp_path / "s.npz")["interpolations"].shape == (2, 4, 1, 8, 8)


def test_other_data_are_read_with_the_classes_of_the_model(run: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    few = found.target >= 5  # their own numbers would begin at 0 with the class 5
    np.savez(tmp_path / "new.npz", x=found.images[few].astype(np.uint8), label=found.target[few])
    assert main(["score", str(run), "--data", str(tmp_path / "new.npz"), "--out", str(tmp_path / "s.csv")]) == 0
    scores = pd.read_csv(tmp_path / "s.csv")
    chosen = scores[[f"probability[label={c}]" for c in range(10)]].to_numpy().argmax(1)
    assert (chosen == found.target[few]).mean() > 0.85


def test_a_learned_prior_is_trained_saved_and_kept(tmp_path: Path) -> None:
    config = RunConfig(
        DataConfig("digits", condition=("label",)),
        ModelConfig(network="mlp", latent_dim=2, width=8, prior="learned"),
        TrainingConfig(max_steps=20, logger=()),
        device="cpu",
    )
    runs.train(config, tmp_path / "run", progress=False)
    vae = runs.open_run(tmp_path / "run").vae
    assert vae.network.prior.is_learned
    assert vae.network.prior.linear.weight.abs().max() > 0
    assert "standard_prior" not in json.loads((tmp_path / "run" / "evaluation.json").read_text())


def test_a_step_that_broke_is_repeated_with_its_condition(tmp_path: Path) -> None:
    config = RunConfig(
        DataConfig("digits", condition=("label",)),
        ModelConfig(network="mlp", latent_dim=2, width=8, prior="standard"),
        TrainingConfig(max_steps=60, learning_rate=1e25, condition_dropout=0.2, ema_decay=None, logger=()),
        device="cpu",
    )
    with pytest.raises(NonFiniteLossError):
        runs.train(config, tmp_path / "run", progress=False)
    found = runs.rerun(tmp_path / "run")
    assert found["begins_in"]


def test_data_of_other_classes_are_refused() -> None:
    data = as_splits(torch.rand(20, 1, 8, 8), condition=torch.arange(20) % 4)
    with pytest.raises(ValueError, match="perhaps with other classes; make the network with"):
        fit(conditional("mlp"), data, TrainingConfig(max_steps=1), progress=False, device="cpu")
    with pytest.raises(ValueError, match="and this network reads none"):
        fit(
            VAE(models.network("mlp", (1, 8, 8), 1), Gaussian(1)),
            torch.rand(20, 1, 8, 8),
            TrainingConfig(max_steps=1, condition_dropout=0.1),
            progress=False,
            device="cpu",
        )


def test_fit_and_evaluate_take_labels_from_python() -> None:
    x, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    data = as_splits(x, condition=labels)
    vae = VAE(models.network("mlp", (1, 8, 8), 1, **FAST, conditions=data.conditions), Gaussian(1, levels=None))
    fit(vae, x, TrainingConfig(max_steps=3, logger=()), progress=False, device="cpu", condition=labels)
    report = evaluate(vae, data, settings=EvaluationSettings(metrics=("classifier",)))
    assert report.condition == ["label"]
    assert 0 <= report.classifier.accuracy.mean <= 1
