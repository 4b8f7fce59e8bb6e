"""A run folder: trained into, resumed, opened, evaluated."""

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sigma_vae import __version__, build
from sigma_vae.config import RunConfig
from sigma_vae.configfile import read, write
from sigma_vae.data import NAMES, Splits
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation.pictures import drawable, pairs, save_clips, save_grid
from sigma_vae.evaluation.shown import reconstructed, sampled
from sigma_vae.evaluation.video import predictions
from sigma_vae.networks import SequenceNetwork
from sigma_vae.networks.default import default_network
from sigma_vae.training import fit, resolve_device
from sigma_vae.vae import VAE

__all__ = ["Run", "evaluate_run", "evaluation_batch", "open_model", "open_run", "resume", "train"]

EVALUATION_BATCH = 256
ENTROPY_EXAMPLES = 10_000
PICTURES = 64
CLIPS = 8
"""In a picture; each is a row of it."""


class Run(NamedTuple):
    """A finished run: its configuration, its model and its data."""

    config: RunConfig
    vae: VAE
    data: Splits


def train(config: RunConfig, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Train into a new folder, calibrate, evaluate on the test split, and draw pictures.

    Returns:
        The evaluation, as ``evaluation.json`` holds it.

    Raises:
        ValueError: the folder already holds something, or the config is not possible.
    """
    resolve_device(config.device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} already exists and is never overwritten; give another --out, or go on with it: sigma-vae resume {out}"
        )
    if config.data.source not in NAMES and Path(config.data.source).exists():  # a path: let the run find it from any folder
        config = replace(config, data=replace(config.data, source=str(Path(config.data.source).resolve())))
    data = build.data(config.data)
    if progress:
        print(f"{data.name}: {data.record['counts']}; {data.record['preprocessing']}")
    if config.model.network == "auto":
        config = replace(config, model=replace(config.model, network=default_network(data.shape, clips=data.clips)))
    vae = _new_vae(config, data)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "config.yaml", config)
    _write_json(out / "environment.json", _environment(config, data))
    return _finish(config, out, vae, data, resumed=False, progress=progress)


def resume(out: Path, *, epochs: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Go on exactly where a run stopped, perhaps for more epochs than it was given.

    Raises:
        ValueError: the folder holds no run, its data have changed, or it has more epochs behind it than asked for.
    """
    config = given = _config(out)
    if epochs is not None:
        config = replace(config, training=replace(config.training, epochs=epochs))
    data = _same_data(out, config)
    vae = _new_vae(config, data)
    write(out / "config.yaml", config)  # at once: where this is interrupted, the next resumption has the same end
    try:
        return _finish(config, out, vae, data, resumed=True, progress=progress)
    except ValueError:
        write(out / "config.yaml", given)
        raise


def open_run(out: Path, device: str = "auto") -> Run:
    """A finished run, with its model on the device.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one.
    """
    config = _config(out)
    return Run(config, open_model(out, device).vae, _same_data(out, config))


def open_model(out: Path, device: str = "auto") -> build.Saved:
    """The model of a finished run alone, on the device; its data may be gone.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one.
    """
    _config(out)
    if not (out / "model" / "model.json").exists():
        raise ValueError(f"{out} has no finished model yet; finish it: sigma-vae resume {out}")
    saved = build.load(out / "model")
    return saved._replace(vae=saved.vae.to(resolve_device(device)))


def evaluation_batch(data: Splits) -> int:
    """How many examples a batch has where nothing is trained: of clips so many fewer as they have frames."""
    return max(1, EVALUATION_BATCH // (data.frames or 1))


def evaluate_run(
    out: Path, *, device: str = "auto", seed: int = 0, best_of: int | None = None, batch_statistics: bool = False
) -> dict[str, Any]:
    """Evaluate a finished run on its test split, and write ``evaluation.json`` anew.

    Args:
        out: folder of the run.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        seed: of the noise.
        best_of: of a video, also the PSNR and SSIM of the best of so many predictions of each clip.
        batch_statistics: make these with the batch's statistics, as SVG's own evaluation does.

    Raises:
        ValueError: there is no such run, or it predicts no frames, or the statistics are those of predictions that nobody asked for.
    """
    if batch_statistics and best_of is None:
        raise ValueError("batch_statistics is about predictions: say of how many the best is taken (best_of, SVG: 100)")
    run = open_run(out, device)
    extra = {}
    if best_of is not None:
        test = run.data.batches("test", evaluation_batch(run.data), device=next(run.vae.parameters()).device)
        extra["predictions"] = predictions(run.vae, test, best_of, seed, batch_statistics=batch_statistics)
    report = _evaluation(run.vae, run.config, run.data, seed) | extra
    _write_json(out / "evaluation.json", report)
    return report


def _finish(config: RunConfig, out: Path, vae: VAE, data: Splits, *, resumed: bool, progress: bool) -> dict[str, Any]:
    fit(vae, data, config.training, out=out, seed=config.seed, device=config.device, resume=resumed, progress=progress)
    build.save(out / "model", vae, config.model, data.shape, data.scaling)
    vae.to(resolve_device(config.device))
    report = _evaluation(vae, config, data)
    _write_json(out / "evaluation.json", report)
    if drawable(data.shape):
        _draw(out, vae, data)
    return report


def _new_vae(config: RunConfig, data: Splits) -> VAE:
    torch.manual_seed(config.seed)
    vae = build.vae(config.model, data.shape, data.scaling)
    if isinstance(vae.network, SequenceNetwork) != (data.frames is not None):
        have, remedy = (
            ("no clips", "take residual, conv, hierarchical or mlp") if data.frames is None else ("clips", "take sequence")
        )
        raise ValueError(f"{config.data.source} has {have}, and the network {config.model.network} is not for that; {remedy}")
    if data.frames is not None and data.frames <= config.model.context_frames:
        raise ValueError(
            f"context_frames={config.model.context_frames} leaves nothing to predict of clips of {data.frames} frames; give fewer"
        )
    return vae


def _evaluation(vae: VAE, config: RunConfig, data: Splits, seed: int = 0) -> dict[str, Any]:
    device = next(vae.parameters()).device
    size = evaluation_batch(data)
    test = data.batches("test", size, device=device)
    training = data.batches("train", size, device=device, limit=min(ENTROPY_EXAMPLES, len(data.train)))
    about: dict[str, Any] = {
        "data": config.data.source,
        "split": "test",
        "network": config.model.network,
        "likelihood": config.model.likelihood,
    }
    if isinstance(vae.network, SequenceNetwork):
        about["context_frames"] = vae.network.context_frames
    return about | evaluate(vae, test, training, seed)


def _draw(out: Path, vae: VAE, data: Splits) -> None:
    vae.eval()
    device = next(vae.parameters()).device
    moving = data.frames is not None
    samples = sampled(vae, data, CLIPS if moving else PICTURES, torch.Generator(device).manual_seed(0))
    batch = next(iter(data.batches("test", CLIPS if moving else PICTURES // 2, device=device)))
    samples, originals, again = map(data.scaling.undo, (samples, batch.x, reconstructed(vae, batch)))
    if not moving:
        save_grid(out / "samples.png", samples)
        save_grid(out / "reconstructions.png", pairs(originals, again, columns=8), columns=8)
        return
    for ending, columns in ((".png", 1), (".gif", 8)):
        save_clips(out / f"samples{ending}", samples)
        save_clips(out / f"reconstructions{ending}", pairs(originals, again, columns), columns)


def _environment(config: RunConfig, data: Splits) -> dict[str, Any]:
    return {
        "sigma_vae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": data.record,
    }


def _same_data(out: Path, config: RunConfig) -> Splits:
    """The data that the run was trained on: changed data may move what it was trained on into the test split."""
    data = build.data(config.data)
    known = _read_json(out / "environment.json").get("data", {}).get("fingerprint")
    if known != data.record["fingerprint"]:
        raise ValueError(
            f"the data of {out} have changed since it was trained; restore them, or train anew into another folder"
        )
    return data


def _config(out: Path) -> RunConfig:
    if not (out / "config.yaml").exists():
        raise ValueError(f"{out} holds no run (no config.yaml); train one: sigma-vae train DATA --out {out}")
    return read(out / "config.yaml", RunConfig)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or broken: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold what a run writes there, but {type(content).__name__}")
    return content
