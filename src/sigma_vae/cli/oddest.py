"""Anomaly scores of the command ``score``: further columns, maps of single values, and the oddest examples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sigma_vae import runs
from sigma_vae.cli.options import to_read
from sigma_vae.config import replacing
from sigma_vae.data import Batches
from sigma_vae.data.splits import Names
from sigma_vae.data.tables import on_time_axis
from sigma_vae.evaluation.anomaly import Anomalies, Score, anomalies, complexity_bits, p_values
from sigma_vae.evaluation.plots import drawable, pairs, reconstructed, save_grid
from sigma_vae.types import Batch
from sigma_vae.vae import VAE

__all__ = ["column_maps", "name_of", "odd_columns", "ranking", "show_oddest", "write_series"]

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
