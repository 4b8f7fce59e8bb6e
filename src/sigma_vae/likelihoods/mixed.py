"""One likelihood for a row of a table: a family of its own for each column, and missing values."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import log_softmax, logsigmoid

from sigma_vae.columns import DF, Column, Row
from sigma_vae.likelihoods.counts import Dispersed, dispersion_slopes, negative_binomial_log_prob, poisson_log_prob
from sigma_vae.likelihoods.residuals import LAPLACE, NORMAL, ResidualDistribution, Shape, student_t
from sigma_vae.likelihoods.scales import MOMENTUM, SPREAD_FLOOR, Fit, Optimal
from sigma_vae.likelihoods.solve import MAX_ITERATIONS, Newton, Observed, best_log_scale, check_repeats
from sigma_vae.registry import register
from sigma_vae.types import DataDistribution, Likelihood, Observes, at_least_float32

__all__ = ["Mixed", "MixedRow"]

RESIDUALS: tuple[ResidualDistribution, ...] = (NORMAL, LAPLACE, student_t(DF))
"""Residual distributions of the families of real values, in their order."""
DISPERSION_BOUNDS = (-7.0, 14.0)
"""Least and largest log r of a negative binomial; with the largest it is a Poisson distribution."""
LARGEST_LOG_MEAN = 40.0


@register.likelihood("mixed")
def _mixed(channels: int, *, spatial_dims: int = 2, levels: int | None = None, columns: Sequence[Column] = ()) -> "Mixed":
    """Rows of a table with columns of all types: real values, counts, categories, missing values."""
    if not columns:
        raise ValueError("mixed is for tables, whose columns it has to know; train on a CSV, Parquet or Excel file")
    return Mixed(columns)


@final
class Mixed(Likelihood):
    r"""A likelihood for rows of a table, with a family of its own for each column; missing values are not scored.

    .. math:: \log p(x \mid h) = \sum_{j \text{ observed}} \log p_j(x_j \mid h_j)

    Real values are Gaussian, Laplace or Student-t (ν = 4) after the monotone transform of their column, whose slope is counted: the
    density is that of x in its own units. Each has a σ of its own, the best for the observed values: solved for each
    batch in training, by :meth:`calibrate` for evaluation. Categories, yes or no, and counts have probabilities. So
    the sum is a log-density of the real values times a probability of the others.

    Values that are missing at random do not bias any σ, as sums and counts are over the observed values (Little and
    Rubin 2019, "Statistical Analysis with Missing Data", section 6). The treatment of columns by a likelihood of their own
    follows Nazábal et al. ("Handling incomplete heterogeneous data using VAEs", 2020, arXiv 1807.03653).

    A count's features are the log-mean; the dispersion r of a negative binomial, of variance :math:`\lambda + \lambda^2/r`, is
    solved per column by Newton's method in log r: a running mean over training batches, exactly by :meth:`calibrate`.

    Args:
        columns: of the table, as :class:`~sigma_vae.data.schema.TableSchema` finds them.

    Shapes:
        x ``(*batch, row.width)``: a row, as :class:`~sigma_vae.columns.Row` places its columns; h ``(*batch,
        row.features)``; ``log_prob`` ``(*batch,)`` in nats.

    Raises:
        ValueError: there is no column.

    >>> columns = [Column("size", "gaussian", scale=10.0), Column("sex", "bernoulli", categories=("f", "m"))]
    >>> likelihood = Mixed(columns)
    >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 1.0]])      # the second row's sex is missing
    >>> p = likelihood(torch.zeros(2, 2), x)
    >>> p.column_log_prob(x)                                                  # −log √(2πe) − log 10; −log 2
    tensor([[-3.7215, -0.6931],
            [-3.7215,  0.0000]])
    """

    log_dispersion: Tensor

    def __init__(self, columns: Sequence[Column]) -> None:
        if not columns:
            raise ValueError("Mixed needs at least one column, got none")
        row = Row(columns)
        super().__init__(row.width, 0, None)
        self.row = row
        self.scales = nn.ModuleList(Optimal(per="channel") for _ in RESIDUALS)
        self.set_floor()
        self.register_buffer("log_dispersion", torch.zeros(len(row.counts[1])))

    @property
    def in_channels(self) -> int:
        """One for each float of a row, but for the masks."""
        return self.row.features

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns of the table."""
        return self.row.columns

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> "MixedRow":
        """p(x|h); a training step solves each σ for this x. See :meth:`Likelihood.distribution`."""
        observes = self.check_observes(observes)
        if h.shape[-1:] != (self.in_channels,):
            raise ValueError(
                f"{self} reads {self.in_channels} decoder channels, got {tuple(h.shape)[-1:]}; size the decoder by `likelihood.in_channels`"
            )
        h = at_least_float32(h)
        if x is not None:
            x = at_least_float32(x).to(h.dtype)
            self.check_data(x, (*h.shape[:-1], self.channels), observes)
        seen = x if x is not None and self.training and x.numel() else None  # what σ and r are solved for
        if seen is not None and len(self.log_dispersion):
            self._track_dispersion(h.detach(), seen)
        log_scales = [scale(h, "density", None if seen is None else self._fit(k, h, seen)) for k, scale in self._used()]
        return MixedRow(self.row, h, torch.cat(log_scales) if log_scales else h.new_zeros(0), self.log_dispersion.to(h).clone())

    @torch.no_grad()
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve each column's σ exactly on its observed values; ``pairs`` are a list or a loader, not a generator.

        A column without an observed value keeps its σ.
        """
        check_repeats(pairs)
        for k, scale in self._used():
            data = _Numbers(self, k, pairs)
            found = best_log_scale(data, "channel", 1, scale.log_floor, None)
            if not torch.isfinite(found).all():
                raise ValueError(
                    "calibrate found no finite σ: the decoder's features are not finite (have its weights diverged?)"
                )
            scale.store("density", self._kept(scale, found, data.seen))
        if len(self.log_dispersion):
            h, x = (torch.cat(list(each)) for each in zip(*pairs, strict=True))
            self.log_dispersion.copy_(self._best_dispersion(h, x))

    @property
    def has_scale(self) -> bool:
        """Whether there are real values."""
        return any(self.row.numbers)

    @property
    def log_floor(self) -> float:
        """The least log σ, in units of the standardised values."""
        floor: float = self._scale(0).log_floor
        return floor

    @torch.no_grad()
    def log_sigma(self, observes: Observes | None = None, *, refitted: bool = False) -> Tensor | None:
        """Log σ of the standardised real values, in the order of the row; None where there are none.

        Raises:
            ValueError: no σ is known yet.
        """
        known = [scale.stored("density") for _, scale in self._used()]
        return torch.cat(known) if known else None

    def refitted_log_scales(self) -> dict[Observes, Tensor]:
        """The stored log σ."""
        known = [stored["density"] for _, scale in self._used() if "density" in (stored := scale.all_stored())]
        return {"density": torch.cat(known)} if known else {}

    def set_floor(self, relative: float | None = None, std: float = 1.0) -> None:
        """Set the least σ, relative to the std of each column, which is 1."""
        for k in range(len(RESIDUALS)):
            self._scale(k).set_floor(relative or SPREAD_FLOOR)

    def extra_repr(self) -> str:
        """The number of columns."""
        return f"{len(self.columns)} columns"

    def _scale(self, k: int) -> Optimal:
        scale = self.scales[k]
        assert isinstance(scale, Optimal)
        return scale

    def _used(self) -> Iterator[tuple[int, Optimal]]:
        """The scales of families that have columns, and their numbers."""
        return ((k, self._scale(k)) for k in range(len(RESIDUALS)) if self.row.numbers[k])

    def _fit(self, k: int, h: Tensor, x: Tensor) -> Fit:
        observed = self._observed(k, h.detach(), x)

        def fit(per: object) -> Tensor:
            scale = self._scale(k)
            found = best_log_scale([observed], "channel", 1, scale.log_floor, None)
            assert observed.weight is not None
            return self._kept(scale, found, observed.weight.flatten(0, -2).sum(0))

        return fit

    def _kept(self, scale: Optimal, found: Tensor, seen: Tensor) -> Tensor:
        """The σ found, but the old one where no value was seen."""
        old = scale.density_log_scale
        return torch.where(seen > 0, found, old.to(found)) if old.shape == found.shape else found.masked_fill(seen == 0, 0)

    @torch.no_grad()
    def _track_dispersion(self, h: Tensor, x: Tensor) -> None:
        """Move the stored log r towards the batch's best, by a small part of a Newton step, as a running σ is moved."""
        self.log_dispersion += MOMENTUM * (self._best_dispersion(h, x, steps=1) - self.log_dispersion)

    def _best_dispersion(self, h: Tensor, x: Tensor, steps: int = MAX_ITERATIONS) -> Tensor:
        """Log r of each negative binomial column, the best for the observed counts; as it was where there are none."""
        chosen = self.row.counts[1]
        places = [self.row.places[i].start for i in chosen]
        x = at_least_float32(x)
        counts = _counts_of([self.row.columns[i] for i in chosen], x[..., places]).flatten(0, -2)
        log_mean = _log_mean([self.row.columns[i] for i in chosen], at_least_float32(h)[..., places]).flatten(0, -2)
        weight = (~self.row.masks(x)[..., chosen]).to(counts).flatten(0, -2)
        return best_log_dispersion(log_mean, counts, weight, self.log_dispersion.to(counts), steps).to(self.log_dispersion)

    def _observed(self, k: int, h: Tensor, x: Tensor) -> Observed:
        """Real values of one family, and their prediction."""
        chosen = self.row.numbers[k]
        start = self.row.places[chosen[0]].start
        part = slice(start, start + len(chosen))
        weight = (~self.row.masks(x)[..., chosen]).to(h.dtype)
        return Observed(RESIDUALS[k], h[..., part], h.new_zeros(()), x[..., part].to(h.dtype), weight)


@torch.no_grad()
def best_log_dispersion(log_mean: Tensor, counts: Tensor, weight: Tensor, start: Tensor, steps: int = MAX_ITERATIONS) -> Tensor:
    """Log r of negative binomials under which counts are likeliest, column by column, by at most so many Newton steps.

    Shapes:
        log_mean, counts, weight ``(n, columns)``, start and result ``(columns,)``.
    """
    search = Newton(start.double(), *DISPERSION_BOUNDS)
    observed = Dispersed.of(log_mean.double(), start.new_zeros(()).double(), counts.double(), None)
    for _ in range(steps):
        slope, curvature = (dispersion_slopes(observed, -0.5 * search.at) * weight).sum(1)  # in log σ = −½ log r
        if search.step(-0.5 * slope, 0.25 * curvature):
            break
    return search.at


def _counts_of(columns: Sequence[Column], y: Tensor) -> Tensor:
    """Counts that are written as y ``(..., columns)``."""
    return torch.stack([column.decode(y[..., i]) for i, column in enumerate(columns)], -1) if columns else y


def _log_mean(columns: Sequence[Column], h: Tensor) -> Tensor:
    """Log-means of counts; features 0 stand for the middle of the training data."""
    shift, scale = h.new_tensor([c.shift for c in columns]), h.new_tensor([c.scale for c in columns])
    return (h * scale + shift).clamp_max(LARGEST_LOG_MEAN)


class _Numbers:
    """Real values of one family in pairs (h, x), in the form that the solver reads; ``seen`` counts them."""

    def __init__(self, likelihood: Mixed, k: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.likelihood, self.k, self.pairs = likelihood, k, pairs
        self.seen = torch.zeros(len(likelihood.row.numbers[k]))

    def __iter__(self) -> Iterator[Observed]:
        for h, x in self.pairs:
            x = at_least_float32(x)
            if not x.isfinite().all():
                raise ValueError("calibrate was given data with NaN or infinite values; write missing ones as the mask")
            observed = self.likelihood._observed(self.k, at_least_float32(h), x)
            assert observed.weight is not None
            self.seen = self.seen.to(x.device) + observed.weight.flatten(0, -2).sum(0)
            yield observed


@final
class MixedRow(DataDistribution):
    """The distribution of a row: batch ``(*batch,)``, event ``(row.width,)``; a mean or a draw has no missing value.

    Args:
        row: places of the columns.
        h: features ``(*batch, row.features)``.
        log_scale: log σ of the real values.
        log_dispersion: log r of the negative binomial columns.
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)
    support = constraints.real

    def __init__(self, row: Row, h: Tensor, log_scale: Tensor, log_dispersion: Tensor) -> None:
        self.row = row
        self.h = h
        self.log_scale = log_scale
        self.log_dispersion = log_dispersion
        self._numbers = sum(map(len, row.numbers))
        self._binary = self._numbers + sum(map(len, row.counts))
        self._category = self._binary + len(row.binaries)
        self._counts = [row.columns[i] for block in row.counts for i in block]
        self._owners, self._filled = row.owners.to(h.device), row.filled.to(h.device)
        super().__init__(h.shape[:-1], torch.Size((row.width,)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the observed values of a row, in nats."""
        return self.element_log_prob(value).sum(-1)

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each float's value: of one-hot categories at the one that is 1; 0 at masks and missing values."""
        x = self._checked(value)
        row = self.row  # a family without columns costs nothing
        parts = [self._number_log_prob(x)] if self._numbers else []
        parts += [self._count_log_prob(x)] if any(row.counts) else []
        parts += [self._binary_log_prob(x)] if row.binaries else []
        parts += [self._category_log_prob(x)] if row.categories else []
        every = torch.cat([*parts, torch.zeros_like(x[..., self.row.features :])], -1)
        observed = ~self.row.masks(x)[..., self._owners]
        return torch.cat([every[..., : self.row.features] * observed, every[..., self.row.features :]], -1)

    def column_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each column's value ``(*batch, columns)``, in nats; 0 where it is missing."""
        each = self.element_log_prob(value)[..., : self.row.features]
        total = each.new_zeros(*each.shape[:-1], len(self.row.columns))
        return total.index_add(-1, self._owners, each)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each float; 0 and 1 at masks and missing values."""
        x = self._checked(value)
        numbers = torch.cat([x[..., :0], *(residual.log_cdf(z).exp() for residual, z in self._residuals(x))], -1)
        p = torch.cat([self._probability_of_one(self.h), self._category_logs.exp()], -1).expand(*x.shape[:-1], -1)
        one = x[..., self._binary : self.row.features] > 0.5
        counts = self._count_cdf(x)
        ends = torch.zeros_like(x[..., self.row.features :]), torch.ones_like(x[..., self.row.features :])
        below = torch.cat([numbers, counts[0], torch.where(one, 1 - p, 0.0), ends[0]], -1)
        upto = torch.cat([numbers, counts[1], torch.where(one, 1.0, 1 - p), ends[1]], -1)
        missing = torch.cat([self.row.masks(x)[..., self._owners], self.row.masks(x)], -1)
        return below.masked_fill(missing, 0), upto.masked_fill(missing, 1)

    @property
    def mean(self) -> Tensor:
        """Locations of real values (their medians, in their own units), encoded means of counts, and probabilities."""
        h, none = self.h, self.h.new_zeros(*self.h.shape[:-1], len(self.row.columns))
        means = self._encoded(torch.cat(self._count_log_means(h), -1).exp())
        return torch.cat([h[..., : self._numbers], means, self._probability_of_one(h), self._category_logs.exp(), none], -1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws of whole rows."""
        h = self.h.expand(*sample_shape, *self.h.shape)
        loc = h[..., : self._numbers]
        noise = [
            residual.sample(part, generator)
            for residual, part in zip(RESIDUALS, torch.split_with_sizes(loc, list(map(len, self.row.numbers)), -1), strict=True)
        ]
        numbers = loc + self.log_scale.exp() * torch.cat(noise, -1)
        binary = torch.bernoulli(self._probability_of_one(h), generator=generator)
        return torch.cat(
            [
                numbers,
                self._count_sample(h, generator),
                binary,
                self._category_sample(sample_shape, generator),
                h.new_zeros(*h.shape[:-1], len(self.row.columns)),
            ],
            -1,
        )

    def _checked(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"expected values of shape (..., {self.row.width}), got {tuple(value.shape)}")
        x = at_least_float32(value).to(self.h.dtype)
        batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        return x.expand(*batch, self.row.width)

    def _residuals(self, x: Tensor) -> Iterator[tuple[ResidualDistribution, Tensor]]:
        z = (x[..., : self._numbers] - self.h[..., : self._numbers]) * torch.exp(-self.log_scale)
        parts = torch.split_with_sizes(z, list(map(len, self.row.numbers)), -1)
        return ((residual, part) for residual, part in zip(RESIDUALS, parts, strict=True) if part.shape[-1])

    def _number_log_prob(self, x: Tensor) -> Tensor:
        density = torch.cat([residual.log_prob(z) for residual, z in self._residuals(x)], -1) - self.log_scale
        return density + self.row.log_slopes(x[..., : self._numbers])

    def _encoded(self, counts: Tensor) -> Tensor:
        """Counts ``(..., columns)`` as they are written in a row."""
        return torch.stack([c.encode(counts[..., i]) for i, c in enumerate(self._counts)], -1) if self._counts else counts

    def _count_log_means(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Log-means of Poisson and of negative binomial columns."""
        split = len(self.row.counts[0])
        part = h[..., self._numbers : self._binary]
        return _log_mean(self._counts[:split], part[..., :split]), _log_mean(self._counts[split:], part[..., split:])

    def _count_log_prob(self, x: Tensor) -> Tensor:
        poisson, negative = self._count_log_means(self.h)
        k = _counts_of(self._counts, x[..., self._numbers : self._binary])
        split = len(self.row.counts[0])
        masses = negative_binomial_log_prob(k[..., split:].double(), negative.double(), -0.5 * self.log_dispersion.double())
        return torch.cat([poisson_log_prob(k[..., :split], poisson), masses.to(k)], -1)  # large log-gammas cancel

    def _count_cdf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Masses below each count and up to it, summed one by one."""
        k = _counts_of(self._counts, x[..., self._numbers : self._binary])
        below = torch.zeros_like(k)
        for smaller in range(int(k.max()) if k.numel() else 0):
            encoded = self._encoded(torch.full_like(k, float(smaller)))
            row = torch.cat([x[..., : self._numbers], encoded, x[..., self._binary :]], -1)
            below = below + torch.where(k > smaller, self._count_log_prob(row).exp(), 0.0)
        return below.clamp_max(1), (below + self._count_log_prob(x).exp()).clamp_max(1)

    def _count_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Poisson draws; of negative binomials with a rate that is a Gamma draw."""
        poisson, negative = self._count_log_means(h)
        r = self.log_dispersion.exp().expand(negative.shape)
        gamma = torch._standard_gamma(r, generator=generator) if r.numel() else r
        rates = torch.cat([poisson.exp(), gamma / r * negative.exp()], -1)
        return self._encoded(torch.poisson(rates, generator=generator))

    def _binary_log_prob(self, x: Tensor) -> Tensor:
        part = slice(self._binary, self._category)
        return logsigmoid((2 * x[..., part] - 1) * self.h[..., part])

    def _probability_of_one(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h[..., self._binary : self._category])

    @property
    def _category_logs(self) -> Tensor:
        """Log-probability of each category, flat."""
        logs = log_softmax(self._category_logits, -1)
        return logs.flatten(-2)[..., self._filled]

    @property
    def _category_logits(self) -> Tensor:
        """Logits ``(*batch, columns, most categories)``, −∞ where a column has fewer."""
        logits = self.h[..., self._category : self.row.features]
        columns, most = len(self.row.categories), self.row.most
        padded = logits.new_full((*logits.shape[:-1], columns * most), -math.inf)
        return padded.index_copy(-1, self._filled, logits).reshape(*logits.shape[:-1], columns, most)

    def _category_log_prob(self, x: Tensor) -> Tensor:
        return x[..., self._category : self.row.features] * self._category_logs

    def _category_sample(self, sample_shape: Shape, generator: torch.Generator | None) -> Tensor:
        """One-hot draws: the largest of the logits with Gumbel noise."""
        logits = self._category_logits
        logits = logits.expand(*sample_shape, *logits.shape)
        if not logits.numel():
            return logits.flatten(-2)
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-20, 1 - 1e-7)
        chosen = (logits - torch.log(-torch.log(uniform))).argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, chosen, 1.0).flatten(-2)[..., self._filled]
