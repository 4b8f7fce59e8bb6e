"""A stack of bits (asymmetric numeral systems), and bits-back coding of one example with a VAE on it.

Latents are popped from the stack; then the example and its latents are pushed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.types import DataDistribution, Likelihood, Network, Prior
from sigma_vae.vae import VAE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]

MassBelow = Callable[[Ints], Floats]
"""Probability that value i is less than each of its edges, ``(n, edges)`` to ``(n, edges)``."""

PRECISION = 24
"""Bits of the integers that stand for probabilities: what constriction's coder works with."""
MASS_BITS = 16
"""Bits that a probability is rounded to, before each symbol gets at least one of the integers."""
MASS_MARGIN = 2.0**-46
"""How far two machines may disagree about a mass that they compute in float64 from equal numbers."""
LEAST_MASS = 2.0**-20
"""Mass that is spread over all values, so that none is impossible."""
SPARE = 3
"""Words that stay on a stack: below two of them a pop would not be undone by a push."""


@final
class Stack:
    """A stack of bits; pop and push undo each other exactly.

    Its bottom is an endless fixed sequence of random-looking words, of which only as many are kept as pops have reached:
    :attr:`seeds`, the initial bits of bits-back coding. A stack made from ``words`` does not grow at the bottom.

    The coder is constriction's (Bamler 2022, arXiv 2201.01741) of asymmetric numeral systems (Duda et al. 2015).

    >>> stack = Stack()
    >>> table = frequencies(np.array([[0.0, 0.5, 0.75, 1.0]]))
    >>> stack.push(np.array([1]), table)
    >>> stack.pop(table), stack.seeds
    (array([1]), 3)
    """

    def __init__(self, words: Words | None = None) -> None:
        import constriction

        self._make: Any = constriction.stream.stack.AnsCoder
        self._model: Any = constriction.stream.model.Categorical(perfect=False)
        self._endless = words is None
        self.seeds = SPARE if words is None else 0
        self._coder: Any = self._make(seed_words(SPARE) if words is None else words)
        self.record: Callable[[bytes], object] = lambda frequencies: None
        """Is given the frequencies of all symbols, for a check word."""

    def push(self, symbols: Ints, table: npt.NDArray[np.float32]) -> None:
        """Add symbols ``(n,)``, the last one first, whose frequencies are the rows of ``table``."""
        self.record(table.tobytes())
        self._coder.encode_reverse(symbols.astype(np.int32), self._model, table)

    def pop(self, table: npt.NDArray[np.float32]) -> Ints:
        """Take symbols ``(n,)`` off: they are distributed like the rows of ``table``, as far as the bits are random.

        Raises:
            ValueError: too few bits are left.
        """
        self.record(table.tobytes())
        while True:
            enough = self._coder.num_words() > len(table) + SPARE  # a symbol takes less than a word
            coder = self._coder if enough else self._coder.clone()
            symbols: Ints = coder.decode(self._model, table).astype(np.int64)
            if coder.num_words() >= SPARE:
                self._coder = coder
                return symbols
            if not self._endless:
                raise ValueError("the stream of bits ends too early: these are not the bits that an encoder wrote")
            self.seeds += 1
            self._coder = self._make(np.concatenate([seed_words(self.seeds)[:1], self._coder.get_compressed()]))

    def words(self) -> Words:
        """All bits, the bottom first."""
        words: Words = self._coder.get_compressed()
        return words


def seed_words(count: int) -> Words:
    """The first words of the fixed sequence, in the order in which they lie on a stack: the first one on top."""
    blocks = (hashlib.sha256(b"sigma-vae %d" % i).digest() for i in range(-(-count // 8)))
    words = np.frombuffer(b"".join(blocks), "<u4")[:count].astype(np.uint32)
    return words[::-1] | np.uint32(1)  # a stack cannot end in a word 0


@final
class Rounding:
    """Round numbers to whole ones, alike on machines whose last digits differ.

    A number near the middle between two whole ones may be rounded to either. The encoder notes each that lies within a margin
    of the middle, as twice its position among all numbers so far, plus 1 if it was rounded to an odd number. The decoder
    takes the nearest whole number with that parity.

    Args:
        known: what an encoder noted, in order; None: this is the encoder.

    >>> encoder = Rounding()
    >>> encoder(np.array([0.3, 1.4999]), 0.01), encoder.noted
    (array([0., 1.]), [3])
    >>> Rounding(encoder.noted)(np.array([0.3, 1.5001]), 0.01)
    array([0., 1.])
    """

    def __init__(self, known: Sequence[int] | None = None) -> None:
        self.known = None if known is None else np.array(known, np.int64)
        self.noted: list[int] = []
        self.count = 0

    def __call__(self, values: Floats, margin: Floats | float) -> Floats:
        """Whole numbers of any shape; ``margin`` is how far two machines may disagree about each value."""
        whole: Floats = np.rint(values)
        if self.known is None:
            with np.errstate(invalid="ignore"):  # what is not finite is refused later
                near = np.flatnonzero(0.5 - np.abs(values - whole) < margin)
            self.noted += (2 * (self.count + near) + whole.flat[near].astype(np.int64) % 2).tolist()
        else:
            first, last = np.searchsorted(self.known, [2 * self.count, 2 * (self.count + values.size)])
            near, odd = self.known[first:last] // 2 - self.count, self.known[first:last] % 2
            there = whole.flat[near]
            whole.flat[near] = np.where(there % 2 == odd, there, there + np.where(values.flat[near] < there, -1, 1))
        self.count += values.size
        return whole


def frequencies(below: Floats, rounding: Rounding | None = None) -> npt.NDArray[np.float32]:
    """Whole numbers that stand for probabilities, less 1, ``(n, symbols)``: with the 1 each row sums to 2²⁴.

    They are floats, which constriction takes; as their sum is that of the free frequencies, it scales them by 1 and adds the
    1 to each. Every symbol can be coded.

    Args:
        below: mass below each symbol's lower edge, and below the last one's upper edge, ``(n, symbols + 1)``, rising. A row
            without mass counts as uniform.
        rounding: rounds the shares of a row's mass below inner edges, to 16 bits.

    >>> frequencies(np.array([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])).astype(int) + 1
    array([[8388608, 8388608],
           [8388608, 8388608]])
    """
    symbols = below.shape[1] - 1
    span = below[:, -1:] - below[:, :1]
    uniform = np.arange(symbols + 1) / symbols
    share = np.divide(below - below[:, :1], span, out=np.tile(uniform, (len(below), 1)), where=span > 0)
    margin = 2 ** (MASS_BITS + 1) * MASS_MARGIN / np.maximum(span, MASS_MARGIN)
    share[:, 1:-1] = (rounding or Rounding())(share[:, 1:-1] * 2**MASS_BITS, margin).clip(0, 2**MASS_BITS) / 2**MASS_BITS
    free = np.floor(np.maximum.accumulate(share, 1) * (2**PRECISION - symbols))  # exact in float64
    table: npt.NDArray[np.float32] = np.diff(free, axis=1).astype(np.float32)
    return table


class Steps(Protocol):
    """Digits in the order in which a decoder pops them; they are either popped, or collected to be pushed."""

    rounding: Rounding

    def digits(self, table: npt.NDArray[np.float32], digits: Ints | None) -> Ints:
        """The digits ``(n,)``: those given, or popped ones."""


@final
class Pops:
    """Pop every digit."""

    def __init__(self, stack: Stack, rounding: Rounding | None = None) -> None:
        self.stack = stack
        self.rounding = rounding or Rounding()

    def digits(self, table: npt.NDArray[np.float32], digits: Ints | None) -> Ints:
        """Pop them; none are given."""
        assert digits is None
        return self.stack.pop(table)


@final
class Pushes:
    """Collect given digits, and push them in reverse, so that popping finds them in order."""

    def __init__(self, rounding: Rounding | None = None) -> None:
        self.rounding = rounding or Rounding()
        self.steps: list[tuple[Ints, npt.NDArray[np.float32]]] = []

    def digits(self, table: npt.NDArray[np.float32], digits: Ints | None) -> Ints:
        """Collect them."""
        assert digits is not None
        self.steps.append((digits, table))
        return digits

    def onto(self, stack: Stack) -> None:
        """Push everything collected."""
        for digits, table in reversed(self.steps):
            stack.push(digits, table)


def code(steps: Steps, below: MassBelow, widths: Sequence[int], count: int, values: Ints | None = None) -> Ints:
    """Code integers digit by digit, the most significant first, each given those before it.

    The distribution function is asked at the edges of a few digits in place of every value's.

    Args:
        steps: pops them, or collects them.
        below: the distribution function.
        widths: bits of each digit.
        count: how many integers.
        values: the integers ``(count,)``, where they are known.

    Raises:
        ValueError: the distribution function is not a number.

    >>> pushes, stack = Pushes(), Stack()
    >>> code(pushes, lambda edges: edges / 16, (2, 2), 2, np.array([5, 15]))
    array([ 5, 15])
    >>> pushes.onto(stack)
    >>> code(Pops(stack), lambda edges: edges / 16, (2, 2), 2)
    array([ 5, 15])
    """
    rows, found = np.arange(count), np.zeros(count, np.int64)
    least = LEAST_MASS / 2 ** sum(widths)
    low, high = np.zeros(count), np.full(count, 1 + LEAST_MASS)
    for width, left in _digit_places(widths):
        inner = ((found[:, None] << width) + np.arange(1, 1 << width)) << left
        edges = np.concatenate([low[:, None], below(inner) + least * inner, high[:, None]], 1)
        if np.isnan(edges).any():
            raise ValueError("the model gives probabilities that are not numbers (has it diverged?), so it cannot code")
        edges = np.minimum(np.maximum.accumulate(edges, 1), high[:, None])  # rounding may make them fall
        known = None if values is None else (values >> left) - (found << width)
        digits = steps.digits(frequencies(edges, steps.rounding), known)
        low, high = edges[rows, digits], edges[rows, digits + 1]
        found = (found << width) + digits
    return found


def _digit_places(widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Width of each digit, and the bits after it."""
    left = sum(widths)
    for width in widths:
        left -= width
        yield width, left


# -- one example, with a VAE -------------------------------------------------------------------------------------------


LATENT_WIDTHS = (2, 4, 4, 4)
"""Bits of a latent's digits."""
CELLS = 2 ** sum(LATENT_WIDTHS)
CELL = 2.0**-9
"""Width of a latent's cell, in stds of its prior: they reach from −16 to 16."""
LEVEL_WIDTH = 2
"""Bits of a level's digits."""
SMALLEST_STD = 1e-9
"""The smallest std of a posterior, in stds of the prior."""
MARGIN = 2.0**-40
"""How far two machines may disagree about a network's output, in units of the tensor's largest number (at least 1)."""
PLACE_BITS = 13
"""Means of latents are multiples of 2⁻¹³ stds of the prior."""
SCALE_BITS = 10
"""Binary logarithms of stds are multiples of 2⁻¹⁰."""
SHARE_BITS = 16
"""Logarithms of a mixture's shares are multiples of 2⁻¹⁶."""
FEATURE_BITS = 8
"""Features are multiples of 2⁻⁸ of a level, or of a finer power of two."""
LEAST_LOG_SHARE = -100.0


class Roundings(NamedTuple):
    """How numbers are rounded when latents are coded by q(z|x), and when latents and data are coded by p."""

    posterior: Rounding
    model: Rounding

    @classmethod
    def knowing(cls, posterior: Sequence[int] | None = None, model: Sequence[int] | None = None) -> "Roundings":
        """Those of a decoder that has an encoder's notes; of an encoder without any."""
        return cls(Rounding(posterior), Rounding(model))


class _Latents(Protocol):
    """The two halves of a network, in which the cells of latents are coded; known cells are given."""

    def posterior(self, steps: Steps, x: Tensor, cells: Sequence[Ints] | None = None) -> list[Ints]:
        """Code the latents of each layer by q(z|x)."""

    def features(self, steps: Steps, cells: Sequence[Ints] | None = None) -> tuple[Tensor, list[Ints]]:
        """Code the latents of each layer by p(z), and decode them."""


@final
class BitsBack:
    r"""Code examples on a stack by a VAE, at the length of its bound (Townsend et al. 2019, arXiv 1901.04866).

    To encode x, pop z by q(z|x), then push x by p(x|z) and z by p(z):

    .. math:: \log_2 q(z|x) - \log_2 p(x|z) - \log_2 p(z) \text{ bits}, \quad z \sim q(z|x)

    To decode, do the opposite. Latents of several layers are popped all together before x is pushed: their posteriors read
    x, which a decoder knows last (Townsend et al. 2020, HiLLoC, arXiv 1912.09953).

    A latent is the centre of one of 2¹⁴ cells, equally wide in stds of its prior. What the network computes is rounded to a
    grid before it becomes a distribution, so that machines whose last digits differ code by equal distributions.

    Args:
        vae: in eval mode, on the CPU, in float64: its last digits then lie far below the grid.

    Raises:
        ValueError: its parts have no probabilities of levels, or of latents one after the other.
    """

    def __init__(self, vae: VAE) -> None:
        self.likelihood = vae.likelihood
        self.latents = _latents_of(vae.network)
        self.refitted = _refitted(vae.likelihood)
        assert self.likelihood.levels is not None
        self.top = self.likelihood.levels - 1
        bits = self.top.bit_length()
        self.feature_bits = bits + FEATURE_BITS
        self.widths = (bits % LEVEL_WIDTH,) * (bits % LEVEL_WIDTH > 0) + (LEVEL_WIDTH,) * (bits // LEVEL_WIDTH)

    def encode(self, stack: Stack, levels: Ints, roundings: Roundings) -> list[Ints]:
        """Push an example ``(C, *space)``; return the cells of its latents."""
        cells = self.latents.posterior(Pops(stack, roundings.posterior), self._values(levels))
        pushes = Pushes(roundings.model)
        h, _ = self.latents.features(pushes, cells)
        self._levels(pushes, h, levels)
        pushes.onto(stack)
        return cells

    def decode(self, stack: Stack, roundings: Roundings) -> Ints:
        """Pop an example.

        Raises:
            ValueError: the bits end too early, or are those of no example.
        """
        pops = Pops(stack, roundings.model)
        h, cells = self.latents.features(pops)
        levels = self._levels(pops, h)
        if levels.max() > self.top:
            raise ValueError(f"the stream of bits has a level {levels.max()} of {self.top}: no encoder wrote it")
        pushes = Pushes(roundings.posterior)
        self.latents.posterior(pushes, self._values(levels), cells)
        pushes.onto(stack)
        return levels

    def _values(self, levels: Ints) -> Tensor:
        return torch.from_numpy(levels).double()[None] / self.top

    def _levels(self, steps: Steps, h: Tensor, levels: Ints | None = None) -> Ints:
        """Code the data: all channels at once, or each one given those before it."""
        features = _rounded(steps, _numbers(h), self.feature_bits, _error(h))
        p = self.likelihood.distribution(torch.from_numpy(features).reshape(h.shape), observes="level", refitted=self.refitted)
        found = np.zeros(p.event_shape, np.int64)
        channels = len(found)
        groups = [slice(0, channels)] if self.likelihood.independent_channels else [slice(c, c + 1) for c in range(channels)]
        for group in groups:
            known = None if levels is None else levels[group].reshape(-1)
            below = partial(self._mass_below, p, found, group)
            coded = code(steps, below, self.widths, found[group].size, known)
            found[group] = coded.reshape(found[group].shape)
        return found

    def _mass_below(self, p: DataDistribution, found: Ints, group: slice, edges: Ints) -> Floats:
        """Mass below levels of some channels, given the channels that are already found."""
        asked = np.repeat(found[None, None], edges.shape[1], 0)
        asked[:, 0, group] = np.minimum(edges.T - 1, self.top).reshape(-1, *found[group].shape)
        _, upto = p.element_cdf(torch.from_numpy(asked).double() / self.top)
        mass: Floats = upto[:, 0, group].reshape(edges.shape[1], -1).T.numpy()
        return np.where(edges > self.top, 1.0, mass)


def _refitted(likelihood: Likelihood) -> bool:
    """Whether to take the σ that was refitted for levels.

    Raises:
        ValueError: the likelihood has no probabilities of levels.
    """
    likelihood.check_observes("level")
    return "level" in likelihood.refitted_log_scales()


def _latents_of(network: Network) -> _Latents:
    name = type(network).__name__
    if network.reads_clips:
        raise ValueError(f"{name} reads clips, which the codec does not code; take a network of single examples")
    if network.reads_condition:
        raise ValueError(f"{name} reads a condition, which the codec does not store; take a network without one")
    if network.has_descent:
        return _Layers(network)
    if not (network.has_posterior and network.has_prior):
        raise ValueError(
            f"the codec needs q(z|x) and p(z), which {name} does not offer: posterior, decode and prior, or descend"
        )
    return _Flat(network)


@final
class _Flat:
    """One layer of latents with N(0, I), or a mixture of Gaussians, as their prior."""

    def __init__(self, network: Network) -> None:
        self.network = network
        (self.shape,) = network.latents.shapes
        count = math.prod(self.shape)
        self.mixture = None if network.prior.is_standard else _Mixture(network.prior)
        self.mean = np.zeros(count) if self.mixture is None else self.mixture.mean
        self.std = np.ones(count) if self.mixture is None else self.mixture.std

    def posterior(self, steps: Steps, x: Tensor, cells: Sequence[Ints] | None = None) -> list[Ints]:
        """Code the latents by q(z|x)."""
        below = _posterior(steps, self.network.posterior(x), self.mean, self.std)
        return [code(steps, below, LATENT_WIDTHS, len(self.mean), None if cells is None else cells[0])]

    def features(self, steps: Steps, cells: Sequence[Ints] | None = None) -> tuple[Tensor, list[Ints]]:
        """Code the latents by p(z), and decode them."""
        known = None if cells is None else cells[0]
        if self.mixture is None:
            found = code(steps, _standard, LATENT_WIDTHS, len(self.mean), known)
        else:
            found = self.mixture.code(steps, known)
        z = torch.from_numpy(self.mean + self.std * _centres(found))
        return self.network.decode(z.reshape(1, *self.shape)), [found]


@final
class _Layers:
    """Several layers, whose priors are Gaussians given the layers above."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def posterior(self, steps: Steps, x: Tensor, cells: Sequence[Ints] | None = None) -> list[Ints]:
        """Code the latents of each layer by q(z|x)."""
        return self._descend(steps, x, cells)[1]

    def features(self, steps: Steps, cells: Sequence[Ints] | None = None) -> tuple[Tensor, list[Ints]]:
        """Code the latents of each layer by p(z), and decode them."""
        return self._descend(steps, None, cells)

    def _descend(self, steps: Steps, x: Tensor | None, cells: Sequence[Ints] | None) -> tuple[Tensor, list[Ints]]:
        found: list[Ints] = []

        def choose(prior: Normal, posterior: Normal | None) -> Tensor:
            std = _rounded_std(steps, _numbers(prior.scale))
            mean = std * _rounded(steps, _numbers(prior.loc) / std, PLACE_BITS, _error(prior.loc) / std)
            below = _standard if posterior is None else _posterior(steps, posterior, mean, std)
            found.append(code(steps, below, LATENT_WIDTHS, len(mean), None if cells is None else cells[len(found)]))
            return torch.from_numpy(mean + std * _centres(found[-1])).reshape(prior.loc.shape)

        return self.network.descend(choose, x), found


@final
class _Mixture:
    """A mixture of Gaussians, coded latent by latent: given those before, each has a mixture in one dimension."""

    def __init__(self, prior: Prior) -> None:
        log_weights, means, factors = (part.double().numpy() for part in prior.as_mixture())
        self.log_weights, self.means, self.factors = log_weights, means, factors
        weights = np.exp(log_weights)[:, None]
        self.mean = (weights * means).sum(0)
        variances = np.square(factors).sum(2) + np.square(means - self.mean)
        self.std = np.sqrt((weights * variances).sum(0))

    def code(self, steps: Steps, cells: Ints | None) -> Ints:
        """Code all latents; each of the components keeps the latents so far in its own units."""
        count = self.means.shape[1]
        found, units = np.zeros(count, np.int64), np.zeros(self.means.shape)
        log_shares = self.log_weights
        for i in range(count):
            own = self.factors[:, i, i]
            means = self.means[:, i] + (self.factors[:, i, :i] * units[:, :i]).sum(1)
            error = MARGIN * max(1.0, float(np.abs(log_shares).max()))
            relative = np.maximum(log_shares - log_shares.max(), LEAST_LOG_SHARE)
            shares = np.exp(_rounded(steps, relative, SHARE_BITS, error))
            places = (means - self.mean[i]) / self.std[i]
            places = _rounded(steps, places, PLACE_BITS, MARGIN * max(1.0, float(np.abs(means).max())) / self.std[i])
            below = partial(_mixed, shares / shares.sum(), places, own / self.std[i])
            found[i : i + 1] = code(steps, below, LATENT_WIDTHS, 1, None if cells is None else cells[i : i + 1])
            units[:, i] = (self.mean[i] + self.std[i] * _centres(found[i]) - means) / own
            log_shares = log_shares - 0.5 * np.square(units[:, i]) - np.log(own)
        return found


def _mixed(shares: Floats, means: Floats, stds: Floats, edges: Ints) -> Floats:
    """Mass of a mixture in one dimension below the edges of cells ``(1, edges)``."""
    inside: Floats = (shares[:, None] * _normal_cdf((_places(edges) - means[:, None]) / stds[:, None])).sum(0)
    return inside[None]


def _posterior(steps: Steps, q: Normal, mean: Floats, std: Floats) -> MassBelow:
    """Mass of Gaussians below the edges of cells, in stds of a prior with the given mean and std."""
    places = _rounded(steps, (_numbers(q.loc) - mean) / std, PLACE_BITS, _error(q.loc) / std)[:, None]
    wide = _rounded_std(steps, np.maximum(_numbers(q.scale) / std, SMALLEST_STD))[:, None]  # keeps NaN
    return lambda edges: _normal_cdf((_places(edges) - places) / wide)


def _rounded(steps: Steps, values: Floats, bits: int, error: Floats | float) -> Floats:
    """The nearest multiples of 2^−bits; machines disagree about the values by up to ``error``."""
    whole: Floats = steps.rounding(values * 2.0**bits, error * 2.0**bits)
    return whole / 2.0**bits


def _rounded_std(steps: Steps, std: Floats) -> Floats:
    rounded: Floats = np.exp2(_rounded(steps, np.log2(std), SCALE_BITS, MARGIN))
    return rounded


def _error(outputs: Tensor) -> float:
    return MARGIN * max(1.0, float(outputs.abs().max())) if outputs.numel() else MARGIN


def _standard(edges: Ints) -> Floats:
    """Mass of N(0, 1) below the edges of cells."""
    mass: Floats = _standard_masses()[edges]
    return mass


@cache
def _standard_masses() -> Floats:
    return _normal_cdf(_places(np.arange(CELLS + 1)))


def _normal_cdf(z: Floats) -> Floats:
    mass: Floats = torch.special.ndtr(torch.from_numpy(z)).numpy()
    return mass


def _places(edges: Ints) -> Floats:
    """Where the edges of cells lie, in stds of the prior."""
    places: Floats = (edges - CELLS // 2) * CELL
    return places


def _centres(cells: Ints) -> Floats:
    """Centres of cells, in stds of the prior."""
    return _places(cells) + CELL / 2


def _numbers(values: Tensor) -> Floats:
    """All numbers of a tensor in a row, in float64."""
    numbers: Floats = values.detach().double().reshape(-1).numpy()
    return numbers
