"""Batch normalisation on several processes: the batch is that of all of them, as it is on one."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from sigma_vae.training.processes import processes
from sigma_vae.training.shares import rows_of_all, sum_over_all

__all__ = ["GlobalBatchNorm", "global_statistics", "of_shares_alone"]

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@final
class GlobalBatchNorm(nn.Module):
    r"""Takes the place of ``nn.BatchNorm1d``, ``2d`` or ``3d`` where several processes train, each with its share of the batch.

    Process p has :math:`n_p` values of a channel, their mean :math:`m_p` and their squares' sum :math:`s_p` about it. In training

    .. math::
        n = \sum_p n_p, \quad m = \sum_p \frac{n_p}{n} m_p, \quad v = \frac1n \sum_p \left( s_p + n_p (m_p - m)^2 \right), \quad
        \hat x = \frac{x - m}{\sqrt{v + \epsilon}}, \quad y = \gamma \hat x + \beta

    (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance": nothing large cancels). With g what all processes
    minimise together, differentiated in y, the gradient in x is

    .. math::
        \frac{\gamma}{\sqrt{v + \epsilon}} \left( g - \frac1n \sum g - \frac{\hat x}n \sum g \hat x \right),

    sums being over the values of all processes (Ioffe and Szegedy 2015, arXiv 1502.03167, section 3). The gradients of γ and β are
    those of the share: data parallelism adds them up. Running statistics follow m and v n / (n − 1), alike on all processes. In eval
    mode they are what is normalised by, and nothing is said between processes.

    Every process must call it as often as the others, forward and backward; a share may be empty.

    Args:
        norm: whose parameters and running statistics are taken, the tensors themselves; it has running statistics.

    Shapes:
        x and result ``(n, C, *space)``, n of this process.

    >>> norm, x = nn.BatchNorm2d(3), torch.rand(4, 3, 2, 2)
    >>> torch.allclose(GlobalBatchNorm(norm)(x), norm(x), atol=1e-5)
    True
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.momentum = norm.momentum
        self.register_parameter("weight", norm.weight)  # in torch's order, which is that of a saved state
        self.register_parameter("bias", norm.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.train(norm.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled graph ends where processes talk
    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of all processes in training, by the running ones else."""
        if not self.training:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        moments = _moments_of_all(x)
        self._track(moments)
        result: Tensor = _Normalised.apply(x, self.weight, self.bias, self.eps, *moments)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _track(self, moments: "_Moments") -> None:
        self.num_batches_tracked.add_(1)
        # Without a momentum, torch's running statistics are the mean over all batches.
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = moments.variance * (moments.number / (moments.number - 1))
        for running, new in ((self.running_mean, moments.mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), momentum)


@contextmanager
def global_statistics(model: nn.Module) -> Iterator[None]:
    """Where there are several processes, let batch normalisation take its statistics over all of them for as long as this lasts.

    Names and shapes of the model's state are those that it has without.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> with global_statistics(network):
    ...     type(network[1]).__name__  # of one process
    'BatchNorm1d'
    """
    if processes().world_size == 1:
        yield
        return
    found = ((path, module) for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm))
    norms = {path: norm for path, norm in found if _replaceable(norm)}
    instead = {norm: GlobalBatchNorm(norm) for norm in norms.values()}  # one that is used in two places stays one
    for path, norm in norms.items():
        model.set_submodule(path, instead[norm])
    try:
        yield
    finally:
        for norm, new in instead.items():
            for name, tensor in chain(new.named_parameters(), new.named_buffers()):  # perhaps on another device by now
                setattr(norm, name, tensor)
            norm.train(new.training)
        for path, norm in norms.items():
            model.set_submodule(path, norm)


def of_shares_alone(model: nn.Module) -> list[nn.Module]:
    """Batch normalisation that :func:`global_statistics` does not make that of all processes.

    It is of another kind than ``nn.BatchNorm1d``, ``2d`` or ``3d``, or has no running statistics: validation, too, then takes the batch's.

    >>> [type(norm).__name__ for norm in of_shares_alone(nn.Sequential(nn.BatchNorm1d(2), nn.SyncBatchNorm(2)))]
    ['SyncBatchNorm']
    """
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if not _replaceable(norm)]


def _replaceable(norm: _BatchNorm) -> bool:
    return type(norm) in KINDS and norm.track_running_stats


class _Moments(NamedTuple):
    """Of the values of all processes: how many a channel has ``()``, their mean and variance ``(C,)``; in float32 at least."""

    number: Tensor
    mean: Tensor
    variance: Tensor


@torch.no_grad()
def _moments_of_all(x: Tensor) -> _Moments:
    exact, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    count = x.numel() // channels
    mean = x.sum(_shared(x), dtype=exact) / max(count, 1)
    squares = (x - _beside(x, mean)).square().sum(_shared(x))
    rows = rows_of_all(torch.cat([mean.new_full((1,), count), mean, squares]))
    counts, means, squares = torch.split(rows, [1, channels, channels], 1)
    number = counts.sum()
    mean = (counts * means).sum(0) / number
    variance = (squares + counts * (means - mean).square()).sum(0) / number
    return _Moments(*(part.to(exact) for part in (number, mean, variance)))


class _Normalised(torch.autograd.Function):
    """By moments that are statistics of x, which its gradient knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *moments: Tensor) -> Tensor:
        number, mean, variance = moments
        ctx.save_for_backward(x, weight, number, mean, torch.rsqrt(variance + eps))
        return functional.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, number, mean, inverse = ctx.saved_tensors
        upstream = upstream.to(mean.dtype)
        normal = (x - _beside(x, mean)) * _beside(x, inverse)
        sums = torch.stack([upstream.sum(_shared(x)), (upstream * normal).sum(_shared(x))])
        means = (sum_over_all(sums) / number).to(sums.dtype)  # asked of all, whatever needs a gradient here
        factor = inverse if weight is None else inverse * weight
        of_x = _beside(x, factor) * (upstream - _beside(x, means[0]) - normal * _beside(x, means[1]))
        of_bias, of_weight = (part if needed else None for part, needed in zip(sums, ctx.needs_input_grad[2:0:-1], strict=True))
        return of_x.to(x.dtype), of_weight, of_bias, None, None, None, None


def _shared(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [0, *range(2, x.dim())]


def _beside(x: Tensor, values: Tensor) -> Tensor:
    """Values ``(C,)`` of channels, in a shape that goes with x."""
    return values.reshape(-1, *[1] * (x.dim() - 2))
