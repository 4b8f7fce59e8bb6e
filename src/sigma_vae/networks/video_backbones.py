"""Encoders and decoders of single frames, with skip connections between them: the DCGAN and the VGG of SVG."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Backbone", "Encoded", "FrameDecoder", "FrameEncoder", "Spread", "batch_statistics_of", "dcgan", "vgg"]

Spread = Callable[[Tensor], Tensor]
"""From one row a clip to one row a frame."""

SMALLEST = 8
SLOPE = 0.2
STANDARD_DEVIATION = 0.02


class Encoded(NamedTuple):
    """What an encoder makes of frames: codes ``(frames, code_dim)``, and the activations of its stages, finest first."""

    code: Tensor
    skips: tuple[Tensor, ...]


class Backbone(NamedTuple):
    """An encoder of frames and the decoder that belongs to it."""

    encoder: "FrameEncoder"
    decoder: "FrameDecoder"


@final
class FrameEncoder(nn.Module):
    """Frames ``(frames, C, H, W)`` to :class:`Encoded`, in stages that halve the size each.

    Args:
        stages: what gives the skip connections, one after the other.
        between: what follows each of them: pooling, or nothing where a stage itself halves the size.
        head: from the last stage to ``(frames, code_dim, 1, 1)``.
    """

    def __init__(self, stages: Sequence[nn.Module], between: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.between = between
        self.head = head

    def forward(self, x: Tensor) -> Encoded:
        """Codes and skip connections."""
        skips: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
            x = self.between(x)
        return Encoded(self.head(x).flatten(1), tuple(skips))


@final
class FrameDecoder(nn.Module):
    """Codes ``(frames, code_dim)``, and the skip connections of their clips, to features ``(frames, out_channels, H, W)``.

    Args:
        stem: from a code ``(frames, code_dim, 1, 1)`` to the smallest map.
        between: what precedes each stage: upsampling, or nothing where a stage itself doubles the size.
        stages: coarsest first; each joins a skip connection.
    """

    def __init__(self, stem: nn.Module, between: nn.Module, stages: "Sequence[_Join]") -> None:
        super().__init__()
        self.stem = stem
        self.between = between
        self.stages = nn.ModuleList(stages)

    def shares(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """What skip connections ``(clips, ...)``, finest first, add in each stage: the same in all frames of a clip."""
        stages = [stage for stage in self.stages if isinstance(stage, _Join)]
        return [stage.share(skip) for stage, skip in zip(stages, reversed(skips), strict=True)]

    def forward(self, code: Tensor, shares: Sequence[Tensor], spread: Spread) -> Tensor:
        """Features of the frames."""
        x: Tensor = self.stem(code[:, :, None, None])
        for stage, share in zip(self.stages, shares, strict=True):
            x = stage(self.between(x), spread(share))
        return x


def dcgan(shape: Sequence[int], out_channels: int, width: int = 64, code_dim: int = 128) -> Backbone:
    """The DCGAN of SVG: 4×4 convolutions of stride 2, their width doubled each time up to eightfold, and the mirror image of it.

    Frames of 64×64 pass four such stages (64, 128, 256, 512 channels), of 32×32 three, of 128×128 five; a 4×4 convolution then gives the
    code, through batch norm and tanh. The decoder's last layer gives features: the likelihood owns what the original's sigmoid does.

    Args:
        shape: of a frame, ``(C, H, W)``.
        out_channels: what the likelihood reads.
        width: channels of the first stage.
        code_dim: size of a code.

    Raises:
        ValueError: the frames are not square with a side of 8, 16, 32, 64, ...

    >>> encoder, decoder = dcgan((1, 64, 64), out_channels=1)
    >>> code, skips = encoder(torch.zeros(6, 1, 64, 64))
    >>> code.shape, [tuple(skip.shape[1:]) for skip in skips]
    (torch.Size([6, 128]), [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)])
    >>> decoder(code, decoder.shares(skips), lambda share: share).shape
    torch.Size([6, 1, 64, 64])
    """
    widths = _widths(shape, width)
    inputs = [shape[0], *widths[:-1]]
    stages = [_block(nn.Conv2d(i, o, 4, 2, 1)) for i, o in zip(inputs, widths, strict=True)]
    joins = [
        _Join(nn.ConvTranspose2d(2 * widths[i], widths[i - 1], 4, 2, 1), [_normed(widths[i - 1])])
        for i in range(len(widths) - 1, 0, -1)
    ]
    joins.append(_Join(nn.ConvTranspose2d(2 * widths[0], out_channels, 4, 2, 1), []))
    encoder = FrameEncoder(stages, nn.Identity(), _head(widths[-1], code_dim))
    return _initialised(Backbone(encoder, FrameDecoder(_stem(code_dim, widths[-1]), nn.Identity(), joins)))


def vgg(shape: Sequence[int], out_channels: int, width: int = 64, code_dim: int = 128) -> Backbone:
    """The VGG of SVG: two or three 3×3 convolutions a stage, pooled and upsampled between.

    Frames of 64×64 pass stages of 2, 2, 3 and 3 convolutions (64, 128, 256, 512 channels), of 32×32 the first three. Arguments, errors
    and ends are those of :func:`dcgan`.

    Raises:
        ValueError: the frames are not square with a side of 8, 16, 32, 64, ...

    >>> encoder, decoder = vgg((3, 32, 32), out_channels=6, width=8)
    >>> [tuple(skip.shape[1:]) for skip in encoder(torch.zeros(2, 3, 32, 32)).skips]
    [(8, 32, 32), (16, 16, 16), (32, 8, 8)]
    """
    widths = _widths(shape, width)
    depths = [2 if i < 2 else 3 for i in range(len(widths))]
    stages = []
    for inputs, outputs, depth in zip([shape[0], *widths[:-1]], widths, depths, strict=True):
        stages.append(nn.Sequential(_layer(inputs, outputs), *(_layer(outputs, outputs) for _ in range(depth - 1))))
    joins = []
    for i in range(len(widths) - 1, 0, -1):
        rest = [_layer(widths[i], widths[i]) for _ in range(depths[i] - 2)]
        rest.append(_layer(widths[i], widths[i - 1]))
        joins.append(_Join(nn.Conv2d(2 * widths[i], widths[i], 3, 1, 1), [_normed(widths[i]), *rest]))
    last = [_normed(width), nn.ConvTranspose2d(width, out_channels, 3, 1, 1)]
    joins.append(_Join(nn.Conv2d(2 * width, width, 3, 1, 1), last))
    encoder = FrameEncoder(stages, nn.MaxPool2d(2), _head(widths[-1], code_dim))
    upsample = nn.Upsample(scale_factor=2, mode="nearest")
    return _initialised(Backbone(encoder, FrameDecoder(_stem(code_dim, widths[-1]), upsample, joins)))


@contextmanager
def batch_statistics_of(network: nn.Module) -> Iterator[None]:
    """Within it, batch norm uses the statistics of what it is given, and leaves the running ones as they are.

    >>> norm = nn.BatchNorm2d(1).eval()
    >>> with batch_statistics_of(norm):
    ...     norm(torch.tensor([[[[1.0]]], [[[3.0]]]])).flatten()
    tensor([-1.0000,  1.0000], grad_fn=<ViewBackward0>)
    >>> norm.running_mean, norm.training
    (tensor([0.]), False)
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.training, norm.track_running_stats = mode, True


@final
class _Join(nn.Module):
    """A convolution of features joined with a skip connection, and what follows it.

    A convolution is linear: the skip connection's share of it is computed once for all frames of a clip.
    """

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d, rest: Sequence[nn.Module]) -> None:
        super().__init__()
        self.convolution = convolution
        self.rest = nn.Sequential(*rest)

    def share(self, skip: Tensor) -> Tensor:
        return self._convolve(skip, slice(-skip.shape[1], None), None)

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        result: Tensor = self.rest(self._convolve(x, slice(x.shape[1]), self.convolution.bias) + share)
        return result

    def _convolve(self, x: Tensor, inputs: slice, bias: Tensor | None) -> Tensor:
        stride, padding = self.convolution.stride[0], int(self.convolution.padding[0])
        if isinstance(self.convolution, nn.ConvTranspose2d):
            return functional.conv_transpose2d(x, self.convolution.weight[inputs], bias, stride, padding)
        return functional.conv2d(x, self.convolution.weight[:, inputs], bias, stride, padding)


def _widths(shape: Sequence[int], width: int) -> list[int]:
    """Channels of each stage; the last one leaves a map of 4×4."""
    side = shape[-1]
    if len(shape) != 3 or shape[1] != side or side < SMALLEST or side & (side - 1):
        raise ValueError(
            f"video networks read square frames (C, H, W) with a side of 8, 16, 32, 64 or 128, got frames of shape {tuple(shape)};"
            " crop, pad or resize them"
        )
    return [width * min(2**i, 8) for i in range(side.bit_length() - 3)]


def _normed(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE))


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, _normed(convolution.out_channels))


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return _block(nn.Conv2d(inputs, outputs, 3, 1, 1))


def _head(inputs: int, code_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, code_dim, 4), nn.BatchNorm2d(code_dim), nn.Tanh())


def _stem(code_dim: int, outputs: int) -> nn.Sequential:
    return _block(nn.ConvTranspose2d(code_dim, outputs, 4))


def _initialised(backbone: Backbone) -> Backbone:
    """Weights N(0, 0.02²), gains N(1, 0.02²), no biases, as published."""
    with torch.no_grad():
        for part in backbone:
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                    assert module.bias is not None
                    mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                    module.weight.normal_(mean, STANDARD_DEVIATION)
                    module.bias.zero_()
    return backbone
