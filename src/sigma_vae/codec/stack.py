"""A stack of bits (asymmetric numeral systems), on which integers are pushed and popped by their distribution functions."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "PRECISION",
    "Floats",
    "Ints",
    "MassBelow",
    "Pops",
    "Pushes",
    "Rounding",
    "Stack",
    "Steps",
    "code",
    "frequencies",
    "seed_words",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]

MassBelow = Callable[[Ints], Floats]
"""Probability that value i is less than each of its edges, ``(n, edges)`` to ``(n, edges)``."""

PRECISION = 24
"""Bits of the integers that stand for probabilities: what constriction's coder works with."""
SHARE_BITS = 16
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
    margin = 2 ** (SHARE_BITS + 1) * MASS_MARGIN / np.maximum(span, MASS_MARGIN)
    share[:, 1:-1] = (rounding or Rounding())(share[:, 1:-1] * 2**SHARE_BITS, margin).clip(0, 2**SHARE_BITS) / 2**SHARE_BITS
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
    for width, left in _places(widths):
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


def _places(widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Width of each digit, and the bits after it."""
    left = sum(widths)
    for width in widths:
        left -= width
        yield width, left
