"""Plans of ladder networks: which blocks work at which resolution, as two short strings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

__all__ = ["DecoderBlock", "EncoderBlock", "LadderPlan"]

LARGEST_PLAN = 1000
"""Blocks; the largest published have some 70."""
LARGEST_PADDING = 0.25
"""Of the image's longer side: more of the network's work than this is not spent on padding."""


class EncoderBlock(NamedTuple):
    """A residual block at this resolution, and the average pooling after it."""

    resolution: int
    pool: int = 1


class DecoderBlock(NamedTuple):
    """A layer of latents at this resolution; the first one of a resolution mixes in what the lower one ended with."""

    resolution: int
    mix_in: int | None = None


@final
@dataclass(frozen=True)
class LadderPlan:
    """The blocks of a ladder network, in the order in which data pass them.

    The notation is that of Very Deep VAEs (Child 2021, arXiv 2011.10650). The encoder's tokens are ``32x11`` (eleven blocks at 32×32),
    ``32d2`` (one block there, then average pooling by 2) and ``32`` (one block); the decoder's are ``8x5`` (five layers
    of latents at 8×8), ``8m4`` (one such layer, the first at 8×8, which takes up the 4×4 features) and ``8``.

    Args:
        encoder: blocks from the image down.
        decoder: layers from the lowest resolution up to the encoder's highest.

    Raises:
        ValueError: the blocks do not follow each other, or the two halves do not meet.

    >>> plan = LadderPlan.parse("8x2,8d2,4,4d4/1x2,4m1,8m4,8x2")
    >>> plan.resolution, plan.layers
    (8, 6)
    >>> plan.encoder[2:4], plan.decoder[2]
    ((EncoderBlock(resolution=8, pool=2), EncoderBlock(resolution=4, pool=1)), DecoderBlock(resolution=4, mix_in=1))
    >>> str(plan)
    '8x2,8d2,4,4d4/1x2,4m1,8m4,8x2'
    """

    encoder: tuple[EncoderBlock, ...]
    decoder: tuple[DecoderBlock, ...]

    def __post_init__(self) -> None:
        """Refuse blocks that do not follow each other."""
        _check_encoder(self.encoder)
        _check_decoder(self.decoder, self.encoder)

    @classmethod
    def parse(cls, text: str) -> "LadderPlan":
        """Read ``encoder/decoder``.

        Raises:
            ValueError: a token is none of the notation's, or the blocks do not follow each other.
        """
        encoder, slash, decoder = text.partition("/")
        if not slash:
            raise ValueError(f"a plan is ENCODER/DECODER, as in 14x2,14d14/1,14m1,14; got {text!r}, which has no slash")
        down = tuple(EncoderBlock(size, number or 1) for size, number in _tokens(encoder, "d", "14x2, 14d2 or 14"))
        up = tuple(DecoderBlock(size, number) for size, number in _tokens(decoder, "m", "14x2, 14m7 or 14"))
        return cls(down, up)

    def __str__(self) -> str:
        down = _written([(block.resolution, None if block.pool == 1 else f"d{block.pool}") for block in self.encoder])
        up = _written([(block.resolution, None if block.mix_in is None else f"m{block.mix_in}") for block in self.decoder])
        return f"{down}/{up}"

    @property
    def resolution(self) -> int:
        """The highest."""
        return self.encoder[0].resolution

    @property
    def layers(self) -> int:
        """How many layers of latents."""
        return len(self.decoder)

    def patch(self, rows: int, columns: int) -> int:
        """Side of the squares of pixels that are one place of the highest resolution.

        The image is padded to a square of ``resolution · patch`` pixels a side.

        Raises:
            ValueError: more than a quarter of the longer side would be padding.

        >>> LadderPlan.parse("14,14d14/1,14m1").patch(28, 28)
        2
        """
        longer = max(rows, columns)
        patch = -(-longer // self.resolution)
        if patch * self.resolution > (1 + LARGEST_PADDING) * longer:
            raise ValueError(
                f"the plan's highest resolution {self.resolution}, or a multiple of it, is to be the image's longer side (up to a"
                f" quarter more is padded), but the image has {rows}×{columns} pixels; begin the plan with {longer} or a half of it"
            )
        return patch


def _tokens(text: str, letter: str, examples: str) -> Iterator[tuple[int, int | None]]:
    """Resolution and number after the letter of each block; tokens with an x stand for several."""
    left = LARGEST_PLAN
    for token in text.split(","):
        match = re.fullmatch(rf"([1-9]\d*)(?:([x{letter}])([1-9]\d*))?", token.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"{token!r} in {text!r} is no block of a plan; a block is written {examples}")
        resolution, kind, number = int(match[1]), match[2], int(match[3] or 1)
        left -= 1 if kind == letter else number
        if left < 0:
            raise ValueError(f"a plan has at most {LARGEST_PLAN} blocks on each side, got more with {token!r}")
        if kind == letter:
            yield resolution, number
        else:
            yield from [(resolution, None)] * number


def _written(blocks: list[tuple[int, str | None]]) -> str:
    """The shortest tokens of blocks, each with what follows its resolution."""
    tokens: list[str] = []
    while blocks:
        resolution, rest = blocks[0]
        same = 1
        while rest is None and same < len(blocks) and blocks[same] == blocks[0]:
            same += 1
        tokens.append(f"{resolution}{rest or (f'x{same}' if same > 1 else '')}")
        blocks = blocks[same:]
    return ",".join(tokens)


def _check_encoder(blocks: tuple[EncoderBlock, ...]) -> None:
    resolution = blocks[0].resolution
    for block in blocks:
        if block.resolution != resolution:
            raise ValueError(
                f"the encoder's block at {block.resolution} gets features of resolution {resolution}; pool before it, as in"
                f" {resolution}d2"
            )
        if resolution % block.pool:
            raise ValueError(f"{resolution}d{block.pool} pools {resolution} by what does not divide it; give a divisor")
        resolution //= block.pool


def _check_decoder(blocks: tuple[DecoderBlock, ...], encoder: tuple[EncoderBlock, ...]) -> None:
    has = {encoder[0].resolution, *(block.resolution // block.pool for block in encoder)}
    resolution = blocks[0].resolution
    if resolution != min(has) or blocks[0].mix_in is not None:
        raise ValueError(
            f"the decoder begins at the lowest resolution of the encoder, {min(has)}, with nothing to mix in; got {blocks[0]}"
        )
    for block in blocks[1:]:
        expected = resolution if block.resolution != resolution else None
        if block.mix_in != expected:
            raise ValueError(
                f"the decoder's first block at a resolution, and no other, mixes in the one before: {block.resolution} after"
                f" {resolution} is written {block.resolution}{'' if expected is None else f'm{expected}'}; got {block}"
            )
        resolution = _checked_step(resolution, block.resolution, has)
    if resolution != max(has):
        raise ValueError(
            f"the decoder ends at the encoder's highest resolution, {max(has)}, got {resolution}; add {max(has)}m…"
        )


def _checked_step(below: int, resolution: int, has: set[int]) -> int:
    if resolution not in has:
        raise ValueError(f"the decoder works at {resolution}, where the encoder has no features: it has {sorted(has)}")
    if resolution % below:
        raise ValueError(
            f"{resolution}m{below} cannot be upsampled by a whole factor; let each resolution be a multiple of the last"
        )
    return resolution
