"""Stochastic video generation (SVG) for clips, with a learned or a fixed prior (Denton and Fergus 2018)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sigma_vae.conditions import WIDTH, Conditions, Embedding
from sigma_vae.registry import Argument, register
from sigma_vae.types import Frames, Inference, Network, Noise, Prediction, Temperature, at_least_float32, per_layer

INITIAL_STD = 0.02
"""Std of the initial weights, as published."""
SMALLEST = 8
SLOPE = 0.2
LOG_2_PI = math.log(2 * math.pi)
FRAMES = 10
"""Number of predicted frames unless asked otherwise, as in the published configurations."""

LstmState = tuple[Tensor, Tensor]
Spread = Callable[[Tensor], Tensor]
"""Repeats the rows of clips, one row per frame."""


class State(NamedTuple):
    """State of each recurrence, ``(hidden, cell)`` of ``(layers, batch, rnn_size)``; None before the first step."""

    posterior: LstmState | None = None
    prior: LstmState | None = None
    predictor: LstmState | None = None


class Moments(NamedTuple):
    """A diagonal Gaussian over the latents of each step, ``(batch, steps, latent_dim)``, in float32 at least."""

    mean: Tensor
    log_variance: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, ``(batch, steps)``, in nats."""
        squares = (z - self.mean).square() * torch.exp(-self.log_variance)
        return -0.5 * (squares + self.log_variance + LOG_2_PI).sum(-1)


class Steps(NamedTuple):
    """Predicted codes ``(batch, steps, code_dim)``, and latents with their Gaussian and their prior."""

    codes: Tensor
    z: Tensor
    drawn_from: Moments
    prior: Moments

    def kl(self) -> Tensor:
        """KL(q‖p) in closed form, ``(batch, steps)``, in nats."""
        q, p = self.drawn_from, self.prior
        spread = (torch.exp(q.log_variance) + (q.mean - p.mean).square()) * torch.exp(-p.log_variance)
        return 0.5 * (p.log_variance - q.log_variance + spread - 1).sum(-1)

    def log_ratio(self) -> Tensor:
        """Log p(z) − log q(z), ``(batch, steps)``, in nats."""
        return self.prior.log_prob(self.z) - self.drawn_from.log_prob(self.z)


@final
class Recurrence(nn.Module):
    """Three recurrences: posterior and prior give a frame's latents, the predictor gives the next frame's code.

    Each begins with a linear layer; posterior and prior have one LSTM layer, the predictor has two. The state is passed
    in and returned.

    Args:
        code_dim: size of a frame's code.
        latent_dim: size of each frame's latents.
        rnn_size: width of the LSTMs.
        learned_prior: whether the prior depends on the frames before; otherwise it is N(0, I).

    >>> recurrence = Recurrence(code_dim=6, latent_dim=2, rnn_size=8)
    >>> codes = torch.rand(3, 5, 6)
    >>> steps, state = recurrence.advance(codes[:, :-1], codes[:, 1:], torch.zeros, State())    # four steps of the posterior
    >>> steps.codes.shape, steps.kl().shape
    (torch.Size([3, 4, 6]), torch.Size([3, 4]))
    >>> recurrence.advance(codes[:, -1:], None, torch.zeros, state)[0].codes.shape              # and one of the prior
    torch.Size([3, 1, 6])
    """

    def __init__(self, code_dim: int, latent_dim: int, rnn_size: int = 256, *, learned_prior: bool = True) -> None:
        super().__init__()
        self.code_dim = code_dim
        self.latent_dim = latent_dim
        self.posterior = _GaussianLstm(code_dim, rnn_size, latent_dim)
        self.prior = _GaussianLstm(code_dim, rnn_size, latent_dim) if learned_prior else None
        self.predictor = _Predictor(code_dim + latent_dim, rnn_size, code_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as published; the LSTMs start as torch's do
                nn.init.normal_(module.weight, 0.0, INITIAL_STD)
                nn.init.zeros_(module.bias)

    def advance(self, before: Tensor, after: Tensor | None, draw: Noise, state: State) -> tuple[Steps, State]:
        """Step from each frame to the next one.

        Args:
            before: codes ``(batch, steps, code_dim)`` of the frames to step from.
            after: codes of the next frames, from which the posterior draws the latents; None: the prior draws them.
            draw: source of standard normal numbers, asked for ``(batch, latent_dim)`` once per step.
            state: to continue from.
        """
        batch, length = before.shape[:2]
        if self.prior is not None:
            prior, prior_state = self.prior(before, state.prior)
        else:
            zero = at_least_float32(before.new_zeros(batch, length, self.latent_dim))
            prior, prior_state = Moments(zero, zero), None
        chosen, posterior_state = (prior, state.posterior) if after is None else self.posterior(after, state.posterior)
        unit = torch.stack([draw(torch.Size([batch, self.latent_dim])).to(chosen.mean) for _ in range(length)], 1)
        z = chosen.mean + torch.exp(0.5 * chosen.log_variance) * unit
        codes, predictor_state = self.predictor(torch.cat([before, z.to(before.dtype)], -1), state.predictor)
        return Steps(codes, z, chosen, prior), State(posterior_state, prior_state, predictor_state)


@final
class _GaussianLstm(nn.Module):
    """Codes ``(batch, steps, code_dim)`` to moments of the latents."""

    def __init__(self, code_dim: int, rnn_size: int, latent_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(code_dim, rnn_size)
        self.lstm = nn.LSTM(rnn_size, rnn_size, batch_first=True)
        self.mean = nn.Linear(rnn_size, latent_dim)
        self.log_variance = nn.Linear(rnn_size, latent_dim)

    def forward(self, codes: Tensor, state: LstmState | None) -> tuple[Moments, LstmState]:
        hidden, state = self.lstm(self.embed(codes), state)
        return Moments(at_least_float32(self.mean(hidden)), at_least_float32(self.log_variance(hidden))), state


@final
class _Predictor(nn.Module):
    """Codes and latents ``(batch, steps, code_dim + latent_dim)`` to the codes of the next frames, within (−1, 1)."""

    def __init__(self, inputs: int, rnn_size: int, code_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, rnn_size)
        self.lstm = nn.LSTM(rnn_size, rnn_size, num_layers=2, batch_first=True)
        self.output = nn.Linear(rnn_size, code_dim)

    def forward(self, inputs: Tensor, state: LstmState | None) -> tuple[Tensor, LstmState]:
        hidden, state = self.lstm(self.embed(inputs), state)
        return torch.tanh(self.output(hidden)), state


class Encoded(NamedTuple):
    """Encoded frames: codes ``(frames, code_dim)``, and the activations of the encoder's stages, finest first."""

    code: Tensor
    skips: tuple[Tensor, ...]


class Backbone(NamedTuple):
    """An encoder of frames and its decoder."""

    encoder: "FrameEncoder"
    decoder: "FrameDecoder"


@final
class FrameEncoder(nn.Module):
    """Encode frames ``(frames, C, H, W)``, in stages that each halve the size.

    Args:
        stages: modules whose outputs are the skip connections, one after the other.
        between: module after each stage: pooling, or the identity where a stage itself halves the size.
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
    """Decode codes ``(frames, code_dim)``, with skip connections, to features ``(frames, out_channels, H, W)``.

    Args:
        stem: from a code ``(frames, code_dim, 1, 1)`` to the smallest map.
        between: module before each stage: upsampling, or the identity where a stage itself doubles the size.
        stages: coarsest first; each joins a skip connection.
    """

    def __init__(self, stem: nn.Module, between: nn.Module, stages: "Sequence[_Join]") -> None:
        super().__init__()
        self.stem = stem
        self.between = between
        self.stages = nn.ModuleList(stages)

    def shares(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Share of skip connections ``(clips, ...)``, finest first, in each stage: the same in all frames of a clip."""
        stages = [stage for stage in self.stages if isinstance(stage, _Join)]
        return [stage.share(skip) for stage, skip in zip(stages, reversed(skips), strict=True)]

    def forward(self, code: Tensor, shares: Sequence[Tensor], spread: Spread) -> Tensor:
        """Features of the frames."""
        x: Tensor = self.stem(code[:, :, None, None])
        for stage, share in zip(self.stages, shares, strict=True):
            x = stage(self.between(x), spread(share))
        return x


def dcgan(shape: Sequence[int], out_channels: int, width: int = 64, code_dim: int = 128) -> Backbone:
    """SVG's DCGAN: 4×4 convolutions of stride 2 that double the width, up to eightfold, and their mirror image.

    Frames of 64×64 pass four such stages (64, 128, 256, 512 channels), of 32×32 three, of 128×128 five; a 4×4
    convolution then gives the code, through batch norm and tanh. The decoder's last layer gives features; the
    original's sigmoid belongs to the likelihood.

    Raises:
        ValueError: the frames ``(C, H, W)`` are not square with a side of 8, 16, 32, 64, ...

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
    joins = [_Join(nn.ConvTranspose2d(2 * i, o, 4, 2, 1), [_normed(o)]) for o, i in reversed(list(pairwise(widths)))]
    joins.append(_Join(nn.ConvTranspose2d(2 * widths[0], out_channels, 4, 2, 1), []))
    return _backbone(stages, nn.Identity(), nn.Identity(), joins, widths[-1], code_dim)


def vgg(shape: Sequence[int], out_channels: int, width: int = 64, code_dim: int = 128) -> Backbone:
    """SVG's VGG: two or three 3×3 convolutions per stage, with pooling and upsampling between stages.

    Frames of 64×64 pass stages of 2, 2, 3 and 3 convolutions (64, 128, 256, 512 channels), of 32×32 the first three.
    Arguments, errors, first and last layers are those of :func:`dcgan`.

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
    return _backbone(stages, nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="nearest"), joins, widths[-1], code_dim)


@contextmanager
def batch_statistics_of(network: nn.Module) -> Iterator[None]:
    """Within this context, batch norm uses the statistics of its input, and its running statistics do not change.

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
    """A convolution of features concatenated with a skip connection, and the modules after it.

    A convolution is linear, so the skip connection's share of it is computed once for all frames of a clip.
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
    # In place: the gradient needs the sign alone, which the output has, and a batch of clips has many activations.
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE, inplace=True))


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, _normed(convolution.out_channels))


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return _block(nn.Conv2d(inputs, outputs, 3, 1, 1))


@torch.no_grad()
def _backbone(
    stages: Sequence[nn.Module], down: nn.Module, up: nn.Module, joins: "Sequence[_Join]", width: int, code_dim: int
) -> Backbone:
    """Add first and last layers; draw weights from N(0, 0.02²) and gains from N(1, 0.02²), as published."""
    head = nn.Sequential(nn.Conv2d(width, code_dim, 4), nn.BatchNorm2d(code_dim), nn.Tanh())
    stem = _block(nn.ConvTranspose2d(code_dim, width, 4))
    backbone = Backbone(FrameEncoder(stages, down, head), FrameDecoder(stem, up, joins))
    for module in (module for part in backbone for module in part.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            assert module.bias is not None
            module.weight.normal_(1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, INITIAL_STD)
            module.bias.zero_()
    return backbone


BACKBONES = {"dcgan": dcgan, "vgg": vgg}


@final
class SequenceNetwork(Network):
    r"""SVG: each frame has latents of its own, drawn given the frames before (arXiv 1802.07687).

    With :math:`c_t` the code of frame t, and all three recurrences being LSTMs,

    .. math::
        q(z_t|x_{\le t}) = N(\mu_\phi(c_{1:t}), \sigma^2_\phi(c_{1:t})), \quad p(z_t|x_{<t}) = N(\mu_\psi(c_{1:t-1}),
        \sigma^2_\psi(c_{1:t-1})), \quad h_t = \text{decoder}(g(c_{t-1}, z_t, \dots), \text{skips})

    (the fixed prior is N(0, I)). The skip connections are those of the last conditioning frame (in the published code,
    of the one before). The first frames of a clip are given and not modelled: the bound is

    .. math::
        \log p(x_{c+1:T}|x_{1:c}) \ge E_q \sum_{t>c} \left[ \log p(x_t|x_{<t}, z_{\le t}) - KL(q(z_t|x_{\le t}) \|
        p(z_t|x_{<t})) \right],

    a sum over *predicted* frames; SVG's loss also counts the conditioning frames, from the second on, and weights the
    KL. Latents of the conditioning frames are drawn from their posterior, which sees only these frames, in prediction
    too: they cost nothing. In training, batch norm takes its statistics over all valid frames of the batch (the
    published code: over one time step). No state is kept between calls.

    Args:
        encoder: of frames, to codes and skip connections.
        decoder: its counterpart.
        recurrence: the LSTMs between them.
        context_frames: number of given frames at the start of a clip, where they do not come separately.
        conditions: labels and covariates to be given for a clip: a linear map of their embedding is added to the codes of
            its frames, so that posterior, prior and predictor see it.

    Shapes:
        x ``(batch, T, C, H, W)`` with values in [0, 1]; h ``(batch, T − context, in_channels, H, W)``; kl ``(batch,
        1)``, log_ratio ``(batch,)``, both summed over the predicted frames that are valid.

    >>> network = sequence((1, 32, 32), out_channels=2, latent_dim=4, width=4, context_frames=2)
    >>> inference = network.infer(torch.rand(3, 7, 1, 32, 32))
    >>> inference.h.shape, inference.target.shape, inference.kl.shape
    (torch.Size([3, 5, 2, 32, 32]), torch.Size([3, 5, 1, 32, 32]), torch.Size([3, 1]))
    """

    reads_clips = True
    trains_in_bfloat16 = True

    def __init__(
        self,
        encoder: FrameEncoder,
        decoder: FrameDecoder,
        recurrence: Recurrence,
        context_frames: int = 2,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        if context_frames < 1:
            raise ValueError(
                f"context_frames counts the frames that a prediction starts from: at least 1, got {context_frames}"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.recurrence = recurrence
        self.context_frames = context_frames
        self.conditions = conditions
        self.reads_condition = conditions is not None
        self.embedding = None if conditions is None else Embedding(conditions)
        self.shift = None if conditions is None else nn.Linear(WIDTH, recurrence.code_dim, bias=False)

    @property
    def latents(self) -> Frames:
        """One vector per frame."""
        return Frames(self.recurrence.latent_dim)

    def infer(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        condition: Tensor | None = None,
    ) -> Inference:
        """Features of the predicted frames, each given the true frames before it, and one posterior draw.

        Args:
            x: whole clips; or, with ``context``, the frames that follow it.
            context: the conditioning frames ``(batch, frames, C, H, W)``.
            mask: ``(batch, T)``, True for the valid frames of x, which come first. Others change no number.
            noise: asked for ``(batch, latent_dim)`` once per frame from the second on.
            condition: of the clips, ``(batch, variables)``.

        Raises:
            ValueError: shapes do not fit, no frame is left to predict, or the mask has gaps or leaves out conditioning
                frames.
        """
        shift = self._shift(condition)
        clip, mask, past = self._clip(x, context, mask)
        codes, skips = self._encode(clip, mask, past)
        codes = codes + shift
        steps, _ = self.recurrence.advance(codes[:, :-1], codes[:, 1:], noise or _torch_noise(clip), State())
        predicted, valid = steps.codes[:, past - 1 :], None if mask is None else mask[:, past:]
        kl, log_ratio = (_sum_over(term[:, past - 1 :], valid) for term in (steps.kl(), steps.log_ratio()))
        return Inference(
            self._decode(predicted, self.decoder.shares(skips), valid), clip[:, past:], kl.unsqueeze(-1), log_ratio, valid
        )

    def generate(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
        *,
        frames: int = FRAMES,
        show: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Features ``(n, frames, in_channels, H, W)`` of predictions from the context of one clip, or of n clips.

        See :meth:`predict`; ``show`` is for example ``lambda h: likelihood(h).mean``.

        Raises:
            ValueError: context or show is missing, or does not fit.
        """
        self.refuse_unread(condition=condition)
        start = starts(n, context)
        if show is None:
            raise ValueError("a video network predicts from frames and needs show, from features to frames; see VAE.predict")
        (single,) = per_layer(temperature, 1)  # perhaps a sequence of one
        if self.conditions is not None and condition is None:
            condition = self.conditions.draw(n, generator)
        return self.predict(start, frames, show, _torch_noise(start, generator), single, condition=condition).h

    def predict(
        self,
        context: Tensor,
        frames: int,
        show: Callable[[Tensor], Tensor],
        noise: Noise | None = None,
        temperature: float = 1.0,
        *,
        batch_statistics: bool = False,
        condition: Tensor | None = None,
    ) -> Prediction:
        """Predict frame after frame, each from the last frame shown.

        Args:
            context: conditioning frames ``(n, past, C, H, W)``, at least one.
            frames: number of frames to predict; a longer prediction begins as a shorter one does.
            show: turns features ``(n, in_channels, H, W)`` into frames: the likelihood's mean (SVG's way), or draws.
            noise: asked for ``(n, latent_dim)`` once per frame from the second on.
            temperature: scales the spread of all latents.
            batch_statistics: let batch norm use the statistics of the frames at hand, those of one time step of all clips,
                in any mode, as the published evaluation does. Predictions then depend on each other.
            condition: of the clips, ``(n, variables)``.

        Raises:
            ValueError: context is no batch of clips with frames, or a number is out of range.
        """
        _check_clip("context", context)
        if frames < 1:
            raise ValueError(f"frames is the number of frames to predict and at least 1, got {frames}")
        shift = self._shift(condition)
        unit, (spread,) = noise or _torch_noise(context), per_layer(temperature, 1)

        def draw(shape: torch.Size) -> Tensor:
            return spread * unit(shape)

        with batch_statistics_of(self) if batch_statistics else nullcontext():
            codes, skips = (
                self._encode_one_by_one(context) if batch_statistics else self._encode(context, None, context.shape[1])
            )
            codes = codes + shift
            state, code, shares = State(), codes[:, -1:], self.decoder.shares(skips)
            if context.shape[1] > 1:
                _, state = self.recurrence.advance(codes[:, :-1], codes[:, 1:], draw, state)
            features, shown = [], []
            for _ in range(frames):
                steps, state = self.recurrence.advance(code, None, draw, state)
                features.append(self._decode(steps.codes, shares, None))
                shown.append(show(features[-1].squeeze(1)))
                code = self.encoder(shown[-1]).code.unsqueeze(1) + shift
        return Prediction(torch.cat(features, 1), torch.stack(shown, 1))

    def _shift(self, condition: Tensor | None) -> Tensor | float:
        """Shift of the codes of a clip's frames, ``(batch, 1, code_dim)``; 0 without conditions."""
        self.refuse_unread(condition=condition)
        if self.embedding is None or self.shift is None:
            return 0.0
        shift: Tensor = self.shift(self.embedding(condition))
        return shift.unsqueeze(1)

    def _clip(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Whole clips, the mask of all their frames, and the number of given frames."""
        _check_clip("x", x)
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask is of bool, one for each frame of x, {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}"
            )
        past = self.context_frames
        if context is not None:
            _check_clip("context", context)
            if context.shape[0] != x.shape[0] or context.shape[2:] != x.shape[2:]:
                raise ValueError(f"context {tuple(context.shape)} and x {tuple(x.shape)} should be parts of the same clips")
            past = context.shape[1]
            mask = None if mask is None else torch.cat([mask.new_ones(context.shape[:2]), mask], 1)
            x = torch.cat([context, x], 1)
        if x.shape[1] <= past:
            raise ValueError(f"of clips of {x.shape[1]} frames {past} are given, so none is left to predict; use longer clips")
        if mask is not None and not (mask[:, :past].all() and (mask[:, :-1] >= mask[:, 1:]).all()):
            raise ValueError(
                f"mask keeps a clip's frames from the first on, without gaps and at least the {past} that are given"
            )
        return x, mask, past

    def _encode(self, clip: Tensor, mask: Tensor | None, past: int) -> tuple[Tensor, list[Tensor]]:
        """Codes ``(batch, T, code_dim)``, 0 for invalid frames, and the last conditioning frame's skip connections."""
        if mask is None:
            code, skips = self.encoder(clip.flatten(0, 1))
            each = clip.shape[:2]
            return code.reshape(*each, -1), [skip.reshape(*each, *skip.shape[1:])[:, past - 1] for skip in skips]
        code, skips = self.encoder(clip[mask])
        last = mask.sum(1).cumsum(0) - mask.sum(1) + past - 1  # among the valid frames of all clips
        return _put(code, mask), [skip[last] for skip in skips]

    def _encode_one_by_one(self, clip: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Do what :meth:`_encode` does, with each time step in a batch of its own, and the last one's skip connections."""
        steps = [self._encode(clip[:, t : t + 1], None, 1) for t in range(clip.shape[1])]
        return torch.cat([codes for codes, _ in steps], 1), steps[-1][1]

    def _decode(self, codes: Tensor, shares: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        batch, length = codes.shape[:2]
        if mask is None:
            features: Tensor = self.decoder(codes.flatten(0, 1), shares, lambda share: share.repeat_interleave(length, 0))
            return features.reshape(batch, length, *features.shape[1:])
        clips = mask.nonzero()[:, 0]
        return _put(self.decoder(codes[mask], shares, lambda share: share[clips]), mask)


def starts(n: int, context: Tensor | None) -> Tensor:
    """Conditioning frames of n predictions ``(n, frames, C, H, W)``, from one clip or n.

    Raises:
        ValueError: there are none, or the number of clips is wrong.
    """
    if context is None:
        raise ValueError(
            "a video network predicts from frames and needs context, the frames to start from: (clips, frames, C, H, W)"
        )
    _check_clip("context", context)
    if len(context) not in (1, n):
        raise ValueError(f"context holds frames of 1 or {n} clips, (clips, frames, C, H, W), got {tuple(context.shape)}")
    return context.expand(n, -1, -1, -1, -1)


def _torch_noise(like: Tensor, generator: torch.Generator | None = None) -> Noise:
    def noise(shape: torch.Size) -> Tensor:
        return torch.randn(shape, device=like.device, generator=generator)

    return noise


def _check_clip(name: str, clip: Tensor) -> None:
    if clip.dim() != 5:
        raise ValueError(f"{name} holds clips, (batch, frames, C, H, W), got {tuple(clip.shape)}; unsqueeze what is missing")
    if clip.shape[1] < 1:
        raise ValueError(f"{name} holds clips of at least one frame, (batch, frames, C, H, W), got {tuple(clip.shape)}")


def _put(values: Tensor, mask: Tensor) -> Tensor:
    """Scatter values ``(valid frames, ...)`` into zeros ``(batch, T, ...)``."""
    return values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)


def _sum_over(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.sum(1) if mask is None else values.masked_fill(~mask, 0).sum(1)


def _variant(text: str) -> dict[str, object]:
    backbone, fixed, rest = text.partition("-fixed")
    if backbone not in BACKBONES or rest:
        raise ValueError(f"the backbone is one of {', '.join(BACKBONES)}, with -fixed for the prior N(0, I); got {text!r}")
    return {"backbone": backbone, "learned_prior": not fixed}


@register.network(
    "sequence", argument=Argument("backbone", _variant, "dcgan"), latents="frames", reads_clips=True, has_prior=False
)
def sequence(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int = 10,
    width: int = 64,
    *,
    backbone: Literal["dcgan", "vgg"] = "dcgan",
    context_frames: int = 2,
    learned_prior: bool = True,
    conditions: Conditions | None = None,
) -> SequenceNetwork:
    """Stochastic video generation (SVG): one vector of latents per frame, with a learned prior.

    At width 64 codes have 128 numbers and LSTMs 256, as published; both scale with the width. Published are Stochastic
    Moving MNIST with ``dcgan``, 10 latents and 5 conditioning frames, and BAIR with ``vgg``, 64 latents and 2.

    Args:
        shape: of a frame, ``(C, H, W)``: square, with a side of 8, 16, 32, 64 or 128.
        out_channels: ``likelihood.in_channels``.
        latent_dim: size of each frame's latents.
        width: channels of the first stage; 16 makes a model for a CPU.
        backbone: a name.
        context_frames: number of given frames at the start of a clip.
        learned_prior: SVG-LP; False for SVG-FP, whose prior is N(0, I).
        conditions: labels and covariates to be given.

    Raises:
        ValueError: a name or a size does not fit.

    >>> published = sequence((1, 64, 64), out_channels=1, context_frames=5)
    >>> sum(p.numel() for p in published.recurrence.posterior.parameters())
    564500
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone is one of {', '.join(BACKBONES)}, got {backbone!r}")
    code_dim = 2 * width
    encoder, decoder = BACKBONES[backbone](shape, out_channels, width, code_dim)
    recurrence = Recurrence(code_dim, latent_dim, rnn_size=4 * width, learned_prior=learned_prior)
    return SequenceNetwork(encoder, decoder, recurrence, context_frames, conditions)
