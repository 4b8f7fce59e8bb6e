"""One cell of a study: trained, evaluated with every prior, and written down, or the error that stopped it."""

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
from sigma_vae.config import EvaluationSettings, write_whole
from sigma_vae.study.grid import Cell

__all__ = ["CELLS", "counted", "do", "finished", "folder_of", "known", "record_of", "running_since", "seconds_in"]

EVERY_SECONDS = 10.0
"""What a killed attempt loses at most."""


def seconds_in(path: Path) -> float:
    """What the file says that was taken so far; 0 where there is none."""
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


@contextmanager
def counted(path: Path, before: float = 0.0) -> Iterator[None]:
    """Add the time that this takes to the seconds in a file: when it ends, however it does, and on the way.

    Args:
        path: of the file.
        before: seconds to begin with where there is no file yet.
    """
    spent, start, ended = seconds_in(path) or before, monotonic(), Event()

    def write() -> None:
        write_whole(path, f"{spent + monotonic() - start}\n")

    def write_meanwhile() -> None:
        while not ended.wait(EVERY_SECONDS):
            with suppress(OSError):  # the next, or the last, says what is wrong
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
"""A file that is there while a process works on the cell."""
SECONDS, TRAINING_SECONDS = "seconds", "training-seconds"
"""Files that are there until the cell is finished: what it has taken so far, of all attempts together."""
OF_SAMPLES = ("iwae", "quality")
"""What is measured again with each further prior; the rest is about codes and decoder."""


def folder_of(cell: Cell, out: Path) -> Path:
    """Where a cell is kept."""
    return out / CELLS / cell.key


def record_of(cell: Cell, out: Path) -> Path:
    """The file that says how it ended."""
    return folder_of(cell, out) / RECORD


def known(cell: Cell, out: Path) -> dict[str, Any] | None:
    """What is written of the cell; None where it has not ended."""
    path = record_of(cell, out)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def finished(cell: Cell, out: Path) -> bool:
    """Whether it has ended, and did not fail."""
    record = known(cell, out)
    return record is not None and record["status"] == "done"


def running_since(cell: Cell, out: Path) -> float | None:
    """When its work began, in seconds since 1970; None where none is going on."""
    try:
        return (folder_of(cell, out) / RUNNING).stat().st_mtime
    except FileNotFoundError:
        return None


def do(cell: Cell, out: Path, threads: int) -> dict[str, Any]:
    """Train and evaluate a cell, unless it is finished; go on with it where a killed study left it.

    Two processes never work on one cell: the second waits, and finds it finished. An error is written down and returned, not raised.
    ``seconds`` and ``training_seconds`` are those of all attempts together, of killed ones too but for their last moments.
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
            told = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            record |= {"status": "failed", "failures": failed + 1, **told}
        finally:
            (folder / RUNNING).unlink(missing_ok=True)
        record["seconds"] = seconds_in(folder / SECONDS)
        written = _without_places(json.dumps(record, indent=1, ensure_ascii=False), out)
        write_whole(record_of(cell, out), written + "\n")
        if record["status"] == "done":
            for name in (SECONDS, TRAINING_SECONDS):
                (folder / name).unlink(missing_ok=True)
        told_again: dict[str, Any] = json.loads(written)
        return told_again


def _without_places(text: str, out: Path) -> str:
    """Paths from the study's folder, the current one or the one of the package on: the same on every machine."""
    places = {str(out), os.getcwd(), *filter(os.path.isabs, sys.path)} - {os.sep}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place.rstrip(os.sep) + os.sep, "")
    return text


def _measured(cell: Cell, folder: Path) -> dict[str, Any]:
    """The reports of each prior on both splits, and how the training went."""
    run = folder / "run"
    with counted(folder / TRAINING_SECONDS):
        if runs.has_checkpoint(run) and not (run / "model" / "model.json").exists():
            runs.resume(run, progress=False)
        elif not (run / "evaluation.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            runs.train(cell.config, run, progress=False)
    validation = EvaluationSettings(metrics=(), split="validation", seed=cell.evaluation.seed)
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
    """Step and validation ELBO, where there is one."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return [
            {"step": int(row["step"]), "elbo_nats": float(row["validation/elbo_nats"])}
            for row in csv.DictReader(file)
            if row.get("validation/elbo_nats")
        ]
