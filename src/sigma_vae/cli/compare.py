"""The subcommand that sets finished runs side by side."""

import json as json_module
from pathlib import Path

import tyro

from sigma_vae import runs
from sigma_vae.cli.tables import print_comparison

__all__ = ["compare"]


def compare(
    runs_: tyro.conf.Positional[tuple[str, ...]], *, paired: bool = False, device: str = "auto", json: bool = False
) -> None:
    """Set finished runs of the same data side by side, from their evaluations.

    Bits per dimension compare between all decoders; nats are left out where some runs observe levels and others do not.

    Args:
        runs_: Folders of the runs, the one to compare with first.
        paired: Score every test example of each run anew, and give mean differences to the first run with their own standard error.
        device: auto, cpu, cuda, cuda:1; of the scoring.
        json: Print JSON alone.
    """
    rows = runs.compare([Path(run) for run in runs_], paired=paired, device=device)
    if json:
        print(json_module.dumps(rows, ensure_ascii=False))
    else:
        print_comparison(rows)
