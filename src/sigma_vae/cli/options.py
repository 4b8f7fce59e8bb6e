"""Options of a command, made by tyro from a function's signature and docstring."""

import os
import re
import shutil
import sys
import textwrap
import warnings
from argparse import Action
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TextIO, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sigma_vae.config import RenamedWarning
from sigma_vae.progress import hidden, shown

RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""The folder of a run, or where it is only read hub:OWNER/NAME, as the argument of a command."""

RunFolders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
"""Folders of several runs."""


CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
"""Settings by which tyro makes options of a function."""
HUB = "hub:"


def to_read(run: str) -> Path:
    """The folder of a run that is read: of ``hub:OWNER/NAME`` its downloaded copy.

    Raises:
        ValueError: the Hub does not have it.
    """
    if not run.startswith(HUB):
        return Path(run)
    from sigma_vae.hub import fetch

    return fetch(run)


def beside(run: str) -> Path:
    """The folder for what is written of a run: the run's, or for one on the Hub the current one."""
    return Path() if run.startswith(HUB) else Path(run)


def to_change(run: str) -> Path:
    """The folder of a run that is written into.

    Raises:
        ValueError: it is on the Hub.
    """
    if run.startswith(HUB):
        name = run.removeprefix(HUB).partition("@")[0]
        raise ValueError(
            f"{run} is only read; copy it, then work on the copy: hf download {name} --local-dir {Path(name).name}"
        )
    return Path(run)


def call(function: Callable[..., Any], options: list[str], program: str) -> None:
    """Call the function with these options; old names of options are remarked upon.

    ``--help`` shows a dozen options where there are many, and ``--help-all`` all of them. Progress is shown, unless the options
    have ``--quiet`` or ``--json``.
    """
    asked = {"-h", "--help", "--help-all"} & set(options)
    if asked and has_short_help(function):
        show_help(parser(function, program, CONFIG, rules()), program, everything="--help-all" in asked)
        raise SystemExit(0)
    options = ["--help" if word == "--help-all" else word for word in options]
    silent = {"--quiet", "--json"} & set(options) or int(os.environ.get("RANK", 0)) > 0
    if "quiet" not in signature(function).parameters:  # every command takes it
        options = [word for word in options if word != "--quiet"]
    with _remarks(program), hidden() if silent else shown(program):
        tyro.cli(function, prog=program, args=options, config=CONFIG, registry=rules())


@contextmanager
def _remarks(program: str) -> Iterator[None]:
    """Print each warning about a renamed option once, as a plain line; other warnings are shown as before."""
    said = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedWarning)
        show = warnings.showwarning

        def say(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, RenamedWarning):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in said:
                said.add(str(message))
                print(f"{program}: {message}", file=sys.stderr)

        warnings.showwarning = say
        yield


def rules() -> ConstructorRegistry:
    """Rules for showing and reading types beside tyro's own."""
    made = ConstructorRegistry()
    made.primitive_rule(_optional)
    return made


def _optional(found: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Show ``int | None`` as ``INT``, and a default of None as "none"; other types have tyro's own rules."""
    kinds = [kind for kind in get_args(found.type) if kind is not NoneType]
    if NoneType not in get_args(found.type) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], found.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["none"] if value is None else spec.str_from_instance(value),
    )


# -- help for commands with many options, and completion in the shell --------------------------------------------------

GROUPS = {
    "Data": ("config.data.source", "columns", "exclude", "levels", "standardise", "config.data."),
    "Pictures": ("size", "fit", "config.data.images."),
    "Videos": ("frames", "config.data.clips."),
    "Model": ("network", "likelihood", "latent-dim", "width", "prior", "config.model."),
    "How long": ("epochs", "max-minutes", "max-steps", "batch-size", "patience", "validate-every", "nothing else"),
    "Optimisation": ("learning-rate", "config.training."),
    "Speed and memory": ("device", "accumulate", "shard-weights", "config.training.hardware."),
    "Run and files": ("out", "quiet", "json", "logger", "log-every", "checkpoint-minutes", ""),
}
"""Groups of options in the words of a user: options by name, then what begins like the last one."""
BASIC = {
    *("source", "columns", "size", "network", "likelihood", "latent-dim", "epochs", "max-minutes", "batch-size"),
    *("device", "seed", "out", "quiet", "json"),
}
"""Options of the short help."""
SHORT = {"train"}
"""Commands with a short help."""
COLUMN = 26


def has_short_help(function: Callable[..., Any]) -> bool:
    """Whether ``--help`` of this command shows a part of its options."""
    return function.__name__ in SHORT


def parser(function: Callable[..., Any], program: str, config: tuple[Any, ...], registry: Any) -> Any:
    """The options of a command, as tyro makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is there in all versions before 2
        return tyro.extras.get_parser(function, prog=program, config=config, registry=registry)


def show_help(found: Any, program: str, *, everything: bool) -> None:
    """Print a dozen options, or all of them, in groups."""
    actions = [action for action in found._actions if action.dest != "help"]
    shown = actions if everything else [action for action in actions if _name(action) in BASIC]
    print(f"usage: {program} DATA [OPTIONS]\n\n{(found.description or '').partition(chr(10))[0]}")
    for group, members in _grouped(shown).items():
        print(f"\n{group}:")
        for action in members:
            print("\n".join(_lines(action, everything=everything)))
    if not everything:
        print(f"\n`{program} --help-all` shows all {len(actions)} options.")


def _name(action: Action) -> str:
    return action.dest.rpartition(".")[2]


def _grouped(actions: list[Action]) -> dict[str, list[Action]]:
    """Options by group, in the order that GROUPS gives them, then their own."""
    groups: dict[str, list[Action]] = {}
    for group, names in GROUPS.items():
        named = [action for name in names[:-1] for action in actions if name in (_name(action), action.dest)]
        rest = [action for action in actions if _home(action) == group and action not in named]
        if named or rest:
            groups[group] = [*named, *rest]
    return groups


def _home(action: Action) -> str | None:
    """The group of an option that no group names."""
    if any(_name(action) in names or action.dest in names[:-1] for names in GROUPS.values()):
        return None
    return max(
        (group for group in GROUPS if action.dest.startswith(GROUPS[group][-1])), key=lambda group: len(GROUPS[group][-1])
    )


def _lines(action: Action, *, everything: bool) -> Iterator[str]:
    """The option and its help, in two columns; a long option has a line of its own."""
    width = max(shutil.get_terminal_size().columns, 60) - COLUMN - 2
    indent = " " * (COLUMN + 2)
    words = [line for part in _paragraphs(action, everything=everything) for line in _wrapped(part, width)]
    first = f"  {_head(action):<{COLUMN - 1}}"
    yield f"{first} {words[0]}" if len(first) <= COLUMN + 1 else first
    yield from (indent + line for line in (words[1:] if len(first) <= COLUMN + 1 else words))


def _head(action: Action) -> str:
    if not action.option_strings:
        return "DATA"
    values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else str(action.metavar or "")
    return f"{action.option_strings[0]} {values.removeprefix('{None}|')}".strip()


def _paragraphs(action: Action, *, everything: bool) -> list[str]:
    r"""The help text without defaults that say nothing, and its list of names: with summaries, or the names alone.

    >>> action = Action(["--x"], "x", help="Name of the network.\n- conv: Convolutions.\n- mlp: Layers. (default: mlp)")
    >>> _paragraphs(action, everything=False)
    ['Name of the network. One of conv, mlp. (default: mlp)']
    """
    text, _, default = str(action.help or "").rpartition(" (default: ")
    text, default = (text, default.removesuffix(")")) if text else (default, "")
    ending = f" (default: {default})" if default not in ("", "none", "None", "False") else ""
    first, *names = (part.replace("\n", " ") for part in text.split("\n- "))
    if everything:
        return [f"{first}{ending}", *(f"- {name}" for name in names)]
    plain = ", ".join(re.split("[:[]", name)[0] for name in names)
    listed = f" One of {plain}." if names else ""
    return [f"{first}{listed}{ending}"]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  " if text.startswith("- ") else "") or [""]


# -- completion --------------------------------------------------------------------------------------------------------

BASH = """_sigma_vae() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        esac
        if [ -z "$words" ]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
            case "$word" in -*) ;; *) words="" ;; esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _sigma_vae sigma-vae
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(shell: Literal["bash", "zsh"], found: Mapping[str, Any], others: Mapping[str, list[str]]) -> str:
    """A script that completes commands, options and choices.

    Args:
        shell: bash or zsh, which reads the same script after a line of its own.
        found: the options of each command.
        others: the words of groups of commands.
    """
    options = {
        name: list(dict.fromkeys([*(each for action in one._actions for each in action.option_strings), "--quiet"]))
        for name, one in found.items()
    }
    cases = [f"                {name}) words={_quoted(words)} ;;" for name, words in options.items()]
    choices = [
        f'            "{name} {action.option_strings[0]}") words={_quoted(list(map(str, action.choices)))} ;;'
        for name, one in found.items()
        for action in one._actions
        if action.choices and action.option_strings
    ]
    choices += [f'            "{name} {name}") words={_quoted(words)} ;;' for name, words in others.items()]
    names = " ".join([*found, *others])
    script = BASH.format(commands=names, choices="\n".join(choices), options="\n".join(cases))
    return (ZSH if shell == "zsh" else "") + script


def _quoted(words: list[str]) -> str:
    return '"' + " ".join(words) + '"'
