"""Solve for the best log-scale: in closed form where there is one, else by Newton's method."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, Protocol, TypeVar, cast, final

import torch
from torch import Tensor, distributed

from sigma_vae.likelihoods.residuals import RESIDUALS, ResidualDistribution
from sigma_vae.likelihoods.scales import Per

HEAD = 2**16  # values
MAX_ITERATIONS = 200
TOLERANCE = 1e-6
LARGEST_LOG_SCALE = 12.0  # where the mean lies at the wrong end, an end level has its largest probability at σ = ∞
COARSE = 6  # points that a maximum is compared with
LARGEST_STEP = 0.7  # in log σ: a factor of two, so that a bad quadratic model cannot throw the search away

Source = TypeVar("Source")
Made = TypeVar("Made")


class Observed(NamedTuple):
    """Data and their prediction: the scale sought is multiplied onto exp(base). Values of weight 0 are missing."""

    residual: ResidualDistribution
    loc: Tensor
    base: Tensor
    x: Tensor
    weight: Tensor | None = None


@final
class Remade(Generic[Made]):
    """Data in the form that the solver reads, made from their source each time that it goes through them."""

    def __init__(self, make: Callable[[Source], Made], source: Iterable[Source]) -> None:
        check_repeats(source)
        self.make = make
        self.source = source

    def __iter__(self) -> Iterator[Made]:
        return map(self.make, self.source)


def check_repeats(pairs: Iterable[object]) -> None:
    """Refuse a generator, which is used up after one pass."""
    if isinstance(pairs, Iterator):
        raise ValueError("calibrate goes through its data more than once: pass a list or a loader, not a generator")


class WithData(Protocol):
    """Data, and whatever is predicted for them."""

    @property
    def x(self) -> Tensor:
        """The data."""

    @property
    def weight(self) -> Tensor | None:
        """Weight of each value, of the data's shape."""


Part = TypeVar("Part", bound=WithData)

Slopes = Callable[[Part, Tensor], Tensor]
"""First and second derivative of each element's log-probability in its log σ, in two rows."""


@torch.no_grad()
def best_log_scale(
    data: Iterable[Observed], per: Per, event_dims: int, log_floor: float, levels: int | None, start: Tensor | None = None
) -> Tensor:
    """The log σ that maximises the density of the data, or with ``levels`` the probability of the observed bins.

    Args:
        data: gone through once where there is a closed form, else several times.
        per: what has a σ of its own.
        event_dims: how many axes an example has.
        log_floor: the least log σ.
        levels: how many values a datum can take; None for the density.
        start: where the search for levels begins; at the density's optimum unless given.

    Shapes:
        result (event-shaped, 1 where shared), or ``(*batch, 1, ...)`` for ``per="image"``; in the precision of the
        data.

    Raises:
        ValueError: there are no data.
    """
    start = _best_for_density(data, per, event_dims, log_floor) if start is None else start
    if levels is None:
        return start

    def slopes(observed: Observed, log_scale: Tensor) -> Tensor:
        return _slope_and_curvature(observed, log_scale, levels)

    def search(start: Tensor) -> Tensor:
        return maximum(slopes, data, per, event_dims, (log_floor, LARGEST_LOG_SCALE), start)

    def score(log_scale: Tensor, part: Callable[[Iterable[Observed]], Iterator[Observed]] = iter) -> Tensor:
        sums = Sums(per, event_dims)
        for observed in part(data):
            sums.add(_bins(observed, log_scale, levels).log_mass[None], observed.weight)
        return sums.means()[0]

    found = search(start.double())
    coarse = torch.linspace(max(math.log(0.25 / (levels - 1)), log_floor), math.log(4), COARSE, dtype=found.dtype)
    return highest(found, coarse.tolist(), score, search).to(start.dtype)


def highest(found: Tensor, coarse: Sequence[float], score: Callable[..., Tensor], search: Callable[[Tensor], Tensor]) -> Tensor:
    """A found maximum, or a higher one near a coarse point: bins at the ends give several.

    There a right prediction's probability falls from 1 to 1/2 with σ, and a wrong one's rises from 0 to 1/2. The first
    data are enough to see that.
    """
    start, best = found, (height := score(found, _head))
    for point in coarse:
        value = score(torch.full_like(found, point), _head)
        start = torch.where(value > best, point, start)
        best = torch.maximum(value, best)
    if not bool((best > height).any()):
        return found
    again = search(start)
    return torch.where(score(again) > score(found), again, found)


def best_batch_log_scale(observed: Observed, per: Per, event_dims: int, log_floor: float, levels: int | None) -> Tensor:
    """:func:`best_log_scale` of one batch; compiled without a graph break.

    Raises:
        ValueError: a compiled solver has to iterate for a residual distribution that is not in :data:`RESIDUALS`.
    """
    residual, loc, _, x, _ = observed
    iterates = levels is not None or not residual.closed_form
    if not (iterates and torch.compiler.is_compiling()):
        return best_log_scale([observed], per, event_dims, log_floor, levels)
    if residual.name not in RESIDUALS:
        raise ValueError(
            f"torch.compile solves for the σ of the residual distributions {list(RESIDUALS)}, got {residual.name!r}; add it to"
            " `sigma_vae.likelihoods.residuals.RESIDUALS`"
        )
    numbers = [p for p in residual.parameters if not isinstance(p, Tensor)]
    tensors = [p.detach() for p in residual.parameters if isinstance(p, Tensor)]
    result: Tensor = _solve(residual.name, numbers, tensors, loc, x, per, event_dims, log_floor, levels)
    return result


def shared_shape(shape: Sequence[int], per: Per, event_dims: int) -> list[int]:
    """Shape of the log σ for data of this shape: 1 where one is shared.

    >>> shared_shape((8, 3, 4, 4), "channel", 3), shared_shape((8, 3, 4, 4), "image", 3)
    ([3, 1, 1], [8, 1, 1, 1])
    """
    shared = _shared_axes(len(shape), per, event_dims)
    whole = [1 if axis - len(shape) in shared else size for axis, size in enumerate(shape)]
    return whole if per == "image" else whole[-event_dims:]


def _shared_axes(dims: int, per: Per, event_dims: int) -> tuple[int, ...]:
    axes = range(-dims, 0)
    batch, space = axes[:-event_dims], axes[len(axes) - event_dims + 1 :]
    shared: dict[Per, Sequence[int]] = {
        "batch": axes,
        "image": axes[-event_dims:],
        "channel": [*batch, *space],
        "pixel": batch,
    }
    return tuple(shared[per])


class Sums:
    """Sums over everything that shares one σ, across batches and processes; batches are added up in float64."""

    def __init__(self, per: Per, event_dims: int) -> None:
        self.per = per
        self.event_dims = event_dims
        self.total: Tensor | None = None
        self.count: float | Tensor = 0.0

    def add(self, values: Tensor, weight: Tensor | None = None) -> None:
        """Add elementwise values; their first axis has one kind of value a row, and ``weight`` has the shape of a row."""
        sums = self._sum(values if weight is None else values * weight)
        self.total = sums if self.total is None else self.total + sums
        self.count = self.count + (values.numel() / sums.numel() if weight is None else self._sum(weight[None])[0])

    def means(self) -> Tensor:
        """Sum over count, the same on every process; 0 where nothing was counted."""
        total, count = self.totals()
        return total / count.clamp_min(1)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Sum and count, the same on every process."""
        if self.total is None:
            raise ValueError("no data to fit a scale on: `pairs` was empty, or a generator that had been used up")
        count = torch.as_tensor(self.count).to(self.total)
        if self.per == "image" or not (distributed.is_available() and distributed.is_initialized()):
            return self.total, count
        message = torch.cat([self.total, count.expand(self.total[:1].shape)])
        distributed.all_reduce(message)
        return message[:-1], message[-1:]

    def _sum(self, values: Tensor) -> Tensor:
        sums = values.sum(_shared_axes(values.dim() - 1, self.per, self.event_dims), keepdim=True, dtype=torch.float64)
        return sums if self.per == "image" else sums.reshape(len(values), *sums.shape[-self.event_dims :])


def _best_for_density(data: Iterable[Observed], per: Per, event_dims: int, log_floor: float) -> Tensor:
    """In closed form, or by Newton's method from the root mean square."""
    sums = Sums(per, event_dims)
    for residual, loc, base, x, weight in data:
        z = (x - loc) * torch.exp(-base)
        sums.add((residual.statistic(z) if residual.closed_form else z.square())[None], weight)
    log_scale = (sums.means()[0].log() / residual.power).clamp_min(log_floor)
    if not residual.closed_form:
        log_scale = maximum(_slope_of_density, data, per, event_dims, (log_floor, math.inf), log_scale)
    return log_scale.to(x.dtype)


def maximum(
    slopes: Slopes[Part], data: Iterable[Part], per: Per, event_dims: int, bounds: tuple[float, float], log_scale: Tensor
) -> Tensor:
    """Find where the slopes add up to 0. After steps on the first data alone, two passes over all of them are enough."""
    for part in (_head, iter):
        search = Newton(log_scale, *bounds)
        for _ in range(MAX_ITERATIONS):
            sums = Sums(per, event_dims)
            for observed in part(data):
                sums.add(slopes(observed, search.at), observed.weight)
            if search.step(*sums.means()):
                break
        log_scale = search.at
    return log_scale


def _head(data: Iterable[Part]) -> Iterator[Part]:
    """The first data, enough of them to come near the optimum."""
    seen = 0
    for observed in data:
        yield observed
        seen += observed.x.numel()
        if seen >= HEAD:
            return


class Newton:
    """Newton's method for maxima of many functions, kept between points where the slope is known to turn."""

    def __init__(self, start: Tensor, floor: float, ceiling: float) -> None:
        self.at = start
        self.floor, self.ceiling = floor, ceiling
        self.lower = torch.full_like(start, -math.inf)
        self.upper = torch.full_like(start, math.inf)

    def step(self, slope: Tensor, curvature: Tensor) -> bool:
        """Move to a better point; True where no further move is worth making."""
        self.lower = torch.where(slope > 0, self.at, self.lower)
        self.upper = torch.where(slope < 0, self.at, self.upper)
        move = torch.where(curvature < 0, -slope / curvature, LARGEST_STEP * slope.sign())
        new = self.at + move.clamp(-LARGEST_STEP, LARGEST_STEP)
        outside = (new <= self.lower) | (new >= self.upper)
        between = 0.5 * (self.lower + self.upper)
        new = torch.where(outside & between.isfinite(), between, new).clamp(self.floor, self.ceiling)
        moved = float((new - self.at).abs().max())
        self.at = new
        # Newton doubles the digits: where a step is this short, what is left is about its square.
        return moved < math.sqrt(TOLERANCE)


def _slope_of_density(observed: Observed, log_scale: Tensor) -> Tensor:
    """:data:`Slopes` of the density; the first is statistic − 1."""
    residual, loc, base, x, _ = observed
    with torch.enable_grad():
        variable = (base + log_scale.to(loc.dtype)).expand(loc.shape).detach().requires_grad_()
        statistic = residual.statistic((x - loc) * torch.exp(-variable))
        (curvature,) = torch.autograd.grad(statistic.sum(), variable)
    return torch.stack([statistic - 1, curvature]).detach()


def _slope_and_curvature(observed: Observed, log_scale: Tensor, levels: int) -> Tensor:
    r""":data:`Slopes` of the bin probabilities.

    With a and b the edges of the bin in units of σ, P its probability, f the density and s = −z (log f)' the residual's
    statistic:

    .. math:: \frac{a f(a) - b f(b)}{P}, \qquad \frac{b f(b) (1 - s(b)) - a f(a) (1 - s(a))}{P} - \text{slope}^2
    """
    lower, upper, width, first, last, log_mass = _bins(observed, log_scale, levels)
    residual = observed.residual
    at_lower, at_upper = (residual.statistic(edge) for edge in (lower, upper))
    # The density's largest part of its bin's mass: otherwise rounding far out in the tails is exponentiated.
    most = torch.log(1 / width + 1 + (at_lower + at_upper) / torch.minimum(lower.abs(), upper.abs()).clamp_min(0.1))
    below, above = (
        torch.where(open_end, 0.0, edge * torch.exp(torch.minimum(residual.log_prob(edge) - log_mass, most)))
        for open_end, edge in ((first, lower), (last, upper))
    )
    slope = below - above
    return torch.stack([slope, above * (1 - at_upper) - below * (1 - at_lower) - slope.square()])


class _Bins(NamedTuple):
    """Edges and width of each value's bin in units of σ, whether it is the first or the last, and its log-probability."""

    lower: Tensor
    upper: Tensor
    width: Tensor
    first: Tensor
    last: Tensor
    log_mass: Tensor


def _bins(observed: Observed, log_scale: Tensor, levels: int) -> _Bins:
    residual, loc, base, x, _ = observed
    top = levels - 1
    width = torch.exp(-base - log_scale.to(loc.dtype)) / top
    center = (torch.round(x * top) - loc * top) * width
    lower, upper = center - 0.5 * width, center + 0.5 * width
    first, last = x * top < 0.5, x * top > top - 0.5
    tail = residual.log_cdf(torch.where(first, upper, -lower))
    log_mass = torch.where(first | last, tail, residual.interval_log_prob(center, width))
    return _Bins(lower, upper, width, first, last, log_mass)


@torch.library.custom_op("sigma_vae::best_log_scale", mutates_args=())
def _solve(
    residual: str,
    numbers: list[float],
    tensors: list[Tensor],
    loc: Tensor,
    x: Tensor,
    per: str,
    event_dims: int,
    log_floor: float,
    levels: int | None,
) -> Tensor:
    observed = Observed(RESIDUALS[residual](*numbers, *tensors), loc, loc.new_zeros(()), x)
    stream = torch.accelerator.current_stream(x.device) if x.device.type == "cuda" else None

    def solve() -> Tensor:
        if stream is not None:
            torch.accelerator.set_stream(stream)
        return best_log_scale([observed], cast(Per, per), event_dims, log_floor, levels).contiguous()

    # The solver differentiates, and an operator of a compiled graph runs where autograd is off, for this thread.
    with ThreadPoolExecutor(1) as other:
        return other.submit(solve).result()


@_solve.register_fake
def _(
    residual: str,
    numbers: list[float],
    tensors: list[Tensor],
    loc: Tensor,
    x: Tensor,
    per: str,
    event_dims: int,
    log_floor: float,
    levels: int | None,
) -> Tensor:
    return x.new_empty(shared_shape(x.shape, cast(Per, per), event_dims))
