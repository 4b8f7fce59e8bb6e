"""Training: what a run leaves behind, that it can be interrupted anywhere, and that options mean what they say."""

import csv
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import ended, started
from safetensors.torch import load_file
from test_processes import SHAPE, Case, last, toy_data, toy_vae

from sigma_vae import VAE, Gaussian, Shared, mlp, models, runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, read
from sigma_vae.data import load
from sigma_vae.training import NonFiniteLossError, fit
from sigma_vae.training.objective import step_loss
from sigma_vae.types import Batch


@pytest.fixture(scope="module")
def digits():
    return load(DataConfig("digits"))


@pytest.fixture(scope="module")
def few(digits):
    """With a fifth of the examples to train on."""
    return replace(digits, train=digits.train.select(torch.arange(300)))


@pytest.fixture(scope="module")
def few_config(digits_config, few, tmp_path_factory):
    """A run that trains on 243 of 300 examples, in 8 steps an epoch."""
    path = tmp_path_factory.mktemp("few") / "few.npy"
    np.save(path, few.values("train").mul(16).byte())
    return replace(digits_config, data=DataConfig(str(path)))


def small_vae(digits, seed=0, likelihood="gaussian/optimal"):
    torch.manual_seed(seed)
    return models.vae(ModelConfig(network="mlp", likelihood=likelihood, latent_dim=4, width=32), digits.shape, digits.scaling)


def train(vae, digits, out=None, seed=0, resume=False, **options):
    fit(
        vae, digits, TrainingConfig(**{"epochs": 2, **options}), out=out, seed=seed, device="cpu", resume=resume, progress=False
    )


def weights(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_fit_from_python_trains_and_calibrates(digits):
    likelihood = Gaussian(channels=1, levels=17, mean="unit")
    vae = VAE(mlp((1, 8, 8), likelihood.in_channels, latent_dim=4, width=64), likelihood)
    test = next(iter(digits.batches("test", 180))).x
    vae.calibrate([test])
    before = vae.eval().elbo(test).total.mean()
    train(vae, digits, epochs=15)
    after = vae.eval().elbo(test).total.mean()
    assert after > before + 10
    # The stored σ is the root of the mean squared error over the validation split, with one posterior draw each.
    x = digits.values("validation")
    errors = (x - vae.reconstruct(x)).square().mean().sqrt()
    assert likelihood.scale.density_log_scale.exp().item() == pytest.approx(errors.item(), rel=0.02)


def test_a_run_folder_is_complete(digits_run, digits_config):
    expected = {
        "config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "model/model.json",
        "model/model.safetensors", "evaluation.json", "samples.png", "reconstructions.png", "environment.json",
    }  # fmt: skip
    found = {str(path.relative_to(digits_run)) for path in digits_run.rglob("*") if path.is_file()}
    assert expected <= found
    assert any(name.startswith("tensorboard/events") for name in found)
    assert read(digits_run / "config.yaml", RunConfig) == digits_config
    choices = json.loads((digits_run / "environment.json").read_text(encoding="utf-8"))["choices"]
    assert choices["precision"] == "float32"
    assert choices["threads"] >= 1


def test_metrics_have_each_step_once_and_all_quantities(digits_run):
    table = rows(digits_run)
    trained = [int(row["step"]) for row in table if row["train/loss_nats"]]
    validated = [int(row["step"]) for row in table if row["validation/elbo_nats"]]
    epoch = -(-1455 // 32)  # 1455 of 1797 digits are trained on: 180 test, a tenth of the rest validation
    assert trained == list(range(0, 6 * epoch, 5))
    assert validated == list(range(-1, 6 * epoch, epoch))  # the start is validated too
    for name in ("train/rate_nats", "train/distortion_nats", "train/sigma"):
        assert all(row[name] for row in table if row["train/loss_nats"])
    for name in ("validation/rate_nats", "validation/distortion_nats", "validation/bits_per_dim"):
        assert all(row[name] for row in table if row["validation/elbo_nats"])


def test_the_same_seed_gives_the_same_model_and_another_another(digits):
    models = []
    for seed in (3, 3, 4):
        vae = small_vae(digits, seed=3)
        train(vae, digits, seed=seed)
        models.append(weights(vae))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_the_exported_weights_are_those_of_the_best_validation(digits, tmp_path):
    vae = small_vae(digits)
    # A learning rate that soon destroys what was learnt: the best validation is not the last.
    train(vae, digits, tmp_path, epochs=6, learning_rate=0.05)
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["model"]
    for name, value in vae.state_dict().items():
        if "log_scale" not in name:  # calibrated afterwards
            assert torch.equal(value, best[name])


def test_patience_stops_a_run_that_no_longer_improves(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path, epochs=40, learning_rate=0.0, patience=2)
    assert sum(bool(row["validation/elbo_nats"]) for row in rows(tmp_path)) == 3


def test_averaged_weights_are_an_average(digits):
    plain, averaged = small_vae(digits), small_vae(digits)
    train(plain, digits, epochs=1, start="random", ema_decay=None)
    train(averaged, digits, epochs=1, start="random", ema_decay=0.9)
    start = small_vae(digits).state_dict()
    name = "network.decoder.0.weight"
    moved = (plain.state_dict()[name] - start[name]).norm()
    lagging = (averaged.state_dict()[name] - start[name]).norm()
    assert 0 < lagging < moved


def test_warmup_cosine_and_clipping_shorten_the_way(digits, tmp_path):
    def distance(**options):
        vae = small_vae(digits)
        before = vae.network.decoder[0].weight.detach().clone()
        train(vae, digits, epochs=1, **options)
        return float((vae.network.decoder[0].weight - before).norm().detach())

    constant = distance()
    assert distance(warmup_steps=1000) < 0.1 * constant
    assert distance(schedule="cosine") < 0.9 * constant
    assert distance(gradient_clip_norm=1e-10) < 0.1 * constant  # far below what Adam adds to its denominator


def test_a_learned_scale_starts_from_the_data_and_moves_faster(digits):
    def scale_after(**options):
        vae = small_vae(digits, likelihood="gaussian/shared")
        train(vae, digits, max_steps=1, start="random", **options)
        assert isinstance(vae.likelihood.scale, Shared)
        return vae.likelihood.scale.log_scale.item()

    spread = digits.values("train").std().log().item()
    assert scale_after(scale_start="data") == pytest.approx(spread, abs=0.1)
    # The first step of Adam is the learning rate itself.
    assert scale_after(scale_start="one", scale_learning_rate_factor=1.0) == pytest.approx(-0.001, rel=1e-3)
    assert scale_after(scale_start="one", scale_learning_rate_factor=10.0) == pytest.approx(-0.01, rel=1e-3)


def test_max_steps_and_minutes_end_a_run(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path / "steps", epochs=50, max_steps=7, log_every=1)
    assert [int(row["step"]) for row in rows(tmp_path / "steps") if row["train/loss_nats"]] == list(range(7))
    begin = time.monotonic()
    train(small_vae(digits), digits, epochs=100_000, max_minutes=0.02)
    assert time.monotonic() - begin < 30


def test_a_loss_that_explodes_stops_the_run_with_a_diagnosis(digits):
    says = r"step \d+: broken term: log-likelihood and KL; σ: .*; batch in \[0, 1\]; weights"
    with pytest.raises(NonFiniteLossError, match=says):
        train(small_vae(digits), digits, learning_rate=1e30)


def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(digits, tmp_path, monkeypatch):
    vae = small_vae(digits)
    train(vae, digits, tmp_path, epochs=1)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    whole = VAE.elbo
    calls = iter(range(100))

    def broken_elbo(self, x, mask=None, condition=None):
        elbo = whole(self, x, mask=mask)
        return elbo if next(calls) < 5 else elbo._replace(kl=elbo.kl * float("nan"))

    monkeypatch.setattr(VAE, "elbo", broken_elbo)
    with pytest.raises(NonFiniteLossError, match="step 17: broken term: KL"):
        train(vae, digits, tmp_path, epochs=3, resume=True)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:1", "cuda:x"])
def test_an_impossible_device_is_refused(device, digits):
    with pytest.raises(ValueError, match="device"):
        fit(small_vae(digits), digits, device=device)


def test_an_existing_run_is_never_overwritten(digits_run, digits_config):
    before = {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="never overwritten"):
        runs.train(digits_config, digits_run)
    assert before == {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}


def test_nothing_to_resume_is_said(tmp_path, digits):
    with pytest.raises(ValueError, match="holds no run"):
        runs.resume(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing to resume"):
        fit(small_vae(digits), digits, out=tmp_path, resume=True)


def test_resume_trains_further(few_config, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    runs.train(few_config, short, progress=False)
    runs.resume(short, epochs=8, progress=False)
    longer = replace(few_config, training=replace(few_config.training, epochs=8))
    runs.train(longer, long, progress=False)
    assert same(load_file(short / "model" / "model.safetensors"), load_file(long / "model" / "model.safetensors"))
    assert read(short / "config.yaml", RunConfig).training.epochs == 8
    with pytest.raises(ValueError, match="up to 2 epochs, it has more of them behind it"):
        runs.resume(short, epochs=2, progress=False)
    assert read(short / "config.yaml", RunConfig).training.epochs == 8


def test_an_interrupted_resumption_remembers_how_far_it_was_to_go(few_config, tmp_path, monkeypatch):
    runs.train(replace(few_config, training=replace(few_config.training, epochs=1)), tmp_path / "run", progress=False)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["sigma_vae.runs.train"], "fit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runs.resume(tmp_path / "run", epochs=3, progress=False)
    runs.resume(tmp_path / "run", progress=False)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["step"] == 3 * 8


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.99, "schedule": "cosine", "warmup_steps": 20}])
def test_ctrl_c_leaves_a_run_that_resumes_to_the_very_same_model(options, few_config, tmp_path):
    training = replace(few_config.training, epochs=90, log_every=1, validate_every=230, **options)
    config = replace(few_config, training=training)
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    runs.train(config, whole, progress=False)
    interrupt_training(config, interrupted)
    stopped = torch.load(interrupted / "checkpoints" / "last.ckpt", weights_only=True)["step"]
    assert 0 < stopped < 90 * 8
    runs.resume(interrupted, progress=False)
    assert same(load_file(interrupted / "model" / "model.safetensors"), load_file(whole / "model" / "model.safetensors"))
    logged = [[row["step"] for row in rows(out) if row["train/loss_nats"]] for out in (interrupted, whole)]
    assert logged[0] == logged[1]


def train_on_one_thread(config: RunConfig, out: Path) -> None:
    torch.set_num_threads(1)  # as here
    runs.train(config, out, progress=False)


def interrupt_training(config: RunConfig, out: Path) -> None:
    """Train in a process of its own; Ctrl-C when some epochs are over."""
    told = out.parent / "told"
    process = started(told, train_on_one_thread, config, out)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (out / "metrics.csv").exists() and len(rows(out)) > 30:
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.01)
    assert ended(process) == 1
    assert "KeyboardInterrupt" in told.read_text()


@pytest.mark.parametrize(
    ("likelihood", "options"),
    [("gaussian/optimal", {"kl_weight": 10.0}), ("gaussian/per-pixel", {"beta_nll": 0.5, "kl_weight": 0.5})],
)
def test_a_weighted_objective_is_named_one_and_evaluation_reports_the_bound(digits, tmp_path, likelihood, options):
    vae = small_vae(digits, likelihood=likelihood)
    train(vae, digits, out=tmp_path, epochs=1, log_every=1, **options)
    logged = [row for row in rows(tmp_path) if row["train/loss_nats"]]
    for row in logged:
        loss, rate, distortion, weighted = (
            float(row[f"train/{name}_nats"]) for name in ("loss", "rate", "distortion", "weighted_objective")
        )
        assert loss == pytest.approx(rate + distortion, rel=1e-5, abs=1e-3)
        if not options.get("beta_nll"):
            assert weighted == pytest.approx(10 * rate + distortion, rel=1e-5, abs=1e-2)
    (validated,) = [row for row in rows(tmp_path) if row["validation/elbo_nats"]]
    elbo, rate, distortion = (float(validated[f"validation/{name}_nats"]) for name in ("elbo", "rate", "distortion"))
    assert elbo == pytest.approx(-rate - distortion, rel=1e-5, abs=1e-3)
    assert not any("elbo" in name for name in validated if name.startswith("train/"))


def test_a_heavier_kl_lowers_the_rate(digits):
    rates = []
    for weight in (0.1, 1.0, 10.0):
        vae = small_vae(digits)
        train(vae, digits, epochs=4, learning_rate=5e-3, kl_weight=weight)
        rates.append(float(vae.eval().elbo(next(iter(digits.batches("test", 180))).x).rate.detach().mean()))
    assert rates[0] > 1.2 * rates[1] > 1.2 * 1.2 * rates[2]


@pytest.mark.parametrize(
    ("likelihood", "options", "says"),
    [
        ("gaussian/optimal", {"beta_nll": 0.5}, "does not predict"),
    ],
)
def test_weights_that_mean_nothing_to_the_model_are_refused(digits, likelihood, options, says):
    with pytest.raises(ValueError, match=says):
        train(small_vae(digits, likelihood=likelihood), digits, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta_nll": 1.5}, "beta_nll is from 0"),
        ({"beta_nll": float("nan")}, "beta_nll is from 0"),
        ({"kl_weight": -1.0}, "kl_weight multiplies"),
        ({"kl_weight": float("inf")}, "kl_weight multiplies"),
    ],
)
def test_weights_that_mean_nothing_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        TrainingConfig(**options)


def test_what_is_no_likelihood_is_validated_by_its_objective(digits, tmp_path):
    """A Bernoulli law of grey data bounds nothing; the best weights and the early stop go by the objective all the same."""
    train(small_vae(digits, likelihood="bernoulli"), digits, tmp_path, epochs=2, patience=1)
    table = rows(tmp_path)
    assert not any("elbo" in name for name in table[0])
    validated = [row for row in table if row["validation/objective_nats"]]
    for row in validated:
        objective, rate, distortion = (float(row[f"validation/{name}_nats"]) for name in ("objective", "rate", "distortion"))
        assert objective == pytest.approx(-rate - distortion, rel=1e-5)
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(
    "likelihood", ["gaussian/running-minimum", "student-t:learned/optimal", "student-t:predicted/per-pixel"]
)
def test_new_likelihoods_train_and_survive_a_resumption(few, tmp_path, likelihood):
    whole, halved = (small_vae(few, likelihood=likelihood) for _ in range(2))
    train(whole, few, epochs=2)
    train(halved, few, out=tmp_path, epochs=1)
    train(halved, few, out=tmp_path, epochs=2, resume=True)
    assert same(weights(whole), weights(halved))
    test = next(iter(few.batches("test", 180))).x
    assert whole.eval().elbo(test).total.isfinite().all()


def test_weights_ruined_by_the_last_step_of_an_epoch_are_never_kept(digits, tmp_path):
    with pytest.raises(NonFiniteLossError, match="after step 0: calibrate found no finite"):
        train(small_vae(digits), digits, tmp_path, epochs=1, batch_size=2000, learning_rate=1e30)
    (kept,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.load(kept, weights_only=True)["step"] == -1  # the start


def test_a_run_that_ends_between_validations_can_be_resumed(few_config, tmp_path):
    training = replace(few_config.training, epochs=2, validate_every=1000)
    runs.train(replace(few_config, training=training), tmp_path / "run", progress=False)
    runs.resume(tmp_path / "run", epochs=3, progress=False)
    steps = [int(row["step"]) for row in rows(tmp_path / "run") if row["train/loss_nats"]]
    assert steps == list(range(0, 3 * 8, 5))


def test_a_short_training_is_judged_on_an_eighth_of_the_examples_it_trained_on(digits_config, tmp_path, monkeypatch):
    monkeypatch.setattr("sigma_vae.training.loop.CALIBRATION_VALUES", 1)
    for steps in (2, 5):
        training = replace(digits_config.training, epochs=None, max_steps=steps, batch_size=32)
        found = runs.train(replace(digits_config, training=training), tmp_path / str(steps), progress=False)
        assert found.bounds.examples == 4 * steps


def test_a_moved_run_keeps_its_best_weights(digits, tmp_path):
    train(small_vae(digits), digits, tmp_path / "old", epochs=3)
    (tmp_path / "old").rename(tmp_path / "new")
    vae = small_vae(digits)
    # Nothing that a ruinous learning rate does from here on is better than what was found there.
    best = torch.load(tmp_path / "new" / "checkpoints" / "best.ckpt", weights_only=True)["model"]
    train(vae, digits, tmp_path / "new", epochs=3, resume=True)
    name = "network.decoder.0.weight"
    assert torch.equal(vae.state_dict()[name], best[name])


def test_after_fit_the_model_is_ready_to_be_evaluated(digits):
    vae = small_vae(digits)
    train(vae, digits, epochs=1)
    assert not any(module.training for module in vae.modules())


@pytest.mark.parametrize("scale", ["running-minimum", "optimal-pixel", "shared", "per-image"])
def test_averaged_weights_work_with_every_kind_of_scale(scale, few, tmp_path):
    vae = small_vae(few, likelihood=f"gaussian/{scale}")
    train(vae, few, tmp_path, epochs=1, ema_decay=0.9)
    train(vae, few, tmp_path, epochs=2, ema_decay=0.9, resume=True)
    assert vae.elbo(few.values("test")).total.isfinite().all()


# -- Micro-batches: what the accumulated gradient is, for each kind of σ -----------------------------------------------

EXAMPLES, PARTS = 10, 4
SIZES = (3, 3, 2, 2)
DIMS = math.prod(SHAPE)


def batch() -> Batch:
    x = toy_data().values("train")[:EXAMPLES]
    return Batch(x, torch.arange(EXAMPLES))


def gradient(likelihood: str, accumulate: int, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradient and each example's bound."""
    vae = toy_vae(Case(likelihood)).train()
    found = step_loss(vae, batch(), TrainingConfig(accumulate=accumulate, **options))
    found.loss.backward()
    return found.loss.detach(), torch.cat([p.grad.flatten() for p in vae.parameters()]), found.elbo.total.detach()


@pytest.mark.parametrize(
    "likelihood",
    ["gaussian/fixed:0.3", "gaussian/shared", "laplace/per-pixel", "gaussian/optimal-image", "bernoulli", "categorical"],
)
@pytest.mark.parametrize("accumulate", [PARTS, EXAMPLES, 100])
def test_where_no_scale_is_a_statistic_the_gradient_is_that_of_the_whole_batch(likelihood, accumulate):
    whole, parts = gradient(likelihood, 1), gradient(likelihood, accumulate)
    for ours, truth in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def test_an_optimal_scale_is_that_of_the_micro_batch():
    """Against the mean over micro-batches of D/2 (log 2πe MSE) + KL, differentiated through the MSE."""
    loss, ours, _ = gradient("gaussian/optimal", PARTS)
    vae = toy_vae(Case())
    expected = torch.zeros((), dtype=torch.float64)
    for part in batch().x.split(SIZES):
        found = vae.network.infer(part)
        mse = (torch.sigmoid(found.h) - found.target).square().mean()
        objective = DIMS / 2 * torch.log(2 * math.pi * math.e * mse) + found.kl.sum(-1).mean()
        expected = expected + objective * len(part) / EXAMPLES
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=0)
    truth = torch.cat([p.grad.flatten() for p in vae.parameters()])
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)
    whole, of_whole, _ = gradient("gaussian/optimal", 1)
    assert loss < whole  # the mean of logarithms
    assert (ours - of_whole).norm() > 1e-4 * of_whole.norm()


def test_free_bits_look_at_the_micro_batch():
    loss, _, _ = gradient("gaussian/fixed:0.3", PARTS, free_bits_nats=0.2)
    vae = toy_vae(Case("gaussian/fixed:0.3"))
    expected = 0.0
    for part in batch().x.split(SIZES):
        elbo = vae.elbo(part)
        objective = elbo.distortion.mean() + elbo.kl.mean(0).clamp_min(0.2).sum()
        expected += float(objective.detach()) * len(part) / EXAMPLES
    assert float(loss) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_norm": 0.5, "skip_gradient_norm": 1e4, "ema_decay": 0.9}])
def test_a_training_in_micro_batches_is_one_in_whole_batches(options, tmp_path):
    states = []
    for accumulate in (1, 3):
        vae, out = toy_vae(Case("gaussian/fixed:0.3")), tmp_path / str(accumulate)
        config = TrainingConfig(epochs=2, batch_size=16, accumulate=accumulate, log_every=1, **options)
        fit(vae, toy_data(), config, out=out, device="cpu", progress=False)
        states.append(last(out))
    whole, parts = states
    assert parts["step"] == whole["step"] == 6
    for name, truth in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], truth, rtol=1e-9, atol=1e-11, msg=name)


def test_micro_batches_are_counted():
    with pytest.raises(ValueError, match="accumulate is at least 1"):
        TrainingConfig(accumulate=0)
