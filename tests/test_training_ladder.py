"""What training a deep ladder adds: skipped steps, free bits, a balance over layers, and exact resumption with all of them."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from sigma_vae import VAE, Gaussian, hierarchical, models
from sigma_vae.config import DataConfig, ModelConfig, TrainingConfig
from sigma_vae.data import load
from sigma_vae.training import fit
from sigma_vae.training.objective import balance, losses
from sigma_vae.types import Batch

STEPS_PER_EPOCH = -(-1455 // 64)


@pytest.fixture(scope="module")
def digits():
    return load(DataConfig("digits"))


def small_vae(digits, network="mlp"):
    torch.manual_seed(0)
    return models.vae(ModelConfig(network=network, latent_dim=2, width=16), digits.shape, digits.scaling)


def train(vae, digits, out=None, resume=False, **options):
    config = TrainingConfig(**{"epochs": 1, "batch_size": 64, "log_every": 1, **options})
    fit(vae, digits, config, out=out, device="cpu", resume=resume, progress=False)
    return vae


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["train/loss_nats"]]


def same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def poison(vae, after: int) -> None:
    """From this step on a gradient is not a number, while the loss is one."""
    calls = iter(range(10_000))
    vae.network.encoder[1].bias.register_hook(lambda gradient: gradient * float("nan") if next(calls) >= after else gradient)


# -- skipped steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"gradient_clip_norm": 10.0, "weight_decay": 0.1}], ids=str)
def test_a_skipped_step_moves_neither_weights_nor_their_average(digits, options):
    stopped = train(small_vae(digits), digits, max_steps=8, **options)
    skipping = small_vae(digits)
    poison(skipping, after=8)
    train(skipping, digits, max_steps=16, skip_gradient_norm=1e9, **options)
    assert same(stopped, skipping)
    assert not same(stopped, train(small_vae(digits), digits, max_steps=16, **options))


def test_a_limit_that_no_gradient_reaches_changes_nothing(digits):
    assert same(train(small_vae(digits), digits), train(small_vae(digits), digits, skip_gradient_norm=1e9))


def test_the_limit_is_on_the_norm_before_clipping(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path / "free", gradient_clip_norm=1e-3, skip_gradient_norm=1e9)
    norms = [float(row["train/gradient_norm"]) for row in rows(tmp_path / "free")]
    assert min(norms) > 1  # far above what clipping leaves
    assert {row["train/skipped_steps"] for row in rows(tmp_path / "free")} == {"0"}
    limit = float(np.nextafter(np.float32(norms[0]), np.float32(0)))  # just below: the first step is skipped
    with pytest.raises(ValueError, match="the 1 steps of this training were all skipped"):
        train(small_vae(digits), digits, tmp_path / "skip", gradient_clip_norm=1e-3, skip_gradient_norm=limit, max_steps=1)
    assert [row["train/skipped_steps"] for row in rows(tmp_path / "skip")] == ["1"]


def test_the_gradient_norm_is_that_of_all_parameters(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path, max_steps=1, batch_size=1455, start="random")
    vae = small_vae(digits)
    x = digits.values("train")
    vae.calibrate([x[:128]])
    (row,) = rows(tmp_path)
    assert float(row["train/gradient_norm"]) > 0
    elbo = []
    for seed in range(3):  # another draw of the noise: nearly the same gradient
        torch.manual_seed(seed)
        vae.zero_grad()
        (-vae.train().elbo(x).total.mean()).backward()
        elbo.append(np.sqrt(sum(float(p.grad.square().sum()) for p in vae.parameters() if p.grad is not None)))
    assert float(row["train/gradient_norm"]) == pytest.approx(np.mean(elbo), rel=0.05)


def test_the_count_of_skipped_steps_survives_a_resumption(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path / "free")
    limit = float(np.median([float(row["train/gradient_norm"]) for row in rows(tmp_path / "free")]))
    train(small_vae(digits), digits, tmp_path / "whole", skip_gradient_norm=limit, epochs=2)
    train(small_vae(digits), digits, tmp_path / "parts", skip_gradient_norm=limit)
    train(small_vae(digits), digits, tmp_path / "parts", skip_gradient_norm=limit, epochs=2, resume=True)
    whole, parts = ([int(row["train/skipped_steps"]) for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    assert 0 < parts[-1] < 2 * STEPS_PER_EPOCH


def test_a_training_that_skips_every_step_stops(digits, tmp_path):
    vae = small_vae(digits)
    poison(vae, after=5)
    with pytest.raises(ValueError, match=r"the last 100 steps, up to step 104, were all skipped.*lower the learning rate"):
        train(vae, digits, tmp_path, skip_gradient_norm=1e9, epochs=20, log_every=1000)
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        counts = [row["train/skipped_steps"] for row in csv.DictReader(file) if row["train/skipped_steps"]]
    assert counts == [str(count) for count in range(100)]  # each is logged, the last one in the error
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_the_count_of_skipped_steps_is_a_result(digits):
    vae = small_vae(digits)
    poison(vae, after=8)
    config = TrainingConfig(max_steps=16, batch_size=64, skip_gradient_norm=1e9)
    assert fit(vae, digits, config, progress=False).skipped_steps == 8


def test_without_the_option_nothing_is_counted(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path, max_steps=3, log_every=2)
    assert all("train/skipped_steps" not in row and row["train/gradient_norm"] for row in rows(tmp_path))
    assert len(rows(tmp_path)) == 2


# -- objectives ------------------------------------------------------------------------------------------------------------


def ladder() -> VAE:
    torch.manual_seed(0)
    vae = VAE(hierarchical((1, 8, 8), 1, latent_dim=2, width=8), Gaussian(1))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


def both(vae: VAE, step: int = 0, **options):
    """What is minimised with and without options, on the same draw."""
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for config in (TrainingConfig(**options), TrainingConfig()):
        torch.manual_seed(1)
        found.append(losses(vae, Batch(x, torch.arange(len(x))), config, step))
    return found


def expected_objective(elbo, latents, free_bits=0.0, weight=1.0, balanced=False) -> float:
    """In NumPy."""
    kl = elbo.kl.detach().numpy().astype(np.float64).mean(0)
    factor = np.ones(len(kl))
    if balanced:
        factor = kl / latents
        factor = factor * len(kl) / factor.sum()
    return float(elbo.distortion.detach().double().mean()) + weight * float((factor * np.maximum(kl, free_bits)).sum())


@pytest.mark.parametrize(
    ("options", "step", "arguments"),
    [
        ({"free_bits_nats": 1.0}, 0, {"free_bits": 1.0}),
        ({"free_bits_nats": 50.0, "kl_weight": 0.5}, 0, {"free_bits": 50.0, "weight": 0.5}),
        ({"kl_balancing_steps": 10}, 9, {"balanced": True}),
        ({"kl_balancing_steps": 10}, 10, {}),
        ({"kl_balancing_steps": 10, "free_bits_nats": 2.0}, 0, {"balanced": True, "free_bits": 2.0}),
    ],
    ids=str,
)
def test_what_is_minimised_is_what_is_documented(options, step, arguments):
    vae = ladder()
    weighted, plain = both(vae, step, **options)
    latents = np.array([np.prod(shape) for shape in vae.network.latents.shapes])
    kl = plain.elbo.kl.detach().mean(0)
    assert kl.min() < 2 < kl.max()  # the bounds of the rows above mean something
    assert float(weighted.minimised.detach().mean()) == pytest.approx(
        expected_objective(plain.elbo, latents, **arguments), rel=1e-4
    )
    torch.testing.assert_close(weighted.elbo.total, plain.elbo.total)


def test_free_bits_leave_layers_below_them_alone():
    vae = ladder()
    weighted, _ = both(vae, free_bits_nats=1e6)
    alone, _ = both(vae, kl_weight=1e-30)
    parameters = list(vae.network.parameters())
    found = torch.autograd.grad(weighted.minimised.mean(), parameters, materialize_grads=True)
    without = torch.autograd.grad(alone.minimised.mean(), parameters, materialize_grads=True)
    for ours, theirs in zip(found, without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_balance_weighs_by_kl_per_latent_and_averages_to_one():
    kl = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = balance(kl, [1, 2, 50, 3])
    assert not weights.requires_grad
    density = kl.detach().numpy().mean(0) / np.array([1, 2, 50, 3])
    np.testing.assert_allclose(weights.numpy(), density / density.mean(), rtol=1e-4)
    torch.testing.assert_close(balance(torch.zeros(3, 2), [1, 8]), torch.ones(2))


@pytest.mark.parametrize(
    ("network", "options", "says"),
    [
        ("mlp", {"kl_balancing_steps": 5}, "balances several layers of latents, and FlatNetwork has one"),
        ("mlp", {"kl_balancing_steps": -1}, "kl_balancing_steps is at least 0"),
        ("mlp", {"free_bits_nats": -1.0}, "free_bits_nats is at least 0"),
        ("mlp", {"free_bits_nats": float("nan")}, "free_bits_nats is at least 0"),
        ("mlp", {"skip_gradient_norm": 0.0}, "skip_gradient_norm is above 0"),
    ],
)
def test_impossible_options_are_refused(digits, network, options, says):
    with pytest.raises(ValueError, match=says):
        train(small_vae(digits, network), digits, **options)


# -- all of it -------------------------------------------------------------------------------------------------------------

SMALL = "hierarchical:2,2d2,1/1,2m1,2"
EVERYTHING = {"ema_decay": 0.9, "free_bits_nats": 0.5, "kl_balancing_steps": 15}


@pytest.mark.parametrize("network", ["residual", "conv"])
def test_other_networks_resume_to_the_very_same_model(digits, tmp_path, network):
    whole, halved = (small_vae(digits, network) for _ in range(2))
    train(whole, digits, epochs=2, batch_size=256, ema_decay=0.9)
    train(halved, digits, tmp_path, epochs=1, batch_size=256, ema_decay=0.9)
    train(halved, digits, tmp_path, epochs=2, batch_size=256, ema_decay=0.9, resume=True)
    assert same(whole, halved)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_ladder_resumes_to_the_very_same_model(digits, tmp_path, options):
    if options:
        train(small_vae(digits, SMALL), digits, tmp_path / "first", batch_size=128)
        norms = [float(row["train/gradient_norm"]) for row in rows(tmp_path / "first")]
        options = options | {"skip_gradient_norm": float(np.quantile(norms, 0.8))}
    whole, halved = (small_vae(digits, SMALL) for _ in range(2))
    train(whole, digits, tmp_path / "whole", epochs=2, batch_size=128, **options)
    train(halved, digits, tmp_path / "halved", epochs=1, batch_size=128, **options)
    train(halved, digits, tmp_path / "halved", epochs=2, batch_size=128, resume=True, **options)
    assert same(whole, halved)
    assert rows(tmp_path / "whole") == rows(tmp_path / "halved")
    if options:
        assert 0 < int(rows(tmp_path / "whole")[-1]["train/skipped_steps"]) < len(rows(tmp_path / "whole"))
        assert all(row["train/weighted_objective_nats"] for row in rows(tmp_path / "whole"))
