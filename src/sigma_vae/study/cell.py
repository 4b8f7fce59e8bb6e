"""One cell of a study: trained, evaluated with every prior, and written down, or the error that stopped it."""

import csv
import json
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from sigma_vae import runs
from sigma_vae.evaluation.settings import EvaluationSettings
from sigma_vae.study.grid import Cell

__all__ = ["do", "folder_of", "known"]

RECORD = "cell.json"


def folder_of(cell: Cell, out: Path) -> Path:
    """Where a cell is kept."""
    return out / "cells" / cell.key


def known(cell: Cell, out: Path) -> dict[str, Any] | None:
    """What is written of the cell; None where it has not ended."""
    path = folder_of(cell, out) / RECORD
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def do(cell: Cell, out: Path, threads: int) -> dict[str, Any]:
    """Train and evaluate a cell, unless it is finished; go on with it where a killed study left it.

    Two processes never work on one cell: the second waits, and finds it finished. An error is written down and returned, not raised.
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
        start, failed = time.monotonic(), 0 if before is None else before["failures"]
        record: dict[str, Any] = {"key": cell.key, "place": cell.place, "threads": threads, "failures": failed}
        try:
            record |= {"status": "done", **_measured(cell, folder)}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            record |= {"status": "failed", "failures": failed + 1, **told}
        record["seconds"] = time.monotonic() - start
        aside = folder / (RECORD + ".part")
        aside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, folder / RECORD)
        return record


def _measured(cell: Cell, folder: Path) -> dict[str, Any]:
    """The reports of each prior on both splits, and how the training went."""
    run, trained = folder / "run", time.monotonic()
    if runs.has_checkpoint(run) and not (run / "model" / "model.json").exists():
        runs.resume(run, progress=False)
    elif not (run / "evaluation.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        runs.train(cell.config, run, progress=False)
    seconds = time.monotonic() - trained
    validation = EvaluationSettings(metrics=(), split="validation", seed=cell.evaluation.seed)
    reports = {}
    for prior in cell.priors:
        if runs.open_model(run, "cpu").config.prior != prior:
            runs.fit_prior(run, prior)
        reports[prior] = {"test": runs.evaluate_run(run, cell.evaluation), "validation": runs.evaluate_run(run, validation)}
    return {"training_seconds": seconds, "reports": reports, "curve": _curve(run / "metrics.csv")}


def _curve(metrics: Path) -> list[dict[str, float]]:
    """Step and validation ELBO, where there is one."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return [
            {"step": int(row["step"]), "elbo_nats": float(row["validation/elbo_nats"])}
            for row in csv.DictReader(file)
            if row.get("validation/elbo_nats")
        ]
