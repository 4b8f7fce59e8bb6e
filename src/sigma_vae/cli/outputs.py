"""Commands that write samples, reconstructions, predictions, latents and scores, anomaly scores among them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from sigma_vae import progress, runs
from sigma_vae.cli import PROGRAM
from sigma_vae.cli.options import RunFolder, beside, to_read
from sigma_vae.columns import Cell
from sigma_vae.conditions import Given
from sigma_vae.config import LARGEST_COUNT, DataConfig, RunConfig, check_seed, replacing
from sigma_vae.data import Batches
from sigma_vae.data.counts import write_h5ad
from sigma_vae.data.load import read_frame
from sigma_vae.data.schema import TableSchema
from sigma_vae.data.splits import Names
from sigma_vae.data.stores import Array
from sigma_vae.data.tables import on_time_axis
from sigma_vae.evaluation import score as score_examples
from sigma_vae.evaluation.anomaly import Anomalies, Score, anomalies, check_scores, complexity_bits, p_values
from sigma_vae.evaluation.classifier import MOST_CLASSES, class_bounds, labels_of, log_probabilities
from sigma_vae.evaluation.plots import (
    drawable,
    interpolations,
    pairs,
    reconstructed,
    sampled,
    sampled_per_class,
    save_clips,
    save_grid,
    traversals,
)
from sigma_vae.models import Saved
from sigma_vae.progress import bar
from sigma_vae.types import Batch, at_least_float32
from sigma_vae.vae import VAE, Show, has_fitted_prior, standard_prior

if TYPE_CHECKING:
    import pandas as pd

RunOrFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE")]
Split = Literal["train", "validation", "test"]
TABLE_FILES = (".csv", ".parquet", ".xlsx")

FARTHEST = 1000.0
"""Stds of the prior that a latent is moved at most."""
MOST_DRAWS = 100_000
"""Latents that are drawn for a row at most."""
FRAMES = 10
"""Number of frames predicted where the clips end with the given ones."""


@torch.no_grad()
def sample(
    run: RunFolder,
    *,
    n: int = 64,
    condition: tuple[str, ...] = (),
    per_class: int | None = None,
    show: Show = "mean",
    temperature: tuple[float, ...] = (1.0,),
    prior: Literal["fitted", "standard"] | None = None,
    where: tuple[str, ...] = (),
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Draw samples from the prior and decode them.

    For video, each sample continues the start of a test clip. For a table with the likelihood mixed, rows are drawn from
    p(x|z), in the types, decimals and ranges of the data, with values missing as often.

    Args:
        run: Folder of the run.
        n: Number of samples.
        condition: What the model is given, as label=3 or age=30 sex=f; drawn like the training data's where it is not
            given.
        per_class: Number of samples of each class, in place of n: a row for each class, from the same random numbers.
        show: Show the mean of p(x|z), or a draw from it.
        temperature: Factor on the spread of the latents; 1 is the model's own. A hierarchical network takes one number,
            or one for each layer from the top down.
        prior: Draw from N(0, I), or from the prior that was fitted to the latents; the model's own unless given.
        where: For the likelihood mixed: values of columns (sex=male age=30); the rest of each row is drawn given them.
        seed: Seed of the draws.
        out: File to write: .png, .npz (key "samples"), for clips .gif, for tables .csv, .parquet or .xlsx;
            RUN/samples-SEED.png, .npz or .csv unless given (with --prior standard RUN/samples-standard-prior-SEED).
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
    if opened.scaling.schema is not None:
        table = checked(Path(out) if out is not None else beside(run) / f"{name}.csv", TABLE_FILES)
        with standard_prior(opened.vae) if prior == "standard" else nullcontext():
            _sample_rows(opened, table, n, where, seed, show, temperature)
        return
    if where:
        raise ValueError(f"where is for tables with the likelihood mixed, which {run} is not; leave it out")
    if out is not None and Path(out).suffix in TABLE_FILES:
        _sample_numbers(run, opened, checked(Path(out), TABLE_FILES), n, seed, show, temperature)
        return
    if condition or per_class:
        name += f"-{runs.word_of('-'.join([*condition, *(['per-class'] if per_class else [])]).replace('=', '-') + '.png')}"
    path = output(out, beside(run) / name, opened.shape, moving=network.reads_clips)
    check_count(n if per_class is None else per_class)
    given = _given(opened.vae, condition)
    spread = temperature[0] if len(temperature) == 1 else temperature
    data = runs.open_run(to_read(run), device).data if network.reads_clips else None
    generator = torch.Generator(opened.vae.device).manual_seed(seed)
    torch.manual_seed(seed)
    with bar("decoding samples"), standard_prior(opened.vae) if prior == "standard" else nullcontext():
        if per_class is None:
            images = sampled(opened.vae, data, n, generator, show, spread, given)
        else:
            images = sampled_per_class(opened.vae, per_class, seed, given, show, spread)
    images = opened.scaling.undo(images)
    write(path, images, {"samples": images}, per_class)


def _sample_rows(
    opened: Saved, path: Path, n: int, where: Sequence[str], seed: int, show: Show, temperature: Sequence[float]
) -> None:
    """Write rows of a table with columns of all types."""
    from sigma_vae.tabular import ESS, TabularVAE

    check_count(n)
    if show != "mean" or tuple(temperature) != (1.0,):
        raise ValueError("rows of a table are always draws from p(x|z), at temperature 1; leave out --show and --temperature")
    model = TabularVAE.of(opened, str(path), device=str(opened.vae.device))
    known: dict[str, Cell] = {}
    for text in where:
        column, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"where is written as column=value, got {text!r}; write --where sex=male, say")
        known[column] = value
    frame = model.sample(n, known or None, seed=seed)
    write_table(path, frame, model.schema)
    if ESS in frame.attrs:
        print(f"effective sample size of the latents: {frame.attrs[ESS]:.0f}")


def _sample_numbers(run: str, opened: Saved, path: Path, n: int, seed: int, show: Show, temperature: Sequence[float]) -> None:
    """Write samples of a table of numbers, with the names of its columns."""
    import pandas as pd

    record = runs.read_json(to_read(run) / "environment.json").get("data")
    columns = record.get("columns") if isinstance(record, dict) else None
    if not columns or opened.shape != (len(columns),):
        raise ValueError(f"{run} was not trained on the columns of a table; write .npz instead")
    check_count(n)
    generator = torch.Generator(opened.vae.device).manual_seed(seed)
    torch.manual_seed(seed)
    spread = temperature[0] if len(temperature) == 1 else temperature
    values = opened.scaling.undo(sampled(opened.vae, None, n, generator, show, spread))
    write_table(path, pd.DataFrame(values.cpu().numpy(), columns=columns))


@torch.no_grad()
def impute(
    run: RunFolder,
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    *,
    out: str,
    show: Show = "mean",
    draws: int = 256,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Fill in the missing values of a table, given the others of their rows.

    The run is of a table with the likelihood mixed.

    Args:
        run: Folder of the run.
        data: Table with these columns, by path, read like the run's own.
        out: .csv, .parquet or .xlsx file to write.
        show: Middle of the values of numbers, and likeliest categories; or a draw from the posterior.
        draws: Number of latents drawn and weighted for each row.
        seed: Seed of the draws.
        device: auto, cpu, cuda or cuda:1.
    """
    from sigma_vae.tabular import TabularVAE

    check_seed(seed)
    if not 2 <= draws <= MOST_DRAWS:
        raise ValueError(f"--draws counts latents for each row, from 2 to {MOST_DRAWS}, got {draws}")
    path = checked(Path(out), TABLE_FILES)
    opened = runs.open_model(to_read(run), device)
    config = runs.new_config(to_read(run), opened.scaling, data)
    model = TabularVAE.of(opened, run, unknown=config.unknown, device=str(opened.vae.device))
    frame, _ = read_frame(replace(config, columns=()), "train")
    write_table(path, model.impute(frame, show, draws=draws, seed=seed), model.schema)


@torch.no_grad()
def reconstruct(
    run: RunFolder,
    *,
    data: str | None = None,
    split: Split = "test",
    n: int = 32,
    condition: tuple[str, ...] = (),
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
        condition: Another condition to decode the latents with, as label=3: counterfactuals. The examples are encoded
            with their own.
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
    other = _counterfactual(examples.vae, condition, batch.condition)
    originals, again = scaling.undo(batch.x), scaling.undo(reconstructed(examples.vae, batch, show, seed, other))
    columns = 1 if moving and path.suffix == ".png" else 8  # a clip fills a row
    write(path, pairs(originals, again, columns), {"originals": originals, "reconstructions": again}, columns)


@torch.no_grad()
def traverse(
    run: RunFolder,
    *,
    n: int = 8,
    steps: int = 9,
    reach: float = 2.0,
    condition: tuple[str, ...] = (),
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
        condition: What a conditional model is given, such as label=3; drawn unless given.
        seed: Seed of the draw.
        out: .png or .npz file to write (keys "traversals", latents × steps, and "latents"); RUN/traversals.png or .npz
            unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    opened = runs.open_model(to_read(run), device)
    vae = opened.vae
    if not (vae.network.has_posterior and vae.network.has_prior) or len(vae.network.latents.shapes[0]) > 1:
        raise ValueError(f"{run} has no single layer of flat latents that could be moved one by one; sample shows its layers")
    path = output(out, beside(run) / "traversals", opened.shape, moving=False)
    check_count(n)
    check_count(steps)
    check_seed(seed)
    if not 0 < reach <= FARTHEST:
        raise ValueError(f"--reach is in stds of the prior, above 0 and at most {FARTHEST:g}, got {reach}")
    z = vae.network.prior.sample(1, torch.Generator(vae.device).manual_seed(seed))[0]
    given: Given | None = _given(vae, condition)
    if given is None and vae.network.conditions is not None:
        given = vae.network.conditions.draw(1, torch.Generator().manual_seed(seed))
    rows, chosen = traversals(vae, z, n, steps, reach, given)
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
    batch = next(iter(Batches(store, scaling, 2 * n))).to(examples.vae.device)
    if (pairs_of := len(batch.x) // 2) == 0:
        raise ValueError(f"a line needs two examples, and the {examples.word} split has one; take another --split")
    first, last = slice(pairs_of), slice(pairs_of, 2 * pairs_of)
    conditions = None if batch.condition is None else (batch.condition[first], batch.condition[last])
    rows = interpolations(examples.vae, batch.x[first], batch.x[last], steps, conditions)
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
    batch = next(iter(Batches(examples.batches.store, examples.batches.scaling, n)))
    clips = batch.x
    if not 1 <= past <= clips.shape[1]:
        raise ValueError(f"--context is from 1 to the {clips.shape[1]} frames of a clip, got {past}")
    future = (clips.shape[1] - past or FRAMES) if frames is None else frames
    if max(future, samples) > LARGEST_COUNT:
        raise ValueError(f"--frames and --samples are at most {LARGEST_COUNT:g}, got {future} and {samples}")
    torch.empty(max(samples, 1), len(clips), max(future, 1), *clips.shape[2:])  # raises at once if memory is not enough
    torch.manual_seed(seed)
    with bar("predicting frames"):
        predicted = vae.predict(
            clips[:, :past],
            future,
            samples,
            show,
            generator=torch.Generator(where).manual_seed(seed),
            temperature=temperature,
            batch_statistics=batch_statistics,
            condition=batch.condition,
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
    run: RunFolder,
    *,
    data: str | None = None,
    split: Split = "test",
    expression: bool = False,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Write mean and std of the latents of each example.

    Args:
        run: Folder of the run.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split to encode.
        expression: Also write the means that the posteriors' means decode to: of counts the normalised expression, of
            rows with the mean total where means are shares of it.
        out: .npz file to write (keys "mean" and "std": examples × latents, in the split's order; "example": their files,
            or rows in the file; "expression"), or .h5ad (latents in obsm, expression in the layer sigma_vae, beside the
            examples' own data where these are of an .h5ad file); RUN/codes-SPLIT.npz unless given.
            Or .npy: one array, examples × (mean, std) × latents, written batch by batch, for latents that do not fit into
            memory; open it with numpy.load(..., mmap_mode="r").
        device: auto, cpu, cuda or cuda:1.
    """
    examples = _examples(run, data, split, device)
    path = checked(Path(out) if out is not None else beside(run) / f"codes-{examples.word}.npz", (".npz", ".npy", ".h5ad"))
    if path.suffix == ".npy":
        _write_batches(path, examples)
        return print(path)
    means, stds, decoded = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in examples.batches:
        posterior = examples.vae.encode(batch.x, batch.condition)
        means.append(posterior.loc)
        stds.append(posterior.scale)
        if expression:
            decoded.append(examples.batches.scaling.undo(examples.vae.decode(posterior.loc, condition=batch.condition)))
    latents = {"mean": torch.cat(means), "std": torch.cat(stds)}
    if path.suffix == ".h5ad":
        source = Path(data) if data is not None else runs.config_of(to_read(run)).data.path
        columns = runs.columns_of(to_read(run)) or [str(i) for i in range(examples.batches.store.shape[0])]
        write_h5ad(path, source, examples.names, columns, _arrays(latents), _joined(decoded))
    else:
        more = {"expression": torch.cat(decoded)} if decoded else {}
        _write_arrays(path, latents | more, example=_plain(examples.names))
    print(path)


def score(
    run: RunOrFile,
    *,
    data: str | None = None,
    split: Split = "test",
    scores: tuple[str, ...] = (),
    maps: str | None = None,
    draws: int = 16,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Write log-likelihood, rate, ELBO and bits per dimension of each example.

    Examples are called by their file, or by their row in the file, from 0. Of the run's own data, their split is
    written too. Of a model that is given a class label, so are the bounds on log p(x|c) for every class c, and the
    probabilities of the classes, by the temperature of the run's last evaluation. Scores of windows of a
    series (train --window) are also put on the time axis, as RUN/series-SPLIT.csv and a plot.

    With a file of data in place of RUN, a model is trained on it first, as train would, into runs/NAME; then all of its examples
    are scored by their density, and the oddest ones listed.

    Args:
        run: Folder of the run; or a file of data, as table.csv, to train on first.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits.
        split: Split to score.
        scores: Anomaly scores to add, larger for odder examples, the first of which ranks them: density, bits-minus-complexity,
            rate, reconstruction, p-value (small for odd ones), or all. The oddest images are drawn in RUN/oddest-SPLIT.png;
            other examples are listed.
        maps: .npz file to write (key "maps"): the negative log-likelihood of each value, or column of a mixed table, in nats.
        draws: Number of posterior draws for the anomaly scores and maps.
        seed: Seed of the posterior's noise.
        out: .csv or .parquet file to write; RUN/scores-SPLIT.csv unless given.
        device: auto, cpu, cuda or cuda:1.
    """
    import pandas as pd

    check_seed(seed)
    if Path(run).is_file():
        run, data, scores = _trained_on(run, device), data or run, scores or ("density",)
    wanted = check_scores(scores)
    map_file = None if maps is None else checked(Path(maps), (".npz",))
    examples = _examples(run, data, split, device)
    path = checked(Path(out) if out is not None else beside(run) / f"scores-{examples.word}.csv", (".csv", ".parquet"))
    columns = _terms(examples, seed)
    odd_nats = columns["rate_nats"] - next(iter(columns.values()))
    columns |= _of_classes(run, examples, seed)
    odd: dict[str, Tensor] = {}
    found = None
    if wanted or map_file is not None:
        with_bits, a_row = "bits-minus-complexity" in wanted, len(examples.batches.store.shape) == 1
        found = anomalies(examples.vae, examples.batches, draws, seed, maps=map_file is not None or a_row, bits=with_bits)
        named = "all" not in scores
        odd = odd_columns(run, examples.vae, examples.batches, found, wanted, draws, seed, named=named)
        columns |= odd
    told = {} if examples.splits is None else {"split": examples.splits}
    table = pd.DataFrame(told | {name: values.numpy() for name, values in columns.items()}, examples.names)
    table = table.rename_axis("example")
    with replacing(path) as aside:
        (table.to_csv if path.suffix == ".csv" else table.to_parquet)(aside)
    print(path)
    if found is not None and map_file is not None:
        assert found.maps is not None
        values, titles = column_maps(examples.vae, examples.batches, found.maps)
        more = {} if titles is None else {"columns": np.array(titles)}
        _write_arrays(map_file, {"maps": values}, example=_plain(examples.names), **more)
        print(map_file)
    if (window := runs.config_of(to_read(run)).data.window) is not None:
        title, values = next(iter(odd.items()), ("odd_nats", odd_nats))
        write_series(beside(run) / f"series-{examples.word}.csv", values, examples.names, window, title)
    if odd and found is not None:
        picture = beside(run) / f"oddest-{examples.word}.png"
        order = ranking(odd, wanted)
        show_oddest(picture, examples.vae, examples.batches, examples.names, odd, order, found.maps)


def _terms(examples: "_Examples", seed: int) -> dict[str, Tensor]:
    """Log-likelihood, rate, their difference, and bits per dimension where there are levels; an objective is called one."""
    terms = score_examples(examples.vae, examples.batches, seed)
    fit, bound = ("log_likelihood_nats", "elbo_nats") if examples.vae.likelihood.normalised else ("fit_nats", "objective_nats")
    columns = {fit: terms.log_likelihood, "rate_nats": terms.rate, bound: terms.log_likelihood - terms.rate}
    if terms.log_mass is not None:
        columns["bits_per_dim"] = (terms.rate - terms.log_mass) / (terms.dims * torch.tensor(2.0).log())
    return columns


def _trained_on(source: str, device: str) -> str:
    """Train on a file with all defaults, and return the folder of the run."""
    folder = Path("runs") / Path(source).stem
    if folder.exists():
        raise ValueError(f"{folder} is there already; score with it: {PROGRAM} score {folder} --data {source}")
    runs.train(RunConfig(DataConfig(source), device=device), folder, progress=progress.screen is not None)
    return str(folder)


def _of_classes(run: str, examples: "_Examples", seed: int) -> dict[str, Tensor]:
    """Bounds and probabilities of all classes of each label that the model is given."""
    labels = labels_of(examples.vae)
    if sum(len(label.classes or ()) for label in labels) > MOST_CLASSES:
        return {}
    found: dict[str, Tensor] = {}
    for label in labels:
        bounds, _ = class_bounds(examples.vae, examples.batches, seed, label.name)
        probabilities = log_probabilities(bounds, label, _temperature(run, label.name)).exp()
        names = [f"{label.name}={name}" for name in label.classes or ()]
        found |= {f"bound_nats[{name}]": values for name, values in zip(names, bounds.T, strict=True)}
        found |= {f"probability[{name}]": values for name, values in zip(names, probabilities.T, strict=True)}
    return found


def _temperature(run: str, label: str) -> float:
    """The temperature of a label's classifier in the run's evaluation; 1 where there is none."""
    try:
        measured = runs.read_evaluation(to_read(run))["classifier"]
        return float(measured.get(label, measured)["temperature"])
    except (KeyError, TypeError, ValueError):
        return 1.0


def _given(vae: VAE, texts: tuple[str, ...]) -> dict[str, str] | None:
    """The conditions in the options, by name; None without such options."""
    if not texts:
        return None
    if vae.network.conditions is None:
        raise ValueError("this model is given no condition; leave --condition out, or train one: --condition NAME")
    return vae.network.conditions.parse(texts)


def _counterfactual(vae: VAE, texts: tuple[str, ...], own: Tensor | None) -> Tensor | None:
    """The examples' own conditions, with those that the options give in their place; None where they give nothing."""
    given = _given(vae, texts)
    if given is None or own is None or vae.network.conditions is None:
        return None
    other = vae.network.conditions.rows(given, len(own)).to(own)
    return torch.where(other.isnan(), own, other)


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


def check_count(n: int, option: str = "--n") -> None:
    """Refuse to take nothing, or more than can be counted."""
    if not 1 <= n <= LARGEST_COUNT:
        raise ValueError(f"{option} counts examples, up to {LARGEST_COUNT:g}, and is at least 1, got {n}")


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


def write_table(path: Path, frame: "pd.DataFrame", schema: TableSchema | None = None) -> None:
    """Write a data frame without its index, and print the path; the ending selects the format.

    Numbers that the schema knows to be whole are written so, though a data frame has them as floats where some are missing.
    """
    whole = [c.name for c in schema.columns if c.decimals == 0 and c.dtype.startswith("float")] if schema is not None else []
    if path.suffix != ".parquet":
        frame = frame.astype(dict.fromkeys(whole, "Int64"))
    with replacing(path) as aside:
        match path.suffix:
            case ".csv":
                frame.to_csv(aside, index=False)
            case ".parquet":
                frame.to_parquet(aside, index=False)
            case _:
                try:
                    frame.to_excel(aside, index=False)
                except ImportError as error:
                    raise ValueError(
                        f"{path} is written with openpyxl, which is not installed; pip install openpyxl, or write .csv"
                    ) from error
    print(path)


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


def _joined(batches: list[Tensor]) -> Array | None:
    return _arrays({"all": torch.cat(batches)})["all"] if batches else None


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Array]:
    return {name: at_least_float32(values).cpu().numpy() for name, values in tensors.items()}


def _write_batches(path: Path, examples: _Examples) -> None:
    """Write mean and std of each batch into a memory-mapped array."""
    batches, n, done = examples.batches, len(examples.batches.store), 0
    with replacing(path) as aside:
        codes: Any = None
        for batch in batches:
            posterior = examples.vae.encode(batch.x, batch.condition)
            both = at_least_float32(torch.stack([posterior.loc, posterior.scale], 1)).cpu().numpy()
            if codes is None:
                codes = np.lib.format.open_memmap(aside, "w+", both.dtype, (n, *both.shape[1:]))
            codes[done : (done := done + len(both))] = both
        codes.flush()


def _write_arrays(path: Path, tensors: dict[str, Tensor], **others: Names) -> None:
    plain: dict[str, Any] = _arrays(tensors) | others
    with replacing(path) as aside:
        np.savez_compressed(aside, **plain)


def _plain(names: Names) -> Names:
    """Words as an array that is written without pickling."""
    return names.astype(str) if names.dtype == object else names


# -- anomaly scores: further columns, maps of single values, and the oddest examples -----------------------------------


DRAWN, LISTED = 16, 10
"""Oddest examples that are drawn, and that are listed."""


def name_of(score: Score) -> str:
    """Name of a score's column, with its unit."""
    units = {"bits-minus-complexity": "bits_minus_complexity", "p-value": "p_value"}
    return units.get(score, f"{score}_odd_nats")


def odd_columns(
    run: str, vae: VAE, batches: Batches, found: Anomalies, scores: Sequence[Score], draws: int, seed: int, *, named: bool
) -> dict[str, Tensor]:
    """Scores as columns; ``named``: each was asked for, and is an error where the data do not have it.

    Raises:
        ValueError: the data have no levels to compress, or those of the run, whose validation split gives p-values, are gone.
    """
    columns: dict[str, Tensor] = {}
    for score in scores:
        if score == "bits-minus-complexity" and (found.bits is None or _is_real(batches)):
            if named:
                raise ValueError(f"{score} is for data with levels, which are compressed; these have real values: leave it out")
            continue
        match score:
            case "density":
                columns[name_of(score)] = found.density
            case "rate":
                columns[name_of(score)] = found.rate
            case "reconstruction":
                columns[name_of(score)] = found.reconstruction
            case "bits-minus-complexity":
                assert found.bits is not None
                parts = torch.split(torch.arange(len(batches.store)), 1024)
                lengths = [complexity_bits(batches.store.take(part)) for part in parts]
                columns[name_of(score)] = found.bits - torch.cat(lengths)
            case "p-value":
                columns[name_of(score)] = p_values(found.density, _reference(run, vae, draws, seed))
    return columns


def _is_real(batches: Batches) -> bool:
    return batches.store.take(torch.zeros(1, dtype=torch.int64)).is_floating_point()


def _reference(run: str, vae: VAE, draws: int, seed: int) -> Tensor:
    """Densities of the run's own validation split."""
    data = runs.open_run(to_read(run), str(vae.device)).data
    return anomalies(
        vae, data.batches("validation", runs.evaluation_batch(data), device=vae.device), draws, seed, bits=False
    ).density


def ranking(columns: dict[str, Tensor], scores: Sequence[Score]) -> Tensor:
    """Positions of examples, the oddest first, by the first score."""
    first = columns[name_of(next(score for score in scores if name_of(score) in columns))]
    odd = -first if name_of("p-value") in columns and first is columns[name_of("p-value")] else first
    return odd.argsort(descending=True, stable=True)


def column_maps(vae: VAE, batches: Batches, maps: Tensor) -> tuple[Tensor, list[str] | None]:
    """Maps of single values; of a table with columns of all types, one value for each column, with their names."""
    schema = batches.scaling.schema
    if schema is None:
        return maps, None
    row = schema.row
    total = maps.new_zeros(len(maps), len(row.columns)).index_add(1, row.owners, maps[:, : row.features])
    return total, [column.name for column in row.columns]


def show_oddest(
    path: Path, vae: VAE, batches: Batches, names: Names, columns: dict[str, Tensor], order: Tensor, maps: Tensor | None
) -> None:
    """Draw the oddest images above their reconstructions; list other examples, tables with their oddest column."""
    if drawable(batches.store.shape):
        chosen = order[:DRAWN]
        x = batches.scaling(batches.store.take(chosen)).to(vae.device)
        again = reconstructed(vae, Batch(x, chosen))
        save_grid(path, pairs(batches.scaling.undo(x), batches.scaling.undo(again), columns=8), columns=8)
        print(path)
        return
    name, values = next(iter(columns.items()))
    print(f"the oddest by {name}:")
    shown, titles = (None, None) if maps is None else column_maps(vae, batches, maps)
    for i in order[:LISTED].tolist():
        where = ""
        if shown is not None and shown.dim() == 2:
            j = int(shown[i].argmax())
            where = f", most in {titles[j] if titles is not None else f'column {j}'} ({float(shown[i, j]):.2f} nats)"
        print(f"  {names[i]}: {float(values[i]):.4g}{where}")


def write_series(path: Path, values: Tensor, starts: Names, window: int, title: str) -> None:
    """Write scores of windows on the time axis, as a table and as a plot beside it."""
    import pandas as pd
    from matplotlib.figure import Figure

    first, length = int(starts.min()), int(starts.max()) + window
    found = on_time_axis(values.double().numpy(), starts.astype(np.int64), window, length)[first:]
    table = pd.DataFrame({"time": np.arange(first, length), title: found})
    with replacing(path) as aside:
        table.to_csv(aside, index=False)
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(table.time, found, color="#0072B2", linewidth=0.8)
    axes.set(xlabel="time (row)", ylabel=title, title="mean score of the windows that hold each time")
    with replacing(path.with_suffix(".png")) as aside:
        figure.savefig(aside, dpi=150)
    print(path)
    print(path.with_suffix(".png"))
