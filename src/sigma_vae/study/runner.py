"""Run the cells of a study through joblib: in processes on this machine, on a Dask cluster, or on Ray."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sigma_vae.config import read, write
from sigma_vae.study.cell import do, finished, known
from sigma_vae.study.grid import StudySpec, cells, check, format_place
from sigma_vae.study.results import collect, is_kept, tabulate

__all__ = ["SPEC", "Backend", "claim", "run", "spec_of"]

SPEC = "study.yaml"


def spec_of(out: Path) -> StudySpec:
    """Read the grid of a study's folder.

    Raises:
        ValueError: the folder holds no study.
    """
    if not (out / SPEC).is_file():
        raise ValueError(f"{out} holds no study (no {SPEC}); run one: sigma-vae study run SPEC --out {out}")
    return read(out / SPEC, StudySpec)


def claim(spec: StudySpec, out: Path) -> None:
    """Write the grid into a folder: a new one, or one whose finished cells are all in this grid.

    Raises:
        ValueError: the folder has finished cells that this grid has not.
    """
    keys = {cell.key for cell in cells(spec)}
    if (out / SPEC).exists():
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
    out.mkdir(parents=True, exist_ok=True)
    write(out / SPEC, replace(spec, sizes={}))


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
