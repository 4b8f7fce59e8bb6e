"""Clips: SVG, stochastic video generation with a learned or a fixed prior (Denton and Fergus 2018)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from sigma_vae.networks.recurrence import Recurrence, State
from sigma_vae.networks.temperature import per_layer
from sigma_vae.networks.video_backbones import FrameDecoder, FrameEncoder, batch_statistics_of, dcgan, vgg
from sigma_vae.types import Inference, Network, Noise, Temperature

__all__ = ["FRAMES", "Prediction", "SequenceNetwork", "sequence", "starts"]

FRAMES = 10
"""How many frames are predicted unless asked for more or fewer, as in the published configurations."""
BACKBONES = {"dcgan": dcgan, "vgg": vgg}


class Prediction(NamedTuple):
    """Features ``(n, frames, in_channels, H, W)``, and the frames ``(n, frames, C, H, W)`` made of them."""

    h: Tensor
    frames: Tensor


@final
class SequenceNetwork(Network):
    r"""SVG: each frame has latents of its own, drawn given the frames before (arXiv 1802.07687).

    With :math:`c_t` the code of frame t, and all three recurrences being LSTMs,

    .. math::
        q(z_t|x_{\le t}) = N(\mu_\phi(c_{1:t}), \sigma^2_\phi(c_{1:t})), \quad p(z_t|x_{<t}) = N(\mu_\psi(c_{1:t-1}),
        \sigma^2_\psi(c_{1:t-1})), \quad h_t = \text{decoder}(g(c_{t-1}, z_t, \dots), \text{skips})

    (the fixed prior is N(0, I)). The skip connections are the last conditioning frame's (in the published code, of the one before).

    The first frames of a clip are given, not modelled: the bound is

    .. math::
        \log p(x_{c+1:T}|x_{1:c}) \ge E_q \sum_{t>c} \left[ \log p(x_t|x_{<t}, z_{\le t}) - KL(q(z_t|x_{\le t}) \| p(z_t|x_{<t})) \right],

    a sum over *predicted* frames; SVG's loss counts the conditioning frames too, from the second on, and weights the KL. Latents of the
    conditioning frames are drawn from their posterior, which sees these frames alone; prediction draws them in the same way, so they
    are part of the conditional model and cost nothing.

    Frames are encoded all at once. In training batch norm takes its statistics over all valid frames of the batch (the published code:
    over one time step); in eval mode the running ones are used, so that no number depends on the batch. No state is kept between calls.

    Args:
        encoder: of frames, to codes and skip connections.
        decoder: its counterpart.
        recurrence: the LSTMs between them.
        context_frames: how many frames at the start of a clip are given, where they do not come separately.

    Shapes:
        x ``(batch, T, C, H, W)`` with values in [0, 1]; h ``(batch, T − context, in_channels, H, W)``; kl ``(batch, 1)``, log_ratio
        ``(batch,)``, both summed over the predicted frames that are valid.

    Raises:
        ValueError: ``context_frames`` is below 1.

    >>> network = sequence((1, 32, 32), out_channels=2, latent_dim=4, width=4, context_frames=2)
    >>> inference = network.infer(torch.rand(3, 7, 1, 32, 32))
    >>> inference.h.shape, inference.target.shape, inference.kl.shape
    (torch.Size([3, 5, 2, 32, 32]), torch.Size([3, 5, 1, 32, 32]), torch.Size([3, 1]))
    """

    def __init__(self, encoder: FrameEncoder, decoder: FrameDecoder, recurrence: Recurrence, context_frames: int = 2) -> None:
        super().__init__()
        if context_frames < 1:
            raise ValueError(
                f"context_frames counts the frames that a prediction starts from: at least 1, got {context_frames}"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.recurrence = recurrence
        self.context_frames = context_frames

    def infer(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Inference:
        """Features of the predicted frames, each given the true frames before it, and one posterior draw.

        Args:
            x: whole clips; or, with ``context``, the frames that follow it.
            context: the conditioning frames ``(batch, frames, C, H, W)``.
            mask: ``(batch, T)``, True for the frames of x that are valid: all of them, up to some frame, of each clip. What the others
                hold changes no number.
            noise: where standard normal numbers come from; asked for ``(batch, latent_dim)`` once a frame from the second on.

        Raises:
            ValueError: shapes do not fit, no frame is left to predict, or the mask has gaps or leaves out conditioning frames.
        """
        clip, mask, past = self._clip(x, context, mask)
        codes, skips = self._encode(clip, mask, past)
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
        *,
        frames: int = FRAMES,
        show: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Features ``(n, frames, in_channels, H, W)`` of predictions; see :meth:`predict`.

        Args:
            n: how many predictions.
            context: conditioning frames, of one clip for all or of n clips, ``(1 or n, frames, C, H, W)``.
            generator: of the latents.
            temperature: scales their spread.
            frames: how many frames to predict.
            show: from features to the frame that the next is predicted from: ``lambda h: likelihood(h).mean``.

        Raises:
            ValueError: context or show is missing, or does not fit.
        """
        start = starts(n, context)
        if show is None:
            raise ValueError("a video network predicts from frames and needs show, from features to frames; see VAE.predict")
        (single,) = per_layer(temperature, 1)  # perhaps a sequence of one
        return self.predict(start, frames, show, _torch_noise(start, generator), single).h

    def predict(
        self,
        context: Tensor,
        frames: int,
        show: Callable[[Tensor], Tensor],
        noise: Noise | None = None,
        temperature: float = 1.0,
        *,
        batch_statistics: bool = False,
    ) -> Prediction:
        """Frame after frame, each predicted from what was made of the last.

        Args:
            context: conditioning frames ``(n, past, C, H, W)``, of any number from 1 on.
            frames: how many to predict; a longer prediction begins as a shorter one does.
            show: from features ``(n, in_channels, H, W)`` to frames ``(n, C, H, W)``. With the likelihood's mean it predicts as SVG does;
                with its draws these are draws from the model that the ELBO bounds.
            noise: where standard normal numbers come from; asked for ``(n, latent_dim)`` once a frame from the second on.
            temperature: scales the spread of all latents; at 0 a prediction is deterministic but for ``show``.
            batch_statistics: whatever the mode, let batch norm use the statistics of the frames at hand, as the published evaluation
                does: predictions then depend on each other. Running statistics stay as they are.

        Raises:
            ValueError: context is no batch of clips or has no frame, ``frames`` is below 1, or the temperature is negative or not finite.
        """
        _check_clip("context", context)
        if frames < 1:
            raise ValueError(f"frames counts what is to be predicted and is at least 1, got {frames}")
        unit, (spread,) = noise or _torch_noise(context), per_layer(temperature, 1)

        def draw(shape: torch.Size) -> Tensor:
            return spread * unit(shape)

        with batch_statistics_of(self) if batch_statistics else nullcontext():
            codes, skips = self._encode(context, None, context.shape[1])
            state, code, shares = State(), codes[:, -1:], self.decoder.shares(skips)
            if context.shape[1] > 1:
                _, state = self.recurrence.advance(codes[:, :-1], codes[:, 1:], draw, state)
            features, shown = [], []
            for _ in range(frames):
                steps, state = self.recurrence.advance(code, None, draw, state)
                features.append(self._decode(steps.codes, shares, None))
                shown.append(show(features[-1].squeeze(1)))
                code = self.encoder(shown[-1]).code.unsqueeze(1)
        return Prediction(torch.cat(features, 1), torch.stack(shown, 1))

    def _clip(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Whole clips, the mask of all their frames, and how many of these are given."""
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
        """Codes ``(batch, T, code_dim)``, 0 where a frame is not valid, and the last conditioning frame's skip connections."""
        if mask is None:
            code, skips = self.encoder(clip.flatten(0, 1))
            each = clip.shape[:2]
            return code.reshape(*each, -1), [skip.reshape(*each, *skip.shape[1:])[:, past - 1] for skip in skips]
        code, skips = self.encoder(clip[mask])
        last = mask.sum(1).cumsum(0) - mask.sum(1) + past - 1  # among the valid frames of all clips
        return _put(code, mask), [skip[last] for skip in skips]

    def _decode(self, codes: Tensor, shares: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Features ``(batch, T, in_channels, H, W)`` of codes ``(batch, T, code_dim)``."""
        batch, length = codes.shape[:2]
        if mask is None:
            features: Tensor = self.decoder(codes.flatten(0, 1), shares, lambda share: share.repeat_interleave(length, 0))
            return features.reshape(batch, length, *features.shape[1:])
        clips = mask.nonzero()[:, 0]
        return _put(self.decoder(codes[mask], shares, lambda share: share[clips]), mask)


def sequence(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int = 10,
    width: int = 64,
    *,
    backbone: Literal["dcgan", "vgg"] = "dcgan",
    context_frames: int = 2,
    learned_prior: bool = True,
) -> SequenceNetwork:
    """SVG in its published proportions: at width 64, codes of 128 and LSTMs of 256 numbers; both scale with the width.

    Published: Stochastic Moving MNIST with ``dcgan``, 10 latents and 5 conditioning frames; BAIR with ``vgg``, 64 latents and 2.

    Args:
        shape: of a frame, ``(C, H, W)``: square, with a side of 8, 16, 32, 64 or 128.
        out_channels: what the likelihood reads, ``likelihood.in_channels``.
        latent_dim: size of each frame's latents.
        width: channels of the first stage; 16 makes a model for a CPU.
        backbone: ``"dcgan"`` or ``"vgg"``.
        context_frames: how many frames at the start of a clip are given.
        learned_prior: SVG-LP; False for SVG-FP, whose prior is N(0, I).

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
    return SequenceNetwork(encoder, decoder, recurrence, context_frames)


def starts(n: int, context: Tensor | None) -> Tensor:
    """Conditioning frames of n predictions ``(n, frames, C, H, W)``, from those of one clip or of n.

    Raises:
        ValueError: there are none, or of another number of clips.
    """
    if context is None:
        raise ValueError(
            "a video network predicts from frames and needs context, those to start from: (clips, frames, C, H, W)"
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
    """Values ``(valid frames, ...)`` where they belong in ``(batch, T, ...)``, among zeros."""
    return values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)


def _sum_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum ``(batch,)`` over the valid frames."""
    return values.sum(1) if mask is None else values.masked_fill(~mask, 0).sum(1)
