"""Options of a command, made by tyro from a function's signature and docstring."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TextIO, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sigma_vae.cli.help import has_short_help, parser, show_help
from sigma_vae.config import RenamedWarning
from sigma_vae.progress import hidden, shown

__all__ = ["CONFIG", "HUB", "RunFolder", "RunFolders", "beside", "call", "rules", "to_change", "to_read"]

RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""The folder of a run, or where it is only read hub:OWNER/NAME, as the argument of a command."""

RunFolders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
"""Folders of several runs."""


CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
"""How tyro makes options of a function."""
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
    """How types are shown and read beside tyro's own rules."""
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
