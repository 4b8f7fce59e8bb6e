"""Subcommands that write what a run makes of data and of noise: pictures, arrays, tables."""

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
import tyro

from sigma_vae import runs
from sigma_vae.cli.files import Split, check_count, checked, output, write
from sigma_vae.evaluation import score as score_examples
from sigma_vae.evaluation.pictures import pairs
from sigma_vae.evaluation.shown import reconstructed, sampled
from sigma_vae.evaluation.standard_prior import has_fitted_prior, standard_prior
from sigma_vae.networks import FlatNetwork, SequenceNetwork
from sigma_vae.vae import Show

__all__ = ["encode", "reconstruct", "sample", "score"]


@torch.no_grad()
def sample(
    run: tyro.conf.Positional[str],
    *,
    n: int = 64,
    show: Show = "mean",
    temperature: tuple[float, ...] = (1.0,),
    prior: Literal["fitted", "standard"] | None = None,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Draw samples from the prior, and decode them; of a video, go on from the first frames of its test clips.

    Args:
        run: Folder of the run.
        n: How many.
        show: The mean of p(x|z), or a draw from it.
        temperature: Spread of the latents; 1 is the model's own. Of a hierarchical network one number, or one for each layer, from the
            top down.
        prior: Draw from N(0, I), or from what was fitted to the codes; the model's own unless said.
        seed: Of the draws.
        out: A .png picture, for clips also a .gif, or a .npz file (key "samples"); RUN/samples-SEED.png or .npz unless given, with
            --prior standard RUN/samples-standard-prior-SEED.
        device: auto, cpu, cuda, cuda:1.
    """
    opened = runs.open_model(Path(run), device)
    moving = isinstance(opened.vae.network, SequenceNetwork)
    if prior == "fitted" and not has_fitted_prior(opened.vae):
        flat = isinstance(opened.vae.network, FlatNetwork)
        remedy = (
            f"fit one: sigma-vae fit-prior {run}"
            if flat
            else "its latents have the one that was learned with them; leave it out"
        )
        raise ValueError(f"{run} has no fitted prior; {remedy}")
    name = f"samples-standard-prior-{seed}" if prior == "standard" else f"samples-{seed}"
    path = output(out, Path(run) / name, opened.shape, moving=moving)
    check_count(n)
    spread = temperature[0] if len(temperature) == 1 else temperature
    data = runs.open_run(Path(run), device).data if moving else None
    generator = torch.Generator(next(opened.vae.parameters()).device).manual_seed(seed)
    torch.manual_seed(seed)
    with standard_prior(opened.vae) if prior == "standard" else nullcontext():
        images = opened.scaling.undo(sampled(opened.vae, data, n, generator, show, spread))
    write(path, images, {"samples": images})


@torch.no_grad()
def reconstruct(
    run: tyro.conf.Positional[str],
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
        out: A .png picture, for clips also a .gif, or a .npz file (keys "originals", "reconstructions"); RUN/reconstructions-SPLIT
            unless given.
        device: auto, cpu, cuda, cuda:1.
    """
    opened = runs.open_run(Path(run), device)
    moving = opened.data.frames is not None
    path = output(out, Path(run) / f"reconstructions-{split}", opened.data.shape, moving=moving)
    check_count(n)
    where = next(opened.vae.parameters()).device
    torch.manual_seed(seed)
    batch = next(iter(opened.data.batches(split, n, device=where)))
    undo = opened.data.scaling.undo
    originals, again = undo(batch.x), undo(reconstructed(opened.vae, batch, show, seed))
    columns = 1 if moving and path.suffix == ".png" else 8  # there a row is a clip
    write(path, pairs(originals, again, columns), {"originals": originals, "reconstructions": again}, columns)


@torch.no_grad()
def encode(run: tyro.conf.Positional[str], *, split: Split = "test", out: str | None = None, device: str = "auto") -> None:
    """Write the posterior of each example of a split: mean and standard deviation of its latents.

    Args:
        run: Folder of the run.
        split: Which examples.
        out: A .npz file (keys "mean" and "std", examples × latents, in the split's order); RUN/codes-SPLIT.npz unless given.
        device: auto, cpu, cuda, cuda:1.
    """
    opened = runs.open_run(Path(run), device)
    path = checked(Path(out) if out is not None else Path(run) / f"codes-{split}.npz", (".npz",))
    where = next(opened.vae.parameters()).device
    posteriors = [
        opened.vae.encode(batch.x) for batch in opened.data.batches(split, runs.evaluation_batch(opened.data), device=where)
    ]
    arrays = {"mean": torch.cat([q.loc for q in posteriors]), "std": torch.cat([q.scale for q in posteriors])}
    write(path, arrays["mean"], arrays)


def score(
    run: tyro.conf.Positional[str], *, split: Split = "test", seed: int = 0, out: str | None = None, device: str = "auto"
) -> None:
    """Write a row for each example of a split: log-likelihood, rate, ELBO and bits per dimension.

    Args:
        run: Folder of the run.
        split: Which examples.
        seed: Of the posterior's noise.
        out: A .csv or .parquet file; RUN/scores-SPLIT.csv unless given.
        device: auto, cpu, cuda, cuda:1.
    """
    import pandas as pd

    opened = runs.open_run(Path(run), device)
    path = checked(Path(out) if out is not None else Path(run) / f"scores-{split}.csv", (".csv", ".parquet"))
    where = next(opened.vae.parameters()).device
    batches = opened.data.batches(split, runs.evaluation_batch(opened.data), device=where)
    scores = score_examples(opened.vae, batches, seed)
    names = ("log_likelihood_nats", "elbo_nats") if opened.vae.likelihood.normalised else ("fit_nats", "objective_nats")
    columns = {
        names[0]: scores.log_likelihood,
        "rate_nats": scores.rate,
        names[1]: scores.log_likelihood - scores.rate,
    }
    if scores.log_mass is not None:
        columns["bits_per_dim"] = (scores.rate - scores.log_mass) / (scores.dims * torch.tensor(2.0).log())
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()}).rename_axis("example")
    if path.suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    print(path)
