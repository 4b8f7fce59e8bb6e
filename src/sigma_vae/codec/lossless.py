"""Examples to bytes and back, without loss, by a model."""

import copy
import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from sigma_vae.codec.bits_back import BitsBack, Roundings
from sigma_vae.codec.container import (
    Array,
    DamagedError,
    Header,
    Notes,
    Opened,
    Part,
    digest_of,
    pack_raw,
    read,
    unpack_raw,
    write,
)
from sigma_vae.codec.stack import Ints, Rounding, Stack, seed_words
from sigma_vae.types import in_full_precision
from sigma_vae.vae import VAE

__all__ = ["CHUNK", "Codec", "Damaged", "Unpacked"]

Damaged = Literal["refuse", "skip"]
"""A damaged file is refused, or the examples that are whole are decoded."""

CHUNK = 1000
"""Examples of a chain: each chain pays initial bits, and is lost as a whole if a byte of it is."""
OFF_A_LEVEL = 1e-4
ROUNDING = 2e-7
"""Rounding of float32, in units of the highest level."""


class Unpacked(NamedTuple):
    """Decoded examples as whole numbers (levels) or as they were given (raw), their positions, and the caller's words."""

    examples: list[Array]
    positions: list[int]
    about: dict[str, Any]


@final
class Codec:
    r"""Lossless compression by a VAE: the bound in bits becomes the size of a file.

    .. math:: \text{bits}(x) \approx -\log_2 p(x|z) - \log_2 p(z) + \log_2 q(z|x), \quad z \sim q(z|x)

    whose expectation is the negative ELBO of the levels in bits: bits-back coding (Hinton & van Camp 1993; Townsend et al.
    2019, arXiv 1901.04866). It takes any likelihood with probabilities of levels, after :meth:`VAE.calibrate`; networks
    with flat latents and a prior that is N(0, I), a Gaussian or a mixture, and hierarchical ones.

    The numbers are computed on the CPU, on one thread, in float64, one example at a time. What the network computes, and the
    probabilities that follow, are rounded to coarse grids, on which machines agree whose last digits differ. Numbers within
    a margin (2⁻⁴⁰ of a network's output) of the middle between two grid points are noted in the file. A check word stands
    for what the writer's machine computed; a machine that computes something else is refused.

    Args:
        vae: the model; it is copied.
        shape: of an example ``(C, *space)``; unless given, that of the first example that is encoded.
        chunk: examples of a chain. Each chain has initial bits of its own; a damaged one is lost as a whole.
        check: decode what was encoded before it is returned.
        on_example: called after each example, to show progress.

    Shapes:
        x ``(n, C, *space)``: levels k/(levels − 1), as the model reads them.

    Raises:
        ValueError: the model has no probabilities of levels, or no prior that can be coded; the message says which.

    >>> from sigma_vae import VAE, Gaussian, mlp
    >>> x = torch.randint(0, 256, (20, 1, 8, 8)) / 255
    >>> vae = VAE(mlp((1, 8, 8), 1, latent_dim=2), Gaussian(channels=1))
    >>> vae.calibrate([x])
    >>> codec = Codec(vae)
    >>> blob = codec.encode(x)
    >>> torch.equal(codec.decode(blob), x)
    True
    """

    def __init__(
        self,
        vae: VAE,
        shape: Sequence[int] | None = None,
        *,
        chunk: int = CHUNK,
        check: bool = True,
        on_example: Callable[[], object] = lambda: None,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk counts the examples of a chain and is at least 1, got {chunk}")
        self.shape = None if shape is None else tuple(shape)
        self.chunk = chunk
        self.check = check
        self.on_example = on_example
        model = copy.deepcopy(vae).to("cpu", torch.float32).eval()
        self.digest = _model_digest(model)
        self.bits_back = BitsBack(model.double())
        self.levels = self.bits_back.top + 1

    def encode(self, x: Tensor | Sequence[Tensor], *, raw: bool = False) -> bytes:
        """Encode examples.

        Args:
            x: ``(n, C, *space)``, or a sequence of examples.
            raw: store examples that the model cannot represent (of another shape, or with values off the levels) as they are,
                compressed by LZMA; otherwise they are refused.

        Raises:
            ValueError: an example cannot be represented, the model's numbers are not finite, or the self-check failed.
        """
        return self.pack([self._as_levels(example) for example in x], raw=raw)

    def decode(self, blob: bytes) -> Tensor:
        """Decode examples of one shape, ``(n, C, *space)`` in float32: those that were encoded, to the last bit.

        Raises:
            ValueError: the file is of another model, was written by a machine that computes other numbers, or has raw
                examples of other shapes (see :meth:`unpack`).
            DamagedError: bytes are missing or altered; nothing of the altered parts was decoded.
        """
        examples = [self._as_values(example) for example in self.unpack(blob).examples]
        if len({example.shape for example in examples}) > 1:
            raise ValueError("the file has raw examples of other shapes, which make no tensor; take unpack(blob).examples")
        return torch.stack(examples) if examples else torch.empty(0, *(self.shape or ()))

    def pack(self, examples: Sequence[Array], *, raw: bool = False, about: dict[str, Any] | None = None) -> bytes:
        """Encode examples given as whole numbers, the levels 0..levels−1 ``(C, *space)``, with words about them.

        Raises:
            ValueError: as for :meth:`encode`.
        """
        if self.shape is None:
            self.shape = examples[0].shape if len(examples) else ()
        problems = [(i, why) for i, example in enumerate(examples) if (why := self._unfit(example))]
        if problems and not raw:
            first, why = problems[0]
            raise ValueError(
                f"the model codes examples of shape {self.shape} with levels 0..{self.levels - 1}, but {len(problems)} of"
                f" {len(examples)} are none, the first at position {first}: {why}; leave them out, or store them as they are"
                " (raw=True, --raw yes)"
            )
        apart = {i for i, _ in problems}
        coded = [example for i, example in enumerate(examples) if i not in apart]
        blob = self._written(coded, [np.asarray(examples[i]) for i in sorted(apart)], tuple(sorted(apart)), about or {})
        if self.check:
            self._check(blob, examples)
        return blob

    def unpack(self, blob: bytes, damaged: Damaged = "refuse") -> Unpacked:
        """Decode examples as whole numbers, in the smallest type; raw ones as they were given.

        Raises:
            ValueError: as for :meth:`decode`.
        """
        opened = read(blob)
        if opened.problem and damaged == "refuse":
            raise DamagedError(opened.problem, opened.whole)
        self._check_reader(opened.header)
        found = dict(self._decoded(opened))
        positions = sorted(found)
        return Unpacked([found[i] for i in positions], positions, opened.header.about)

    def _written(self, coded: list[Array], apart: list[Array], positions: tuple[int, ...], about: dict[str, Any]) -> bytes:
        assert self.shape is not None
        chunks, payloads = [], []
        for start in range(0, len(coded), self.chunk):
            some = [example.astype(np.int64) for example in coded[start : start + self.chunk]]
            payload, seeds, noted = self._chain(some)
            chunks.append(Part(len(some), len(payload), digest_of(payload), _content(some), seeds, noted))
            payloads.append(payload)
        raw = None
        if apart:
            payloads.append(pack_raw(apart))
            raw = Part(len(apart), len(payloads[-1]), digest_of(payloads[-1]), _content(apart))
        roundings = Roundings.knowing()
        check = self._check_word(self.shape, roundings) if chunks else ""
        notes = _noted([roundings])
        header = Header(self.digest, check, notes, _machine(), self.shape, self.levels, tuple(chunks), raw, positions, about)
        return write(header, payloads)

    def _chain(self, examples: list[Ints]) -> tuple[bytes, int, Notes]:
        """Encode examples onto one stack, the last one first; return its bytes, the words of its initial bits, and notes."""
        stack, roundings = Stack(), [Roundings.knowing() for _ in examples]
        with _reproducible():
            for example, own in zip(reversed(examples), reversed(roundings), strict=True):
                self.bits_back.encode(stack, example, own)
                self.on_example()
        return stack.words().astype("<u4").tobytes(), stack.seeds, _noted(roundings)

    def _decoded(self, opened: Opened) -> Iterator[tuple[int, Array]]:
        """Positions and examples of the parts that are whole."""
        header, positions = opened.header, opened.header.positions()
        kind = np.min_scalar_type(header.levels - 1)
        for part, payload, where in zip(header.chunks, opened.payloads[:-1], positions[:-1], strict=True):
            if payload is not None:
                examples: Sequence[Array] = self._unchained(part, payload)
                yield from zip(where, (example.astype(kind) for example in examples), strict=True)
        if header.raw is not None and (payload := opened.payloads[-1]) is not None:
            yield from zip(positions[-1], unpack_raw(payload, header.raw.examples), strict=True)

    def _unchained(self, part: Part, payload: bytes) -> list[Ints]:
        """Decode a chain, and check that exactly its initial bits are left.

        Raises:
            ValueError: it was not written by this codec.
        """
        stack, examples = Stack(np.frombuffer(payload, "<u4").astype(np.uint32)), []
        roundings = _knowing(part.noted)
        with _reproducible():
            for _ in range(part.examples):
                examples.append(self.bits_back.decode(stack, roundings))
                self.on_example()
        if not np.array_equal(stack.words(), seed_words(part.seeds)) or _content(examples) != part.content:
            raise ValueError("the decoded examples are not those that were encoded: this machine computes other numbers")
        return examples

    def _check_reader(self, header: Header) -> None:
        """Refuse another model, and a machine that computes other numbers."""
        if header.model != self.digest:
            raise ValueError(f"the file needs the model {header.model}, this one is {self.digest}; give the run that wrote it")
        if self.shape not in (None, header.shape):
            raise ValueError(
                f"the file has examples of shape {header.shape}, the model codes {self.shape}; give the run that wrote it"
            )
        if not header.chunks or header.check == self._check_word(header.shape, _knowing(header.check_noted)):
            return
        here = _machine()
        written = ", ".join(f"{name} {value}" for name, value in header.machine.items())
        raise ValueError(
            f"this machine computes other numbers with this model than the machine that wrote the file, beyond the margin, so it"
            f" cannot decode it: written with {written}; here {', '.join(f'{name} {value}' for name, value in here.items())}."
            " Decode it where these agree; the environment"
            " ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 makes torch compute like on an older processor"
        )

    def _check_word(self, shape: tuple[int, ...], roundings: Roundings) -> str:
        """Digest of all frequencies that two fixed examples are coded by."""
        every, stack = hashlib.sha256(), Stack()
        stack.record = every.update
        count = int(np.prod(shape, dtype=np.int64))
        number = np.arange(count, dtype=np.int64)
        with _reproducible():
            for levels in (number * 40503 // 8 % self.levels, number * self.levels // max(count, 1)):
                self.bits_back.encode(stack, levels.reshape(shape), roundings)
        return every.hexdigest()[:32]

    def _check(self, blob: bytes, examples: Sequence[Array]) -> None:
        try:
            found = self.unpack(blob).examples
            problem = None if len(found) == len(examples) and all(map(_same, found, examples)) else ValueError("other examples")
        except ValueError as error:
            problem = error
        if problem is not None:
            raise ValueError(
                "the self-check failed, nothing was written: the model does not compute the same numbers twice, so it cannot code"
                " (does it draw random numbers in eval mode?)"
            ) from problem

    def _unfit(self, example: Array) -> str:
        """Why the model cannot represent an example; empty if it can."""
        if example.shape != self.shape:
            return f"its shape is {example.shape}"
        if example.dtype.kind not in "ui":
            return "it has values off the levels"
        if example.size and not (int(example.min()) >= 0 and int(example.max()) < self.levels):
            return f"its levels go from {example.min()} to {example.max()}"
        return ""

    def _as_levels(self, example: Tensor) -> Array:
        """Whole numbers, or the values themselves where they are off the levels."""
        values = example.detach().cpu()
        if not values.is_floating_point():
            top = self.levels - 1
            raise ValueError(
                f"examples are floats k/{top}, as the model reads them, got {values.dtype}; divide the levels by {top}"
            )
        scaled = values.double() * (self.levels - 1)
        levels = scaled.round()
        off = (scaled - levels).abs().max() if values.numel() else 0.0
        if not float(off) <= max(OFF_A_LEVEL, ROUNDING * self.levels):
            return values.float().numpy()
        array: Array = levels.long().numpy()
        return array

    def _as_values(self, example: Array) -> Tensor:
        values = torch.from_numpy(example)
        return values if values.is_floating_point() else values.float() / (self.levels - 1)


def _noted(roundings: Sequence[Roundings]) -> Notes:
    """The notes of all examples, in their order, as gaps between positions."""
    gaps = (np.diff(_along([each[side] for each in roundings]), prepend=0).tolist() for side in (0, 1))
    posterior, model = map(tuple, gaps)
    return posterior, model


def _along(roundings: Sequence[Rounding]) -> list[int]:
    before = np.cumsum([0, *(each.count for each in roundings)]).tolist()
    return [2 * start + note for start, each in zip(before, roundings, strict=False) for note in each.noted]


def _knowing(notes: Notes) -> Roundings:
    posterior, model = (np.cumsum(gaps).tolist() for gaps in notes)
    return Roundings.knowing(posterior, model)


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, full precision, no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), in_full_precision("cpu"):
            yield
    finally:
        torch.set_num_threads(threads)


def _machine() -> dict[str, str]:
    """The processor and versions on which the last bits of a number depend."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "constriction": version("constriction"), "processor": processor}


def _model_digest(vae: VAE) -> str:
    """Digest of the weights and scales, in float32."""
    whole = hashlib.sha256(f"{type(vae.network).__name__} {vae.likelihood!r}".encode())
    for name, value in sorted(vae.state_dict().items()):
        whole.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        whole.update(value.contiguous().numpy().tobytes())
    return whole.hexdigest()[:32]


def _same(one: Array, other: Array) -> bool:
    return np.array_equal(one, other, equal_nan=True)


def _content(examples: Sequence[Array]) -> str:
    """Digest of examples, whatever the type of their numbers."""
    return digest_of(*(f"{example.shape}".encode() + example.tobytes() for example in examples))
