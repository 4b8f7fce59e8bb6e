"""Laws of whole models: probabilistic PCA as the oracle, invariances, entropies, and what VAE promises its callers."""

import copy
import inspect
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import final

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from sigma_vae import (
    VAE,
    Elbo,
    Fixed,
    FlatNetwork,
    Gaussian,
    Optimal,
    PerImage,
    PerPixel,
    Shared,
    hierarchical,
    mlp,
    sequence,
)
from sigma_vae.likelihoods.scales import Scale
from sigma_vae.priors import StandardNormal
from sigma_vae.types import Batch, Inference, Latents, Network, Noise
from sigma_vae.vae import keyed_noise

DIM, LATENT, NOISE = 12, 3, 0.5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices: threads would wait for each other, for minutes where other work holds the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@final
class LinearEncoder(nn.Module):
    """Mean linear in x, log-variance one free parameter a latent: the exact posterior of a linear model has this form."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(DIM, LATENT)
        self.log_variance = nn.Parameter(torch.zeros(LATENT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), self.log_variance.expand(len(x), -1)], 1)


def linear_vae(scale: Scale) -> VAE:
    torch.manual_seed(0)
    network = FlatNetwork(LinearEncoder(), nn.Linear(LATENT, DIM), LATENT)
    return VAE(network, Gaussian(DIM, scale, spatial_dims=0, levels=None)).double()


@pytest.fixture(scope="module")
def linear_data() -> Tensor:
    random = np.random.default_rng(0)
    directions, _ = np.linalg.qr(random.standard_normal((DIM, LATENT)))
    z = random.standard_normal((2000, LATENT)) * [3.0, 2.0, 1.2]
    return torch.from_numpy(0.3 + z @ directions.T + NOISE * random.standard_normal((2000, DIM)))


def probabilistic_pca(x: Tensor) -> tuple[float, float]:
    """σ² and mean log-likelihood at the maximum (Tipping and Bishop 1999)."""
    data = x.numpy()
    covariance = np.cov(data.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    variance = values[:-LATENT].mean()
    top = vectors[:, -LATENT:]
    model = top @ np.diag(values[-LATENT:] - variance) @ top.T + variance * np.eye(DIM)
    return float(variance), float(stats.multivariate_normal.logpdf(data, data.mean(0), model).mean())


def cubature(x: Tensor) -> tuple[Tensor, Noise]:
    """x repeated, and points ±√k e_j whose mean over them is the exact expectation of any quadratic of z."""
    points = math.sqrt(LATENT) * torch.cat([torch.eye(LATENT), -torch.eye(LATENT)]).to(x)
    return x.repeat(len(points), 1), lambda shape: points.repeat_interleave(len(x), 0)


def minimise(loss: Callable[[], Tensor], parameters: list[nn.Parameter], iterations: int) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=1e-8
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def adam(loss: Callable[[], Tensor], parameters: list[nn.Parameter], steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module", params=[Optimal, Shared])
def converged(request: pytest.FixtureRequest, linear_data: Tensor) -> VAE:
    vae = linear_vae(request.param())
    x, noise = cubature(linear_data)
    minimise(lambda: -vae.elbo(x, noise=noise).total.mean(), list(vae.parameters()), 200)
    inference = vae.network.infer(x, noise=noise)
    vae.likelihood.calibrate([(inference.h, inference.target)])
    return vae.eval()


def test_linear_vae_is_probabilistic_pca(converged: VAE, linear_data: Tensor) -> None:
    variance, log_likelihood = probabilistic_pca(linear_data)
    x, noise = cubature(linear_data)
    with torch.no_grad():
        sigma = float(converged.likelihood(converged.network.infer(x, noise=noise).h).scale)
        elbo = float(converged.elbo(x, noise=noise).total.mean())
    assert sigma**2 == pytest.approx(variance, rel=1e-3)
    assert -1e-6 <= log_likelihood - elbo <= 5e-3


def test_elbo_at_a_stationary_point_is_the_sum_of_three_entropies(converged: VAE, linear_data: Tensor) -> None:
    """Damm et al. 2023: mean H[q(z|x)] − H[p(z)] − H[p(x|z)]; entropies from scipy."""
    x, noise = cubature(linear_data)
    assert entropy_gap(converged, x, noise) < 1e-3
    assert entropy_gap(linear_vae(Shared(0.2)).eval(), x, noise) > 0.1  # away from one it is not


@torch.no_grad()
def entropy_gap(vae: VAE, x: Tensor, noise: Noise) -> float:
    """|ELBO − sum of entropies| in nats a dimension of the data."""
    posterior = vae.encode(x)
    latent_dim = posterior.loc.shape[1]
    log_sigma = float(vae.likelihood(vae.network.infer(x, noise=noise).h).log_scale)
    dims = x[0].numel()
    of_posterior = float((stats.norm.entropy() + posterior.scale.log()).sum(1).mean())
    entropies = of_posterior - latent_dim * stats.norm.entropy() - dims * (stats.norm.entropy() + log_sigma)
    return abs(float(vae.elbo(x, noise=noise).total.mean()) - entropies) / dims


def mlp_of(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def test_linear_vae_with_sampled_latents_comes_close_to_probabilistic_pca(linear_data: Tensor) -> None:
    vae = linear_vae(Optimal())
    torch.manual_seed(0)

    def loss() -> Tensor:
        return -vae.elbo(linear_data[torch.randint(len(linear_data), (256,))]).total.mean()

    adam(loss, list(vae.parameters()), steps=1200)
    vae.calibrate(linear_data.split(500))
    variance, log_likelihood = probabilistic_pca(linear_data)
    assert float(vae.likelihood.scale.density_log_scale.mul(2).exp()) == pytest.approx(variance, rel=1e-2)
    x, noise = cubature(linear_data)
    assert -1e-2 <= log_likelihood - float(vae.eval().elbo(x, noise=noise).total.detach().mean()) <= 0.5


# -- no tuning -------------------------------------------------------------------------------------------------------------


@final
class Scaled(Network):
    """Another network whose target and features are in other units; its encoder sees the same."""

    def __init__(self, inner: FlatNetwork, factor: float) -> None:
        super().__init__()
        self.inner = inner
        self.factor = factor

    @property
    def latents(self) -> Latents:
        return self.inner.latents

    def infer(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Inference:
        inference = self.inner.infer(x, context, mask, noise)
        return inference._replace(h=self.factor * inference.h, target=self.factor * inference.target)

    def generate(
        self, n: int, context: Tensor | None = None, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        return self.factor * self.inner.generate(n, context, generator, temperature)


def weights_after_training(factor: float, scale: Scale) -> Tensor:
    torch.manual_seed(0)
    network = FlatNetwork(mlp_of(8, 16, 4), mlp_of(2, 16, 8), 2)
    vae = VAE(Scaled(network, factor), Gaussian(8, scale, spatial_dims=0, levels=None)).double()
    x = torch.from_numpy(np.random.default_rng(2).random((32, 8)))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        (-vae.elbo(x, noise=keyed_noise(torch.arange(32), seed=step)).total.mean()).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("factor", [2.0, 1 / 255, 255.0])
def test_units_of_the_data_change_nothing_with_an_optimal_scale(factor: float) -> None:
    def distance(at_one: Scale, at_factor: Scale) -> float:
        truth = weights_after_training(1.0, at_one)
        return float((weights_after_training(factor, at_factor) - truth).norm() / truth.norm())

    floor = math.exp(-6)
    assert distance(Optimal(floor=floor), Optimal(floor=factor * floor)) < 1e-10
    assert distance(Fixed(1.0), Fixed(1.0)) > 0.05


def unclipped_loss(vae: VAE, x: Tensor) -> Tensor:
    """The same objective as people write it: log σ = ½ log MSE, and no floor."""
    inference = vae.network.infer(x)
    loc = torch.sigmoid(inference.h)
    log_sigma = 0.5 * torch.log((x - loc).square().mean())
    log_likelihood = -0.5 * ((x - loc) / log_sigma.exp()).square() - log_sigma - 0.5 * math.log(2 * math.pi)
    return inference.kl.sum() / len(x) - log_likelihood.sum() / len(x)


@pytest.mark.parametrize("clipped", [True, False])
def test_black_images_train_to_the_floor(clipped: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 20))
    decoder = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 784), nn.Unflatten(1, (1, 28, 28)))
    vae = VAE(FlatNetwork(encoder, decoder, 10), Gaussian(1, Optimal(floor=math.exp(-6)), mean="unit"))
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    x = torch.zeros(64, 1, 28, 28)
    for _ in range(600):
        loss = -vae.elbo(x).total.mean() if clipped else unclipped_loss(vae, x)
        if not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bool(loss.isfinite()) == clipped
    if clipped:
        assert all(parameter.isfinite().all() for parameter in vae.parameters())
        assert float(vae.likelihood(vae.network.infer(x).h, x).log_scale) == -6.0


# -- the elements of a VAE -------------------------------------------------------------------------------------------------


def image_vae(scale: Scale | None = None, shape: tuple[int, ...] = (1, 8, 8)) -> VAE:
    torch.manual_seed(0)
    likelihood = Gaussian(shape[0], scale, spatial_dims=len(shape) - 1)
    return VAE(mlp(shape, likelihood.in_channels, latent_dim=3, width=16), likelihood)


def images(n: int, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(1)) / 255


def test_elbo_is_the_terms_that_it_says() -> None:
    vae, x = image_vae(Fixed(0.3)), images(5)
    noise = keyed_noise(torch.arange(5))(torch.Size([5, 3]))
    elbo = vae.elbo(x, noise=lambda shape: noise)
    posterior = vae.encode(x)
    z = posterior.loc + posterior.scale * noise
    mean, std, data, loc = (t.detach().double().numpy() for t in (posterior.loc, posterior.scale, x, vae.network.decode(z)))
    kl = (0.5 * (mean**2 + std**2 - 1) - np.log(std)).sum(1)
    log_likelihood = stats.norm.logpdf(data, loc, 0.3).sum((1, 2, 3))
    assert isinstance(elbo, Elbo)
    assert elbo.kl.shape == (5, 1)
    for ours, truth in (
        (elbo.log_likelihood, log_likelihood),
        (elbo.distortion, -log_likelihood),
        (elbo.rate, kl),
        (elbo.total, log_likelihood - kl),
    ):
        np.testing.assert_allclose(ours.detach().double().numpy(), truth, rtol=1e-5)


def test_the_encoder_gives_means_then_log_variances() -> None:
    vae, x = image_vae(), images(5)
    raw = vae.network.encoder(x)
    torch.testing.assert_close(vae.encode(x).loc, raw[:, :3])
    torch.testing.assert_close(vae.encode(x).variance, raw[:, 3:].exp())
    half = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).bfloat16(), nn.Linear(3, 64), 3).posterior(x.bfloat16())
    assert half.loc.dtype == half.scale.dtype == torch.float32


def test_log_ratio_is_the_two_densities_at_the_draw() -> None:
    vae, x = image_vae(Fixed(0.3)).double(), images(5).double()
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = vae.encode(x)
    mean, std = posterior.loc.detach().numpy(), posterior.scale.detach().numpy()
    z = mean + std * noise.numpy()
    truth = (stats.norm.logpdf(z) - stats.norm.logpdf(z, mean, std)).sum(1)
    ours = vae.network.infer(x, noise=lambda shape: noise).log_ratio.detach().numpy()
    np.testing.assert_allclose(ours, truth, rtol=1e-10)


@final
class Frames(Network):
    """A stand-in for a video network: one latent a clip, three frames."""

    def __init__(self, frame: FlatNetwork) -> None:
        super().__init__()
        self.frame = frame

    @property
    def latents(self) -> Latents:
        return self.frame.latents

    def infer(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Inference:
        one = self.frame.infer(x[:, 0], context, mask, noise)
        return one._replace(h=one.h.unsqueeze(1).expand(-1, x.shape[1], -1, -1, -1), target=x)

    def generate(
        self, n: int, context: Tensor | None = None, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        return self.frame.generate(n, context, generator, temperature).unsqueeze(1).expand(-1, 3, -1, -1, -1)


@pytest.mark.parametrize("scale", [lambda: Fixed(0.3), Optimal, lambda: Optimal(per="image"), PerImage, PerPixel])
def test_a_clip_is_one_example(scale: Callable[[], Scale]) -> None:
    still = image_vae(scale())
    video = VAE(Frames(still.network), still.likelihood)
    clips = images(12).reshape(4, 3, 1, 8, 8)
    noise = keyed_noise(torch.arange(4))(torch.Size([4, 3]))
    elbo = video.elbo(clips, noise=lambda shape: noise)
    inference = video.network.infer(clips, noise=lambda shape: noise)
    frames = video.likelihood(inference.h, clips).log_prob(clips)
    assert frames.shape == (4, 3)
    assert elbo.total.shape == elbo.rate.shape == (4,)
    assert elbo.kl.shape == (4, 1)
    torch.testing.assert_close(elbo.log_likelihood, frames.sum(1))
    assert video.sample(2).shape == (2, 3, 1, 8, 8)
    with pytest.raises(ValueError, match="Frames has no single layer of flat latents"):
        video.encode(clips)


@pytest.mark.parametrize("shape", [(5,), (2, 9), (1, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("scale", [Optimal, PerImage, PerPixel])
def test_shapes_of_samples_and_reconstructions(scale: Callable[[], Scale], shape: tuple[int, ...]) -> None:
    vae, x = image_vae(scale(), shape), images(6, shape)
    vae.calibrate([x])
    vae.eval()
    for show in ("mean", "draw"):
        assert vae.sample(4, show).shape == (4, *shape)
        assert vae.reconstruct(x, show).shape == x.shape
    assert vae.encode(x).loc.shape == vae.encode(x).scale.shape == (6, 3)
    assert vae(x).total.shape == (6,)


def test_show_says_what_is_shown() -> None:
    vae, x = image_vae(Fixed(0.3)), images(6)
    noise = keyed_noise(torch.arange(6))(torch.Size([6, 3]))
    mean, draw = (vae.reconstruct(x, show, noise=lambda shape: noise) for show in ("mean", "draw"))
    torch.testing.assert_close(mean, vae.network.infer(x, noise=lambda shape: noise).h)
    assert (draw - mean).std().item() == pytest.approx(0.3, rel=0.2)
    with pytest.raises(ValueError, match='show is "mean" or "draw"'):
        vae.sample(1, show="median")


def test_a_generator_makes_samples_repeatable() -> None:
    vae = image_vae(Fixed(0.3)).eval()
    first, again, other = (vae.sample(4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    cold = vae.sample(4, temperature=0.0)
    torch.testing.assert_close(cold, vae.network.decode(torch.zeros(4, 3)))


def test_keyed_noise_is_standard_normal_and_the_examples_own() -> None:
    noise = keyed_noise(torch.arange(2000), seed=1)(torch.Size([2000, 10]))
    assert stats.kstest(noise.numpy().ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.1
    alone = keyed_noise(torch.tensor([7]), seed=1)(torch.Size([1, 10]))
    assert torch.equal(alone[0], noise[7])
    assert not torch.equal(alone, keyed_noise(torch.tensor([7]), seed=2)(torch.Size([1, 10])))
    again = keyed_noise(torch.tensor([7]), seed=1)  # a second call goes on in the stream: another draw for importance weights
    assert not torch.equal(again(torch.Size([1, 10])), again(torch.Size([1, 10])))


@pytest.mark.parametrize("scale", [Optimal, PerImage, lambda: Optimal(per="image")])
def test_batch_size_changes_no_number_of_an_example(scale: Callable[[], Scale]) -> None:
    vae, x = image_vae(scale()).double(), images(12).double()
    vae.calibrate([x])
    vae.eval()

    def totals(size: int) -> Tensor:
        return torch.cat([vae.elbo(x[i], noise=keyed_noise(i)).total for i in torch.arange(12).split(size)])

    for size in (1, 5):
        torch.testing.assert_close(totals(size), totals(12), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [Optimal, lambda: Optimal(per="pixel"), PerPixel])
def test_calibrate_does_not_depend_on_batches_and_draws_each_example_once(scale: Callable[[], Scale]) -> None:
    x = images(20)
    vaes = [image_vae(scale()) for _ in range(3)]
    vaes[0].calibrate(x.split(7))
    vaes[1].calibrate([(x[:13], "a label"), (x[13:], "another")])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    vaes[2].calibrate([Batch(x[order], order)])
    for name, value in vaes[0].likelihood.state_dict().items():
        for other in vaes[1:]:
            torch.testing.assert_close(other.likelihood.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    seeds = [copy.deepcopy(vaes[0]) for _ in range(2)]
    for vae, seed in zip(seeds, (0, 1), strict=True):
        vae.calibrate([x], seed=seed)
    first, second = (vae.likelihood.scale.density_log_scale for vae in seeds)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("training", [True, False])
def test_calibrate_leaves_the_mode_as_it_was(training: bool) -> None:
    vae = image_vae().train(training)
    vae.network.encoder[1].train(not training)  # a part that the user froze, or thawed
    before = [module.training for module in vae.modules()]
    vae.calibrate([images(4)])
    assert [module.training for module in vae.modules()] == before
    with pytest.raises(ValueError, match="no data"):
        vae.calibrate([])
    assert [module.training for module in vae.modules()] == before


def test_calibrate_sees_the_network_in_eval_mode() -> None:
    def calibrated(training: bool) -> Tensor:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6), nn.Dropout(0.5))
        decoder = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
        vae = VAE(FlatNetwork(encoder, decoder, 3), Gaussian(1)).train(training)
        vae.calibrate(images(20).split(7))
        assert encoder[1].num_batches_tracked == 0
        return vae.likelihood.scale.density_log_scale

    assert torch.equal(calibrated(training=True), calibrated(training=False))


def test_calibrate_makes_the_stored_scale_that_of_the_decoded_data() -> None:
    vae, x = image_vae().double(), images(30).double()
    vae.calibrate(x.split(7))
    with torch.no_grad():
        h = vae.network.infer(x, noise=keyed_noise(torch.arange(30))).h
    truth = 0.5 * math.log((x - h).square().mean())
    assert float(vae.likelihood.scale.density_log_scale) == pytest.approx(truth, rel=1e-12)


# -- networks --------------------------------------------------------------------------------------------------------------


def test_users_modules_of_the_wrong_size_are_refused() -> None:
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    x = torch.zeros(5, 1, 4, 4)
    for outputs in (3, 5, 7):
        network = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, outputs)), decoder, latent_dim=3)
        with pytest.raises(ValueError, match=rf"6 numbers per example; got \(5, {outputs}\)"):
            network.infer(x)
    network = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, 6)), decoder, latent_dim=3)
    with pytest.raises(ValueError, match="reads 2 decoder channels, got 1"):
        VAE(network, Gaussian(1, PerPixel())).elbo(x)
    for name, given in itertools.product(("context", "mask"), (x,)):
        with pytest.raises(ValueError, match=f"{name} is for video networks"):
            network.infer(x, **{name: given})


# -- the torch-only face ---------------------------------------------------------------------------------------------------

HEAVY = (
    "pytorch_lightning",
    "pydantic",
    "yaml",
    "PIL",
    "pandas",
    "sklearn",
    "tyro",
    "safetensors",
    "rich",
    "matplotlib",
    "zuko",
)


def test_import_needs_torch_and_numpy_alone() -> None:
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\nimport sigma_vae\n"
        f"[getattr(sigma_vae, name) for name in sigma_vae.__all__]\nnew = set(sys.modules) - before\n"
        f"print([name for name in {HEAVY} if name in new])\nprint('sigma_vae.vae' in new)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == ["[]", "True"]


@final
class Reconstruct(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.reconstruct(x, noise=torch.zeros)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.export's own
def test_a_vae_in_eval_mode_can_be_exported() -> None:
    vae, x = image_vae().eval(), images(4)
    vae.likelihood.calibrate([(x + 0.1, x)])
    with torch.no_grad():
        program = torch.export.export(Reconstruct(vae), (x,))
        torch.testing.assert_close(program.module()(x), vae.reconstruct(x, noise=torch.zeros))


# -- what a model can do ---------------------------------------------------------------------------------------------------


def test_decoding_the_posteriors_mean_gives_the_mean_of_p() -> None:
    vae, x = image_vae(Fixed(0.3)).eval(), images(4)
    z = vae.encode(x).loc
    torch.testing.assert_close(vae.decode(z), vae.likelihood(vae.network.decode(z)).mean)
    torch.manual_seed(0)
    drawn = vae.decode(z.expand(4, -1), "draw")
    assert drawn.shape == x.shape
    assert float((drawn - vae.decode(z)).detach().std()) == pytest.approx(0.3, rel=0.2)
    assert vae.device == torch.device("cpu")


@pytest.mark.parametrize(("name", "network"), [("flat_network", mlp), ("video_network", sequence)])
def test_old_names_of_the_network_work_with_a_warning(name: str, network: Callable[..., Network]) -> None:
    vae = VAE(network((1, 8, 8), 1, 3, 4), Gaussian(1))
    with pytest.warns(DeprecationWarning, match=f"VAE.{name} is now VAE.network"):
        assert getattr(vae, name) is vae.network
    other = VAE(hierarchical((1, 8, 8), 1), Gaussian(1))
    assert not hasattr(other, name)


@pytest.mark.parametrize("network", [mlp, sequence, hierarchical])
def test_a_model_can_be_inspected(network: Callable[..., Network]) -> None:
    members = dict(inspect.getmembers(VAE(network((1, 8, 8), 1, 3, 4), Gaussian(1))))
    assert {"encode", "decode", "sample", "device"} <= members.keys()


@final
class Bound(nn.Module):
    """A model as part of another."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.elbo(x, noise=lambda shape: unit).total, self.vae.decode(unit)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes are not recorded
def test_a_model_can_be_traced() -> None:
    bound = Bound(image_vae(Fixed(0.3)).eval())
    given = images(4), torch.randn(4, 3)
    traced = torch.jit.trace(bound, given)
    torch.testing.assert_close(traced(*given), bound(*given))


NETWORKS = {"mlp": mlp, "hierarchical": hierarchical, "sequence": sequence}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_refuses_the_arguments_that_it_does_not_read(name: str) -> None:
    network = NETWORKS[name]((1, 8, 8), 1, 3, 4)
    x = torch.rand(2, 4, 1, 8, 8) if network.reads_clips else torch.rand(2, 1, 8, 8)
    given = {"condition": torch.zeros(2, 1)} | ({} if network.reads_clips else {"context": x, "mask": torch.ones(2, 4) > 0})
    for argument, value in given.items():
        with pytest.raises(ValueError, match="reads no condition" if argument == "condition" else f"{argument} is for video"):
            network.infer(x, **{argument: value})
    with pytest.raises(ValueError, match="reads no condition"):
        network.generate(2, condition=given["condition"])


def test_the_base_refuses_what_a_network_does_not_define() -> None:
    bare, x = Frames(image_vae(Fixed(0.3)).network), images(2)
    assert not any([bare.has_posterior, bare.has_prior, bare.has_draw, bare.has_latent_kl, bare.reads_clips, *bare.shards()])
    for ask in (
        lambda: bare.posterior(x),
        lambda: bare.decode(x),
        lambda: bare.draw(x, bare.frame.posterior(x), torch.zeros(2, 3)),
        lambda: bare.latent_kl(x),
        lambda: bare.replace_prior(StandardNormal(3)),
        lambda: bare.predict(x, 3, lambda h: h),
    ):
        with pytest.raises(ValueError, match=r"Frames (has no|predicts no)"):
            ask()


def test_the_old_name_of_posterior_warns() -> None:
    network, x = image_vae(Fixed(0.3)).network, images(2)
    with pytest.warns(DeprecationWarning, match="now posterior"):
        assert torch.equal(network.encode(x).loc, network.posterior(x).loc)


@pytest.mark.parametrize("observes", ["density", "level"])
def test_calibrating_what_is_observed_alone_solves_that_as_ever(observes: str) -> None:
    torch.manual_seed(0)
    vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, mean="unit", observes=observes))
    before, x = (torch.randint(256, (60, 1, 4, 4)) / 255 for _ in range(2))

    def solved_on(x: Tensor, **options: bool) -> dict[str, Tensor]:
        vae.calibrate([x], **options)
        return {name: value.clone() for name, value in vae.likelihood.refitted_log_scales().items()}

    old, alone, whole = solved_on(before / 2), solved_on(x, only_observed=True), solved_on(x)
    assert torch.equal(alone[observes], whole[observes])
    assert not torch.equal(old[observes], whole[observes])
    if observes == "density":
        assert torch.equal(alone["level"], old["level"])
