"""A step's loss over several processes and several micro-batches: each example counts the same, wherever and whenever it is seen."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig
from sigma_vae.training.objective import losses
from sigma_vae.training.processes import processes
from sigma_vae.training.shares import sum_over_all
from sigma_vae.types import Batch, Elbo
from sigma_vae.vae import VAE

__all__ = ["StepLoss", "step_loss"]


class StepLoss(NamedTuple):
    """The bound of each of this process's examples, and the mean over all processes' examples of what is minimised, in nats."""

    elbo: Elbo
    loss: Tensor


def step_loss(
    vae: VAE, batch: Batch, config: TrainingConfig, step: int = 0, elbo_of: Callable[..., Elbo] | None = None
) -> StepLoss:
    r"""What one step minimises: of the global batch, of which this process has its share, in ``config.accumulate`` micro-batches.

    With :math:`n_i` of all n examples in micro-batch i,

    .. math:: \text{loss} = \sum_i \frac{n_i}{n}\, L_i(\sigma_i), \qquad L_i = \text{mean over the micro-batch's examples}

    A σ that is solved is that of its micro-batch (over all processes), and so are the batch means of free bits and of KL balancing. Where σ
    is no statistic of the batch (fixed, learned, predicted) the gradient is that of the whole batch. Where it is one, the loss lies below
    the whole batch's, as the mean of :math:`\log \sigma_i` lies below the logarithm of the root mean square, and the gradient is
    that of this mean.

    All micro-batches but the last are differentiated here, and add to the gradients that are there; the loss returned has the gradient of
    the last one. Gradients are scaled by the number of processes, as data parallelism takes their mean over processes.

    Args:
        vae: the model, in training mode.
        batch: this process's share, at least one example.
        config: its weights of the objective, and how many micro-batches; never more than each process has examples.
        step: how many steps were taken.
        elbo_of: ``vae.elbo``, perhaps compiled.

    >>> from sigma_vae import Fixed, Gaussian, mlp
    >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, Fixed(0.5)))
    >>> batch = Batch(torch.rand(6, 1, 4, 4), torch.arange(6))
    >>> elbo, loss = step_loss(vae, batch, TrainingConfig(accumulate=3))
    >>> bool(torch.isclose(loss, -elbo.total.mean()))
    True
    """
    us = processes()
    if us.world_size == 1 and config.accumulate == 1:
        elbo, minimised = losses(vae, batch, config, step, elbo_of)
        return StepLoss(elbo, minimised.mean())
    examples = int(sum_over_all(torch.tensor(len(batch.x))))
    parts = max(1, min(config.accumulate, examples // us.world_size))
    found: list[Elbo] = []
    total = torch.zeros((), dtype=torch.float64, device=batch.x.device)
    for number, part in enumerate(_split(batch, parts), start=1):
        elbo, minimised = losses(vae, part, config, step, elbo_of)
        found.append(elbo)
        total += minimised.detach().sum()
        mine = minimised.sum() * (us.world_size / examples)
        if number < parts:
            with torch.autocast(mine.device.type, enabled=False):
                mine.backward()  # type: ignore[no-untyped-call]
    mean = (sum_over_all(total) / examples).to(mine.dtype)
    whole = Elbo(*(torch.cat([terms.detach() for terms in column]) for column in zip(*found, strict=True)))
    return StepLoss(whole, mine + (mean - mine.detach()))


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    masks = [None] * parts if batch.mask is None else batch.mask.tensor_split(parts)
    for x, positions, mask in zip(batch.x.tensor_split(parts), batch.positions.tensor_split(parts), masks, strict=True):
        yield Batch(x, positions, mask)
