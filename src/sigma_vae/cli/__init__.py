"""The command line: find a command, run it, turn what goes wrong into a sentence and an exit code.

``COMMANDS`` says where each command is. Its module is imported when it runs, so that ``sigma-vae --help`` imports
neither torch nor tyro; tyro builds the command's options from the function's signature and docstring.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import TextIOWrapper
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

from sigma_vae import __version__

__all__ = ["COMMANDS", "PROGRAM", "STUDY", "Command", "main"]

PROGRAM = "sigma-vae"
ABOUT = "Train VAEs with calibrated decoders: no KL weight to tune."
FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 128 + signal.SIGTERM
"""Exit codes."""
OUT_OF_MEMORY = ("allocate memory", "enough memory", "out of memory", "size calculation overflowed", "multiplication overflow")
"""In the errors of torch, which has no class for all of them."""
TOO_LARGE = "this needs more memory than there is; take a smaller number (of examples, latents, width, or a smaller batch)"


class Command(NamedTuple):
    """A command.

    Args:
        place: of its function, ``module:name`` in this package.
        summary: the first sentence of the function's docstring.
        shared: whether several processes, started by ``torchrun``, may run it together.
        commands: its own commands, where it is a group of them.
    """

    place: str
    summary: str
    shared: bool = False
    commands: "Mapping[str, Command]" = MappingProxyType({})

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Any] = getattr(import_module(f"{__name__}.{module}"), name)
        return function


STUDY = {
    "run": Command("study:run", "Train all unfinished runs of a study, and write its report"),
    "table": Command("study:table", "Print the results so far: mean ± std over seeds, on the test split"),
    "report": Command("study:report", "Write the results so far as report.html and report.md"),
    "keep": Command("study:keep", "Copy a study without its weights"),
    "verdicts": Command("study:verdicts", "Print what several studies say about each claim, as Markdown"),
    "list": Command("study:names", "List the studies that come with the package"),
}

COMMANDS = {
    "new": Command("inspect:new", "Write a commented config.yaml for DATA, and print the command that trains it"),
    "inspect": Command("inspect:inspect", "Describe DATA: sizes, levels, ranges, duplicates, and a likelihood that suits them"),
    "train": Command("runs:train", "Train a VAE on DATA, calibrate and evaluate it, and draw samples", shared=True),
    "resume": Command("runs:resume", "Continue a run exactly where it stopped", shared=True),
    "replay": Command("runs:replay", "Train again what a config.yaml describes, into a new folder", shared=True),
    "rerun": Command("runs:rerun", "Repeat the step whose loss was not finite, and report the first layer where that begins"),
    "report": Command("runs:report", "Write the page of a finished run anew: report.html, in one file"),
    "evaluate": Command("runs:evaluate", "Measure a finished run on held-out data", shared=True),
    "compare": Command("runs:compare", "Compare finished runs on the same examples"),
    "fit-prior": Command("runs:fit_prior", "Fit a prior to the latents of a finished run, and evaluate it again", shared=True),
    "calibrate": Command(
        "runs:calibrate", "Refit σ of a finished run, and evaluate it again; or audit a VAE of diffusers", shared=True
    ),
    "sample": Command("outputs:sample", "Draw samples from the prior and decode them"),
    "impute": Command("outputs:impute", "Fill in the missing values of a table, given the others of their rows"),
    "reconstruct": Command("outputs:reconstruct", "Encode and decode the first examples of a split"),
    "traverse": Command("outputs:traverse", "Move one latent at a time, and decode: what each of them stands for"),
    "interpolate": Command("outputs:interpolate", "Decode the line between the latents of two examples, for several pairs"),
    "predict": Command("outputs:predict", "Predict future frames from the start of each clip, several times"),
    "encode": Command("outputs:encode", "Write mean and std of the latents of each example"),
    "score": Command("outputs:score", "Write log-likelihood, rate, ELBO and bits per dimension of each example"),
    "compress": Command("codec:compress", "Compress pictures or DATA without loss, to the size that the model's bound says"),
    "decompress": Command("codec:decompress", "Restore what ``compress`` wrote"),
    "export": Command("runs:export", "Write a run's autoencoder for another library"),
    "push": Command("runs:push", "Write a finished run to the Hugging Face Hub, with a model card made from its evaluation"),
    "explain": Command("inspect:explain", "Compute the effective β and the implied σ of a hand-tuned loss"),
    "completion": Command("inspect:completion", "Print a script that completes commands and options in your shell"),
    "study": Command("study", "Train a grid of runs, and report what they show", commands=STUDY),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a problem that is explained, 130 Ctrl-C, 143 SIGTERM.

    A wrong command line exits with 2. Where ``torchrun`` started several processes, only the first one prints results;
    each prints its own problems.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe without σ and β, as on Windows, shows "?"
    rank, alone = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone:
        return _answer(words, PROGRAM)
    if words and words[0] in COMMANDS and not COMMANDS[words[0]].shared:
        raise SystemExit(f"{PROGRAM} {words[0]} runs on one process; start it without torchrun")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(sys.stdout if rank == 0 else nowhere):
        return _answer(words, f"{PROGRAM} (process {rank})" if rank else PROGRAM)


def _answer(words: list[str], speaker: str) -> int:
    """Run the command; what it raises becomes a sentence and an exit code."""
    before = _on_sigterm(_terminate)
    try:
        _run(words, COMMANDS, PROGRAM, ABOUT)
    except KeyboardInterrupt:
        return _say(f"\n{speaker}: interrupted. If training had begun, `{PROGRAM} resume RUN` continues it", INTERRUPTED)
    except SystemExit as stop:
        if stop.code != TERMINATED:
            raise
        return _say(
            f"\n{PROGRAM}: terminated (SIGTERM). If training had begun, `{PROGRAM} resume RUN` continues it", TERMINATED
        )
    except ModuleNotFoundError as error:
        from sigma_vae.registry import remedy

        return _say(f"{speaker}: this command needs {error.name}: {remedy(error.name)}", FAILED)
    except (ValueError, OSError) as error:
        return _say(f"{speaker}: {_line(error)}", FAILED)
    except MemoryError:
        return _say(f"{speaker}: {TOO_LARGE}", FAILED)
    except RuntimeError as error:
        return _say_if_known(error, speaker)
    finally:
        _on_sigterm(before)
    return 0


def _run(words: list[str], commands: Mapping[str, Command], program: str, about: str) -> None:
    """Call the function of the command that the first word names with the options in the others."""
    name, options = words[0] if words else "", words[1:]
    if name in ("-h", "--help"):
        print(_listing(commands, program, about))
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")
    elif name not in commands:
        raise SystemExit(_say(f"{program}: {_unknown(name, commands)}", MISUSED))
    elif commands[name].commands:
        _run(options, commands[name].commands, f"{program} {name}", f"{commands[name].summary}.")
    else:
        from sigma_vae.cli.options import call

        call(commands[name].load(), options, f"{program} {name}")


def _listing(commands: Mapping[str, Command], program: str, about: str) -> str:
    width = max(map(len, commands))
    rows = (f"  {name:<{width}}  {command.summary}" for name, command in commands.items())
    options = f"`{program} COMMAND --help` lists the options of a command; with --quiet none shows its progress."
    return "\n".join([f"usage: {program} COMMAND ...", "", about, "", "commands:", *rows, "", options])


def _unknown(name: str, commands: Mapping[str, Command]) -> str:
    from difflib import get_close_matches

    known = f"commands: {', '.join(commands)}"
    if not name:
        return f"say what to do; {known}"
    near = get_close_matches(name, commands, n=1, cutoff=0.0)
    return f"there is no command {name!r}; did you mean {near[0]!r}? All {known}"


def _line(error: Exception) -> str:
    """Return the error's text as one line: those of other libraries may have several."""
    return " ".join(line.strip() for line in str(error).splitlines())


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def _say_if_known(error: RuntimeError, speaker: str) -> int:
    """Explain an error that training raises on purpose; anything else is a defect, and is raised again."""
    from sigma_vae.training import NonFiniteLossError
    from sigma_vae.training.distributed import ElsewhereError

    if isinstance(error, ElsewhereError):
        return FAILED  # the first process says it
    if any(words in str(error) for words in OUT_OF_MEMORY):
        return _say(f"{speaker}: {TOO_LARGE}", FAILED)
    if isinstance(error, NonFiniteLossError):
        return _say(f"{speaker}: {_line(error)}", FAILED)
    raise error


def _on_sigterm(handler: Any) -> Any:
    """Install a SIGTERM handler and return the previous one; only the main thread may."""
    return signal.signal(signal.SIGTERM, handler) if threading.current_thread() is threading.main_thread() else None


def _terminate(number: int, frame: FrameType | None) -> None:
    """Stop at once: outside of training, whose own handler finishes the step, files are written whole or not at all."""
    raise SystemExit(TERMINATED)
