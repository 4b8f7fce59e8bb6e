"""Weights, gradients and the optimiser's state in parts, one on each process (FSDP2), for networks that one GPU cannot train."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sigma_vae.config import TrainingConfig
from sigma_vae.networks import HierarchicalNetwork
from sigma_vae.training.processes import processes
from sigma_vae.vae import VAE

__all__ = ["average_gradients", "clip", "gradient_norm", "is_sharded", "shard", "to_be_trained", "whole"]


def is_sharded(config: TrainingConfig) -> bool:
    """Whether weights are shared out: on one process there is nobody to share with."""
    return config.shard_weights and processes().world_size > 1


def to_be_trained(vae: VAE, config: TrainingConfig) -> VAE:
    """The model itself, or where its weights are to be shared out, a copy: the model stays whole, and takes the best weights at the end.

    Raises:
        ValueError: the network has no blocks to share out, or weights are to be averaged as well.
    """
    if config.shard_weights and not isinstance(vae.network, HierarchicalNetwork):
        raise ValueError(
            f"shard_weights shares out the blocks of a hierarchical network, got {type(vae.network).__name__}; leave it off: the"
            " gradients of several processes are shared anyway"
        )
    if config.shard_weights and config.ema_decay is not None:
        raise ValueError("shard_weights and ema_decay do not go together, as averaging copies whole networks; leave one off")
    return copy.deepcopy(vae) if is_sharded(config) else vae


def shard(vae: VAE, mesh: DeviceMesh) -> None:
    """Give each process a part of every block; a block is whole only while it computes.

    What the likelihood learns (a shared σ, a ν) stays on every process.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in [module for module in vae.network.modules() if isinstance(module, nn.Sequential)]:
        fully_shard(block, mesh=mesh)
    fully_shard(vae.network, mesh=mesh)
    register_fsdp_forward_method(vae.network, "infer")


def whole(value: Tensor) -> Tensor:
    """The tensor itself, or where it is shared out, put together: each process must call this."""
    if not isinstance(value, DTensor):
        return value
    together: Tensor = value.full_tensor()
    return together


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over processes, of parameters that are not shared out."""
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= processes().world_size


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all gradients together, of which some may be shared out.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> gradient_norm([weight])
    tensor(5.)
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if len(whole) == len(gradients):
        return torch.nn.utils.get_total_norm(whole)
    parts = torch.nn.utils.get_total_norm([gradient for gradient in gradients if isinstance(gradient, DTensor)])
    assert isinstance(parts, DTensor)
    norms = [parts.full_tensor(), *(gradient.norm() for gradient in whole)]
    total: Tensor = torch.stack(norms).norm()
    return total


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Shorten a gradient of this norm to the largest allowed, as torch does; torch itself stumbles over what is partly shared out."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(isinstance(p.grad, DTensor) for p in parameters):
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return
    factor = float((largest / (norm + 1e-6)).clamp(max=1))
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(factor)
