"""The start that is solved: the best linear VAE, against closed forms and SciPy, for every likelihood."""

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from safetensors.torch import load_file, save_file
from scipy import special
from test_discrete import ALL as UNSCALED
from test_discrete import make as unscaled
from torch import Tensor, nn

from sigma_vae import (
    VAE,
    Bernoulli,
    FlatNetwork,
    Gaussian,
    HierarchicalNetwork,
    HierarchyPlan,
    Multinomial,
    NegativeBinomial,
    Optimal,
    PerPixel,
    Poisson,
    SpatialNetwork,
    models,
    runs,
    spatial,
)
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, EvaluationSettings, HardwareConfig, ModelConfig, TrainingConfig
from sigma_vae.data import as_splits, load
from sigma_vae.evaluation import evaluate
from sigma_vae.networks import conv, mlp, residual
from sigma_vae.networks.hierarchical import hierarchical
from sigma_vae.networks.principal import MARGIN, _logit, principal
from sigma_vae.training import NonFiniteLossError, fit
from sigma_vae.training.checkpoints import FORMAT, write_sealed
from sigma_vae.training.objective import FILE, first_broken, load_broken_step, with_saved_step
from sigma_vae.training.step import Stepper
from sigma_vae.types import Likelihood, Network

SHAPE = (1, 8, 8)
LATENTS = 3


def linear_data(n: int = 400, dims: int = 6, seed: int = 0) -> Tensor:
    """Rows with the very moments of a linear-Gaussian model, in float64."""
    random = np.random.default_rng(seed)
    raw = random.standard_normal((n, dims))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / n)).T
    weight = np.linalg.qr(random.standard_normal((dims, LATENTS)))[0] * [1.5, 1.0, 0.7]
    covariance = weight @ weight.T + 0.25 * np.eye(dims)
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + np.linspace(-1, 1, dims))


def sigma_points(vae: VAE, x: Tensor):
    """ELBO over posterior draws whose mean and covariance are exact: what is quadratic in z has its very expectation."""
    shape = vae.network.latents.shapes[0]
    eye = math.sqrt(math.prod(shape)) * torch.eye(math.prod(shape), dtype=x.dtype)
    unit = torch.cat([eye, -eye]).reshape(-1, 1, *shape).expand(-1, len(x), *shape)
    inference = vae.network.draw(x, vae.network.posterior(x), unit)
    flat = inference.h.flatten(0, 1), inference.target.flatten(0, 1)
    return vae.likelihood(*flat).log_prob(flat[1]).mean() - inference.kl.mean()


def started_on(x: Tensor, network: Network, likelihood: Likelihood) -> VAE:
    vae = VAE(network, likelihood).to(x.dtype)
    vae.start_from(x.split(100))
    return vae


@pytest.mark.parametrize(
    ("mean", "scale"),
    [("identity", 1e-6), ("identity", 1.0), ("identity", 1e6), ("unit", 0.05)],
    ids=["small", "as it is", "large", "through a sigmoid"],
)
def test_on_linear_data_the_start_is_the_optimum(mean, scale):
    x = (scale * linear_data() + 0.5 * (mean == "unit")).unflatten(1, (1, 2, 3))
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 2 * LATENTS))
    network = FlatNetwork(encoder, nn.Sequential(nn.Linear(LATENTS, 6), nn.Unflatten(1, (1, 2, 3))), LATENTS)
    vae = started_on(x, network, Gaussian(1, Optimal(), mean=mean, levels=None))
    vae.likelihood.set_floor(std=scale)
    bound = sigma_points(vae, x)
    (-bound).backward()
    for name, p in vae.named_parameters():  # in units of the data, so that the size of a gradient means the same at every scale
        if name.startswith("network.decoder") and mean == "unit":
            continue  # what it adds to the logit is not linear in the mean
        decoders = "network.decoder", "network.linear.decoder.weight", "network.linear.decoder.bias"
        unit = scale if name.startswith(decoders) else 1.0
        unit = unit / scale if name == "network.encoder.1.weight" else unit
        assert float(unit * p.grad.abs().max()) < 1e-6, name
    centred = (x - x.mean(0)).flatten(1).numpy()
    covariance = centred.T @ centred / len(x)
    exact = -0.5 * (6 * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + 6)  # the data have the model's moments
    assert float(bound.detach()) == pytest.approx(exact, abs=1e-3)


def maps_of(stride: int, axes: int, picture_channels: int) -> SpatialNetwork:
    """A network of maps with two latent channels, for pictures of 4×6 or series of 12."""
    down, up = (nn.Conv2d, nn.ConvTranspose2d) if axes == 2 else (nn.Conv1d, nn.ConvTranspose1d)
    space = [size // stride for size in ((4, 6) if axes == 2 else (12,))]
    halves = down(2, 4, stride, stride=stride), up(2, 2, stride, stride=stride)
    return SpatialNetwork(*halves, 2, space, stride, picture_channels=picture_channels)


@pytest.mark.parametrize(
    ("shape", "stride", "picture_channels"),
    [((2, 4, 6), 2, 0), ((2, 4, 6), 2, 2), ((2, 12), 3, 0)],
    ids=["maps", "pictures", "series"],
)
def test_maps_start_at_the_linear_model_of_each_patch(shape, stride, picture_channels):
    axes = len(shape) - 1
    x = linear_data(300, 24).cumsum(1).reshape(-1, *shape) / 20 + 0.5
    vae = VAE(maps_of(stride, axes, picture_channels), Gaussian(2, spatial_dims=axes, mean="identity", levels=None)).double()
    std = vae.start_from(x.split(100))
    bound = sigma_points(vae, x)
    if axes == 2:
        cut = x.numpy().reshape(-1, 2, 2, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 8)
    else:
        cut = x.numpy().reshape(-1, 2, 4, 3).transpose(0, 2, 1, 3).reshape(-1, 6)
    dims, places = cut.shape[1], len(cut) // len(x)
    variances = np.linalg.eigvalsh(np.cov(cut.T, bias=True))[::-1]
    noise = variances[2:].mean()
    exact = -0.5 * (dims * math.log(2 * math.pi * math.e) + np.log(variances[:2]).sum() + (dims - 2) * math.log(noise))
    assert float(bound.detach()) == pytest.approx(places * exact, abs=1e-3)
    assert std == pytest.approx(math.sqrt(noise), rel=1e-9)
    larger = torch.cat([x[:4], x[4:8]], -1)  # places do not see each other
    again = vae.network.decode(vae.encode(larger).loc)
    torch.testing.assert_close(again, torch.cat([vae.network.decode(vae.encode(part).loc) for part in (x[:4], x[4:8])], -1))


def best_linear_bound(x: np.ndarray, side: int, latents: int) -> tuple[float, float]:
    """Log-likelihood in nats of probabilistic PCA of each patch, summed over those of an example; and the std of its noise."""
    n, channels, rows, columns = x.shape
    cut = x.reshape(n, channels, rows // side, side, columns // side, side).transpose(0, 2, 4, 1, 3, 5)
    cut = cut.reshape(-1, channels * side**2)
    variances, dims = np.linalg.eigvalsh(np.cov(cut.T, bias=True))[::-1], cut.shape[1]
    latents = min(latents, dims - 1)  # the noise has a direction left
    noise = variances[latents:].mean()
    log_determinant = np.log(variances[:latents]).sum() + (dims - latents) * math.log(noise)
    return -0.5 * len(cut) / n * (dims * math.log(2 * math.pi * math.e) + log_determinant), math.sqrt(noise)


@pytest.mark.parametrize(("side", "plan"), [(4, "4,4d2,2,2d2/1,2m1,2,4m2"), (7, "4,4d2,2,2d2/1,2m1,4m2"), (4, "2,2d2/1x3,2m1")])
def test_a_ladder_starts_at_the_linear_model_of_the_likeliest_patches(side, plan):
    plan = HierarchyPlan.parse(plan)
    x = (linear_data(300, 2 * side * side).cumsum(1) / 20 + 0.5).reshape(-1, 2, side, side)
    vae = VAE(HierarchicalNetwork((2, side, side), 2, plan, latent_dim=2, width=8), Gaussian(2, mean="identity", levels=None))
    vae = vae.double()
    std = vae.start_from(x.split(100))
    whole = nn.functional.pad(x, (0, side % 4 and 1, 0, side % 4 and 1), mode="replicate").numpy()
    layers = Counter(block.resolution for block in plan.decoder)
    bounds = [best_linear_bound(whole, whole.shape[-1] // resolution, 2 * count) for resolution, count in layers.items()]
    exact, noise = max(bounds)
    assert std == pytest.approx(noise, rel=1e-9)
    if side == 4:  # a padded image has the model's patches, but is a part of what they model
        shapes = [(2, block.resolution, block.resolution) for block in plan.decoder]
        sizes = [math.prod(shape) for shape in shapes]
        eye = math.sqrt(sum(sizes)) * torch.eye(sum(sizes), dtype=x.dtype)
        inferred = []
        for point in torch.cat([eye, -eye]):  # draws whose mean and covariance are exact
            parts = iter(part.reshape(shape) for part, shape in zip(point.split(sizes), shapes, strict=True))
            inferred.append(vae.network.infer(x, noise=lambda shape, parts=parts: next(parts).expand(shape)))
        many = x.repeat(len(inferred), 1, 1, 1)  # one σ for all draws
        log_prob = vae.likelihood(torch.cat([each.h for each in inferred]), many).log_prob(many)
        bound = log_prob.mean() - torch.cat([each.kl for each in inferred]).sum(-1).mean()
        assert float(bound.detach()) == pytest.approx(exact, abs=1e-3)


def test_other_units_give_the_same_start():
    x = linear_data()
    own, other = (
        started_on(each, mlp((6,), 6, latent_dim=LATENTS), Gaussian(6, spatial_dims=0, levels=None)).network.linear
        for each in (x, 100 * x)
    )
    signs = torch.sign((own.encoder.directions * other.encoder.directions).sum(1))
    torch.testing.assert_close(other.encoder.gain, own.encoder.gain)
    torch.testing.assert_close(other.encoder.log_variance, own.encoder.log_variance)
    torch.testing.assert_close(100 * other.encoder.directions * signs[:, None], own.encoder.directions)
    torch.testing.assert_close(other.decoder.weight * signs / 100, own.decoder.weight)


def test_near_its_ends_a_mean_is_bent_and_stays_between_them():
    inside = torch.linspace(MARGIN, 1 - MARGIN, 50, dtype=torch.float64)
    np.testing.assert_allclose(_logit(inside), special.logit(inside.numpy()), rtol=1e-12)
    beyond = torch.tensor([-0.5, 0.0, 0.5 * MARGIN, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: _logit(m), beyond)
    bent = torch.sigmoid(_logit(beyond.detach()))
    assert (bent.diff() > 0).all()
    assert ((bent > 0) & (bent < 1)).all()
    slopes = torch.autograd.grad(_logit(beyond).sum(), beyond)[0]  # the logit's own at the margin
    np.testing.assert_allclose(slopes, 1 / (MARGIN * (1 - MARGIN)), rtol=1e-12)


def test_a_path_that_was_saved_before_there_were_unit_channels_is_linear(digits):
    vae = started_on(digits.values("train")[:100], mlp(SHAPE, 1, latent_dim=2), Gaussian(1, mean="unit"))
    older = {name: value for name, value in vae.state_dict().items() if not name.endswith("unit_channels")}
    again = VAE(mlp(SHAPE, 1, latent_dim=2), Gaussian(1, mean="unit"))
    again.load_state_dict(older)
    z = torch.eye(2)
    path = again.network.linear.decoder
    torch.testing.assert_close(path(z).flatten(1), z @ path.weight.T + path.bias.flatten())


LIKELIHOODS = {case.name: lambda case=case: case.make(mean="unit") for case in CASES} | {
    family.name: lambda family=family: unscaled(family) for family in UNSCALED if family.channels == 1
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_starts_nearer_to_its_data(name, digits):
    make = LIKELIHOODS[name]
    likelihood = make()
    top = (likelihood.levels or 256) - 1
    x = torch.round(digits.values("train")[:300] * top) / top
    bounds = []
    for start in (False, True):
        torch.manual_seed(0)
        vae = VAE(mlp(SHAPE, likelihood.in_channels, latent_dim=8, width=32), make())
        if start:
            vae.start_from(x.split(100))
        vae.calibrate([x])
        vae.train()
        bounds.append(float(vae.elbo(x).total.mean().detach()))
    assert math.isfinite(bounds[1])
    if any(word in name for word in ("optimal", "per-", "bernoulli")):  # those whose σ follows, and a coin
        assert bounds[1] > bounds[0]


COUNTS = {"poisson": Poisson, "negative binomial": NegativeBinomial, "multinomial": Multinomial}
OF_COUNTS = {
    "mlp": ((24,), lambda channels: mlp((24,), channels, latent_dim=3, width=16)),
    "maps": ((2, 12), lambda channels: spatial((2, 12), channels, width=8, plan="f2c3")),
    "ladder": ((2, 4, 4), lambda channels: hierarchical((2, 4, 4), channels, latent_dim=3, width=8)),
}


@pytest.mark.parametrize("network", OF_COUNTS)
@pytest.mark.parametrize("family", COUNTS)
def test_latents_of_counts_have_unit_moments_at_the_start(family, network):
    """The encoder reads log(1 + x), and so do the linear directions: E m² + v = 1 for each latent that is used."""
    shape, make = OF_COUNTS[network]
    factors = linear_data(200, math.prod(shape)).reshape(-1, *shape)
    x = torch.poisson(30 * torch.exp(factors), generator=torch.Generator().manual_seed(0)).float()
    likelihood = COUNTS[family](shape[0], spatial_dims=len(shape) - 1)
    vae = VAE(make(likelihood.in_channels), likelihood)
    vae.start_from([x])
    with torch.no_grad():
        if network == "ladder":
            rate = vae.network.infer(x).kl.sum(-1).mean()
            assert 0 < rate < 50  # nats; counts in place of their logarithms give thousands
        else:
            posterior = vae.network.posterior(x)
            second = (posterior.loc.square() + posterior.scale.square()).movedim(1, 0).flatten(1).mean(1)
            torch.testing.assert_close(second, torch.ones(3), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def digits():
    return as_splits("digits")


NETWORKS = {"mlp": mlp, "conv": conv, "residual": residual}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_each_network_is_linear_at_the_start(make, digits):
    x = digits.values("train")[:200]
    vae = started_on(x, make(SHAPE, 1, latent_dim=5), Gaussian(1, mean="identity", levels=17))
    fitted = principal(lambda: x.split(100), 5)
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = fitted.mean + z @ (fitted.directions * (fitted.variances - fitted.noise_variance).sqrt()).T
    torch.testing.assert_close(vae.network.decode(z.float()).flatten(1).double(), expected, rtol=1e-4, atol=1e-5)


def test_latents_that_no_direction_is_left_for_start_at_the_prior(digits):
    x = digits.values("train")[:9]
    vae = started_on(x, mlp(SHAPE, 1, latent_dim=20), Gaussian(1, mean="unit"))
    posterior = vae.encode(x)
    torch.testing.assert_close(posterior.loc[:, 4:], torch.zeros(9, 16))
    torch.testing.assert_close(posterior.scale[:, 4:], torch.ones(9, 16))


def test_predicted_scales_start_at_the_residuals(digits):
    x = digits.values("train")[:500]
    vae = VAE(mlp(SHAPE, 2, latent_dim=8), Gaussian(1, PerPixel(), mean="unit", levels=17))
    std = vae.start_from(x.split(100))
    raw = vae.network.decode(torch.zeros(1, 8))[:, 1]
    torch.testing.assert_close(raw.exp(), torch.full_like(raw, std))


class Plain(nn.Module):
    """An encoder or decoder that ends with something else than weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(self.inner(x))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_network_that_cannot_be_silenced_is_refused_as_it_was(half, digits):
    halves = dict(mlp(SHAPE, 1, latent_dim=4, width=16).named_children())
    halves[half] = Plain(halves[half])
    vae = VAE(FlatNetwork(halves["encoder"], halves["decoder"], 4), Gaussian(1, mean="unit", levels=17))
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(ValueError, match=rf"the {half} does not give 0 .*start=random"):
        vae.start_from(digits.values("train")[:200].split(100))
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_a_network_that_cannot_be_silenced_is_refused_with_a_way_out(digits):
    network = mlp(SHAPE, 1, latent_dim=4, width=16)
    own = FlatNetwork(Plain(network.encoder), network.decoder, 4)
    vae, before = VAE(own, Gaussian(1, mean="unit", levels=17)), copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match=r"the encoder does not give 0 .*start=random"):
        fit(vae, digits, TrainingConfig(start="principal", max_steps=2), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    fit(vae, digits, TrainingConfig(max_steps=2), progress=False)  # auto takes another start
    assert own.linear is None
    fit(vae, digits, TrainingConfig(start="random", max_steps=2), progress=False)


def test_data_without_variance_start_at_random(capsys):
    vae = VAE(mlp(SHAPE, 1, latent_dim=2), Gaussian(1, mean="unit"))
    fit(vae, np.zeros((40, 8, 8), np.uint8), TrainingConfig(max_steps=2))
    assert "start: random, as the data have no variance" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["mlp", "spatial:f2c2"])
def test_a_started_model_is_saved_and_loaded(network, tmp_path: Path, digits):
    config = ModelConfig(network=network, latent_dim=4 if network == "mlp" else None, width=16)
    vae = models.vae(config, SHAPE, digits.scaling)
    fit(vae, digits, TrainingConfig(max_steps=5), progress=False)
    models.save(tmp_path, vae, config, SHAPE, digits.scaling)
    again = models.load(tmp_path).vae
    x = digits.values("test")[:5]
    assert torch.equal(again.encode(x).loc, vae.encode(x).loc)
    plain = models.vae(config, SHAPE, digits.scaling)
    plain.load_state_dict(vae.state_dict())
    plain.load_state_dict(models.vae(config, SHAPE, digits.scaling).state_dict(), strict=False)
    assert plain.network.linear is None  # the form is that of the weights


def test_a_ladder_takes_the_linear_start_if_it_is_asked_for(tmp_path: Path, digits):
    config, x = ModelConfig(network="hierarchical:tiny", width=16), digits.values("test")[:5]
    vae = models.vae(config, SHAPE, digits.scaling)
    fit(vae, digits, TrainingConfig(max_steps=2), progress=False)
    assert vae.network.linear is None
    fit(vae, digits, TrainingConfig(max_steps=5, start="principal"), progress=False)
    models.save(tmp_path, vae, config, SHAPE, digits.scaling)
    again = models.load(tmp_path).vae
    assert again.network.linear is not None
    assert torch.equal(again.network.infer(x, noise=torch.zeros).h, vae.network.infer(x, noise=torch.zeros).h)


@pytest.mark.parametrize(
    "name", ["encoder.centre", "encoder.directions", "encoder.gain", "decoder.weight", "decoder.bias", "decoder.unit_channels"]
)
def test_a_path_of_other_sizes_is_refused(name, tmp_path: Path, digits):
    config = ModelConfig(network="mlp", latent_dim=4, width=16)
    vae = models.vae(config, SHAPE, digits.scaling)
    vae.start_from([digits.values("train")[:50]])
    models.save(tmp_path, vae, config, SHAPE, digits.scaling)
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"network.linear.{name}"] = torch.zeros(7, 7)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights"):
        models.load(tmp_path)


def test_the_start_survives_compilation_and_autocast(digits):
    x = digits.values("train")[:100]
    vae = started_on(x, mlp(SHAPE, 1, latent_dim=4, width=16), Gaussian(1, mean="unit")).eval()
    vae.calibrate([x])
    expected = vae.network.decode(vae.encode(x).loc)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vae.network.decode(vae.encode(x).loc).float(), expected, rtol=0.02, atol=0.02)
    compiled = torch.compile(lambda x: vae.network.decode(vae.network.posterior(x).loc), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_the_model_has_the_sigma_of_validation_data(digits):
    vae = VAE(mlp(SHAPE, 1, latent_dim=10), Gaussian(1, mean="unit", levels=17))
    found = fit(vae, digits, TrainingConfig(max_steps=400, patience=None), progress=False)
    x = digits.values("validation")
    own = float(vae.likelihood.sigma("density"))
    with torch.no_grad():
        assert own == pytest.approx(float((x - vae.reconstruct(x)).square().mean().sqrt()), rel=0.03)
    assert found.training_sigma["density"] < 0.95 * own  # it overfits
    bounds = [evaluate(vae, digits, settings=EvaluationSettings(metrics=())).elbo_nats.mean]
    vae.calibrate(digits.batches("train", 256))
    bounds.append(evaluate(vae, digits, settings=EvaluationSettings(metrics=())).elbo_nats.mean)
    assert bounds[0] > bounds[1]


def test_training_takes_the_ratio_of_held_out_residuals(digits):
    """On 300 pictures the σ of training residuals is too small, and training with it overfits them sooner."""
    few = replace(digits, train=digits.train.select(torch.arange(300)))
    bounds, widened = {}, {}
    for source in ("held-out", "batch"):
        torch.manual_seed(0)
        vae = VAE(mlp(SHAPE, 1), Gaussian(1, mean="unit", levels=17))
        found = fit(vae, few, TrainingConfig(max_steps=250, validate_every=50, sigma_from=source), progress=False)
        widened[source] = float(vae.likelihood.scale.log_widening.exp())
        bounds[source] = found.best_score
    assert widened["batch"] == 1
    assert 1.1 < widened["held-out"] < 1.6
    assert bounds["held-out"] > bounds["batch"] + 1


def test_the_start_is_worth_its_nats(digits):
    bounds = {}
    for start in ("random", "principal"):
        torch.manual_seed(0)
        vae = VAE(mlp(SHAPE, 1, latent_dim=10), Gaussian(1, mean="unit", levels=17))
        fit(vae, digits, TrainingConfig(max_steps=200, start=start), progress=False)
        bounds[start] = evaluate(vae, digits, settings=EvaluationSettings(metrics=())).elbo_nats.mean
    assert bounds["principal"] > bounds["random"] + 3


def test_where_training_finds_nothing_better_the_start_is_the_model(digits):
    vae = VAE(mlp(SHAPE, 1, latent_dim=10), Gaussian(1, mean="unit", levels=17))
    found = fit(vae, digits, TrainingConfig(epochs=2, learning_rate=0.1), progress=False)
    assert found.best_step == found.history[0]["step"] == -1
    own = VAE(mlp(SHAPE, 1, latent_dim=10), Gaussian(1, mean="unit", levels=17))
    own.start_from(digits.batches("train", 256))
    z = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    sign = torch.sign((own.network.linear.encoder.directions * vae.network.linear.encoder.directions).sum(1))
    torch.testing.assert_close(vae.network.decode(z), own.network.decode(z * sign), rtol=1e-3, atol=1e-3)
    weighted = fit(vae, digits, TrainingConfig(epochs=1, kl_weight=2.0), progress=False)
    assert weighted.history[0]["step"] >= 0  # its bound says nothing about another objective


def test_a_coin_for_each_value_starts_at_its_probability():
    random = torch.Generator().manual_seed(0)
    x = (torch.rand(500, 1, 4, 4, generator=random) < 0.3).float()
    vae = started_on(x, mlp((1, 4, 4), 1, latent_dim=2), Bernoulli(1, levels=2))
    with torch.no_grad():
        assert float(torch.sigmoid(vae.network.decode(torch.zeros(1, 2))).mean()) == pytest.approx(0.3, abs=0.03)


def test_the_number_of_latents_is_chosen_by_the_command(tmp_path: Path, capsys):
    words = ["train", "digits", "--network", "mlp", "--width", "8", "--max-steps", "2", "--latent-dim", "auto"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "32 latents, by the held-out likelihood of probabilistic PCA" in capsys.readouterr().out
    assert models.load(tmp_path / "run").config.latent_dim == 32
    assert main(["train", "digits", "--network", "hierarchical", "--latent-dim", "auto", "--out", str(tmp_path / "other")]) == 1
    assert "latent_dim auto is for networks with one layer of flat latents" in capsys.readouterr().err


# -- A loss that is not finite: the run stops, says where, and keeps the step so that it can be done again -------------

DIMS = 6


@pytest.fixture
def table(tmp_path):
    """Real values, standardised by their own deviation: none of them is far out."""
    rows = np.random.default_rng(0).normal(size=(200, DIMS))
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",", header="a,b,c,d,e,f", comments="")
    return load(DataConfig(str(tmp_path / "rows.csv")))


def train(vae, data, out, **options):
    config = TrainingConfig(**{"epochs": 5, "batch_size": 16, "checkpoint_minutes": 0.0, **options})
    fit(vae, data, config, out=out, device="cpu", progress=False)


def test_an_outlier_is_named(table, tmp_path, monkeypatch):
    monkeypatch.setattr("sigma_vae.training.loop.CALIBRATION_VALUES", 10 * DIMS)  # the refits look at the first ten examples
    table.train.values[50, 1] = 1e30  # its square is more than float32 holds
    vae = models.vae(ModelConfig("mlp", latent_dim=2, width=8), table.shape, table.scaling)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteLossError) as caught:
        train(vae, table, out)
    said = str(caught.value)
    assert "broken term: log-likelihood" in said
    assert "e+30]" in said
    step = load_broken_step(out / FILE)
    assert 50 in step.batch.positions
    assert float(step.batch.x.max()) == pytest.approx(1e30, rel=0.1)
    assert step.about["step"] > 0
    again = models.vae(ModelConfig("mlp", latent_dim=2, width=8), table.shape, table.scaling)
    assert any("log-likelihood of" in place for place in first_broken(again, step))


class Normalised(nn.Module):
    """Divides by a spread that a dead layer does not have."""

    def forward(self, h):
        return h / h.std(-1, keepdim=True)


def test_a_dead_decoder_is_named(table, tmp_path):
    decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Normalised(), nn.Linear(8, DIMS))
    network = FlatNetwork(nn.Linear(DIMS, 4), decoder, latent_dim=2)
    vae = VAE(network, Gaussian(channels=DIMS, scale=Optimal(), spatial_dims=0, levels=None))
    calls = iter(range(10**6))

    def die(module, inputs):
        if module.training and next(calls) == 30:
            nn.init.constant_(module.bias, -1e3)

    decoder[0].register_forward_pre_hook(die)
    with pytest.raises(NonFiniteLossError, match="broken term: log-likelihood"):
        train(vae, table, tmp_path)
    places = first_broken(vae, load_broken_step(tmp_path / FILE))
    assert places[0] == "network.decoder.2 (Normalised)"


def test_an_exploding_learning_rate_is_told_at_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "digits", "--network", "mlp", "--width", "8", "--device", "cpu", "--learning-rate", "1e30"]
    words += ["--start", "random"]
    assert main([*words, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "the loss is not finite at step 1: broken term: log-likelihood" in said
    assert "There is no checkpoint of before" in said
    assert f"sigma-vae rerun {out}" in said
    assert "Traceback" not in said
    assert main(["rerun", str(out)]) == 0
    assert "not finite: network." in capsys.readouterr().out


def test_the_last_good_checkpoint_is_the_one_before_where_the_last_holds_the_failing_weights(tmp_path, monkeypatch):
    data = load(DataConfig("digits"))
    vae = models.vae(ModelConfig("mlp", latent_dim=2, width=8), data.shape, data.scaling)
    whole = VAE.elbo

    def broken(self, x, mask=None, noise=None, condition=None):
        elbo = whole(self, x, mask=mask, noise=noise)
        return elbo._replace(kl=elbo.kl * float("nan")) if self.training and next(calls) == 5 else elbo

    monkeypatch.setattr(VAE, "elbo", broken)
    calls = iter(range(-1, 100))  # one call before the first step
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*previous\.ckpt \(step 4\), which a resumption takes"):
        train(vae, data, tmp_path, hardware=HardwareConfig(steps_per_call=1))


def look_later(monkeypatch, later: bool) -> None:
    """As on a GPU, where a look at the loss would wait for it."""
    init = Stepper.__init__

    def changed(stepper, *words):
        init(stepper, *words)
        stepper._checks_later = later

    monkeypatch.setattr(Stepper, "__init__", changed)


@pytest.mark.parametrize(("steps_per_call", "later"), [(1, False), (4, False), (4, True)])
def test_what_is_kept_is_the_very_step_that_failed(tmp_path, monkeypatch, steps_per_call, later):
    """Also amid a call, and when losses are looked at only when it ends: its batch, its weights, its noise."""
    look_later(monkeypatch, later)
    data = load(DataConfig("digits"))
    vae = models.vae(ModelConfig("mlp", latent_dim=2, width=8), data.shape, data.scaling)
    whole, found = VAE.elbo, []  # the bounds that are computed: one before the first step

    def broken(self, x, mask=None, noise=None, condition=None):
        found.append(whole(self, x, mask=mask, noise=noise))
        return found[-1]._replace(kl=found[-1].kl * float("nan")) if len(found) == 7 else found[-1]

    monkeypatch.setattr(VAE, "elbo", broken)
    with pytest.raises(NonFiniteLossError, match="at step 5: broken term: KL"):
        train(vae, data, tmp_path, hardware=HardwareConfig(steps_per_call=steps_per_call))
    monkeypatch.undo()
    step = load_broken_step(tmp_path / FILE)
    assert step.about["step"] == 5
    again = models.vae(ModelConfig("mlp", latent_dim=2, width=8), data.shape, data.scaling)
    again.load_state_dict(step.weights)
    torch.set_rng_state(step.rng)
    assert torch.equal(again.train().elbo(step.batch.x).total, found[6].total)


WAYS = {
    "plain": {},
    "micro-batches": {"accumulate": 3},
    "half precision": {"hardware": HardwareConfig(precision="bfloat16", steps_per_call=1)},
    "weighted": {"kl_weight": 0.5},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_rerun_does_what_the_step_did(tmp_path, monkeypatch, options):
    """To the last bit: in the same micro-batches, in the same precision."""
    data = load(DataConfig("digits"))
    vae = models.vae(ModelConfig("mlp", latent_dim=2, width=8), data.shape, data.scaling)
    whole, found, parts = FlatNetwork.infer, [], options.get("accumulate", 1)

    def noted(self, *arguments, **words):
        inference = whole(self, *arguments, **words)
        if self.training:
            found.append(inference)
        return inference

    def breaking(self, *arguments, **words):
        inference = noted(self, *arguments, **words)
        last = self.training and len(found) == 1 + 6 * parts  # one before the first step
        return inference._replace(kl=inference.kl * float("nan")) if last else inference

    monkeypatch.setattr(FlatNetwork, "infer", breaking)
    options = {"hardware": HardwareConfig(steps_per_call=1), **options}
    with pytest.raises(NonFiniteLossError, match="at step 5: broken term: KL"):
        train(vae, data, tmp_path, **options)
    before = found[-parts:]
    found.clear()
    monkeypatch.setattr(FlatNetwork, "infer", noted)
    again = models.vae(ModelConfig("mlp", latent_dim=2, width=8), data.shape, data.scaling)
    assert first_broken(again, load_broken_step(tmp_path / FILE), TrainingConfig(**options)) == []
    for ours, theirs in zip(found, before, strict=True):
        assert torch.equal(ours.kl, theirs.kl)
        assert torch.equal(ours.scored()[0], theirs.scored()[0])


def test_a_damaged_checkpoint_is_not_called_good(tmp_path):
    for name, behind in (("previous.ckpt", 2), ("last.ckpt", 3)):
        write_sealed({"format": FORMAT, "step": behind}, tmp_path / "checkpoints" / name)
    told = partial(with_saved_step, NonFiniteLossError("broken"), tmp_path, 9)
    assert "last.ckpt (step 3)." in str(told())
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    assert "previous.ckpt (step 2)." in str(told())  # taken without any deletion
    last.unlink()
    assert "previous.ckpt (step 2)." in str(told())


def test_what_cannot_be_kept_does_not_hide_what_failed(tmp_path):
    (tmp_path / FILE).mkdir()
    data = load(DataConfig("digits"))
    vae = models.vae(ModelConfig("mlp", latent_dim=2, width=8), data.shape, data.scaling)
    with pytest.raises(NonFiniteLossError, match=r"broken term: .* The step could not be kept \(.*directory"):
        train(vae, data, tmp_path, learning_rate=1e30)


def test_a_rerun_needs_a_broken_step(tmp_path, capsys):
    (tmp_path / FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ValueError, match="holds no step"):
        runs.rerun(tmp_path)
    assert main(["rerun", str(tmp_path / "nowhere")]) == 1
