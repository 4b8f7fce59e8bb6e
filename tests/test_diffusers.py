"""Autoencoders of diffusers, in and out: truth is diffusers itself, opened from the same folder."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sigma_vae import VAE, Gaussian, Laplace, Optimal, PerPixel, mlp, models
from sigma_vae.cli import main
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Scaling
from sigma_vae.likelihoods.translate import CONVENTIONS, explain
from sigma_vae.networks import spatial
from sigma_vae.networks.autoencoder_kl import autoencoder_kl
from sigma_vae.networks.spatial import map_statistics
from sigma_vae.runs import open_model
from sigma_vae.runs.audit import Audit, Fit, audit, audit_rows, write_page
from sigma_vae.training import fit
from sigma_vae.vae import keyed_noise

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors.torch")  # which diffusers 0.32 uses without importing it

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
SIZES = [(16, 16), (24, 40)]


def theirs(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**CONFIG | changes).eval()


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "vae"
    theirs().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pictures.npy"
    smooth = np.random.default_rng(0).integers(0, 256, (80, 3, 4, 4), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    np.save(path, smooth)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--network", "spatial:f4c3", "--width", "4", "--max-steps", "10", "--batch-size", "16", "--logger", "csv"]
    assert main(["train", str(data), *options, "--start", "random", "--prior", "standard", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "vae"
    assert main(["export", str(run), "--to", "diffusers", "--out", str(out)]) == 0
    return out


def same(vae: VAE, model: Any, x: Tensor) -> None:
    """Both encode and decode alike, bit for bit."""
    with torch.no_grad():
        ours, posterior = vae.eval().encode(x), model.encode(2 * x - 1).latent_dist
        assert torch.equal(ours.loc, posterior.mean)
        assert torch.equal(ours.scale, posterior.std)
        assert torch.equal(vae.network.decode(ours.loc)[:, : x.shape[1]], (model.decode(ours.loc).sample + 1) / 2)


# -- in --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_folder_is_read_with_its_weights(folder: Path, size: tuple[int, int]) -> None:
    vae = VAE(autoencoder_kl((3, 16, 16), 3, folder), Gaussian(3))
    same(vae, theirs(), pictures(2, 3, *size))


def test_the_rate_is_what_diffusers_computes(folder: Path) -> None:
    x = pictures(4, 3, 16, 16)
    rate = VAE(autoencoder_kl((3, 16, 16), 3, folder), Gaussian(3)).network.infer(x).kl[:, 0]
    torch.testing.assert_close(rate, theirs().encode(2 * x - 1).latent_dist.kl())


def test_the_vae_of_a_pipeline_s_folder_is_found(folder: Path) -> None:
    vae = VAE(autoencoder_kl((3, 16, 16), 3, folder.parent), Gaussian(3))
    same(vae, theirs(), pictures(1, 3, 16, 16))


def test_a_config_alone_gives_random_weights(folder: Path) -> None:
    seeds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seeds.append(autoencoder_kl((3, 16, 16), 3, folder / "config.json").encoder.encoder.conv_in.weight)
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_one_and_of_four_channels_have_configs_of_their_own(channels: int) -> None:
    config = CONFIG | {"in_channels": channels, "out_channels": channels}
    assert autoencoder_kl((channels, 16, 16), channels, config).infer(pictures(2, channels, 16, 16)).h.shape == (
        2,
        channels,
        16,
        16,
    )


REFUSED = {
    "another class": ({"_class_name": "AutoencoderDC"}, (3, 16, 16), 3, "class AutoencoderDC, and AutoencoderKL alone"),
    "grey": ({}, (1, 16, 16), 1, "reads 3 channels and gives 3, the examples have 1; .*colour grey, rgb or rgba"),
    "rgba": ({}, (4, 16, 16), 4, "reads 3 channels and gives 3, the examples have 4"),
    "series": ({}, (3, 16), 3, r"reads images \(C, H, W\), got an example of shape \(3, 16\)"),
    "predicted scale": ({}, (3, 16, 16), 6, "gives 3 feature channels, and the likelihood reads 6; .*gaussian/optimal"),
    "odd size": ({}, (3, 15, 16), 3, "by a factor of 2 and pads nothing.*got 15×16; crop or resize to 14×16"),
    "huge": ({"layers_per_block": 10**9}, (3, 16, 16), 3, "layers_per_block is no possible size, got 1000000000"),
    "words": ({"block_out_channels": "many"}, (3, 16, 16), 3, "block_out_channels is no possible size, got many"),
    "groups": ({"norm_num_groups": 5}, (3, 16, 16), 3, "the config describes no model: .*"),
}


@pytest.mark.parametrize(("changes", "shape", "out_channels", "message"), REFUSED.values(), ids=REFUSED)
def test_configs_that_do_not_fit_are_refused(
    changes: dict[str, Any], shape: tuple[int, ...], out_channels: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder_kl(shape, out_channels, CONFIG | changes)


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, changes in (("smaller", {"block_out_channels": [4, 8]}), ("fewer", {"layers_per_block": 2})):
        broken = tmp_path / name
        theirs().save_pretrained(broken)
        (broken / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(ValueError, match=f"the weights of {re.escape(str(broken))} do not fit its config"):
            autoencoder_kl((3, 16, 16), 3, broken)


def test_pickled_weights_are_never_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(theirs().state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened a pickle"))
    with pytest.raises(ValueError, match=r"pickled weights alone \(diffusion_pytorch_model.bin\).*never opened"):
        autoencoder_kl((3, 16, 16), 3, tmp_path)


@pytest.mark.parametrize("text", ["", "nowhere", "{broken"])
def test_what_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no JSON|there is no|takes a config.json"):
        models.network(f"autoencoder-kl:{text}", (3, 16, 16), 3)


def test_diffusers_own_layers_get_no_linear_path(folder: Path) -> None:
    network = autoencoder_kl((3, 16, 16), 3, str(folder))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not network.has_start
    vae, data = VAE(network, Gaussian(3)), (255 * pictures(20, 3, 16, 16)).byte().numpy()
    with pytest.raises(ValueError, match="get no linear path; train it with start=random"):
        fit(vae, data, TrainingConfig(max_steps=1, start="principal"), progress=False)
    fit(vae, data, TrainingConfig(max_steps=1, learning_rate=1e-30), progress=False)
    torch.testing.assert_close(dict(network.state_dict()), before)


def test_a_saved_model_needs_the_folder_no_more(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(network=f"autoencoder-kl:{folder}")
    vae, x = models.vae(config, (3, 16, 16), Scaling(levels=256)), pictures(4, 3, 16, 16)
    vae.calibrate([x])
    models.save(tmp_path, vae, config, (3, 16, 16), Scaling(levels=256))
    assert str(folder) not in (tmp_path / "model.json").read_text()
    same(models.load(tmp_path).vae, theirs(), x)


def test_it_is_trained_by_the_command_line_and_exported(folder: Path, data: Path, tmp_path: Path) -> None:
    options = ["--network", f"autoencoder-kl:{folder}", "--max-steps", "2", "--batch-size", "16", "--logger", "csv"]
    out = tmp_path / "run"
    assert main(["train", str(data), *options, "--prior", "standard", "--out", str(out)]) == 0
    assert open_model(out).vae.network.latents.shapes == ((4, 8, 8),)
    assert main(["export", str(out), "--out", str(tmp_path / "out")]) == 0
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    same(open_model(out).vae, again, pictures(2, 3, 24, 40))


# -- out -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_exported_run_encodes_and_decodes_bit_for_bit(run: Path, exported: Path, size: tuple[int, int]) -> None:
    model, info = diffusers.AutoencoderKL.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    same(open_model(run).vae, model, pictures(2, 3, *size))


@pytest.mark.parametrize("plan", ["f2c2", "f8c4", "f8c16", "f16c16", "f32c4"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_plan_has_the_layers_of_diffusers(plan: str, channels: int) -> None:
    factor = int(plan[1:].partition("c")[0])
    torch.manual_seed(0)
    vae = VAE(spatial((channels, factor, 2 * factor), channels, width=4, plan=plan), Gaussian(channels))
    same(vae, vae.to_diffusers().eval(), pictures(2, channels, 3 * factor, 2 * factor))


def test_a_folder_goes_out_as_it_came_in(folder: Path, tmp_path: Path) -> None:
    VAE(autoencoder_kl((3, 16, 16), 3, folder), Gaussian(3)).to_diffusers().save_pretrained(tmp_path)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        before, after = (path / name for path in (folder, tmp_path))
        assert after.read_bytes() == before.read_bytes()


@pytest.mark.parametrize("likelihood", [Gaussian(3), Laplace(3, Optimal(per="channel"))])
def test_measured_numbers_are_the_moments_of_draws(likelihood: Any) -> None:
    torch.manual_seed(0)
    vae, x = VAE(spatial((3, 16, 16), 3, width=4, plan="f4c3"), likelihood), pictures(20, 3, 16, 16)
    model, posterior = vae.to_diffusers([x]), vae.encode(x)
    z = posterior.rsample(torch.Size([3000])).double().transpose(0, 2).flatten(1).detach()
    assert model.config.latents_mean == pytest.approx(z.mean(1).tolist(), abs=5e-3)
    assert model.config.latents_std == pytest.approx(z.std(1).tolist(), rel=5e-3)
    assert model.config.scaling_factor == pytest.approx(1 / float(z.std()), rel=5e-3)
    assert model.config.shift_factor == pytest.approx(float(z.mean()), abs=5e-3)
    kurtosis = ((z - z.mean(1, keepdim=True)) ** 4).mean(1) / z.var(1) ** 2 - 3
    assert map_statistics([posterior]).excess_kurtosis == pytest.approx(kurtosis.tolist(), abs=0.05)


def test_the_card_says_sigma_and_how_the_numbers_were_measured(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    vae = open_model(run).vae
    assert f"σ of the decoder: {float(vae.likelihood.sigma()):.5g} in units of pictures in [0, 1]" in card
    assert "training examples, over posterior draws and places" in card
    assert all(name in card for name in ("scaling_factor", "latents_std", "bits_per_dim", "rate_nats"))


def test_an_exported_autoencoder_runs_in_a_pipeline(run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its pictures are what the run decodes from the same latents."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    vae = diffusers.AutoencoderKL.from_pretrained(exported)
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    decoded, decode = list[Tensor](), vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, *more, **options: decoded.append(z) or decode(z, *more, **options))
    images = pipeline([1, 2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert images.std() > 0
    with torch.no_grad():
        ours = open_model(run).vae.eval().decode(decoded[0])
    np.testing.assert_array_equal(images, ours.clamp(0, 1).movedim(1, -1).numpy())


def test_features_of_a_predicted_scale_are_left_out() -> None:
    torch.manual_seed(0)
    likelihood = Gaussian(3, PerPixel())
    vae = VAE(spatial((3, 16, 16), likelihood.in_channels, width=4), likelihood)
    x = pictures(2, 3, 16, 16)
    z = vae.eval().encode(x).loc
    torch.testing.assert_close((vae.to_diffusers().decode(z).sample + 1) / 2, vae.network.decode(z)[:, :3])


def started() -> VAE:
    vae = VAE(spatial((3, 8, 8), 3, width=4), Gaussian(3))
    vae.start_from([pictures(20, 3, 8, 8)])
    return vae


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (VAE(mlp((3, 8, 8), 3), Gaussian(3)), "FlatNetwork does not have the layers of diffusers' AutoencoderKL; train"),
        (VAE(spatial((3, 16), 3, width=4), Gaussian(3, spatial_dims=1)), "SpatialNetwork does not have the layers"),
        (VAE(spatial((3, 8, 8), 3, width=4), Gaussian(3, mean="unit")), "is not the decoder's output.*--mean auto"),
        (started(), "no layers for that path.*--start random"),
    ],
)
def test_what_cannot_be_exported_is_refused(vae: VAE, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.to_diffusers()


def test_a_folder_is_never_overwritten(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(exported)]) == 1
    assert "is not empty, and is never overwritten; give another --out" in capsys.readouterr().err


# -- audit -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Path]:
    page = tmp_path_factory.mktemp("audit") / "page.html"
    found, picture = audit(f"hf-vae:{folder}", str(data), kl_weight=1e-6, device="cpu")
    write_page(found, picture, page)
    return found, page


def test_an_audit_is_what_diffusers_computes(audited: tuple[Audit, Path], data: Path) -> None:
    found, splits, model = audited[0], models.data(str(data)), theirs()
    with torch.no_grad():
        x, training = (2 * splits.values(split) - 1 for split in ("test", "train"))
        posterior, over = model.encode(x).latent_dist, model.encode(training).latent_dist
        again = model.decode(posterior.mean).sample
    kl = posterior.kl()
    assert found.rate_nats.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.rate_bits_per_latent == pytest.approx(float(kl.mean()) / 256 / math.log(2), rel=1e-4)
    assert sum(found.kl_per_channel_nats) == pytest.approx(found.rate_nats.mean, rel=1e-4)
    mse = (again - x).square().flatten(1).mean(1) / 4
    assert found.psnr_db.mean == pytest.approx(float((-10 * mse.log10()).mean()), rel=1e-4)
    total = (over.mean.square() + over.var).mean() - over.mean.mean() ** 2
    assert found.scaling_factor == pytest.approx(float(total) ** -0.5, rel=1e-4)
    assert found.config_scaling_factor == 0.5


def test_sigma_is_the_rmse_and_b_the_mean_absolute_error_of_validation_data(audited: tuple[Audit, Path], data: Path) -> None:
    found, splits = audited[0], models.data(str(data))
    x = splits.values("validation")
    vae = VAE(autoencoder_kl((3, 16, 16), 3, CONFIG), Gaussian(3))
    vae.load_state_dict({**vae.state_dict(), **_weights()})
    with torch.no_grad():
        errors = vae.network.infer(x, noise=keyed_noise(torch.arange(len(x)))).h - x
    assert found.gaussian.scale == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-4)
    assert found.laplace.scale == pytest.approx(float(errors.abs().mean()), rel=1e-4)


def _weights() -> dict[str, Tensor]:
    vae = VAE(autoencoder_kl((3, 16, 16), 3, CONFIG), Gaussian(3))
    names = {
        name: name.replace("encoder.encoder", "encoder").replace("decoder.decoder", "decoder")
        for name in vae.network.state_dict()
    }
    names = {ours: name.replace("encoder.quant", "quant").replace("decoder.post", "post") for ours, name in names.items()}
    known = theirs().state_dict()
    return {f"network.{ours}": known[name] for ours, name in names.items() if name in known}


@pytest.mark.parametrize(("family", "convention"), [("gaussian", "diffusers"), ("laplace", "compvis")])
def test_the_implied_weight_is_the_one_whose_scale_explain_names(
    audited: tuple[Audit, Path], family: str, convention: str
) -> None:
    """In units of [−1, 1], where a scale is twice that in [0, 1]."""
    fit: Fit = audited[0][family]
    loss, reduction, value_range, _ = CONVENTIONS[convention]  # type: ignore[index]
    found = explain((3, 16, 16), fit.implied_kl_weight, reduction, value_range=value_range, loss=loss)
    assert found.implied_sigma == pytest.approx(2 * fit.scale, rel=1e-6)


def test_the_page_needs_nothing_outside_it(audited: tuple[Audit, Path]) -> None:
    found, page = audited
    text = html.unescape(page.read_text())
    assert all(name in text and value in text for name, value, _ in audit_rows(found))
    assert "data:image/png;base64," in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "With the scaling factor of its config" in text


def test_the_command_line_audits_and_evaluates(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "audit.html"
    options = ["--data", str(data), "--device", "cpu", "--json"]
    assert main(["calibrate", f"hf-vae:{folder}", *options, "--kl-weight", "1e-6", "--out", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl_weight"] == 1e-6
    assert page.stat().st_size > 1000
    assert main(["evaluate", f"hf-vae:{folder}", *options, "--metrics", "iwae", "--draws", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rate_nats"]["mean"] == pytest.approx(found["rate_nats"]["mean"])
    assert report["iwae"]["iwae_nats"]["mean"] >= report["elbo_nats"]["mean"]
    assert main(["evaluate", f"hf-vae:{folder}", *options, "--examples", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 2


def test_a_name_on_the_hub_is_fetched_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    asked: list[Any] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found, _ = audit("hf-vae:somebody/their-vae", str(data), device="cpu")
    assert found.name == asked[0] == "somebody/their-vae"
    assert all(pattern.endswith(("config.json", ".safetensors*")) for pattern in asked[1:])


def test_what_cannot_be_audited_is_refused(
    folder: Path, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    grey = tmp_path / "grey.npy"
    np.save(grey, np.zeros((40, 1, 16, 16), dtype=np.uint8))
    given = ["--data", str(data)]
    for words, message in (
        ([f"hf-vae:{folder}"], "give --data, a name or a path"),
        ([f"hf-vae:{tmp_path}", *given], "has no weights (diffusion_pytorch_model.safetensors), so there is nothing to audit"),
        ([f"hf-vae:{tmp_path / 'nowhere'}", *given], "there is no"),
        ([f"hf-vae:{folder}", "--data", str(grey)], "reads 3 channels and gives 3, the examples have 1"),
        ([f"hf-vae:{folder}", *given, "--kl-weight", "0"], "above 0, got 0"),
        ([f"hf-vae:{folder}", *given, "--out", "page.txt"], "should end in .html"),
        ([str(run), "--kl-weight", "1"], "are for an audit of hf-vae:FOLDER"),
    ):
        assert main(["calibrate", *words]) == 1
        assert message in capsys.readouterr().err
