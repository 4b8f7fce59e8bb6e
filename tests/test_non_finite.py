"""A loss that is not finite: the run stops, says where, and keeps the step so that it can be done again."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sigma_vae import VAE, Gaussian, Optimal, models, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, HardwareConfig, ModelConfig, TrainingConfig
from sigma_vae.data import load
from sigma_vae.networks import FlatNetwork
from sigma_vae.training import NonFiniteLossError, fit
from sigma_vae.training.checkpoints import FORMAT, write_sealed
from sigma_vae.training.nonfinite import FILE, first_broken, load_broken_step, with_saved_step
from sigma_vae.training.step import Stepper

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
    monkeypatch.setitem(fit.__globals__, "CALIBRATION_VALUES", 10 * DIMS)  # the refits look at the first ten examples
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
