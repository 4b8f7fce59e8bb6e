"""Run the cells of a study through joblib: in processes on this machine, on a Dask cluster, or on Ray."""

import csv
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from sigma_vae import models, runs
from sigma_vae.config import read, replacing, write, write_whole
from sigma_vae.registry import register
from sigma_vae.runs.folder import config_of
from sigma_vae.study.grid import GRID, Cell, StudySpec, as_column, cells, check, format_place, in_words, kept_spec, pinned

SPEC = "study.yaml"


def spec_of(out: Path) -> StudySpec:
    """Read the grid of a study's folder.

    Raises:
        ValueError: the folder holds no study.
    """
    if (out / SPEC).is_file():
        return read(out / SPEC, StudySpec)
    if is_kept(out):
        return kept_spec(out / RESULTS)
    raise ValueError(f"{out} holds no study (neither {SPEC} nor {RESULTS}); run one: sigma-vae study run SPEC --out {out}")


def claim(spec: StudySpec, out: Path) -> None:
    """Write the grid into a folder: a new one, or one whose finished cells are all in this grid.

    Raises:
        ValueError: the folder has finished cells that this grid has not.
    """
    check_same(spec, out)
    out.mkdir(parents=True, exist_ok=True)
    write(out / SPEC, replace(spec, sizes={}))


def check_same(spec: StudySpec, out: Path) -> None:
    """Refuse a folder that has finished cells of another grid."""
    keys = {cell.key for cell in cells(spec)}
    if (out / SPEC).exists() or is_kept(out):
        before = spec_of(out)
        table = tabulate(cells(before), out)
        there = set(table.loc[table["status"] == "done", "key"])
        lost = [cell for cell in cells(before) if cell.key in there - keys]
        if lost:
            raise ValueError(
                f"{out} holds the study {before.title!r} with {len(lost)} finished cells that this grid has not, such as"
                f" {format_place(lost[0].place)};"
                " give another --out, or a grid that has them too"
            )


Backend = Literal["loky", "dask", "ray"]


def run(
    spec: StudySpec,
    out: Path,
    *,
    backend: Backend = "loky",
    workers: int | None = None,
    address: str | None = None,
    retries: int = 1,
    tell: Callable[[dict[str, Any], int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that is not finished, and write ``results.parquet`` with a row for each cell, prior and split.

    ``study.yaml`` in the folder holds the grid. Each cell has a folder under ``out/cells``, named by a digest of its
    configuration, with its run and ``cell.json``, which is written when the cell ends. A study that was stopped or
    killed continues: finished cells are not repeated, and one that was in training is resumed from its checkpoint. A
    cell that raises is recorded as failed, with its error, and tried again: ``retries`` times at once, and whenever the
    study is run again.

    Args:
        spec: the grid.
        out: folder of the study; on a cluster, one that all workers can write to.
        backend: ``"loky"`` (processes here), ``"dask"`` or ``"ray"``.
        workers: number of cells at once (loky); one per core unless given, each with its share of the cores.
        address: of the Dask scheduler or the Ray cluster; a local one is started unless given.
        retries: number of further attempts at a failed cell.
        tell: called with the record of each cell that ends (on Ray: when all have), the number of ended cells, and of
            all.

    Returns:
        The records of all cells, in the order of the grid.

    Raises:
        ValueError: a cell's configuration is not possible (checked before anything is trained, as far as that goes
            without the data), ``retries`` or ``workers`` is too small, the folder is a kept study or has finished cells
            of another grid, or the backend's package is not installed.
        ChildProcessError: a worker was killed; finished cells are kept.
    """
    from joblib import Parallel, cpu_count, delayed, effective_n_jobs

    if retries < 0:
        raise ValueError(f"retries is how many further attempts a failed cell gets, at least 0, got {retries}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is how many cells run at once, at least 1, got {workers}; leave it out for one on each core")
    if is_kept(out):
        raise ValueError(f"{out} holds a kept study, without the weights of its runs; give another --out")
    todo = cells(spec)
    workers = None if workers is None else min(workers, len(todo))
    check([cell for cell in todo if not finished(cell, out)])
    claim(spec, out)
    ended = 0
    with _on(backend, workers, address):
        threads = max(1, cpu_count() // effective_n_jobs(workers or -1)) if backend == "loky" else 1
        for attempt in range(1 + retries):
            left = [cell for cell in todo if not finished(cell, out)]
            if attempt == 0:
                ended = len(todo) - len(left)
            if not left:
                break
            # Ray's backend returns results only at the end.
            parallel = Parallel(n_jobs=workers or -1, return_as="list" if backend == "ray" else "generator_unordered")
            with _living(out):
                for record in parallel(delayed(do)(cell, out.resolve(), threads) for cell in left):
                    ended += record["status"] == "done"
                    if tell is not None:
                        tell(record, ended, len(todo))
    collect(todo, out)
    return [record for cell in todo if (record := known(cell, out)) is not None]


@contextmanager
def _living(out: Path) -> Iterator[None]:
    """Say what to do when a worker dies, for example killed by the system when memory runs out."""
    try:
        yield
    except BrokenExecutor as error:
        raise ChildProcessError(
            f"a worker of the study died, perhaps killed because memory ran out; what is finished in {out} is kept. Run the study"
            " again to continue, with fewer workers if memory ran out"
        ) from error


@contextmanager
def _on(backend: Backend, workers: int | None, address: str | None) -> Iterator[None]:
    """Select joblib's backend, with a local cluster where none is named."""
    from joblib import parallel_config

    if backend == "loky":
        if address is not None:
            raise ValueError("an address belongs to a cluster: take backend dask or ray, or leave it out")
        with parallel_config(backend="loky"):
            yield
    elif backend == "dask":
        with _dask(workers, address), parallel_config(backend="dask"):
            yield
    else:
        with _ray(workers, address), parallel_config(backend="ray"):
            yield


@contextmanager
def _dask(workers: int | None, address: str | None) -> Iterator[None]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError("the backend dask needs its package: pip install 'dask[distributed]'") from error
    if address is not None:
        with Client(address):  # type: ignore[no-untyped-call]
            yield
        return
    count = workers or os.cpu_count()
    with (
        LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster,  # type: ignore[no-untyped-call]
        Client(cluster),  # type: ignore[no-untyped-call]
    ):
        yield


@contextmanager
def _ray(workers: int | None, address: str | None) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ValueError("the backend ray needs its package: pip install 'ray[default]'") from error
    register: Callable[[], None] = register_ray
    register()
    ray.init(address=address, num_cpus=workers if address is None else None, ignore_reinit_error=True)
    try:
        yield
    finally:
        ray.shutdown()


# -- one cell: trained and evaluated, continued where it was killed ----------------------------------------------------

EVERY_SECONDS = 10.0
"""Longest time that the clock of a killed attempt can lose."""


def seconds_in(path: Path) -> float:
    """Read the seconds in a file; 0 where there is none."""
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


@contextmanager
def counted(path: Path, before: float = 0.0) -> Iterator[None]:
    """Add the time of this block to the seconds in a file, while it runs and when it ends or raises.

    Args:
        path: the file.
        before: seconds to begin with where there is no file yet.
    """
    spent, start, ended = seconds_in(path) or before, monotonic(), Event()

    def write() -> None:
        write_whole(path, f"{spent + monotonic() - start}\n")

    def write_meanwhile() -> None:
        while not ended.wait(EVERY_SECONDS):
            with suppress(OSError):  # the next write or the last one raises
                write()

    thread = Thread(target=write_meanwhile, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()


CELLS, RECORD = "cells", "cell.json"
RUNNING = "running"
"""Name of a file that exists while a process works on the cell."""
SECONDS, TRAINING_SECONDS = "seconds", "training-seconds"
"""Names of files with the time of all attempts so far; removed when the cell is finished."""
OF_SAMPLES = ("iwae", "quality")
"""Metrics to measure again with each further prior; others are about latents and decoder."""
CHOSEN_BY = ("quality", "predictions")
"""Metrics to measure on the validation split as well, by which the best of several arms is chosen."""


def folder_of(cell: Cell, out: Path) -> Path:
    """The folder of a cell."""
    return out / CELLS / cell.key


def record_of(cell: Cell, out: Path) -> Path:
    """The file with the cell's record."""
    return folder_of(cell, out) / RECORD


def known(cell: Cell, out: Path) -> dict[str, Any] | None:
    """Read the record of a cell; None where it has not ended."""
    path = record_of(cell, out)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def finished(cell: Cell, out: Path) -> bool:
    """Whether the cell has ended and did not fail."""
    record = known(cell, out)
    return record is not None and record["status"] == "done"


def running_since(cell: Cell, out: Path) -> float | None:
    """Start of the work on a cell, in seconds since 1970; None where nobody works on it."""
    try:
        return (folder_of(cell, out) / RUNNING).stat().st_mtime
    except FileNotFoundError:
        return None


def do(cell: Cell, out: Path, threads: int) -> dict[str, Any]:
    """Train and evaluate a cell unless it is finished, and continue one that was killed.

    Two processes never work on one cell: the second waits, and finds it finished. An error is recorded and returned,
    not raised. ``seconds`` and ``training_seconds`` count all attempts; of a killed attempt up to ten seconds are lost.
    """
    import torch
    from filelock import FileLock

    folder = folder_of(cell, out)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        before = known(cell, out)
        if before is not None and before["status"] == "done":
            return before
        torch.set_num_threads(threads)
        (folder / RUNNING).touch()
        failed, spent = (0, 0.0) if before is None else (before["failures"], before["seconds"])
        record: dict[str, Any] = {"key": cell.key, "place": cell.place, "threads": threads, "failures": failed}
        try:
            with counted(folder / SECONDS, spent):
                record |= {"status": "done", **_measured(cell, folder)}
        except Exception as error:
            failure = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            record |= {"status": "failed", "failures": failed + 1, **failure}
        finally:
            (folder / RUNNING).unlink(missing_ok=True)
        record["seconds"] = seconds_in(folder / SECONDS)
        written = _without_places(json.dumps(record, indent=1, ensure_ascii=False), out)
        write_whole(record_of(cell, out), written + "\n")
        if record["status"] == "done":
            for name in (SECONDS, TRAINING_SECONDS):
                (folder / name).unlink(missing_ok=True)
        as_read: dict[str, Any] = json.loads(written)
        return as_read


def _without_places(text: str, out: Path) -> str:
    """Shorten paths in the study's folder, the current one or the package's, so that they are equal on every machine."""
    places = {str(out), os.getcwd(), *filter(os.path.isabs, sys.path)} - {os.sep}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place.rstrip(os.sep) + os.sep, "")
    return text


def _measured(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train a cell and evaluate it with each prior on both splits."""
    run = folder / "run"
    with counted(folder / TRAINING_SECONDS):
        if runs.has_checkpoint(run) and not (run / "model" / "model.json").exists():
            runs.resume(run, progress=False)
        elif not (run / "evaluation.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            runs.train(cell.config, run, progress=False, page=False)
    by = tuple(m for m in cell.evaluation.metrics or () if m in CHOSEN_BY)
    validation = replace(cell.evaluation, metrics=by, split="validation")
    of_samples = replace(cell.evaluation, metrics=tuple(m for m in cell.evaluation.metrics or () if m in OF_SAMPLES))
    reports: dict[str, Any] = {}
    learned = not register.network.fact(cell.config.model.network, "has_prior", True)  # which auto leaves as it is
    for prior in cell.priors:
        if config_of(run).model.prior != prior and not (learned and prior == models.AUTO):
            runs.fit_prior(run, prior)
        settings = of_samples if reports else cell.evaluation
        reports[prior] = {
            "test": runs.evaluate_run(run, settings).to_json(),
            "validation": runs.evaluate_run(run, validation).to_json(),
        }
    return {"training_seconds": seconds_in(folder / TRAINING_SECONDS), "reports": reports, "curve": _curve(run / "metrics.csv")}


def _curve(metrics: Path) -> list[dict[str, float]]:
    """Read steps and validation ELBO from a run's metrics."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return [
            {"step": int(row["step"]), "elbo_nats": float(row["validation/elbo_nats"])}
            for row in csv.DictReader(file)
            if row.get("validation/elbo_nats")
        ]


# -- results of the cells as a table -----------------------------------------------------------------------------------

if TYPE_CHECKING:
    import pandas as pd


RESULTS = "results.parquet"
PICTURE = "picture."
"""Start of the names of columns with pictures, in the table of a kept study."""


def collect(cells: Sequence[Cell], out: Path) -> "pd.DataFrame":
    """Gather what the cells have written in ``results.parquet``, and return it as a table.

    Columns: ``key``, ``status``, ``error``, ``failures``, one for each axis, ``prior``, ``split``, ``observes``
    (whether the bounds are of a ``"density"`` or of a ``"level"``), ``training_seconds``, ``core_seconds``, ``curve``
    (steps and validation ELBO), then each value of the evaluation under its dotted name. A mean has its own name, and
    its error is at ``....standard_error``. An axis whose values are not all numbers has them as words (null:
    ``"null"``). A cell that failed has one row; one that has not ended has none.

    The table of a kept study is read, not written.
    """
    table = tabulate(cells, out)
    if not is_kept(out):
        write_table(table, out)
    return table


def tabulate(cells: Sequence[Cell], out: Path) -> "pd.DataFrame":
    """Return the table of :func:`collect` and write nothing."""
    import pandas as pd

    if is_kept(out):
        kept = pd.read_parquet(out / RESULTS)
        kept.attrs = {}  # the grid, which every operation on the table would copy
        return kept[kept["key"].isin([cell.key for cell in cells])].reset_index(drop=True)
    columns: dict[str, dict[str, Any]] = {
        axis: as_column([cell.place[axis] for cell in cells]) for axis in (cells[0].place if cells else ())
    }
    rows = [row for cell in cells for row in _rows(cell, columns, out)]
    return pd.DataFrame(rows) if rows else pd.DataFrame({"key": [], "status": [], "error": []})


def is_kept(out: Path) -> bool:
    """Whether the folder holds a kept study: the table in one file, and no cells."""
    return (out / RESULTS).is_file() and not (out / CELLS).is_dir()


def write_table(table: "pd.DataFrame", out: Path, spec: StudySpec | None = None) -> None:
    """Write ``results.parquet``, of a kept study with its grid; equal tables give equal bytes."""
    table.attrs = {} if spec is None else {GRID: asdict(pinned(replace(spec, sizes={})))}
    with replacing(out / RESULTS) as aside:
        table.to_parquet(aside, index=False, compression="zstd", write_statistics=False)


def leaves(report: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten the report of an evaluation: its values under dotted names.

    Words at the top repeat the cell's configuration and are left out.

    >>> dict(leaves({"data": "digits", "elbo_nats": {"mean": 1.0, "standard_error": 0.5}, "how": {"name": "x"}}))
    {'elbo_nats': 1.0, 'elbo_nats.standard_error': 0.5, 'how.name': 'x'}
    """
    for name, value in report.items():
        path = f"{before}.{name}" if before else name
        if isinstance(value, dict):
            yield from leaves(value, path)
        elif value is not None and (before or not isinstance(value, str)):
            yield path.removesuffix(".mean"), value


def _rows(cell: Cell, columns: dict[str, dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    record = known(cell, out)
    if record is None:
        return
    place = {axis: columns[axis][in_words(value)] for axis, value in cell.place.items()}
    about = {name: record.get(name) for name in ("status", "error", "failures")}
    seconds = {"training_seconds": record.get("training_seconds"), "core_seconds": record["seconds"] * record["threads"]}
    if record["status"] != "done":
        yield {"key": cell.key, **about, **place, **seconds}
        return
    for prior, reports in record["reports"].items():
        for split, report in reports.items():
            which = {"prior": prior, "split": split, "observes": report["observes"]}
            yield {"key": cell.key, **about, **place, **which, **seconds, "curve": record.get("curve"), **dict(leaves(report))}
