"""Laws of the ladder network: its layers' KL, its two ways down, its plans, and data whose hierarchy is known."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sigma_vae import VAE, Fixed, Gaussian, HierarchicalNetwork, HierarchyPlan, LogisticMixture, hierarchical, mlp, models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import evaluate
from sigma_vae.networks.hierarchical import Diagonal, draw
from sigma_vae.training.objective import losses
from sigma_vae.types import Batch
from sigma_vae.vae import keyed_noise


@dataclass(frozen=True)
class Case:
    """A network: a shape, and a plan for it."""

    name: str
    shape: tuple[int, int, int]
    plan: str
    out_channels: int = 2
    width: int = 8

    def make(self) -> HierarchicalNetwork:
        """Fresh, in float64."""
        torch.manual_seed(0)
        return hierarchical(self.shape, self.out_channels, latent_dim=3, width=self.width, plan=self.plan).double()

    def trained(self) -> HierarchicalNetwork:
        """As if trained: no parameter is zero, so that no prior is N(0, 1) any more."""
        network = self.make()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return network

    def images(self, n: int, seed: int = 0) -> Tensor:
        return torch.rand(n, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = (
    Case("four resolutions", (1, 8, 8), "8,8d2,4,4d2,2d2,1/1x2,2m1,4m2,4,8m4,8x2"),
    Case("patches, padded, not square", (3, 11, 8), "6x2,6d3,2d2/1,2m1,6m2", out_channels=5),
    Case("no single place", (2, 4, 4), "4,4d2/2x2,4m2"),
    Case("tiny", (1, 28, 28), "tiny", out_channels=1),
)
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def noise_of(n: int, seed: int = 0, first: int = 0):
    return keyed_noise(torch.arange(first, first + n), seed)


# -- layers of latents -----------------------------------------------------------------------------------------------------


def test_a_draw_has_the_kl_and_the_log_ratio_of_its_gaussians():
    values = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    found = draw(Diagonal(values[0], values[1]), Diagonal(values[2], values[3]), values[4])
    q, p = Normal(values[0], values[1].exp()), Normal(values[2], values[3].exp())
    torch.testing.assert_close(found.kl, kl_divergence(q, p).sum((1, 2, 3)))
    torch.testing.assert_close(found.z, values[0] + values[1].exp() * values[4])
    torch.testing.assert_close(found.log_ratio, (p.log_prob(found.z) - q.log_prob(found.z)).sum((1, 2, 3)))


@over_cases
def test_each_layer_has_a_kl_and_they_sum_to_the_rate(case):
    network = case.trained()
    kl = network.infer(case.images(4)).kl
    assert kl.shape == (4, network.plan.layers)
    assert (kl > 0).all()
    vae = VAE(hierarchical(case.shape, case.shape[0], plan=case.plan, width=8), Gaussian(case.shape[0]))
    elbo = vae.elbo(case.images(4).float())
    torch.testing.assert_close(elbo.rate, elbo.kl.sum(1))
    torch.testing.assert_close(elbo.total, elbo.log_likelihood - elbo.kl.sum(1))


@over_cases
def test_the_analytic_kl_is_the_mean_of_the_log_ratio(case):
    draws = 300
    with torch.no_grad():
        inference = case.trained().infer(case.images(1).repeat(draws, 1, 1, 1), noise=noise_of(draws))
    difference = inference.kl.sum(1) + inference.log_ratio
    error = float(difference.std()) / math.sqrt(draws)
    assert 0 < error < 0.1 * float(inference.kl.sum(1).mean())
    assert abs(float(difference.mean())) < 4 * error


@over_cases
def test_decoding_the_posteriors_draw_gives_what_inference_gave(case):
    network, x = case.trained(), case.images(3)
    latents = network.draw_latents(x, noise_of(3))
    assert [tuple(z.shape[1:]) for z in latents] == list(network.latents.shapes)
    torch.testing.assert_close(network.decode(latents), network.infer(x, noise=noise_of(3)).h, rtol=0, atol=0)


@over_cases
def test_at_first_every_prior_is_standard_normal_and_adds_nothing(case):
    network = case.make()
    for layer in network.decoder:
        state = torch.randn(2, case.width, layer.resolution, layer.resolution, dtype=torch.float64)
        prior, residual = layer.prior_of(state)
        assert not any(value.any() for value in (prior.mean, prior.log_std, residual))


@over_cases
def test_gradients_reach_every_parameter(case):
    network = case.trained()
    inference = network.infer(case.images(3), noise=noise_of(3))
    (inference.h.square().sum() + inference.kl.sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@over_cases
def test_no_number_depends_on_the_batch(case):
    network, x = case.trained(), case.images(5)
    with torch.no_grad():
        together = network.infer(x, noise=noise_of(5))
        alone = [network.infer(x[i : i + 1], noise=noise_of(1, first=i)) for i in range(5)]
    for name in ("h", "kl", "log_ratio"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))


@over_cases
def test_temperature_scales_the_spread_layer_by_layer(case):
    network, layers = case.trained(), case.make().plan.layers

    def generate(temperature, seed):
        with torch.no_grad():
            return network.generate(2, generator=torch.Generator().manual_seed(seed), temperature=temperature)

    assert generate(1.0, 0).shape == (2, case.out_channels, *case.shape[1:])
    assert torch.equal(generate(1.0, 0), generate(1.0, 0))
    assert not torch.equal(generate(1.0, 0), generate(1.0, 1))
    assert torch.equal(generate(0.0, 0), generate(0.0, 1))
    assert torch.equal(generate(0.0, 0)[0], generate(0.0, 0)[1])
    assert torch.equal(generate(0.7, 0), generate([0.7] * layers, 0))
    assert not torch.equal(generate([1.0] + [0.0] * (layers - 1), 0), generate(0.0, 0))
    spreads = [generate(temperature, 0).var(0).mean() for temperature in (0.1, 1.0)]
    assert spreads[0] < spreads[1]


def test_the_layers_that_are_not_given_are_drawn_from_their_priors():
    case = CASES[0]
    network = case.trained()
    with torch.no_grad():
        latents = network.draw_latents(case.images(2))
        coldly = partial(network.decode, latents[:2], temperature=0.0)
        given = network.decode(latents[:2], generator=torch.Generator().manual_seed(0))
        assert not torch.equal(given, network.decode(latents[:2], generator=torch.Generator().manual_seed(1)))
        assert torch.equal(coldly(), coldly())
        assert not torch.equal(coldly(), network.decode([latents[0] + 1, latents[1]], temperature=0.0))


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda network, x: network.infer(x, context=x), "context is for video"),
        (lambda network, x: network.infer(x, mask=x), "mask is for video"),
        (lambda network, x: network.generate(2, context=x), "context is for video"),
        (lambda network, x: network.infer(x[..., :-1]), r"examples of shape \(1, 8, 8\), got a batch of shape \(2, 1, 8, 7\)"),
        (lambda network, x: network.infer(x[0]), "got a batch of shape"),
        (lambda network, x: network.generate(2, temperature=-1.0), "temperature scales the spread"),
        (lambda network, x: network.generate(2, temperature=math.nan), "temperature scales the spread"),
        (lambda network, x: network.generate(2, temperature=[1.0, 1.0]), "one for each of 8 layers of latents; got 2"),
        (lambda network, x: network.decode([]), "latents of the top layer or more"),
        (lambda network, x: network.decode(network.draw_latents(x)[1:]), "latents of the top layer or more"),
        (lambda network, x: network.decode([*network.draw_latents(x), x]), "latents of the top layer or more"),
        (lambda network, x: VAE(network, Gaussian(1)).encode(x), "has no single layer of flat latents"),
        (lambda network, x: mlp((1, 8, 8), 1).generate(2, temperature=[1.0, 1.0]), "one for each of 1 layers"),
    ],
)
def test_misuse_is_explained(use, says):
    with pytest.raises(ValueError, match=says):
        use(CASES[0].make(), CASES[0].images(2))


# -- plans and sizes -------------------------------------------------------------------------------------------------------


def test_the_published_network_has_its_published_size():
    with torch.device("meta"):
        network = hierarchical((3, 32, 32), LogisticMixture(3, 10).in_channels, plan="cifar10")
    assert network.head.out_channels == 100
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(39e6, rel=0.01)
    assert str(network.plan) == (
        "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3/1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"  # 1x1 is one block: 1
    )


@pytest.mark.parametrize("text", ["8,8d8/1,8m1", "6x3,6d2,3x2,3d3,1/1x4,3m1,3,6m3,6x2", "4x2/4x2", "10d2,5x12,5d5/1,5m1,10m5"])
def test_a_plan_can_be_written_and_read(text):
    plan = HierarchyPlan.parse(text)
    assert str(plan) == text
    assert HierarchyPlan(plan.encoder, plan.decoder) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8,8d8", "which has no slash"),
        ("8,8d8/", "'' in '' is not a block"),
        ("8,8q8/1", "'8q8' in '8,8q8' is not a block"),
        ("8,8m8/1", "'8m8' in '8,8m8' is not a block"),
        ("8,8d8/1,8d1", "'8d1' in '1,8d1' is not a block"),
        ("8x0/8", "'8x0' in '8x0' is not a block"),
        ("0/0", "'0' in '0' is not a block"),
        ("8,8d-2/1", "'8d-2' in"),
        ("8,4/4", "block at 4 gets features of resolution 8; pool before it, as in 8d2"),
        ("8d3/1", "8d3 pools 8 by a number that does not divide it"),
        ("8,8d8/8", "begins at the lowest resolution of the encoder, 1"),
        ("8,8d8/1m1,8m1", "with nothing to mix in"),
        ("8,8d8/1,8", "8 after 1 is written 8m1"),
        ("8,8d8/1,8m1,8m8", "8 after 8 is written 8;"),
        ("8,8d2,4d4/1,4m1,8m1", "8 after 4 is written 8m4"),
        ("8,8d8/1,4m1,8m4", r"decoder works at 4, where the encoder has no features: it has \[1, 8\]"),
        ("8,8d2,4d4/1,8m1,4m8", "4m8 cannot be upsampled"),
        ("8,8d2,4d4/1,4m1", "ends at the encoder's highest resolution, 8, got 4"),
    ],
)
def test_an_impossible_plan_is_refused_with_a_remedy(text, says):
    with pytest.raises(ValueError, match=says):
        HierarchyPlan.parse(text)


@pytest.mark.parametrize(
    ("shape", "plan", "says"),
    [
        ((1, 28, 28), "20,20d20/1,20m1", "the image has 28×28 pixels; begin the plan with 28 or half of it"),
        ((1, 8, 8), "16,16d16/1,16m1", "the image has 8×8 pixels"),
        ((1, 28, 28), "huge", "a plan is one of tiny, cifar10, or ENCODER/DECODER"),
        ((5,), "tiny", "reads images"),
        ((1, 3, 28), "tiny", "at least 4×4"),
        ((1, 2, 8, 8), "tiny", "reads images"),
    ],
)
def test_a_plan_that_does_not_fit_the_data_is_refused(shape, plan, says):
    with pytest.raises(ValueError, match=says):
        hierarchical(shape, 1, plan=plan)


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (7, 9), (8, 8), (13, 30), (17, 17), (28, 28), (32, 32), (33, 31), (64, 64)])
def test_tiny_takes_images_of_any_size(size):
    network = hierarchical((3, *size), 2, latent_dim=1, width=4)
    assert network.plan.resolution <= 8
    assert network.infer(torch.rand(1, 3, *size)).h.shape == (1, 2, *size)
    assert network.generate(2).shape == (2, 2, *size)


@pytest.mark.parametrize("name", ["hierarchical", "hierarchical:tiny", "hierarchical:4,4d2,2/2,4m2"])
def test_a_network_by_name_survives_its_file(name, tmp_path):
    config = ModelConfig(network=name, likelihood="gaussian/fixed:0.1", width=8)
    vae = models.vae(config, (1, 8, 8), Scaling(256)).eval()
    models.save(tmp_path, vae, config, (1, 8, 8), Scaling(256))
    loaded = models.load(tmp_path).vae
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.elbo(x, noise=noise_of(2)).total, vae.elbo(x, noise=noise_of(2)).total)
    assert isinstance(loaded.network, HierarchicalNetwork)
    assert loaded.network.stem.out_channels == 8


@pytest.mark.parametrize("name", ["hierarchial", "hierarchical:", "conv:tiny", "hierarchical:tinny"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=r"did you mean 'hierarchical|a plan is one of|write 'conv'"):
        models.network(name, (1, 8, 8), 1)


LIKELIHOODS = [
    ("gaussian/optimal", 256),
    ("gaussian/per-pixel", 256),
    ("logistic-mixture:3", 256),
    ("categorical", 4),
    ("bernoulli", 2),
]


@pytest.mark.parametrize(("name", "levels"), LIKELIHOODS, ids=lambda value: str(value))
def test_every_kind_of_likelihood_works_unchanged(name, levels):
    vae = models.vae(ModelConfig(network="hierarchical", likelihood=name, width=8), (3, 8, 8), Scaling(levels))
    x = torch.randint(0, levels, (4, 3, 8, 8)) / (levels - 1)
    vae.elbo(x).total.mean().backward()
    vae.calibrate([x])
    scores = vae.eval().score(x, noise_of(4))
    assert scores.log_likelihood.isfinite().all()
    torch.testing.assert_close(scores.kl.sum(1), scores.rate)
    assert vae.sample(2, "draw", temperature=[1.0] * scores.kl.shape[1]).shape == (2, 3, 8, 8)


def test_the_kl_is_in_float32_under_autocast():
    vae = VAE(hierarchical((1, 8, 8), 1, width=8), Gaussian(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        elbo = vae.elbo(torch.rand(2, 1, 8, 8))
    assert elbo.kl.dtype == torch.float32
    elbo.total.mean().backward()


def test_a_network_in_half_precision_has_densities_in_float32():
    case = CASES[0]
    network, x = case.trained().bfloat16(), case.images(2).bfloat16()
    inference = network.infer(x, noise=noise_of(2))
    assert inference.h.dtype == network.generate(2).dtype == torch.bfloat16
    assert inference.kl.dtype == inference.log_ratio.dtype == torch.float32


def test_the_evaluation_reports_the_kl_of_each_layer():
    stored = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    batches = Batches(InMemory(stored), Scaling(256), 7)
    for network, layers in ((hierarchical((1, 8, 8), 1, width=8), 4), (mlp((1, 8, 8), 1, width=8), None)):
        vae = VAE(network, Gaussian(1))
        vae.calibrate(batches)
        report = evaluate(vae, batches)
        kl = report.get("kl_per_layer_nats")
        assert (kl and len(kl)) == layers
        assert kl is None or sum(kl) == pytest.approx(report["rate_nats"]["mean"])


# -- data of a known hierarchy ---------------------------------------------------------------------------------------------

GLOBAL, LOCAL, NOISE = 0.3, 0.1, 0.05
"""Spread of what all pixels share, of what each of four quarters has of its own, and of each pixel."""
FIRST_STEPS, STEPS = 150, 450
FREE_BITS = TrainingConfig(free_bits_nats=2.0)
"""In the first steps: no layer is left unused because another is sooner."""
QUARTER = np.arange(16) // 8 * 2 + np.arange(16) % 4 // 2


def known_images(n: int, seed: int) -> tuple[Tensor, np.ndarray]:
    random = np.random.default_rng(seed)
    shared, own, pixels = random.standard_normal(n), random.standard_normal((n, 4)), random.standard_normal((n, 16))
    x = 0.5 + GLOBAL * shared[:, np.newaxis] + LOCAL * own[:, QUARTER] + NOISE * pixels
    return torch.from_numpy(x).float().view(n, 1, 4, 4), shared


class Training:
    """Two layers, for the image and for its quarters (which 1×1 kernels keep apart), and images of exactly that structure."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        network = hierarchical((1, 4, 4), 1, latent_dim=2, width=32, plan="2,2d2,1/1,2m1")
        self.vae = VAE(network, Gaussian(1, Fixed(NOISE), levels=None, mean="identity"))
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=5e-3, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 5e-3, STEPS)
        self.elbo_nats = -math.inf

    def until(self, last: int) -> VAE:
        for step in range(self.schedule.last_epoch, last):
            self.optimizer.zero_grad()
            batch = Batch(known_images(128, step)[0], torch.arange(128))
            elbo, minimised = losses(self.vae, batch, FREE_BITS if step < FIRST_STEPS else TrainingConfig())
            minimised.mean().backward()
            torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 200.0)
            self.optimizer.step()
            self.schedule.step()
        self.elbo_nats = float(elbo.total.detach().mean())
        return self.vae


@pytest.fixture(scope="module")
def ladder():
    """A start in four never learns to use its lower layer: begin with three, and go on with the best."""
    starts = [Training(seed) for seed in range(3)]
    for start in starts:
        start.until(FIRST_STEPS)
    return max(starts, key=lambda start: start.elbo_nats).until(STEPS).eval()


@torch.no_grad()
def test_each_layer_carries_the_information_of_its_factor(ladder):
    """The true posterior is Gaussian, so the best rates are mutual informations, log-determinants of covariances."""
    own = LOCAL**2 * (QUARTER[:, np.newaxis] == QUARTER)
    given_all, given_shared = NOISE**2 * np.eye(16), own + NOISE**2 * np.eye(16)
    covariance = GLOBAL**2 + given_shared
    half_log_det = [0.5 * np.linalg.slogdet(matrix)[1] for matrix in (covariance, given_shared, given_all)]
    x, _ = known_images(4000, seed=10_000)
    elbo = ladder.elbo(x)
    top, local = elbo.kl.mean(0).tolist()
    assert top == pytest.approx(half_log_det[0] - half_log_det[1], rel=0.2)
    assert local == pytest.approx(half_log_det[1] - half_log_det[2], rel=0.1)
    exact = stats.multivariate_normal.logpdf(x.double().flatten(1).numpy(), np.full(16, 0.5), covariance).mean()
    assert 0 <= exact - float(elbo.total.mean()) + 0.1 < 0.6


@torch.no_grad()
def test_the_top_latents_decide_the_global_factor_and_no_detail(ladder):
    x, shared = known_images(500, seed=20_000)
    network = ladder.network
    top, local = network.draw_latents(x)
    moved = torch.roll(torch.arange(500), 1)
    means = network.decode([top[moved]]).mean((1, 2, 3))
    assert np.corrcoef(means, shared[moved])[0, 1] > 0.85
    assert abs(np.corrcoef(means, shared)[0, 1]) < 0.15
    detail = [quarters(h) - quarters(h).mean(1, keepdim=True) for h in (x, network.decode([top, local]), network.decode([top]))]
    assert np.corrcoef(detail[0].flatten(), detail[1].flatten())[0, 1] > 0.9
    assert abs(np.corrcoef(detail[0].flatten(), detail[2].flatten())[0, 1]) < 0.1


def quarters(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 2).flatten(1)
