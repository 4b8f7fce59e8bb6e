"""Options of a command, made by tyro from a function's signature and docstring."""

from collections.abc import Callable
from dataclasses import replace
from types import NoneType
from typing import Annotated, Any, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

__all__ = ["RunFolder", "RunFolders", "call"]

RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""The folder of a run, as the argument of a command."""

RunFolders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
"""Folders of several runs."""


def call(function: Callable[..., Any], options: list[str], program: str) -> None:
    """Call the function with these options."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    tyro.cli(function, prog=program, args=options, config=config, registry=_rules())


def _rules() -> ConstructorRegistry:
    rules = ConstructorRegistry()
    rules.primitive_rule(_optional)
    return rules


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
