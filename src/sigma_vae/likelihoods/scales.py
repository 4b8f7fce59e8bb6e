"""Sources of log σ: the scale says over which axes σ is shared, the family says how it is solved."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from sigma_vae.likelihoods.densities import soft_clip
from sigma_vae.registry import Argument, number_above_zero, register
from sigma_vae.types import Observes

Per = Literal["batch", "image", "channel", "pixel"]
"""The unit that has a σ of its own: the whole batch, each example, each channel, or each place of each channel."""

Fit = Callable[[Per], Tensor]
"""Solves the log-scale that is best for the present batch, shared as asked."""

LEVEL_FLOOR = 1 / 64
"""Default floor on σ, in distances of two levels: the bin around an exact prediction then has nearly all probability."""
SPREAD_FLOOR = 1e-6
"""Default floor on σ of real-valued data, in units of their std: float32 tells values apart no better."""
LOG_RANGE = 20.0
"""From the least log σ to the largest: predicted scales are clipped there, a factor on them is not smaller than this."""
OLD_BOUNDS = (-6.0, 6.0)
"""Least and largest log σ of models from before the floor was relative: half the distance of two 8-bit levels."""

MOMENTUM = 0.01
"""Weight of the present batch in a running mean of σ²."""
LOG_WIDEST = math.log(2)
"""Most that held-out residuals widen σ in training: one odd example among them must not switch all latents off."""


class Scale(nn.Module, ABC):
    """A source of log σ, with two stored values that ``calibrate`` solves: for the density and for bin probabilities.

    A stored value is log σ; for predicted scales it is the log of one factor on all predictions. It is empty until
    solved, and its shape travels with the ``state_dict``.

    Args:
        floor: the least σ, in units of the data. Unless given, the likelihood sets it by :meth:`set_floor`, relative to
            what the data can tell apart.

    Raises:
        ValueError: the floor is not above 0.
    """

    extra_per_channel = 0
    """Feature channels that the decoder gives for each data channel, besides the mean."""
    extra = 0
    """Feature channels that the decoder gives once."""
    predicted = False
    """Whether the decoder predicts the scale, so that a refit is a factor on it."""
    solved = False
    """Whether the stored σ is the scale's own, so that a refit replaces it."""
    refit_per: Per = "batch"
    """Axes over which a refitted scale is shared."""
    spatial_dims = 2
    """Set by the likelihood that the scale is given to."""

    density_log_scale: Tensor
    level_log_scale: Tensor
    log_bounds: Tensor

    def __init__(self, floor: float | None = None) -> None:
        super().__init__()
        if floor is not None and not 0 < floor < math.inf:
            raise ValueError(f"floor is the smallest σ, in units of the data: above 0, got {floor}")
        self.floor = floor
        self.register_buffer("density_log_scale", torch.empty(0))
        self.register_buffer("level_log_scale", torch.empty(0))
        self.register_buffer("log_bounds", torch.zeros(2))  # of the numbers below, so that they are saved with the model
        self._bound(math.log(floor or SPREAD_FLOOR))

    def set_floor(self, floor: float) -> None:
        """Set the least σ, in units of the data, unless one was given."""
        if self.floor is None:
            self._bound(math.log(floor))

    def _bound(self, log_floor: float) -> None:
        bounds = torch.tensor([log_floor, log_floor + LOG_RANGE], dtype=torch.float32, device="cpu")
        self.log_floor, self.log_ceiling = bounds.tolist()  # rounded as they are saved
        self.log_bounds = bounds.to(self.log_bounds)

    @abstractmethod
    def forward(self, raw: Tensor, observes: Observes, fit: Fit | None) -> Tensor:
        """Log σ, broadcastable to the data ``(*batch, C, *space)``.

        Args:
            raw: the extra feature channels.
            observes: what the stored values are asked for.
            fit: solves the present batch; None where it must not be looked at.
        """

    def base(self, raw: Tensor) -> Tensor:
        """The log σ that a stored value is added to: 0, or the prediction."""
        return raw.new_zeros(())

    def start(self, std: float) -> None:
        """Start a learned σ from the std of the data; other scales have no start."""

    def widen(self, ratio: float) -> None:
        """Train a solved σ with so many times the batch's; other scales are not solved."""

    def refitted(self, raw: Tensor, observes: Observes) -> Tensor:
        """Log σ that ``calibrate`` solved."""
        return self.base(raw) + self.stored(observes)

    def all_stored(self) -> dict[Observes, Tensor]:
        """The stored values that there are."""
        kinds: tuple[Observes, Observes] = ("density", "level")
        return {observes: self._buffer(observes) for observes in kinds if self._buffer(observes).numel()}

    def stored(self, observes: Observes) -> Tensor:
        """The stored value; for levels the density's, where theirs is not solved.

        Raises:
            ValueError: nothing is stored yet.
        """
        known = self.all_stored()
        value = known.get(observes, known.get("density"))
        if value is None:
            raise ValueError(
                f"{self} has no stored σ yet; train for a step, or fit it on training data by"
                " `likelihood.calibrate(pairs)` or `vae.calibrate(loader)`"
            )
        return value

    def store(self, observes: Observes, value: Tensor) -> None:
        """Keep a solved value, in place where the shape allows (so that a wrapped module sees it)."""
        buffer = self._buffer(observes)
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            setattr(self, f"{observes}_log_scale", value.detach().to(buffer).clone())

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return "" if self.floor is None else f"floor={self.floor:g}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _buffer(self, observes: Observes) -> Tensor:
        return self.level_log_scale if observes == "level" else self.density_log_scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A stored value's shape is part of what is stored: take it over before torch compares.
        for name, buffer in list(self.named_buffers()):
            if prefix + name in state_dict:
                setattr(self, name, buffer.new_empty(state_dict[prefix + name].shape))
        old = self.log_bounds if self.floor is not None else self.log_bounds.new_tensor(OLD_BOUNDS)
        state_dict.setdefault(prefix + "log_bounds", old)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.log_floor, self.log_ceiling = self.log_bounds.tolist()


@register.scale(
    "fixed",
    argument=Argument(
        "σ",
        number_above_zero("sigma", "σ, in units of the data's range"),
        "0.1",
        required=True,
        of=lambda made: repr(made.sigma),
    ),
)
@final
class Fixed(Scale):
    """A constant σ; 1 is the usual Gaussian VAE.

    >>> Fixed(1.0)
    Fixed(1)
    >>> Fixed.from_beta(0.5)
    Fixed(0.5)
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not 0 < sigma < math.inf:
            raise ValueError(f"Fixed takes a σ > 0 (a standard deviation in units of the data), got {sigma}")
        self.sigma = sigma

    @classmethod
    def from_beta(cls, beta: float) -> "Fixed":
        r"""The constant σ = √(β/2), whose ELBO is the objective of a β-VAE up to a factor and a constant.

        :math:`\|x - \hat x\|^2 + \beta\,KL = 2\sigma^2\,(-\log p(x|z) + KL) + \text{const}` with :math:`\sigma^2 = \beta/2`. The paper's
        text has another conversion; the constants of its Table 1 show that it ran this one.
        """
        if not 0 < beta < math.inf:
            raise ValueError(f"from_beta takes the weight β > 0 of ‖x − x̂‖² + β·KL, got {beta}")
        return cls(math.sqrt(beta / 2))

    def forward(self, raw: Tensor, observes: Observes, fit: Fit | None) -> Tensor:
        """The constant."""
        return raw.new_full((), math.log(self.sigma))

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"{self.sigma:.6g}"


register.scale.add(
    "beta",
    Fixed.from_beta,
    argument=Argument("β", number_above_zero("beta", "β of ‖x − x̂‖² + β·KL"), "0.1", required=True),
)


@register.scale("shared")
@final
class Shared(Scale):
    """One learned σ (the paper's "shared σ-VAE").

    Adam moves a parameter by at most its learning rate a step, so a log σ that starts far from its optimum lags.
    ``start`` puts it at the spread of the data, and training gives it a learning rate of its own.
    """

    def __init__(self, sigma: float | None = None, floor: float | None = None) -> None:
        super().__init__(floor)
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(f"Shared starts from a σ > 0, got {sigma}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(sigma or 1.0)))
        self.started = sigma is not None

    @torch.no_grad()
    def start(self, std: float) -> None:
        """Start from this σ, unless one was given or learned before."""
        if not self.started:
            self.log_scale.fill_(max(math.log(max(std, 1e-300)), self.log_floor))
        self.started = True

    def forward(self, raw: Tensor, observes: Observes, fit: Fit | None) -> Tensor:
        """The parameter; training puts it back onto the floor (a clamp of the value would cut its gradient)."""
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.log_scale.clamp_(min=self.log_floor)
        return self.log_scale.to(raw.dtype)


class _Predicted(Scale):
    predicted = True

    def forward(self, raw: Tensor, observes: Observes, fit: Fit | None) -> Tensor:
        """The prediction."""
        return self.base(raw)


@register.scale("per-image")
@final
class PerImage(_Predicted):
    """One predicted σ for each example: the mean over space of one extra feature channel.

    Clipped softly to [floor, 5e8·floor]: without a clip, predicted scales diverge within a few hundred steps.
    """

    extra = 1

    def base(self, raw: Tensor) -> Tensor:
        """The prediction, ``(*batch, 1, ...)``."""
        space = tuple(range(raw.dim() - self.spatial_dims, raw.dim()))
        pooled = raw.mean(space, keepdim=True) if space else raw
        return soft_clip(pooled, self.log_floor, self.log_ceiling)


@register.scale("per-pixel")
@final
class PerPixel(_Predicted):
    """One predicted σ for each value of the data, clipped softly to [floor, 5e8·floor].

    The likelihood improves at the pixels that are easiest to predict, and samples get worse (paper, Table 2).
    """

    extra_per_channel = 1

    def base(self, raw: Tensor) -> Tensor:
        """The prediction, of the data's shape."""
        return soft_clip(raw, self.log_floor, self.log_ceiling)


@register.scale("optimal")
@final
class Optimal(Scale):
    r"""The σ that is best for the data at hand: not learned but solved (the paper's "optimal σ-VAE", equation 5).

    For a Gaussian :math:`\sigma^2 = \text{MSE}`. It is detached: at the optimum the gradient through σ vanishes
    (envelope theorem). Under ``torch.distributed`` it is the optimum of the global batch.

    In training σ comes from the batch. In eval mode it is a stored value, never one that has seen the example: a
    running mean over training until ``calibrate`` solves it exactly. ``per="image"`` then uses the batch-wide one, as a
    σ chosen from the example that it scores gives no normalised density.

    The floor is hard, for degenerate data alone: a soft clip at −6, as in the paper's code, widens σ by 13 % at log σ =
    −4.
    """

    solved = True
    log_widening: Tensor

    def __init__(self, per: Per = "batch", floor: float | None = None) -> None:
        super().__init__(floor)
        self.register_buffer("log_widening", torch.zeros(()))
        if per not in ("batch", "image", "channel", "pixel"):
            raise ValueError(f'Optimal(per=...) is "batch", "image", "channel" or "pixel", got {per!r}')
        self.per: Per = per
        self.refit_per = "batch" if per == "image" else per

    def forward(self, raw: Tensor, observes: Observes, fit: Fit | None) -> Tensor:
        """The batch's optimum in training, times the ratio of :meth:`widen`; else the stored value."""
        if fit is None or not self.training:
            return self.stored(observes)
        log_scale = fit(self.per)
        self._track(observes, fit("batch") if self.per == "image" else log_scale)
        return log_scale + self.log_widening

    @torch.no_grad()
    def widen(self, ratio: float) -> None:
        """Train with σ times the ratio of held-out residuals to training residuals, kept between 1 and 2.

        Where a model overfits, the batch's σ is smaller than that of new data, and overfits it further.
        """
        self.log_widening.fill_(min(max(math.log(ratio), 0.0), LOG_WIDEST))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(prefix + "log_widening", self.log_widening.new_zeros(()))  # of a model from before it
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def _track(self, observes: Observes, log_scale: Tensor) -> None:
        old = self._buffer(observes)
        if old.shape == log_scale.shape:
            log_scale = _running_mean(old, log_scale)
            log_scale = torch.where(log_scale.isfinite(), log_scale, old)  # a broken batch has broken the loss; it ends there
            other = self._buffer("density" if observes == "level" else "level")
            if other.shape == old.shape:  # a calibration has set both: the one that is not trained follows by the same factor
                other += log_scale - old
        self.store(observes, log_scale)

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        per = "" if self.per == "batch" else f'per="{self.per}"'
        return ", ".join(filter(None, (per, super().extra_repr())))


@register.scale("optimal-image")
def _optimal_image() -> Optimal:
    """The best σ for each example in training; the batch-wide one in evaluation."""
    return Optimal(per="image")


@register.scale("optimal-channel")
def _optimal_channel() -> Optimal:
    """The best σ for each channel, solved."""
    return Optimal(per="channel")


@register.scale("optimal-pixel")
def _optimal_pixel() -> Optimal:
    """The best σ for each place of each channel, solved."""
    return Optimal(per="pixel")


@register.scale("running-minimum")
@final
class RunningMinimum(Scale):
    r"""A running mean of the batch's best σ² that never rises (Asperti & Trentin 2020, arXiv 2002.07514).

    .. math:: \sigma^2 \leftarrow \min(\sigma^2,\; 0.99\,\sigma^2 + 0.01\,\text{MSE of the batch})

    σ is a constant, the same in training and evaluation: a calibration stores post-hoc values. It lags
    :class:`Optimal` while the fit improves, and never follows where the fit gets worse.
    """

    running_log_scale: Tensor

    def __init__(self, floor: float | None = None) -> None:
        super().__init__(floor)
        self.register_buffer("running_log_scale", torch.empty(0))

    def forward(self, raw: Tensor, observes: Observes, fit: Fit | None) -> Tensor:
        """The running minimum, in training after a step with this batch; before the first step, a calibrated value."""
        if fit is not None and self.training:
            self._track(fit("batch"))
        if self.running_log_scale.numel() == 0:
            return self.stored(observes)
        return self.running_log_scale.to(raw.dtype, copy=True)  # the next step changes the buffer

    @torch.no_grad()
    def _track(self, batch: Tensor) -> None:
        old = self.running_log_scale
        new = batch.to(old) if old.numel() == 0 else torch.minimum(old, _running_mean(old, batch))
        self.running_log_scale = old.copy_(new) if old.shape == new.shape else new.clone()


def _running_mean(old: Tensor, new: Tensor) -> Tensor:
    """Log σ of the running mean of σ²."""
    return 0.5 * torch.logaddexp(2 * old + math.log1p(-MOMENTUM), 2 * new + math.log(MOMENTUM))
