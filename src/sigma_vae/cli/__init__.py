"""The command line: subcommands, printing, exit codes.

The functions in ``COMMANDS`` are the subcommands: tyro builds the interface from their signatures and docstrings.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from types import FrameType
from typing import Any

import tyro

from sigma_vae.cli.inspect import explain, inspect
from sigma_vae.cli.outputs import encode, predict, reconstruct, sample, score
from sigma_vae.cli.runs import calibrate, compare, evaluate, fit_prior, replay, rerun, resume, train
from sigma_vae.cli.study import STUDY, study
from sigma_vae.training import NonFiniteLossError, Terminated
from sigma_vae.training.distributed import ElsewhereError

__all__ = ["main"]

PROGRAM = "sigma-vae"
INTERRUPTED = 130
SHARED = ("train", "resume", "replay", "evaluate", "calibrate", "fit-prior")
"""What several processes do together."""
TERMINATED = 143

COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "train": train,
    "resume": resume,
    "replay": replay,
    "rerun": rerun,
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
    """Run a command, and say how it went: 0 well, 1 a problem that is explained, 130 Ctrl-C, 143 SIGTERM.

    A wrong command line exits with 2. Of several processes, started by ``torchrun``, the first one prints; what goes wrong is said by
    whom it happens to.
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
    before = _on_sigterm(_terminate)
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
    except Terminated:
        print(f"\n{PROGRAM}: terminated (SIGTERM). Where training had begun, `{PROGRAM} resume RUN` goes on", file=sys.stderr)
        return TERMINATED
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"{speaker}: {error}", file=sys.stderr)
        return 1
    except ElsewhereError:  # the first process says it
        return 1
    finally:
        _on_sigterm(before)
    return 0


def _on_sigterm(handler: Any) -> Any:
    """Set what SIGTERM does, where this is the main thread, and return what it did."""
    return signal.signal(signal.SIGTERM, handler) if threading.current_thread() is threading.main_thread() else None


def _terminate(number: int, frame: FrameType | None) -> None:
    """Outside of training, which ends its step first, there is nothing to wait for: files are written whole or not at all."""
    raise Terminated
