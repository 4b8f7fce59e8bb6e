"""What streams by of residuals: predicted variance against squared error, correlation between neighbours and between channels."""

from typing import Any, final

import torch
from torch import Tensor

__all__ = ["AgainstError", "Correlations", "deciles"]

BINS = 10
LAGS = 8
LARGEST_MATRIX = 16
"""Channels (columns) up to which their correlations are told one by one."""

ROUNDING = 1e-12
"""A variance that is no larger a part of the mean square is what rounding leaves of a constant's."""

FINE_BINS, WIDEST = 2**14, 20.0
"""Of log σ: so many between −20 and 20, which are joined to ten of about equal counts in the end."""

AXES = {0: (), 1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@final
class AgainstError:
    """Predicted variance and squared error of all values, binned by the prediction, in memory that does not grow with them.

    >>> values = AgainstError()
    >>> values.add(torch.tensor([1.0, 4.0, 4.0]), torch.tensor([2.0, 3.0, 5.0]))
    >>> values.bins()
    {'predicted_variance': [1.0, 4.0], 'mean_squared_error': [2.0, 4.0], 'count': [1, 2]}
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(3, FINE_BINS, dtype=torch.float64)
        """For each fine bin: how many values, the sum of their predicted variances, of their squared errors."""

    def add(self, variance: Tensor, square: Tensor) -> None:
        """Count values of one shape."""
        variance, square = variance.double().flatten(), square.double().flatten()
        position = (0.5 * variance.log() + WIDEST) * (FINE_BINS / (2 * WIDEST))
        fine = position.clamp(0, FINE_BINS - 1).long()
        for row, weights in zip(self.totals, (None, variance, square), strict=True):
            row += torch.bincount(fine, weights, FINE_BINS).cpu()

    def bins(self) -> dict[str, list[float]]:
        """Means in bins of about equal counts, by growing prediction; fewer than ten where many predictions are the same."""
        counts = self.totals[0]
        middle = counts.cumsum(0) - 0.5 * counts
        which = (middle * (BINS / counts.sum())).long().clamp_max(BINS - 1)
        joined = torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, which, self.totals)
        return _means(*joined[:, joined[0] > 0])


def deciles(variance: Tensor, square: Tensor) -> dict[str, list[float]]:
    """The same bins of values ``(n,)`` that are all at hand.

    >>> deciles(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 3.0, 0.0]))
    {'predicted_variance': [1.0], 'mean_squared_error': [1.0], 'count': [3]}
    """
    if float(variance.max() - variance.min()) <= 1e-6 * float(variance.max()):  # all the same, but for rounding
        return _means(torch.tensor([len(variance)]), variance.sum().reshape(1), square.sum().reshape(1))
    parts = [part for part in torch.tensor_split(variance.argsort(), BINS) if len(part)]
    sums = [torch.stack([values[part].sum() for part in parts]) for values in (variance, square)]
    return _means(torch.tensor([len(part) for part in parts]), *sums)


def _means(counts: Tensor, variance: Tensor, square: Tensor) -> dict[str, list[float]]:
    return {
        "predicted_variance": (variance / counts).tolist(),
        "mean_squared_error": (square / counts).tolist(),
        "count": counts.long().tolist(),
    }


@final
class Correlations:
    r"""Correlation of residuals with those k places further along each axis, and between channels.

    .. math:: \hat\rho_k = \frac{\overline{(r_i - m)(r_{i+k} - m)}}{\overline{(r_i - m)^2}}

    with the mean m of all residuals, over all pairs of all examples and channels. Axes are named length (series), height and width
    (images), and time (frames of clips).

    >>> correlations = Correlations(spatial_dims=1)
    >>> correlations.add(torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]))
    >>> correlations.along_axes()
    {'length': {'autocorrelation': [1.0, -1.0, 1.0, -1.0], 'pairs': [4, 3, 2, 1]}}
    """

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims
        self.one = torch.zeros(3, dtype=torch.float64)
        """How many residuals, their sum, that of their squares."""
        self.pairs: dict[str, Tensor] = {}
        """For each axis and lag: how many pairs, the sums of first and second, of their products."""
        self.channels: list[Tensor] = []
        """Sums over everything else: (1,), of each channel, of each pair of channels."""

    def add(self, residuals: Tensor) -> None:
        """Count residuals ``(batch, [time,] C, *space)``."""
        r = residuals.double()
        self.one += torch.stack([_count(r), r.sum().cpu(), r.square().sum().cpu()])
        names = AXES[self.spatial_dims]
        axes = dict(zip(names, range(-len(names), 0), strict=True))
        if r.dim() > self.spatial_dims + 2:
            axes["time"] = -self.spatial_dims - 2
        for name, axis in axes.items():
            self.pairs[name] = self.pairs.get(name, 0) + _pairs(r, axis)
        values = r.movedim(-1 - self.spatial_dims, 0).flatten(1)
        if 1 < len(values) <= LARGEST_MATRIX:
            sums = [_count(values[0]), values.sum(1).cpu(), (values @ values.T).cpu()]
            self.channels = [old + new for old, new in zip(self.channels, sums, strict=True)] if self.channels else sums

    @property
    def sums(self) -> list[Tensor]:
        """What is added up over examples."""
        return [self.one, *self.pairs.values(), *self.channels]

    def along_axes(self) -> dict[str, dict[str, list[float]]] | None:
        """For each axis the correlations at lags 0, 1, ..., at most 8, and how many pairs each comes from.

        None where residuals do not vary, or have no axis.
        """
        count, total, squares = self.one.tolist()
        mean = total / count
        variance = squares / count - mean**2
        if not self.pairs or variance <= ROUNDING * squares / count:
            return None
        found = {}
        for name, (n, first, second, products) in self.pairs.items():
            covariance = (products - mean * (first + second)) / n + mean**2
            pairs = [int(count), *n.long().tolist()]
            found[name] = {"autocorrelation": [1.0, *(covariance / variance).tolist()], "pairs": pairs}
        return found

    def between_channels(self) -> list[list[float]] | None:
        """The correlation matrix; None for one channel, for more than 16, or where one does not vary."""
        if not self.channels:
            return None
        count, sums, products = self.channels
        covariance = products / count - torch.outer(sums, sums) / count**2
        variance = covariance.diagonal()
        if not (variance > ROUNDING * products.diagonal() / count).all():
            return None
        deviation = variance.sqrt()
        matrix: list[list[float]] = (covariance / torch.outer(deviation, deviation)).tolist()
        return matrix

    def report(self) -> dict[str, Any]:
        """Both, with the number of residuals that they come from."""
        return {"axes": self.along_axes(), "channels": self.between_channels(), "count": int(self.one[0])}


def _count(values: Tensor) -> Tensor:
    return torch.tensor(values.numel(), dtype=torch.float64)


def _pairs(r: Tensor, axis: int) -> Tensor:
    """Count, sums and sum of products of all pairs at each lag, ``(4, lags)``."""
    size = r.shape[axis]
    columns = []
    for lag in range(1, min(LAGS, size - 1) + 1):
        first, second = r.narrow(axis, 0, size - lag), r.narrow(axis, lag, size - lag)
        sums = [first.sum(), second.sum(), (first * second).sum()]
        columns.append(torch.stack([_count(first), *(total.cpu() for total in sums)]))
    return torch.stack(columns, 1) if columns else torch.zeros(4, 0, dtype=torch.float64)
