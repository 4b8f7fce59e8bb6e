"""Families of counts 0, 1, 2, ...: Poisson, negative binomial, zero-inflated negative binomial, multinomial."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from sigma_vae.likelihoods.base import Scaled, checked_features
from sigma_vae.likelihoods.residuals import Shape
from sigma_vae.likelihoods.scales import Fit, Optimal, Per, Scale
from sigma_vae.likelihoods.solve import Newton, Remade, Sums, highest, maximum, shared_shape
from sigma_vae.registry import Argument, register
from sigma_vae.types import DataDistribution, Likelihood, Observes, at_least_float32

LARGEST_LOG_MEAN = 30.0
"""Features are cut off here, at a mean of 10¹³ counts: beyond it only a diverged decoder predicts."""
FLOOR, LARGEST_LOG_SIGMA = 1e-3, 5.0
"""Least σ, at which rates vary by a thousandth of themselves, and largest log σ that is solved for."""
ENOUGH = 20
"""Counts above zero that a column needs in order to have a σ of its own; the others share one."""
STEPS_IN_TRAINING = 2
"""Newton's steps for a batch, from the running σ: they double its digits twice, and the gradient through σ vanishes there."""
STIRLING_FROM = 100.0
COARSE = 6  # points that a maximum is compared with


# -- probabilities of single counts ----------------------------------------------------------------------------------------


def poisson_log_prob(k: Tensor, log_mean: Tensor) -> Tensor:
    r"""Log-probability of each count, :math:`k \log\mu - \mu - \log k!`, in the precision of ``log_mean``.

    >>> poisson_log_prob(torch.tensor([0.0, 2.0]), torch.zeros(2)).exp()  # e⁻¹ and e⁻¹/2
    tensor([0.3679, 0.1839])
    """

    def above_zero(k: Tensor, log_mean: Tensor) -> Tensor:
        return k * log_mean - log_mean.exp() - torch.lgamma(k + 1)

    return _split_at_zero(k, -log_mean.exp(), above_zero, log_mean)


def negative_binomial_log_prob(k: Tensor, log_mean: Tensor, log_sigma: Tensor) -> Tensor:
    r"""Log-probability of each count with mean μ and variance μ + σ²μ², in the precision of ``log_mean``.

    With :math:`r = 1/\sigma^2`,

    .. math:: \log\frac{\Gamma(k + r)}{\Gamma(r)\, k!} - k \log(1 + r/\mu) - r \log(1 + \mu/r)

    Terms of large counts cancel, so counts above zero are computed in float64: in sparse data these are few.

    >>> k = torch.tensor([0.0, 3.0])
    >>> negative_binomial_log_prob(k, torch.zeros(2), torch.zeros(2)).exp()  # geometric: 2^-(k + 1)
    tensor([0.5000, 0.0625])
    """
    at_zero = -softplus(log_mean + 2 * log_sigma) * torch.exp(-2 * log_sigma)

    def above_zero(k: Tensor, log_mean: Tensor, log_sigma: Tensor) -> Tensor:
        r, odds = torch.exp(-2 * log_sigma), log_mean + 2 * log_sigma
        return _log_rising(r, k) - torch.lgamma(k + 1) - k * softplus(-odds) - r * softplus(odds)

    return _split_at_zero(k, at_zero, above_zero, log_mean, log_sigma)


def _inflated(log_prob: Tensor, k: Tensor, zero_logit: Tensor) -> Tensor:
    """Log-probability of each count, given that of those that are not zero for another reason."""
    counted = log_prob + logsigmoid(-zero_logit)
    return torch.where(k > 0, counted, torch.logaddexp(logsigmoid(zero_logit), counted))


def _split_at_zero(k: Tensor, at_zero: Tensor, above_zero: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """Values at the zeros; elsewhere the function of k and the parts, computed in float64 for these elements alone."""
    k, at_zero = torch.broadcast_tensors(k, at_zero)  # type: ignore[no-untyped-call]
    if torch.compiler.is_compiling():  # how many there are is not known to a graph
        found = above_zero(k.clamp_min(1).double(), *(part.double() for part in parts))
        return torch.where(k > 0, found.to(at_zero), at_zero)
    places = _places(k)
    found = above_zero(k.reshape(-1)[places].double(), *(_at(places, part, k.shape) for part in parts))
    return at_zero.reshape(-1).index_copy(0, places, found.to(at_zero)).reshape(k.shape)


def _places(k: Tensor) -> Tensor:
    """Places of the counts above zero, in the flattened tensor."""
    return k.reshape(-1).nonzero().squeeze(1)


def _at(places: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Values at these places of their expansion to a shape, in float64; a single value stays one."""
    return (values.reshape(()) if values.numel() == 1 else values.expand(shape).reshape(-1)[places]).double()


def _log_rising(r: Tensor, k: Tensor) -> Tensor:
    """Log Γ(r + k)/Γ(r) in float64: for large r by Stirling's series, whose large terms cancel before they are rounded."""
    large = r.clamp_min(STIRLING_FROM)
    series = (k + large - 0.5) * torch.log1p(k / large) + k * large.log() - k + _stirling(large + k) - _stirling(large)
    small = r.clamp_max(STIRLING_FROM)
    return torch.where(r > STIRLING_FROM, series, torch.lgamma(small + k) - torch.lgamma(small))


def _stirling(z: Tensor) -> Tensor:
    """The end of Stirling's series for log Γ(z), to 1e-17 from 100 on."""
    inverse = 1 / z
    return inverse * (1 / 12 - inverse.square() * (1 / 360 - inverse.square() / 1260))


# -- distributions ---------------------------------------------------------------------------------------------------------


class CountDistribution(DataDistribution):
    r"""Counts: batch ``(*batch,)``, event ``(C, *space)``, given the logarithms of their rates.

    Without ``total`` a rate is a mean. With it, rates are shares of the row's total N (the library size), and means are
    N times the shares. What is scored has its own total, which is taken as given: :math:`p(x \mid z, N)`; draws and
    means are those of rows with the total ``total``.

    Args:
        log_rate: ``(*batch, C, *space)``.
        event_dims: number of axes of an event.
        total: of the rows that are drawn, broadcastable to ``(*batch,)``; None where rates are means.
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(self, log_rate: Tensor, event_dims: int, total: Tensor | None = None) -> None:
        self.log_rate = log_rate
        self.total = total
        self._event_axes = tuple(range(-event_dims, 0))
        split = log_rate.dim() - event_dims
        super().__init__(log_rate.shape[:split], log_rate.shape[split:], validate_args=False)

    @abstractmethod
    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each count, of the data's shape."""

    @abstractmethod
    def spread(self, mean: Tensor) -> Tensor:
        """Variance of each count whose rate gives this mean of the family's own distribution."""

    @abstractmethod
    def _draw(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws with these rates."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the whole event, in nats."""
        return self.element_log_prob(value).sum(self._event_axes)

    def weighted_log_prob(self, value: Tensor, beta: float) -> Tensor:
        """The β-NLL objective (Seitzer et al. 2022), with the variances of the counts: see ``Continuous``."""
        weights = self.spread(self._log_mean(self._checked(value)).exp()).detach() ** beta
        return (self.element_log_prob(value) * weights).sum(self._event_axes)

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of each count, and the squared distance from its mean."""
        rate = self._log_mean(self._checked(value)).exp()
        return self.spread(rate), (value - self.mean_of(rate)).square()

    def mean_of(self, rate: Tensor) -> Tensor:
        """Mean of each count at this rate."""
        return rate

    @property
    def mean(self) -> Tensor:
        """Expectation, of the data's shape: for rows with the total ``total``, where rates are shares."""
        return self.mean_of(self._typical_rate())

    @property
    def variance(self) -> Tensor:
        """Variance of each count, likewise."""
        return self.spread(self._typical_rate())

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws of counts."""
        rate = self._typical_rate()
        if not rate.isfinite().all():
            raise ValueError("counts cannot be drawn from features that are NaN or infinite (has the decoder diverged?)")
        return self._draw(rate.expand(*sample_shape, *rate.shape), generator)

    def _typical_rate(self) -> Tensor:
        rate = self.log_rate.exp()
        return rate if self.total is None else rate * self._of_rows(self.total)

    def _log_mean(self, value: Tensor) -> Tensor:
        if self.total is None:
            return self.log_rate
        return self.log_rate + value.sum(self._event_axes, keepdim=True).clamp_min(1e-30).log()

    def _of_rows(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.log_rate).reshape(numbers.shape + (1,) * len(self._event_axes))

    def _checked(self, value: Tensor) -> Tensor:
        if value.shape[-len(self._event_axes) :] != self.event_shape:
            raise ValueError(
                f"expected counts of shape (..., {', '.join(map(str, self.event_shape))}), got {tuple(value.shape)}: they would be"
                " broadcast"
            )
        return at_least_float32(value).to(self.log_rate.dtype)


@final
class PoissonCounts(CountDistribution):
    """Poisson counts: variance μ.

    >>> p = PoissonCounts(torch.zeros(2, 3), event_dims=1)
    >>> p.log_prob(torch.ones(2, 3)), p.mean[0]
    (tensor([-3., -3.]), tensor([1., 1., 1.]))
    """

    def element_log_prob(self, value: Tensor) -> Tensor:
        """See :func:`poisson_log_prob`."""
        value = self._checked(value)
        return poisson_log_prob(value, self._log_mean(value))

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x − 1) and F(x): regularised incomplete gamma functions."""
        value = self._checked(value)
        k, mean = value.double(), self._log_mean(value).double().exp()
        upto, below = (torch.special.gammaincc(n, mean) for n in (k + 1, k.clamp_min(1)))
        return below.masked_fill(k == 0, 0).to(value), upto.to(value)

    def spread(self, mean: Tensor) -> Tensor:
        """The mean."""
        return mean

    def _draw(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(mean, generator)


@final
class NegativeBinomialCounts(CountDistribution):
    """Negative binomial counts: Poisson counts whose rates vary, with a std of σ times their mean; variance μ + σ²μ².

    >>> p = NegativeBinomialCounts(torch.zeros(2, 3), torch.zeros(()), event_dims=1)
    >>> p.log_prob(torch.zeros(2, 3)), p.variance[0]  # three of probability ½ each
    (tensor([-2.0794, -2.0794]), tensor([2., 2., 2.]))
    """

    def __init__(self, log_rate: Tensor, log_sigma: Tensor, event_dims: int, total: Tensor | None = None) -> None:
        super().__init__(log_rate, event_dims, total)
        self.log_sigma = log_sigma

    def element_log_prob(self, value: Tensor) -> Tensor:
        """See :func:`negative_binomial_log_prob`."""
        value = self._checked(value)
        return negative_binomial_log_prob(value, self._log_mean(value), self.log_sigma)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x − 1) and F(x): regularised incomplete beta functions."""
        value = self._checked(value)
        k, r, odds = value.double(), torch.exp(-2 * self.log_sigma.double()), self._log_mean(value).double()
        success = torch.sigmoid(-odds - 2 * self.log_sigma.double())
        upto, below = (_betainc(r, n, success) for n in (k + 1, k.clamp_min(1)))
        return below.masked_fill(k == 0, 0).to(value), upto.to(value)

    def spread(self, mean: Tensor) -> Tensor:
        """μ + σ²μ²."""
        return mean + (mean * self.log_sigma.exp()).square()

    def _draw(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        variance = torch.exp(2 * self.log_sigma).expand(mean.shape)
        rate = torch._standard_gamma(1 / variance, generator=generator) * variance * mean
        return torch.poisson(rate, generator)


@final
class ZeroInflatedCounts(CountDistribution):
    r"""Zero with probability π, else negative binomial: :math:`P(0) = \pi + (1 - \pi)\,\mathrm{NB}(0)`.

    ``zero_logit`` is the logit of π, of the data's shape.

    >>> p = ZeroInflatedCounts(torch.zeros(1, 2), torch.zeros(()), torch.zeros(1, 2), event_dims=1)
    >>> p.element_log_prob(torch.tensor([[0.0, 1.0]])).exp()  # ½ + ½·½, and ½·¼
    tensor([[0.7500, 0.1250]])
    """

    def __init__(
        self, log_rate: Tensor, log_sigma: Tensor, zero_logit: Tensor, event_dims: int, total: Tensor | None = None
    ) -> None:
        super().__init__(log_rate, event_dims, total)
        self.counts = NegativeBinomialCounts(log_rate, log_sigma, event_dims, total)
        self.zero_logit = zero_logit

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each count."""
        value = self._checked(value)
        return _inflated(self.counts.element_log_prob(value), value, self.zero_logit)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x − 1) and F(x)."""
        below, upto = self.counts.element_cdf(value)
        pi, rest = torch.sigmoid(self.zero_logit), torch.sigmoid(-self.zero_logit)
        return (pi + rest * below).masked_fill(value <= 0, 0), (pi + rest * upto).clamp_max(1)

    def mean_of(self, rate: Tensor) -> Tensor:
        """(1 − π)μ."""
        return torch.sigmoid(-self.zero_logit) * rate

    def spread(self, mean: Tensor) -> Tensor:
        """(1 − π)(μ + σ²μ² + πμ²)."""
        return torch.sigmoid(-self.zero_logit) * (self.counts.spread(mean) + torch.sigmoid(self.zero_logit) * mean.square())

    def _draw(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        kept = torch.bernoulli(torch.sigmoid(-self.zero_logit).expand(mean.shape), generator=generator)
        return kept * self.counts._draw(mean, generator)


@final
class MultinomialCounts(CountDistribution):
    r"""A row's total N, dealt out by probabilities p, whose logarithms are ``log_rate``: :math:`N! \prod_i p_i^{x_i} / x_i!`.

    >>> p = MultinomialCounts(torch.full((1, 2), 0.5).log(), 1, total=torch.tensor(2.0))
    >>> p.log_prob(torch.tensor([[1.0, 1.0]])).exp(), p.mean
    (tensor([0.5000]), tensor([[1., 1.]]))
    """

    total: Tensor

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Each count's term, x log p − log x!; log N! is shared among them."""
        value = self._checked(value)
        shares = _split_at_zero(value, torch.zeros_like(self.log_rate), _dealt, self.log_rate)
        totals = value.double().sum(self._event_axes, keepdim=True)
        return shares + (torch.lgamma(totals + 1) / self.event_shape.numel()).to(shares)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the whole event given its total, in nats; summed in float64, as log N! is large."""
        value = self._checked(value)
        terms = _split_at_zero(value.double(), value.new_zeros(()).double(), _dealt, self.log_rate)
        totals = value.double().sum(self._event_axes)
        return (torch.lgamma(totals + 1) + terms.sum(self._event_axes)).to(value)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x − 1) and F(x) of each count, given those before: binomial."""
        value = self._checked(value)
        k, p = value.double().flatten(-len(self._event_axes)), self.log_rate.double().exp().flatten(-len(self._event_axes))
        left = k.flip(-1).cumsum(-1).flip(-1)
        share = (p / p.flip(-1).cumsum(-1).flip(-1)).clamp(0, 1).expand(k.shape)
        upto = _betainc((left - k).clamp_min(1), k + 1, 1 - share).masked_fill(k >= left, 1)
        below = _betainc(left - k + 1, k.clamp_min(1), 1 - share).masked_fill(k == 0, 0)
        return below.reshape(value.shape).to(value), upto.reshape(value.shape).to(value)

    def spread(self, mean: Tensor) -> Tensor:
        """Np(1 − p)."""
        return mean * -torch.expm1(self.log_rate)

    def _draw(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        shares = self.log_rate.exp().expand(mean.shape).flatten(-len(self._event_axes)).reshape(-1, self.event_shape.numel())
        totals = self.total.round().long().expand(mean.shape[: -len(self._event_axes)]).reshape(-1)
        rows = [
            torch.bincount(torch.multinomial(p, n, replacement=True, generator=generator), minlength=len(p))
            if n
            else torch.zeros_like(p, dtype=torch.int64)
            for p, n in zip(shares, totals.tolist(), strict=True)
        ]
        return torch.cat([mean.new_zeros(0), *(row.to(mean) for row in rows)]).reshape(mean.shape)  # perhaps of no example


def _dealt(k: Tensor, log_share: Tensor) -> Tensor:
    return k * log_share - torch.lgamma(k + 1)


def _betainc(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The regularised incomplete beta function, without a gradient."""
    from scipy.special import betainc

    found = betainc(*(each.detach().cpu().numpy() for each in (a, b, x)))
    return torch.from_numpy(found).to(x.device)


# -- the best dispersion ---------------------------------------------------------------------------------------------------


class Dispersed(NamedTuple):
    """Counts, what is predicted for them, and the places of those above zero; the log σ sought is added to ``base``."""

    log_mean: Tensor
    base: Tensor
    x: Tensor
    zero_logit: Tensor | None
    places: Tensor
    weight: Tensor | None = None

    @classmethod
    def of(cls, log_mean: Tensor, base: Tensor, x: Tensor, zero_logit: Tensor | None) -> "Dispersed":
        """Look the places up once."""
        return cls(log_mean, base, x, zero_logit, _places(x))


@torch.no_grad()
def best_log_sigma(
    data: Iterable[Dispersed],
    per: Per,
    event_dims: int,
    log_floor: float,
    start: Tensor | None = None,
    steps: int | None = None,
) -> Tensor:
    """The log σ of highest likelihood, by Newton's method; several starts are compared unless one is given.

    Channels (or places) with fewer than 20 counts above zero hardly tell their σ: they share one.

    Args:
        data: gone through several times.
        per: what has a σ of its own.
        event_dims: number of axes of an example.
        log_floor: the least log σ.
        start: where the search begins, of the result's shape or of one value.
        steps: most steps from there; None: until it has arrived.

    Shapes:
        result (event-shaped, 1 where shared), or ``(*batch, 1, ...)`` for ``per="image"``, in the precision of the data.

    Raises:
        ValueError: there are no data.
    """
    if per in ("batch", "image"):
        return _searched(data, per, event_dims, log_floor, start, steps)
    columns = _each(lambda part: _arranged(part, per, event_dims), data)
    sums = Sums("channel", 1)
    for part in columns:
        sums.add((part.x > 0)[None].double())
    enough = sums.totals()[0][0] >= ENOUGH
    known = torch.empty(0) if start is None else start.flatten()
    found = part.log_mean.new_empty(enough.shape)
    for chosen, own in ((enough, "channel"), (~enough, "batch")):
        if bool(chosen.any()):
            first = None if start is None else known[chosen] if known.shape == chosen.shape else known
            some = _each(partial(_chosen, columns=chosen), columns)
            found[chosen] = _searched(some, cast(Per, own), 1, log_floor, first, steps)
    shape = shared_shape(next(iter(data)).x.shape, per, event_dims)
    result: Tensor = found.reshape(shape)
    return result


def _each(change: Callable[[Dispersed], Dispersed], data: Iterable[Dispersed]) -> Iterable[Dispersed]:
    """The parts changed: at once where they are a list (a batch in training), else each time that they are read."""
    return [change(part) for part in data] if isinstance(data, list) else Remade(change, data)


def _arranged(part: Dispersed, per: Per, event_dims: int) -> Dispersed:
    """Its values as matrices with a column for each group."""

    def matrix(values: Tensor) -> Tensor:
        if per == "pixel":
            return values.reshape(-1, values.shape[-event_dims:].numel())
        return values.movedim(-event_dims, -1).reshape(-1, values.shape[-event_dims])

    return _mapped(part, matrix)


def _chosen(part: Dispersed, columns: Tensor) -> Dispersed:
    return _mapped(part, lambda values: values[:, columns])


def _mapped(part: Dispersed, change: Callable[[Tensor], Tensor]) -> Dispersed:
    logit = part.zero_logit
    return Dispersed.of(change(part.log_mean), part.base, change(part.x), None if logit is None else change(logit))


def _searched(
    data: Iterable[Dispersed], per: Per, event_dims: int, log_floor: float, start: Tensor | None, steps: int | None
) -> Tensor:
    """The maximum near the start; without one, near what moments say, or near a better one of some coarse points."""
    bounds = log_floor, LARGEST_LOG_SIGMA

    def score(log_sigma: Tensor, some: Callable[[Iterable[Dispersed]], Iterator[Dispersed]] = iter) -> Tensor:
        sums = Sums(per, event_dims)
        for part in some(data):
            sums.add(_log_prob(part, log_sigma)[None])
        return sums.means()[0]

    def search(at: Tensor) -> Tensor:
        if steps is None:
            return maximum(dispersion_slopes, data, per, event_dims, bounds, at)
        newton = Newton(at, *bounds)
        for _ in range(steps):
            sums = Sums(per, event_dims)
            for part in data:
                sums.add(dispersion_slopes(part, newton.at))
            newton.step(*sums.means())
        return newton.at

    shape = shared_shape(next(iter(data)).x.shape, per, event_dims)
    if start is not None:
        first = (
            start.double().reshape(shape) if start.numel() == torch.Size(shape).numel() else start.double().mean().expand(shape)
        )
        found = search(first.clamp(*bounds).contiguous())
    else:
        found = search(_from_moments(data, per, event_dims).clamp(*bounds))
        found = highest(found, torch.linspace(*bounds, COARSE).tolist(), score, search)
    return found.to(next(iter(data)).x.dtype)


def _from_moments(data: Iterable[Dispersed], per: Per, event_dims: int) -> Tensor:
    """Log σ at which the variances are those of the data."""
    sums = Sums(per, event_dims)
    for part in data:
        mean = part.log_mean.exp()
        sums.add(torch.stack([(part.x - mean).square() - mean, (part.base.exp() * mean).square()]))
    excess, squares = sums.means()
    log_sigma: Tensor = 0.5 * (excess / squares).clamp(1e-30, 1e30).log().nan_to_num(0.0)
    return log_sigma


def _log_prob(part: Dispersed, log_sigma: Tensor) -> Tensor:
    log_sigma = part.base + log_sigma.to(part.log_mean.dtype)
    log_prob = negative_binomial_log_prob(part.x, part.log_mean, log_sigma)
    return log_prob if part.zero_logit is None else _inflated(log_prob, part.x, part.zero_logit)


def dispersion_slopes(part: Dispersed, log_sigma: Tensor) -> Tensor:
    r"""First and second derivative of each log-probability in log σ.

    With :math:`r = 1/\sigma^2`, :math:`s = \mu/(\mu + r)`, and Δ the difference between r + k and r, twice and four times

    .. math:: r(\log(1 + \mu/r) - s - \Delta\psi) + k (1 - s), \qquad
              r(s + s^2 - \log(1 + \mu/r) + \Delta\psi + r \Delta\psi') - k s (1 - s)
    """
    log_sigma = part.base + log_sigma.to(part.log_mean.dtype)
    odds, r = part.log_mean + 2 * log_sigma, torch.exp(-2 * log_sigma)
    log_one = softplus(odds)
    share = -torch.expm1(-log_one)
    slope, curvature = r * (log_one - share), r * (share + share.square() - log_one)
    if part.zero_logit is not None:
        counted = torch.sigmoid(-r * log_one - part.zero_logit)  # of a zero, the probability that it was not inflated
        slope, curvature = counted * slope, counted * (curvature + (1 - counted) * slope.square())

    def above_zero(k: Tensor, odds: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        r, share, log_one = torch.exp(-2 * log_sigma), torch.sigmoid(odds), softplus(odds)
        first = r * (torch.digamma(r + k) - torch.digamma(r))
        second = r.square() * (torch.polygamma(1, r + k) - torch.polygamma(1, r))
        slope = r * (log_one - share) - first + k * (1 - share)
        return slope, r * (share + share.square() - log_one) + first + second - k * share * (1 - share)

    places, shape = part.places, part.x.shape
    found = above_zero(part.x.reshape(-1)[places].double(), _at(places, odds, shape), _at(places, log_sigma, shape))
    rows = ((2, slope, found[0]), (4, curvature, found[1]))
    return torch.stack([n * dense.reshape(-1).index_copy(0, places, own.to(dense)).reshape(shape) for n, dense, own in rows])


# -- likelihoods -----------------------------------------------------------------------------------------------------------


def _library(text: str) -> dict[str, Any]:
    if text != "library":
        raise ValueError(f"after the colon comes library (means are shares of each row's total) or nothing, got {text!r}")
    return {"library": True}


LIBRARY = Argument("library", _library, "library", of=lambda made: "library" if made.library else None)


class CountLikelihood(Likelihood):
    r"""A likelihood of counts, which reach it as they are; encoders read log(1 + x).

    Features are log-means; with ``library``, a softmax over each row gives shares of the row's total N, as in scVI (Lopez
    et al. 2018): log-likelihoods are then those of the row given its total, :math:`\log p(x \mid z, N)`. Means and draws
    are of rows with the mean total of the data that the likelihood was calibrated on.

    Args:
        channels: the data's channels: columns of a table.
        spatial_dims: 0 for tables, 1 for series, 2 for images.
        library: whether features are shares of the row's total.

    Raises:
        ValueError: an argument is out of range.
    """

    observes: Observes = "level"
    typical_total: Tensor

    def __init__(self, channels: int, *, spatial_dims: int = 0, library: bool = False) -> None:
        super().__init__(channels, spatial_dims, None)
        self.library = library
        self.register_buffer("typical_total", torch.ones(()))

    @property
    def in_channels(self) -> int:
        """A log-mean for each channel."""
        return self.channels

    @property
    def has_mass(self) -> bool:
        """True: counts are their own levels."""
        return True

    def encoder_input(self, x: Tensor) -> Tensor:
        """Log(1 + x)."""
        return torch.log1p(at_least_float32(x))

    def check_observes(self, observes: Observes | None) -> Observes:
        """Return "level": counts have no density.

        Raises:
            ValueError: a density is asked for.
        """
        if observes == "density":
            raise ValueError(f'{self} is a distribution over counts and has no density; ask with observes="level"')
        return "level"

    def check_data(self, x: Tensor, shape: Iterable[int], observes: Observes) -> None:
        """Refuse data of another shape, and what is no count.

        Raises:
            ValueError: x has another shape, or values that are negative or no whole numbers.
        """
        super().check_data(x, tuple(shape), "density")
        if torch.compiler.is_compiling() or not x.numel():
            return
        if not bool(((x >= 0) & (x == x.round()) & x.isfinite()).all()):
            low, high = (float(v) for v in x.aminmax())
            raise ValueError(
                f"{self} expects counts 0, 1, 2, ..., got values in [{low:.4g}, {high:.4g}], not all of them whole and at least 0; read"
                " the data as counts: --counts, or DataConfig(..., counts=True)"
            )

    def start_features_for(self, data: Iterable[Tensor], std: float) -> Tensor:
        """The logarithm of each channel's mean, and the other features of :meth:`start_features`."""
        features = self.start_features(std)
        total, count = torch.zeros(self.channels, dtype=torch.float64), 0
        for x in data:
            values = x.transpose(0, 1).flatten(1).double()
            total, count = total + values.sum(1).cpu(), count + values.shape[1]
        features[: self.channels] = ((total + 0.5) / count).log()
        return features

    @torch.no_grad()
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take the mean total of the rows, for means and draws."""
        sums = Sums("batch", 1)
        for _, x in pairs:
            sums.add(at_least_float32(x).flatten(-1 - self.spatial_dims).sum(-1, keepdim=True)[None])
        self.typical_total.copy_(sums.means().reshape(()))

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}" + (", library=True" if self.library else "")

    def _split(self, h: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Log-rates, and other features in channels of these numbers."""
        event_dims = 1 + self.spatial_dims
        rates, *others = torch.split(checked_features(self, h), [self.channels, *sizes], dim=-event_dims)
        if self.library:
            flat = rates.flatten(-event_dims)
            return flat.log_softmax(-1).reshape(rates.shape), *others
        return rates.clamp(-LARGEST_LOG_MEAN, LARGEST_LOG_MEAN), *others

    @property
    def _total(self) -> Tensor | None:
        return self.typical_total if self.library else None

    def _seen(self, x: Tensor | None, log_rate: Tensor) -> Tensor | None:
        if x is None:
            return None
        x = at_least_float32(x).to(log_rate.dtype)
        self.check_data(x, log_rate.shape, "level")
        return x


@register.likelihood("poisson", argument=LIBRARY, counts=True)
@final
class Poisson(CountLikelihood):
    r"""Poisson counts, whose variance is their mean; real counts usually vary more.

    .. math:: \log p(x \mid h) = \sum_i x_i \log \mu_i - \mu_i - \log x_i!, \qquad \log \mu = h

    Shapes:
        h and x ``(*batch, channels, *space)``; ``log_prob`` ``(*batch,)`` in nats.

    Raises:
        ValueError: h has the wrong channels, or x is no count.

    >>> likelihood = Poisson(channels=2)
    >>> likelihood(torch.zeros(1, 2)).log_prob(torch.tensor([[0.0, 1.0]]))
    tensor([-2.])
    """

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> PoissonCounts:
        """p(x|h): see :meth:`Likelihood.distribution`."""
        self.check_observes(observes)
        (log_rate,) = self._split(h)
        self._seen(x, log_rate)
        return PoissonCounts(log_rate, 1 + self.spatial_dims, self._total)


@register.likelihood("multinomial", counts=True)
@final
class Multinomial(CountLikelihood):
    r"""Counts of a row's columns given their total N.

    .. math:: \log p(x \mid h, N) = \log N! + \sum_i x_i \log p_i - \log x_i!, \qquad p = \text{softmax}(h)

    Shapes:
        h and x ``(*batch, channels, *space)``; ``log_prob`` ``(*batch,)`` in nats.

    Raises:
        ValueError: h has the wrong channels, or x is no count.

    >>> likelihood = Multinomial(channels=2)
    >>> likelihood(torch.zeros(1, 2)).log_prob(torch.tensor([[1.0, 1.0]])).exp()
    tensor([0.5000])
    """

    def __init__(self, channels: int, *, spatial_dims: int = 0) -> None:
        super().__init__(channels, spatial_dims=spatial_dims, library=True)

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}"

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> MultinomialCounts:
        """p(x|h, N): see :meth:`Likelihood.distribution`."""
        self.check_observes(observes)
        (log_rate,) = self._split(h)
        self._seen(x, log_rate)
        return MultinomialCounts(log_rate, 1 + self.spatial_dims, self.typical_total)


class _Dispersion(CountLikelihood, Scaled):
    """Counts with a σ, the std of their rates in units of the mean: variance μ + σ²μ²."""

    zero_channels = 0
    """Feature channels for the probability of zeros."""

    def __init__(self, channels: int, scale: Scale | None = None, *, spatial_dims: int = 0, library: bool = False) -> None:
        super().__init__(channels, spatial_dims=spatial_dims, library=library)
        self.scale = Optimal() if scale is None else scale
        self.scale.spatial_dims = spatial_dims
        self.set_floor()

    @property
    def in_channels(self) -> int:
        """The log-mean's channels, the scale's and those of zeros."""
        return self.channels + self._scale_channels + self.zero_channels

    def set_floor(self, relative: float | None = None, std: float = 1.0) -> None:
        """Set the least σ, which has no unit: a thousandth unless given."""
        self.scale.set_floor(relative or FLOOR)

    def start(self, std: float) -> None:
        """Start a learned σ at 1, whatever the data's std."""
        self.scale.start(1.0)

    @torch.no_grad()
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve σ exactly; ``pairs`` (h, x) are a list or a loader, as they are gone through several times.

        Columns with fewer than 20 counts above zero share one σ, where columns have σ of their own.

        Raises:
            ValueError: there are no pairs, or they come from a generator, or features are not finite.
        """
        data = Remade(self._of_pair, pairs)
        super().calibrate(pairs)
        how = self.scale.refit_per, self._event_dims, self.log_floor
        found = best_log_sigma(data, *how, self.scale.all_stored().get("level"))
        if not torch.isfinite(found).all():
            raise ValueError("calibrate found no finite σ: the decoder's features are not finite (have its weights diverged?)")
        self.scale.store("level", found)

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}, scale={self.scale}" + (", library=True" if self.library else "")

    def _parts(
        self, h: Tensor, x: Tensor | None, observes: Observes | None, refitted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-rates, log σ, and logits of zeros; a training step solves an :class:`Optimal` scale for this x."""
        observes = self.check_observes(observes)
        log_rate, raw, logit = self._features(h)
        x = self._seen(x, log_rate)
        fit = self._fit(log_rate, x, logit) if x is not None and self.training and x.numel() and not refitted else None
        log_sigma = self.scale.refitted(raw, observes) if refitted else self.scale(raw, observes, fit)
        return log_rate, log_sigma, logit

    def _features(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-rates, what the scale reads, and logits of zeros."""
        log_rate, raw, *zeros = self._split(h, self._scale_channels, *([self.zero_channels] if self.zero_channels else []))
        return log_rate, raw, zeros[0] if zeros else None

    def _of_pair(self, pair: tuple[Tensor, Tensor]) -> Dispersed:
        """A pair (h, x) in the form that the solver reads."""
        log_rate, raw, logit = self._features(pair[0])
        x = self._seen(pair[1], log_rate)
        assert x is not None
        return self._dispersed(log_rate, self.scale.base(raw), x, logit)

    def _fit(self, log_rate: Tensor, x: Tensor, logit: Tensor | None) -> Fit:
        def fit(per: Per) -> Tensor:
            part = self._dispersed(log_rate, log_rate.new_zeros(()), x, logit)
            known = self.scale.all_stored().get("level")
            steps = None if known is None else STEPS_IN_TRAINING
            return best_log_sigma([part], per, self._event_dims, self.log_floor, known, steps)

        beside_the_graph: Fit = torch.compiler.disable(fit)  # type: ignore[no-untyped-call]
        return beside_the_graph

    def _dispersed(self, log_rate: Tensor, base: Tensor, x: Tensor, logit: Tensor | None) -> Dispersed:
        if self.library:
            axes = tuple(range(-self._event_dims, 0))
            log_rate = log_rate + x.sum(axes, keepdim=True).clamp_min(1e-30).log()
        return Dispersed.of(log_rate.detach(), base.detach(), x, None if logit is None else logit.detach())


@register.likelihood("negative-binomial", argument=LIBRARY, counts=True)
@final
class NegativeBinomial(_Dispersion):
    r"""Counts that vary more than Poisson counts: their rates have a std of σ times the mean.

    σ² is the dispersion:

    .. math:: \operatorname{Var}(x_i) = \mu_i + \sigma^2 \mu_i^2, \qquad
              \log p(x \mid h) = \sum_i \log\frac{\Gamma(x_i + r)}{\Gamma(r)\, x_i!} + r \log\frac{r}{r + \mu_i}
              + x_i \log\frac{\mu_i}{r + \mu_i}, \qquad r = 1/\sigma^2

    :class:`Optimal` solves σ by maximum likelihood, by Newton's method in log σ: on calibration data exactly, for a
    batch in training in two steps from the running value. At the optimum the gradient through σ vanishes.

    Shapes:
        h ``(*batch, in_channels, *space)``, log-means and what the scale reads; x ``(*batch, channels, *space)``;
        ``log_prob`` ``(*batch,)`` in nats.

    Raises:
        ValueError: h has the wrong channels, x is no count, or no σ is known yet.

    >>> from sigma_vae import Fixed
    >>> likelihood = NegativeBinomial(2, Fixed(1.0))
    >>> likelihood(torch.zeros(1, 2)).log_prob(torch.tensor([[0.0, 3.0]])).exp()  # 2⁻¹ · 2⁻⁴
    tensor([0.0312])
    """

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> NegativeBinomialCounts:
        """p(x|h); a training step solves an :class:`Optimal` scale for this x: see :meth:`Likelihood.distribution`."""
        log_rate, log_sigma, _ = self._parts(h, x, observes, refitted)
        return NegativeBinomialCounts(log_rate, log_sigma, 1 + self.spatial_dims, self._total)


@register.likelihood("zero-inflated-negative-binomial", argument=LIBRARY, counts=True)
@final
class ZeroInflatedNegativeBinomial(_Dispersion):
    r"""Negative binomial counts, of which some are zero for another reason: with a predicted probability π.

    .. math:: P(0) = \pi + (1 - \pi)\,\mathrm{NB}(0), \qquad P(k) = (1 - \pi)\,\mathrm{NB}(k)

    Shapes:
        h ``(*batch, in_channels, *space)``: log-means, what the scale reads, and the logits of π; otherwise as
        :class:`NegativeBinomial`.

    Raises:
        ValueError: as for :class:`NegativeBinomial`.

    >>> from sigma_vae import Fixed
    >>> likelihood = ZeroInflatedNegativeBinomial(1, Fixed(1.0))
    >>> likelihood(torch.zeros(1, 2)).log_prob(torch.zeros(1, 1)).exp()  # ½ + ½·½
    tensor([0.7500])
    """

    @property
    def zero_channels(self) -> int:  # type: ignore[override]
        """A logit for each channel."""
        return self.channels

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> ZeroInflatedCounts:
        """p(x|h); a training step solves an :class:`Optimal` scale for this x: see :meth:`Likelihood.distribution`."""
        log_rate, log_sigma, logit = self._parts(h, x, observes, refitted)
        assert logit is not None
        return ZeroInflatedCounts(log_rate, log_sigma, logit, 1 + self.spatial_dims, self._total)

    def start_features(self, std: float) -> Tensor:
        """Few zeros are inflated at first."""
        features = super().start_features(std)
        features[-self.channels :] = -3.0
        return features
