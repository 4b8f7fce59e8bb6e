"""Commands that write samples, reconstructions, predictions, latents and scores."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sigma_vae import runs
from sigma_vae.cli.options import RunFolder, beside, to_read
from sigma_vae.config import LARGEST_COUNT, check_seed, replacing
from sigma_vae.data import Batches
from sigma_vae.data.splits import Names
from sigma_vae.evaluation import score as score_examples
from sigma_vae.evaluation.elbo import has_fitted_prior, standard_prior
from sigma_vae.evaluation.plots import (
    drawable,
    interpolations,
    pairs,
    reconstructed,
    sampled,
    save_clips,
    save_grid,
    traversals,
)
from sigma_vae.types import at_least_float32
from sigma_vae.vae import VAE, Show

__all__ = [
    "Split",
    "check_count",
    "checked",
    "encode",
    "interpolate",
    "output",
    "predict",
    "reconstruct",
    "sample",
    "score",
    "traverse",
    "write",
]

Split = Literal["train", "validation", "test"]

FRAMES = 10
"""Number of frames predicted where the clips end with the given ones."""


@torch.no_grad()
def sample(
    run: RunFolder,
    *,
    n: int = 64,
    show: Show = "mean",
    temperature: tuple[float, ...] = (1.0,),
    prior: Literal["fitted", "standard"] | None = None,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Draw samples from the prior and decode them.

    For video, each sample continues the start of a test clip.

    Args:
        run: Folder of the run.
        n: Number of samples.
        show: Show the mean of p(x|z), or a draw from it.
        temperature: Factor on the spread of the latents; 1 is the model's own. A hierarchical network takes one number,
            or one for each layer from the top down.
        prior: Draw from N(0, I), or from the prior that was fitted to the latents; the model's own unless given.
        seed: Seed of the draws.
        out: File to write: .png, .npz (key "samples"), or for clips .gif; RUN/samples-SEED.png or .npz unless given
            (with --prior standard RUN/samples-standard-prior-SEED).
        device: auto, cpu, cuda or cuda:1.
    """
    check_seed(seed)
    opened = runs.open_model(to_read(run), device)
    network = opened.vae.network
    if prior == "fitted" and not has_fitted_prior(opened.vae):
        fit = f"fit one: sigma-vae fit-prior {run}"
        raise ValueError(
            f"{run} has no fitted prior; {fit if network.has_prior else 'its prior was learned with it; leave --prior out'}"
        )
    name = f"samples-standard-prior-{seed}" if prior == "standard" else f"samples-{seed}"
    path = output(out, beside(run) / name, opened.shape, moving=network.reads_clips)
    check_count(n)
    spread = temperature[0] if len(temperature) == 1 else temperature
    data = runs.open_run(to_read(run), device).data if network.reads_clips else None
    generator = torch.Generator(opened.vae.device).manual_seed(seed)
    torch.manual_seed(seed)
    with standard_prior(opened.vae) if prior == "standard" else nullcontext():
        images = opened.scaling.undo(sampled(opened.vae, data, n, generator, show, spread))
    write(path, images, {"samples": images})


@torch.no_grad()
def reconstruct(
    run: RunFolder,
    *,
    data: str | None = None,
    split: Split = "test",
    n: int = 32,
    show: Show = "mean",
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Encode and decode the first examples of a split.

    The picture has each original above its reconstruction.

    Args:
        run: Folder of the run.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split that the examples come from.
        n: Number of examples.
        show: Show the mean of p(x|z), or a draw from it.
        seed: Seed of the posterior's noise.
        out: File to write: .png, .npz (keys "originals" and "reconstructions"), or for clips .gif;
            RUN/reconstructions-SPLIT.png or .npz unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    examples = _examples(run, data, split, device)
    store, scaling, moving = examples.batches.store, examples.batches.scaling, examples.vae.network.reads_clips
    path = output(
        out, beside(run) / f"reconstructions-{examples.word}", store.shape[1:] if moving else store.shape, moving=moving
    )
    check_count(n)
    check_seed(seed)
    torch.manual_seed(seed)
    batch = next(iter(Batches(store, scaling, n)))
    originals, again = scaling.undo(batch.x), scaling.undo(reconstructed(examples.vae, batch, show, seed))
    columns = 1 if moving and path.suffix == ".png" else 8  # a clip fills a row
    write(path, pairs(originals, again, columns), {"originals": originals, "reconstructions": again}, columns)


@torch.no_grad()
def traverse(
    run: RunFolder,
    *,
    n: int = 8,
    steps: int = 9,
    reach: float = 2.0,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Move one latent at a time, and decode: what each of them stands for.

    A draw from the prior is the middle of each row. The rows are the latents that change the decoder's mean most.

    Args:
        run: Folder of the run.
        n: Number of latents.
        steps: Number of values of each latent.
        reach: Largest step to either side; posterior stds are below 1.
        seed: Seed of the draw.
        out: .png or .npz file to write (keys "traversals", latents × steps, and "latents"); RUN/traversals.png or .npz
            unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    opened = runs.open_model(to_read(run), device)
    vae = opened.vae
    if not (vae.network.has_posterior and vae.network.has_prior):
        raise ValueError(f"{run} has no single layer of flat latents that could be moved one by one; sample shows its layers")
    path = output(out, beside(run) / "traversals", opened.shape, moving=False)
    check_count(n)
    check_count(steps)
    check_seed(seed)
    z = vae.network.prior.sample(1, torch.Generator(vae.device).manual_seed(seed))[0]
    rows, chosen = traversals(vae, z, n, steps, reach)
    images = opened.scaling.undo(rows.flatten(0, 1))
    write(path, images, {"traversals": images.reshape(rows.shape), "latents": torch.tensor(chosen)}, steps)
    print(f"latents, a row each: {' '.join(map(str, chosen))}")


@torch.no_grad()
def interpolate(
    run: RunFolder,
    *,
    data: str | None = None,
    split: Split = "test",
    n: int = 8,
    steps: int = 9,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Decode the line between the latents of two examples, for several pairs.

    Args:
        run: Folder of the run.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split that the examples come from: the first 2n.
        n: Number of pairs, a row each.
        steps: Number of places on each line, the ends included.
        out: .png or .npz file to write (key "interpolations": pairs × steps); RUN/interpolations-SPLIT.png or .npz
            unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    examples = _examples(run, data, split, device)
    store, scaling = examples.batches.store, examples.batches.scaling
    check_count(n)
    check_count(steps)
    batch = next(iter(Batches(store, scaling, 2 * n))).x.to(examples.vae.device)
    if len(batch) < 2:
        raise ValueError(f"a line needs two examples, and the {examples.word} split has {len(batch)}; take another --split")
    rows = interpolations(examples.vae, batch[: len(batch) // 2], batch[len(batch) // 2 :][: len(batch) // 2], steps)
    path = output(out, beside(run) / f"interpolations-{examples.word}", store.shape, moving=False)
    images = scaling.undo(rows.flatten(0, 1))
    write(path, images, {"interpolations": images.reshape(rows.shape)}, steps)


@torch.no_grad()
def predict(
    run: RunFolder,
    *,
    data: str | None = None,
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
    """Predict future frames from the start of each clip, several times.

    The picture has each true clip, followed by its predictions.

    Args:
        run: Folder of the run.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split that the clips come from.
        n: Number of clips.
        context: Number of given frames; the network's own unless given.
        frames: Number of predicted frames; the rest of the clip unless given.
        samples: Number of predictions of each clip.
        show: Show each frame by the mean of p(x|z) or by a draw from it; the next frame is predicted from what is
            shown.
        temperature: Factor on the spread of the latents; 1 is the model's own.
        batch_statistics: Let batch norm use the statistics of these clips, as SVG's own evaluation does.
        seed: Seed of the draws.
        out: File to write: .png (a row per clip), .gif or .npz (keys "originals" and "predictions": samples, clips,
            frames, ...); RUN/predictions-SPLIT.png and .gif unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    default = beside(run) / f"predictions-{split if data is None else runs.word_of(data)}.png"
    paths = [checked(Path(out), (".png", ".gif", ".npz"))] if out is not None else [default, default.with_suffix(".gif")]
    check_count(n)
    check_seed(seed)
    examples = _examples(run, data, split, device)
    vae, where = examples.vae, examples.vae.device
    if not vae.network.reads_clips:
        raise ValueError(f"{run} has a network that reads single examples, not clips, and predicts no frames")
    past = vae.network.context_frames if context is None else context
    clips = next(iter(Batches(examples.batches.store, examples.batches.scaling, n))).x
    if not 1 <= past <= clips.shape[1]:
        raise ValueError(f"--context is from 1 to the {clips.shape[1]} frames of a clip, got {past}")
    future = (clips.shape[1] - past or FRAMES) if frames is None else frames
    if max(future, samples) > LARGEST_COUNT:
        raise ValueError(f"--frames and --samples are at most {LARGEST_COUNT:g}, got {future} and {samples}")
    torch.empty(max(samples, 1), len(clips), max(future, 1), *clips.shape[2:])  # raises at once if memory is not enough
    torch.manual_seed(seed)
    predicted = vae.predict(
        clips[:, :past],
        future,
        samples,
        show,
        generator=torch.Generator(where).manual_seed(seed),
        temperature=temperature,
        batch_statistics=batch_statistics,
    )
    for path in paths:
        write(path, _beside(clips, predicted, past), {"originals": clips, "predictions": predicted}, columns=1 + samples)


def _beside(clips: Tensor, predicted: Tensor, past: int) -> Tensor:
    """Each clip, then its predictions after the frames they started from; white where a clip is shorter."""
    length = past + predicted.shape[2]
    missing = clips.new_ones(len(clips), max(0, length - clips.shape[1]), *clips.shape[2:])
    whole = torch.cat([clips, missing], 1)[:, :length]
    given = clips[:, :past].expand(len(predicted), *clips[:, :past].shape)
    return torch.cat([whole[None], torch.cat([given, predicted], 2)]).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def encode(
    run: RunFolder, *, data: str | None = None, split: Split = "test", out: str | None = None, device: str = "auto"
) -> None:
    """Write mean and std of the latents of each example.

    Args:
        run: Folder of the run.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split to encode.
        out: .npz file to write (keys "mean" and "std": examples × latents, in the split's order; "example": their files,
            or rows in the file); RUN/codes-SPLIT.npz unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    examples = _examples(run, data, split, device)
    path = checked(Path(out) if out is not None else beside(run) / f"codes-{examples.word}.npz", (".npz",))
    posteriors = [examples.vae.encode(batch.x) for batch in examples.batches]
    means, stds = (torch.cat(values) for values in ([q.loc for q in posteriors], [q.scale for q in posteriors]))
    _write_arrays(path, {"mean": means, "std": stds}, example=_plain(examples.names))
    print(path)


def score(
    run: RunFolder,
    *,
    data: str | None = None,
    split: Split = "test",
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Write log-likelihood, rate, ELBO and bits per dimension of each example.

    Examples are called by their file, or by their row in the file, from 0. Of the run's own data, their split is
    written too.

    Args:
        run: Folder of the run.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split to score.
        seed: Seed of the posterior's noise.
        out: .csv or .parquet file to write; RUN/scores-SPLIT.csv unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    import pandas as pd

    check_seed(seed)
    examples = _examples(run, data, split, device)
    path = checked(Path(out) if out is not None else beside(run) / f"scores-{examples.word}.csv", (".csv", ".parquet"))
    scores = score_examples(examples.vae, examples.batches, seed)
    fit, bound = ("log_likelihood_nats", "elbo_nats") if examples.vae.likelihood.normalised else ("fit_nats", "objective_nats")
    columns = {fit: scores.log_likelihood, "rate_nats": scores.rate, bound: scores.log_likelihood - scores.rate}
    if scores.log_mass is not None:
        columns["bits_per_dim"] = (scores.rate - scores.log_mass) / (scores.dims * torch.tensor(2.0).log())
    told = {} if examples.splits is None else {"split": examples.splits}
    table = pd.DataFrame(told | {name: values.numpy() for name, values in columns.items()}, examples.names)
    table = table.rename_axis("example")
    with replacing(path) as aside:
        (table.to_csv if path.suffix == ".csv" else table.to_parquet)(aside)
    print(path)


class _Examples(NamedTuple):
    """Examples for a run's model, their names, the run's split of each, and a word for the files written of them."""

    vae: VAE
    batches: Batches
    names: Names
    splits: Names | None
    word: str


def _examples(run: str, data: str | None, split: Split, device: str) -> _Examples:
    """A split of the run's own data, or other data."""
    if data is None:
        opened = runs.open_run(to_read(run), device)
        own = opened.data.batches(split, runs.evaluation_batch(opened.data), device=opened.vae.device)
        return _Examples(opened.vae, own, opened.data.names[split], np.full(len(own.store), split), split)
    saved = runs.open_model(to_read(run), device)
    new = runs.new_data(to_read(run), saved, data, split)
    return _Examples(saved.vae, new.batches, new.names, new.splits, runs.word_of(data))


def check_count(n: int) -> None:
    """Refuse to write nothing, or more than can be counted."""
    if not 1 <= n <= LARGEST_COUNT:
        raise ValueError(f"--n counts examples, up to {LARGEST_COUNT:g}, and is at least 1, got {n}")


def output(out: str | None, default: Path, shape: tuple[int, ...], *, moving: bool) -> Path:
    """The file to write; unless given, a picture where examples of this shape can be drawn, else arrays."""
    if out is None:
        return default.with_name(default.name + (".png" if drawable(shape) else ".npz"))
    return checked(Path(out), (".png", ".gif", ".npz") if moving else (".png", ".npz"))


def checked(path: Path, endings: tuple[str, ...]) -> Path:
    """Refuse a path whose folder is missing, or that has none of these endings."""
    if path.suffix not in endings:
        raise ValueError(f"{path} should end in {' or '.join(endings)}: the ending selects the format")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def write(path: Path, images: Tensor, arrays: dict[str, Tensor], columns: int | None = None) -> None:
    """Write a picture, a moving picture or arrays, and print the path.

    Args:
        path: file to write; its ending selects the format.
        images: ``(n, C, H, W)``, or clips ``(n, T, C, H, W)``.
        arrays: content of a .npz file.
        columns: columns of the picture's grid.
    """
    if path.suffix == ".gif" or (path.suffix == ".png" and images.dim() == 5):
        save_clips(path, images, columns)
    elif path.suffix == ".png":
        save_grid(path, images, columns)
    else:
        _write_arrays(path, arrays)
    print(path)


def _write_arrays(path: Path, tensors: dict[str, Tensor], **others: Names) -> None:
    plain: dict[str, Any] = {name: at_least_float32(values).cpu().numpy() for name, values in tensors.items()} | others
    with replacing(path) as aside:
        np.savez_compressed(aside, **plain)


def _plain(names: Names) -> Names:
    """Words as an array that is written without pickling."""
    return names.astype(str) if names.dtype == object else names
