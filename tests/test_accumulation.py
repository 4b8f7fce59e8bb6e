"""Micro-batches: what the accumulated gradient is, for each kind of σ."""

import math

import pytest
import torch
from test_processes import SHAPE, Case, last, toy_data, toy_vae

from sigma_vae.config import TrainingConfig
from sigma_vae.training import fit
from sigma_vae.training.objective import step_loss
from sigma_vae.types import Batch

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
