"""The command line: subcommands, printing, exit codes.

The functions in ``COMMANDS`` are the subcommands: tyro builds the interface from their signatures and docstrings.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import tyro

from sigma_vae.cli.calibrate import calibrate
from sigma_vae.cli.compare import compare
from sigma_vae.cli.explain import explain
from sigma_vae.cli.inspect import inspect
from sigma_vae.cli.outputs import encode, reconstruct, sample, score
from sigma_vae.cli.priors import fit_prior
from sigma_vae.cli.runs import evaluate, replay, resume, train
from sigma_vae.cli.study import STUDY, study
from sigma_vae.cli.video import predict
from sigma_vae.training import NonFiniteLossError
from sigma_vae.training.processes import ElsewhereError

__all__ = ["main"]

PROGRAM = "sigma-vae"
INTERRUPTED = 130
SHARED = ("train", "resume", "replay", "evaluate", "calibrate", "fit-prior")
"""What several processes do together."""

COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "train": train,
    "resume": resume,
    "replay": replay,
    "evaluate": evaluate,
    "compare": compare,
    "fit-prior": fit_prior,
    "calibrate": calibrate,
    "sample": sample,
    "reconstruct": reconstruct,
    "predict": predict,
    "encode": encode,
    "score": score,
    "explain": explain,
    "study": study,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 for a problem that is explained, 130 for Ctrl-C (a wrong command line exits with 2).

    Of several processes, started by ``torchrun``, the first one prints; what goes wrong is said by whom it happens to.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    rank, others = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not others:
        return _main(words, PROGRAM)
    if words and words[0] in COMMANDS and words[0] not in SHARED:
        raise SystemExit(f"{PROGRAM} {words[0]} is for one process; start it without torchrun")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(sys.stdout if rank == 0 else nowhere):
        return _main(words, f"{PROGRAM} (process {rank})" if rank else PROGRAM)


def _main(words: list[str], speaker: str) -> int:
    commands, program = COMMANDS, PROGRAM
    if len(words) > 1 and words[0] == "study":
        commands, program, words = STUDY, f"{PROGRAM} study", words[1:]
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog=program,
            description="Train VAEs with calibrated decoders: no KL weight to tune.",
            args=words,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except KeyboardInterrupt:
        print(f"\n{speaker}: interrupted. Where training had begun, `{PROGRAM} resume RUN` goes on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"{speaker}: {error}", file=sys.stderr)
        return 1
    except ElsewhereError:  # the first process says it
        return 1
    return 0
