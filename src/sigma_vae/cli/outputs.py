"""Subcommands that write samples, reconstructions, latents, scores and predictions."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from sigma_vae import runs
from sigma_vae.evaluation import score as score_examples
from sigma_vae.evaluation.elbo import has_fitted_prior, standard_prior
from sigma_vae.evaluation.plots import drawable, pairs, reconstructed, sampled, save_clips, save_grid
from sigma_vae.networks import FlatNetwork, SequenceNetwork
from sigma_vae.networks.sequence import FRAMES
from sigma_vae.vae import Show

__all__ = ["Split", "check_count", "checked", "encode", "output", "predict", "reconstruct", "sample", "score", "write"]

Split = Literal["train", "validation", "test"]


def check_count(n: int) -> None:
    """Refuse to write nothing."""
    if n < 1:
        raise ValueError(f"--n counts examples and is at least 1, got {n}")


def output(out: str | None, default: Path, shape: tuple[int, ...], *, moving: bool) -> Path:
    """Where to write: a picture unless told otherwise, where examples (of clips, frames) of this shape can be shown."""
    if out is None:
        return default.with_name(default.name + (".png" if drawable(shape) else ".npz"))
    return checked(Path(out), (".png", ".gif", ".npz") if moving else (".png", ".npz"))


def checked(path: Path, endings: tuple[str, ...]) -> Path:
    """A path that can be written, with one of these endings."""
    if path.suffix not in endings:
        raise ValueError(f"{path} should end in {' or '.join(endings)}, which says in what form it is written")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def write(path: Path, images: torch.Tensor, arrays: dict[str, torch.Tensor], columns: int | None = None) -> None:
    """Write clips or images as a picture, a moving one (.gif), or arrays; and say where.

    Args:
        path: what to write; its ending says how.
        images: ``(n, C, H, W)``, or clips ``(n, T, C, H, W)``.
        arrays: what a .npz file holds.
        columns: of a grid.
    """
    if path.suffix == ".gif" or (path.suffix == ".png" and images.dim() == 5):
        save_clips(path, images, columns)
    elif path.suffix == ".png":
        save_grid(path, images, columns)
    else:
        import numpy as np

        plain: dict[str, Any] = {name: values.float().cpu().numpy() for name, values in arrays.items()}
        np.savez_compressed(path, **plain)
    print(path)


@torch.no_grad()
def predict(
    run: tyro.conf.Positional[str],
    *,
    split: Split = "test",
    n: int = 4,
    context: int | None = None,
    frames: int | None = None,
    samples: int = 3,
    show: Show = "mean",
    temperature: float = 1.0,
    batch_statistics: bool = False,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Go on from the first frames of clips, several times each: each true clip, and the predictions of it.

    Args:
        run: Folder of the run.
        split: Where the clips come from.
        n: How many clips.
        context: How many frames are given; the network's own number unless said.
        frames: How many to predict; as many as the clips still have unless said.
        samples: How many predictions of each clip.
        show: Each frame is the mean of p(x|z), or a draw from it, and the next is predicted from that.
        temperature: Spread of the latents; 1 is the model's own.
        batch_statistics: Let batch norm use the statistics of the clips at hand, as SVG's own evaluation does.
        seed: Of the draws.
        out: A .png picture (a clip a row), a .gif or a .npz file (keys "originals", "predictions": samples, clips, frames, ...);
            RUN/predictions-SPLIT.png and .gif unless given.
        device: auto, cpu, cuda, cuda:1.
    """
    opened = runs.open_run(Path(run), device)
    default = Path(run) / f"predictions-{split}.png"
    paths = [checked(Path(out), (".png", ".gif", ".npz"))] if out is not None else [default, default.with_suffix(".gif")]
    check_count(n)
    past = opened.vae.video_network.context_frames if context is None else context
    where = next(opened.vae.parameters()).device
    clips = next(iter(opened.data.batches(split, n, device=where))).x
    if not 1 <= past <= clips.shape[1]:
        raise ValueError(f"--context is from 1 to the {clips.shape[1]} frames of a clip, got {past}")
    torch.manual_seed(seed)
    predicted = opened.vae.predict(
        clips[:, :past],
        (clips.shape[1] - past or FRAMES) if frames is None else frames,
        samples,
        show,
        generator=torch.Generator(where).manual_seed(seed),
        temperature=temperature,
        batch_statistics=batch_statistics,
    )
    for path in paths:
        write(path, _beside(clips, predicted, past), {"originals": clips, "predictions": predicted}, columns=1 + samples)


def _beside(clips: Tensor, predicted: Tensor, past: int) -> Tensor:
    """Each clip, then its samples with the frames that they go on from; white where a clip is shorter."""
    length = past + predicted.shape[2]
    missing = clips.new_ones(len(clips), max(0, length - clips.shape[1]), *clips.shape[2:])
    whole = torch.cat([clips, missing], 1)[:, :length]
    given = clips[:, :past].expand(len(predicted), *clips[:, :past].shape)
    return torch.cat([whole[None], torch.cat([given, predicted], 2)]).transpose(0, 1).flatten(0, 1)


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
