"""Priors by name, and what is said where a name means nothing."""

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from sigma_vae.networks import FlatNetwork
from sigma_vae.priors import FittedPrior, FlowPrior, GaussianPrior, MixturePrior, StandardNormal
from sigma_vae.types import Network, Prior

__all__ = ["check_prior", "positive", "prior", "prior_name", "unknown"]

PRIORS: dict[str, Callable[[int], Prior]] = {
    "standard": StandardNormal,
    "gaussian": GaussianPrior,
    "mixture": MixturePrior,
    "flow": FlowPrior,
}


def prior(name: str, latent_dim: int) -> Prior:
    """A prior by its name; those that are fitted come unfitted. ``mixture`` takes its number of components after a colon.

    Raises:
        ValueError: the name does not exist (the nearest is given), or the number is none.

    >>> prior("mixture:20", latent_dim=8).components
    20
    """
    kind, colon, number = name.partition(":")
    if not colon and kind in PRIORS:
        return PRIORS[kind](latent_dim)
    if kind != "mixture":
        raise ValueError(unknown("prior", name, [*PRIORS, "mixture:20"]))
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{name}: mixture takes a number of components, as in mixture:20; got {number!r}")
    return MixturePrior(latent_dim, int(number))


def prior_name(prior: Prior) -> str:
    """The name that builds such a prior, of a mixture with the number of components that it has.

    Raises:
        ValueError: it is a user's own.

    >>> prior_name(MixturePrior(latent_dim=8, components=20))
    'mixture:20'
    """
    if isinstance(prior, MixturePrior) and prior.components is not None:
        return f"mixture:{prior.components}"
    for name, kind in PRIORS.items():
        if type(prior) is kind:
            return name
    raise ValueError(f"{type(prior).__name__} has no name to be saved under; known: {', '.join(PRIORS)}")


def check_prior(name: str, network_name: str, network: Network) -> None:
    """Refuse before training what could not be fitted after it.

    Raises:
        ValueError: there is no such prior, or the network has no flat latents that it could be fitted to.
    """
    made = prior(name, network.latent_dim if isinstance(network, FlatNetwork) else 1)
    if isinstance(made, FittedPrior) and not isinstance(network, FlatNetwork):
        raise ValueError(
            f"the prior {name} is fitted to a single layer of flat latents, which {network_name} does not have;"
            " take residual, conv or mlp, or prior=standard"
        )


def positive(name: str, kind: str, number: str, what: str, example: str) -> float:
    """The number after a colon in a name."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: {kind} takes a number above 0 ({what}), as in {kind}:{example}; got {number!r}")
    return value


def unknown(kind: str, name: str, names: Sequence[str]) -> str:
    """The sentence about a name that does not exist."""
    near = get_close_matches(name, names, n=1, cutoff=0.0)
    return f"there is no {kind} {name!r}; did you mean {near[0]!r}? Known: {', '.join(names)}"
