"""Train and evaluate one cell of a study, and record its results or the error that stopped it."""

import csv
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

from sigma_vae import runs
from sigma_vae.config import write_whole
from sigma_vae.study.grid import Cell

__all__ = ["CELLS", "counted", "do", "finished", "folder_of", "known", "record_of", "running_since", "seconds_in"]

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
    """When the work on a cell began, in seconds since 1970; None where nobody works on it."""
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
    for prior in cell.priors:
        if runs.open_model(run, "cpu").config.prior != prior:
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
