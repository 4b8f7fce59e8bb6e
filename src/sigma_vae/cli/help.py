"""Help for commands with many options: a dozen of them, or all in groups; and completion in the shell."""

import re
import shutil
import textwrap
import warnings
from argparse import Action
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import tyro

__all__ = ["completion", "has_short_help", "parser", "show_help"]

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
