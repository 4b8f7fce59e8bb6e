"""The three LSTMs of SVG: posterior and prior of each frame's latents, and what the next frame's code is made of."""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from sigma_vae.types import Noise

__all__ = ["Moments", "Recurrence", "State", "Steps"]

STANDARD_DEVIATION = 0.02
LOG_2_PI = math.log(2 * math.pi)

LstmState = tuple[Tensor, Tensor]


class State(NamedTuple):
    """Where the LSTMs stand, each ``(hidden, cell)`` of ``(layers, batch, rnn_size)``; None before the first step."""

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
    """What some steps gave: the predicted codes ``(batch, steps, code_dim)``, the latents, and what these were drawn from."""

    codes: Tensor
    z: Tensor
    drawn_from: Moments
    prior: Moments

    def kl(self) -> Tensor:
        """KL to the prior in closed form, ``(batch, steps)``, in nats."""
        q, p = self.drawn_from, self.prior
        spread = (torch.exp(q.log_variance) + (q.mean - p.mean).square()) * torch.exp(-p.log_variance)
        return 0.5 * (p.log_variance - q.log_variance + spread - 1).sum(-1)

    def log_ratio(self) -> Tensor:
        """Log-density of the latents under the prior less that under what they were drawn from, ``(batch, steps)``."""
        return self.prior.log_prob(self.z) - self.drawn_from.log_prob(self.z)


@final
class Recurrence(nn.Module):
    """From the codes of frames to latents and the codes of the next frames; its state is passed in and handed back.

    Each of the three starts with a linear layer; posterior and prior have one LSTM, the predictor two.

    Args:
        code_dim: size of a frame's code.
        latent_dim: size of each frame's latents.
        rnn_size: width of the LSTMs.
        learned_prior: whether the prior sees the frames before; else it is N(0, I).

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
        self.latent_dim = latent_dim
        self.posterior = _GaussianLstm(code_dim, rnn_size, latent_dim)
        self.prior = _GaussianLstm(code_dim, rnn_size, latent_dim) if learned_prior else None
        self.predictor = _Predictor(code_dim + latent_dim, rnn_size, code_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as published; the LSTMs start as torch's do
                nn.init.normal_(module.weight, 0.0, STANDARD_DEVIATION)
                nn.init.zeros_(module.bias)

    def advance(self, before: Tensor, after: Tensor | None, draw: Noise, state: State) -> tuple[Steps, State]:
        """Steps from frames to the next ones, whose latents come from the posterior where it is said what they hold.

        Args:
            before: codes ``(batch, steps, code_dim)`` of the frames to step from.
            after: codes of the frames that follow each; None: latents come from the prior.
            draw: gives what stands for standard normal numbers; asked for ``(batch, latent_dim)`` once a step.
            state: where to go on from.
        """
        batch, length = before.shape[:2]
        if self.prior is not None:
            prior, prior_state = self.prior(before, state.prior)
        else:
            zero = _full(before.new_zeros(batch, length, self.latent_dim))
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
        return Moments(_full(self.mean(hidden)), _full(self.log_variance(hidden))), state


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


def _full(x: Tensor) -> Tensor:
    """In float32 at least: densities in half precision mean nothing."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
