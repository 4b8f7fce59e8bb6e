"""Examples to bytes and back, without loss, by a model; and the file that holds them."""

import copy
import hashlib
import io
import json
import lzma
import platform
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sigma_vae.codec.bits_back import BitsBack, Ints, Rounding, Roundings, Stack, seed_words
from sigma_vae.types import in_full_precision
from sigma_vae.vae import VAE

Array = npt.NDArray[np.generic]

MAGIC = b"\x89SVAE\r\n"
FORMAT = 2
START = struct.Struct("<7sBI16s")
"""Magic, format, length of the header, its digest."""
DIGEST_BYTES = 16
HEADER_BYTES = 2**26
RAW_BYTES = 2**31
"""Largest header and raw part, when decompressed."""
SPARE_SEEDS = 2**16


@final
class DamagedError(ValueError):
    """Bytes of a file are missing or altered; ``whole`` are the positions of the examples that can still be decoded."""

    def __init__(self, message: str, whole: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.whole = list(whole)


Notes = tuple[tuple[int, ...], tuple[int, ...]]


@final
@dataclass(frozen=True)
class Part:
    """A run of examples that is decoded as a whole.

    Args:
        examples: how many.
        size: in bytes.
        digest: of the bytes.
        content: digest of the examples.
        seeds: words of initial bits; 0 for raw examples.
        noted: notes about numbers that lie near the middle between two roundings (see ``Rounding``): of posteriors, and of
            the model; as gaps.
    """

    examples: int
    size: int
    digest: str
    content: str
    seeds: int = 0
    noted: Notes = ((), ())


@final
@dataclass(frozen=True)
class Header:
    """The beginning of a file: all that a decoder has to know.

    Args:
        model: digest of the weights.
        check: digest of numbers that the model computes from fixed inputs.
        check_noted: notes about these numbers, like a part's.
        machine: versions and processor that they were computed with.
        shape: of an example that the model codes.
        levels: of its values.
        chunks: parts of coded examples, in order.
        raw: the part of examples that the model cannot represent.
        raw_positions: their positions among all examples.
        about: the caller's own words, such as names.
    """

    model: str
    check: str
    check_noted: Notes
    machine: dict[str, str]
    shape: tuple[int, ...]
    levels: int
    chunks: tuple[Part, ...]
    raw: Part | None
    raw_positions: tuple[int, ...]
    about: dict[str, Any]

    @property
    def examples(self) -> int:
        """Number of all examples."""
        return sum(chunk.examples for chunk in self.chunks) + len(self.raw_positions)

    def positions(self) -> list[list[int]]:
        """Positions of the examples of each chunk, and last those of the raw part."""
        raw = set(self.raw_positions)
        coded = iter([i for i in range(self.examples) if i not in raw])
        return [[next(coded) for _ in range(chunk.examples)] for chunk in self.chunks] + [list(self.raw_positions)]


class Opened(NamedTuple):
    """A header, the bytes of its parts (chunks, then the raw part), None where they are damaged, and what is wrong."""

    header: Header
    payloads: list[bytes | None]
    problem: str

    @property
    def whole(self) -> list[int]:
        """Positions of the examples whose part is not damaged."""
        parts = zip(self.header.positions(), self.payloads, strict=True)
        return sorted(i for positions, payload in parts if payload is not None for i in positions)


def digest_of(*parts: bytes) -> str:
    """A digest of 128 bits, in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[: 2 * DIGEST_BYTES]


def write(header: Header, payloads: Sequence[bytes]) -> bytes:
    """All bytes of a file."""
    content = zlib.compress(json.dumps(asdict(header), separators=(",", ":"), ensure_ascii=False).encode(), 9)
    start = START.pack(MAGIC, FORMAT, len(content), bytes.fromhex(digest_of(content)))
    return b"".join([start, content, *payloads])


def read(blob: bytes) -> Opened:
    """Read the header, and check the digest of each part.

    Raises:
        ValueError: these are no coded examples, or their format is newer.
        DamagedError: the header is damaged, so that nothing can be decoded.
    """
    if len(blob) < START.size or not blob.startswith(MAGIC):
        raise ValueError("this is no file of `sigma-vae compress`: it does not begin like one")
    _, number, length, digest = START.unpack_from(blob)
    if number != FORMAT:
        raise ValueError(f"the file has format {number}, this version reads {FORMAT}; decode it with the version that wrote it")
    content = blob[START.size : START.size + length]
    if len(content) != length or bytes.fromhex(digest_of(content)) != digest:
        raise DamagedError("the file's header is damaged, so no example can be decoded; copy the file again from where it was")
    header = _header(content)
    return _opened(header, blob[START.size + length :])


def _opened(header: Header, rest: bytes) -> Opened:
    payloads: list[bytes | None] = []
    start = 0
    for part in (*header.chunks, header.raw):
        size = 0 if part is None else part.size
        payload = rest[start : start + size]
        start += size
        good = part is None or digest_of(payload) == part.digest
        payloads.append(payload if good else None)
    damaged = payloads.count(None)
    opened = Opened(header, payloads, "")
    if len(rest) == start and not damaged:
        return opened
    length = (
        f"it has {abs(len(rest) - start)} bytes too {'many' if len(rest) > start else 'few'}; " if len(rest) != start else ""
    )
    return opened._replace(
        problem=f"the file is damaged: {length}{damaged} of {len(payloads) - (header.raw is None)} parts are altered or missing;"
        f" whole are {len(opened.whole)} of {header.examples} examples: {_ranges(opened.whole)}"
    )


def _header(content: bytes) -> Header:
    """Check the types of what a writer, perhaps a hostile one, has put into a header."""
    try:
        text = zlib.decompressobj().decompress(content, HEADER_BYTES)
        found = json.loads(text)
        found["chunks"] = tuple(_part(chunk) for chunk in found["chunks"])
        found["raw"] = None if found["raw"] is None else _part(found["raw"])
        for name in ("shape", "raw_positions"):
            found[name] = tuple(_count(number) for number in found[name])
        found["check_noted"] = _notes(found["check_noted"])
        header = Header(**found)
        _count(header.levels - 2)
        consistent = len(set(header.raw_positions)) == len(header.raw_positions) == (header.raw.examples if header.raw else 0)
        texts = (header.model, header.check, *header.machine.values())
        if not (consistent and all(isinstance(text, str) for text in texts) and isinstance(header.about, dict)):
            raise ValueError("its entries contradict each other")
        if header.raw_positions and max(header.raw_positions) >= header.examples:
            raise ValueError("it has raw examples beyond its last one")
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the file's header is no header of coded examples: {error}") from error
    return header


def _part(found: dict[str, Any]) -> Part:
    part = Part(**{**found, "noted": _notes(found["noted"])})
    for number in (part.examples, part.size, part.seeds):
        _count(number)
    if part.seeds > part.size // 4 + SPARE_SEEDS or part.examples > 2**31:
        raise ValueError(
            f"a part of {part.size} bytes cannot have {part.seeds} words of initial bits, {part.examples} examples"
        )
    return part


def _notes(found: Any) -> Notes:
    posterior, model = (tuple(_count(number) for number in notes) for notes in found)
    return posterior, model


def _count(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"expected a number of at least 0, got {number!r}")
    return number


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: ``0-99, 200-299``.

    >>> _ranges([0, 1, 2, 5, 7, 8]), _ranges([])
    ('0-2, 5, 7-8', 'none')
    """
    if not numbers:
        return "none"
    array = np.asarray(numbers)
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def pack_raw(arrays: Sequence[Array]) -> bytes:
    """Arrays of any shape and type, one after the other in NumPy's format, compressed by LZMA."""
    whole = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(whole, array, allow_pickle=False)
    return lzma.compress(whole.getvalue(), preset=9)


def unpack_raw(payload: bytes, count: int) -> list[Array]:
    """The arrays of :func:`pack_raw`.

    Raises:
        ValueError: these are no such bytes.
    """
    try:
        whole = io.BytesIO(lzma.LZMADecompressor().decompress(payload, RAW_BYTES))
        return [np.lib.format.read_array(whole, allow_pickle=False) for _ in range(count)]
    except (lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"the file's raw examples cannot be read: {error}") from error


# -- examples to bytes and back ----------------------------------------------------------------------------------------


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
