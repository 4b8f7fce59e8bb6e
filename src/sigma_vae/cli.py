"""The command line: subcommands, printing, exit codes.

The functions named in ``COMMANDS`` are the subcommands: tyro builds the interface from their signatures and docstrings.
"""

import json as json_module
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from sigma_vae import runs
from sigma_vae.config import RunConfig
from sigma_vae.evaluation import score as score_examples
from sigma_vae.evaluation.pictures import drawable, pairs, save_grid
from sigma_vae.likelihoods.explain import Reduction
from sigma_vae.likelihoods.explain import explain as explain_loss
from sigma_vae.training import NonFiniteLossError
from sigma_vae.vae import Show, keyed_noise

__all__ = ["main"]

PROGRAM = "sigma-vae"
INTERRUPTED = 130

Split = Literal["train", "validation", "test"]


def train(config: RunConfig, *, out: str | None = None, json: bool = False) -> None:
    """Train a VAE on DATA, calibrate it, evaluate it on the test split, draw pictures; all of it into a new run folder.

    Args:
        config: The run.
        out: Folder of the run; runs/DATA-NETWORK-LIKELIHOOD-SEED unless given. Never overwritten.
        json: Print the evaluation as JSON alone.
    """
    name = f"{Path(config.data.source).stem}-{config.model.network}-{config.model.likelihood}-{config.seed}"
    folder = Path(out) if out is not None else Path("runs") / name.replace("/", "-").replace(":", "")
    _print_evaluation(runs.train(config, folder, progress=not json), json)
    _say(f"run folder: {folder}", json)


def resume(run: str, *, epochs: int | None = None, json: bool = False) -> None:
    """Go on exactly where a run stopped; finish, calibrate and evaluate it.

    Args:
        run: Folder of the run.
        epochs: Train up to so many epochs, instead of what the run was given.
        json: Print the evaluation as JSON alone.
    """
    _print_evaluation(runs.resume(Path(run), epochs=epochs, progress=not json), json)


def evaluate(run: str, *, device: str = "auto", seed: int = 0, json: bool = False) -> None:
    """Bounds of a finished run on its test split, in nats and bits per dimension, with standard errors.

    Args:
        run: Folder of the run.
        device: auto, cpu, cuda, cuda:1, mps.
        seed: Of the posterior's noise, which belongs to each example: no number depends on the batch size.
        json: Print JSON alone.
    """
    _print_evaluation(runs.evaluate_run(Path(run), device=device, seed=seed), json)


@torch.no_grad()
def sample(
    run: str,
    *,
    n: int = 64,
    show: Show = "mean",
    temperature: float = 1.0,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Draw samples from the prior, and decode them.

    Args:
        run: Folder of the run.
        n: How many.
        show: The mean of p(x|z), or a draw from it.
        temperature: Spread of the latents; 1 is the model's own.
        seed: Of the draws.
        out: A .png picture or a .npz file (key "samples"); RUN/samples-SEED.png or .npz unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    opened = runs.open_run(Path(run), device)
    path = _output(out, Path(run) / f"samples-{seed}", opened.data.shape)
    where = next(opened.vae.parameters()).device
    torch.manual_seed(seed)
    images = opened.vae.sample(n, show, generator=torch.Generator(where).manual_seed(seed), temperature=temperature)
    _write(path, images, {"samples": images})


@torch.no_grad()
def reconstruct(
    run: str,
    *,
    split: Split = "test",
    n: int = 32,
    show: Show = "mean",
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Encode the first examples of a split, draw their latents, and decode them: each original above its reconstruction.

    Args:
        run: Folder of the run.
        split: Where the examples come from.
        n: How many.
        show: The mean of p(x|z), or a draw from it.
        seed: Of the posterior's noise.
        out: A .png picture or a .npz file (keys "originals", "reconstructions"); RUN/reconstructions-SPLIT unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    opened = runs.open_run(Path(run), device)
    path = _output(out, Path(run) / f"reconstructions-{split}", opened.data.shape)
    where = next(opened.vae.parameters()).device
    torch.manual_seed(seed)
    batch = next(iter(opened.data.batches(split, n, device=where)))
    again = opened.vae.reconstruct(batch.x, show, noise=keyed_noise(batch.positions, seed))
    _write(path, pairs(batch.x, again, columns=8), {"originals": batch.x, "reconstructions": again}, columns=8)


@torch.no_grad()
def encode(run: str, *, split: Split = "test", out: str | None = None, device: str = "auto") -> None:
    """Write the posterior of each example of a split: mean and standard deviation of its latents.

    Args:
        run: Folder of the run.
        split: Which examples.
        out: A .npz file (keys "mean" and "std", examples × latents, in the split's order); RUN/codes-SPLIT.npz unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    opened = runs.open_run(Path(run), device)
    path = _checked(Path(out) if out is not None else Path(run) / f"codes-{split}.npz", (".npz",))
    where = next(opened.vae.parameters()).device
    posteriors = [opened.vae.encode(batch.x) for batch in opened.data.batches(split, runs.EVALUATION_BATCH, device=where)]
    arrays = {"mean": torch.cat([q.loc for q in posteriors]), "std": torch.cat([q.scale for q in posteriors])}
    _write(path, arrays["mean"], arrays)


def score(run: str, *, split: Split = "test", seed: int = 0, out: str | None = None, device: str = "auto") -> None:
    """Write a row for each example of a split: log-likelihood, rate, ELBO and bits per dimension.

    Args:
        run: Folder of the run.
        split: Which examples.
        seed: Of the posterior's noise.
        out: A .csv or .parquet file; RUN/scores-SPLIT.csv unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    import pandas as pd

    opened = runs.open_run(Path(run), device)
    path = _checked(Path(out) if out is not None else Path(run) / f"scores-{split}.csv", (".csv", ".parquet"))
    where = next(opened.vae.parameters()).device
    batches = opened.data.batches(split, runs.EVALUATION_BATCH, device=where)
    scores = score_examples(opened.vae, batches, seed)
    columns = {
        "log_likelihood_nats": scores.log_likelihood,
        "rate_nats": scores.rate,
        "elbo_nats": scores.log_likelihood - scores.rate,
    }
    if scores.log_mass is not None:
        dims = torch.Size(opened.data.shape).numel()
        columns["bits_per_dim"] = (scores.rate - scores.log_mass) / (dims * torch.tensor(2.0).log())
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()}).rename_axis("example")
    if path.suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    print(path)


def explain(
    *,
    shape: str,
    beta: float = 1.0,
    reduction: Reduction = "mean",
    kl_reduction: Reduction = "batch-mean",
    half: bool = False,
    batch_size: int | None = None,
    latent_dim: int | None = None,
    value_range: float = 1.0,
    json: bool = False,
) -> None:
    """Say what a hand-tuned loss, reduction(squared error) + beta · kl_reduction(KL), means: its effective β, and the σ it implies.

    Args:
        shape: Of one example: 3,64,64.
        beta: Weight on the KL, as it stands in the code.
        reduction: Of the squared error: sum over all, batch-mean (a sum for each example, averaged), or mean over everything.
        kl_reduction: Of the KL, likewise.
        half: The squared error carries a factor ½.
        batch_size: Needed where exactly one of the terms is summed over the batch.
        latent_dim: Needed where the KL is a mean over latents.
        value_range: Largest less smallest value of the data: 1 for [0, 1], 2 for [-1, 1].
        json: Print JSON alone.
    """
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        raise ValueError(f"--shape takes sizes with commas between, as 3,64,64; got {shape!r}") from None
    result = explain_loss(
        sizes,
        beta,
        reduction,
        kl_reduction,
        half=half,
        batch_size=batch_size,
        latent_dim=latent_dim,
        value_range=value_range,
    )
    if json:
        print(json_module.dumps(asdict(result), ensure_ascii=False))
        return
    print(f"effective β   {result.effective_beta:.6g}   (of ‖x − x̂‖² + β·KL, summed over {result.dims} values)")
    print(f"implied σ     {result.implied_sigma:.6g}")
    print(result.advice)


COMMANDS = {
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "encode": encode,
    "score": score,
    "explain": explain,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 for a problem that is explained, 2 for a wrong command line, 130 for Ctrl-C."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog=PROGRAM,
            description="Train VAEs with calibrated decoders: no KL weight to tune.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
        )
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted. Where training had begun, `{PROGRAM} resume RUN` goes on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _print_evaluation(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_module.dumps(report, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['data']} · {report['network']} · {report['likelihood']} · {report['examples']} test examples")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± s.e.", justify="right")
    for name, value in report.items():
        if isinstance(value, dict) and "mean" in value:
            table.add_row(name, f"{value['mean']:.4f}", f"{value['standard_error']:.4f}")
        elif name.startswith(("sigma", "factor")):
            table.add_row(name, f"{value:.5f}", "")
    if "active_units" in report:
        table.add_row("active_units", f"{report['active_units']} of {report['latent_dim']}", "")
    if report.get("entropy_identity"):
        table.add_row("entropy gap, nats/dim", f"{report['entropy_identity']['gap_nats_per_dim']:.4f}", "")
    Console().print(table)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text)


def _output(out: str | None, default: Path, shape: tuple[int, ...]) -> Path:
    if out is None:
        return default.with_name(default.name + (".png" if drawable(shape) else ".npz"))
    return _checked(Path(out), (".png", ".npz"))


def _checked(path: Path, endings: tuple[str, ...]) -> Path:
    if path.suffix not in endings:
        raise ValueError(f"{path} should end in {' or '.join(endings)}, which says in what form it is written")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def _write(path: Path, images: torch.Tensor, arrays: dict[str, torch.Tensor], columns: int | None = None) -> None:
    if path.suffix == ".png":
        save_grid(path, images, columns)
    else:
        import numpy as np

        np.savez_compressed(path, **{name: values.float().cpu().numpy() for name, values in arrays.items()})
    print(path)
