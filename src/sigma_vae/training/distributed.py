"""Several processes: group, exchanges, shares of the data, sharded weights, batch statistics, noise, and Fabric."""

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from itertools import chain, count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar, final

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.registry import needed_by
from sigma_vae.vae import VAE

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Made = TypeVar("Made")

PATIENCE = timedelta(days=1)
"""Time that a process waits for others, one of which may be measuring alone. None waits for one that has died."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)


class ElsewhereError(RuntimeError):
    """The first process failed at what all of them need; it says why."""


class Processes(NamedTuple):
    """This process among those that train together; the default is one process alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    per_node: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0


def processes() -> Processes:
    """This process among those of torch's default group, or alone.

    >>> processes()
    Processes(rank=0, world_size=1, local_rank=0, per_node=1)
    """
    if _alone.get() or not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Processes(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


_newest_group: list[Any] = []
"""Kept beyond its end. Were a DistributedDataParallel the last to hold the group, then freeing it would wait for a thread of the
group while it holds Python's lock, and that thread may be waiting for the lock."""

_groups = count(1)
"""Each group leaves the addresses of its processes under a name of its own, so that none reads those of a group before."""


@cache
def _meeting_point() -> tuple[Any, int, int]:
    """The store in which processes find each other, kept as long as this one lives; its rank, and how many they are."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    return store, rank, size


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Form a group with the processes that ``torchrun`` has started, and leave it at the end.

    A single process, or one that is in a group already, stays as it is. GPUs talk by NCCL, CPUs by gloo.

    >>> with joined(torch.device("cpu")) as us:
    ...     us.world_size
    1
    """
    if not _launched() or distributed.is_initialized():
        yield processes()
        return
    store, rank, size = _meeting_point()
    own = distributed.PrefixStore(f"group{next(_groups)}", store)  # type: ignore[attr-defined]  # exported by a star
    where: dict[str, Any] = {"store": own, "rank": rank, "world_size": size}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=device, **where)
    else:
        distributed.init_process_group("gloo", timeout=PATIENCE, **where)
    _newest_group[:] = [distributed.group.WORLD]
    try:
        distributed.barrier()  # so that none has left the group, and maybe ended, before the last has found the others
        yield processes()
    finally:
        distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """This process's own GPU where ``torchrun`` has started several processes; any other device as it is.

    Raises:
        ValueError: one GPU is asked for by all of them, or there are fewer GPUs than processes.
    """
    if device.type != "cuda" or not _launched():
        return device
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(f"each process takes a GPU of its own, got device {str(device)!r} for all of them; ask for cuda")
    if local_rank >= gpus:
        raise ValueError(f"each process takes a GPU of its own, and this machine has {gpus}; start as many processes")
    return torch.device("cuda", local_rank)


def from_first(make: Callable[[], Made]) -> Made:
    """Let the first process alone make something (files, say), and give it to all; the others wait.

    Raises:
        ElsewhereError: on the others, where the first one fails.

    >>> from_first(lambda: 1 + 1)
    2
    """
    us = processes()
    if us.world_size == 1:
        return make()
    message: list[Any] = [None, None]  # what was made, why it was not
    failure: BaseException | None = None
    if us.first:
        token = _alone.set(True)
        try:
            message[0] = make()
        except BaseException as error:
            failure, message[1] = error, f"{type(error).__name__}: {error}"
        finally:
            _alone.reset(token)
    distributed.broadcast_object_list(message)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise ElsewhereError(f"the first process stopped: {message[1]}")
    made: Made = message[0]
    return made


@contextmanager
def first_of_node_first() -> Iterator[None]:
    """Let one process of each machine run the block before the others, so that they find its caches on disk."""
    us = processes()
    if us.local_rank:
        distributed.barrier()
    try:
        yield
    finally:
        if us.world_size > 1 and not us.local_rank:
            distributed.barrier()


def fabric_for(vae: VAE, config: TrainingConfig, device: torch.device) -> "Fabric":
    """Lightning Fabric for the processes of ``torchrun``, with DDP or FSDP; one process alone goes without.

    The environment is given explicitly: Fabric must not mistake a cluster scheduler's variables for other processes.
    """
    with needed_by("training on several processes"):  # its import takes longer than torch's
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    def sharded(module: nn.Module, mesh: "DeviceMesh") -> nn.Module:
        shard(vae, mesh["data_parallel"])
        return module

    us = processes()
    fabric = Fabric(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=us.per_node,
        num_nodes=us.world_size // us.per_node,
        strategy=ModelParallelStrategy(sharded, data_parallel_size=us.world_size, tensor_parallel_size=1)
        if is_sharded(config)
        else DDPStrategy(),
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric


def _launched() -> bool:
    needed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return needed <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1


def shared(data: Splits, split: SplitName, size: int, device: torch.device | str = "cpu", limit: int | None = None) -> Batches:
    """This process's share of a split, in order, for passes whose results do not depend on the batch size.

    ``size`` examples are in a batch of all processes together; more where the last batch would leave a process without
    any. With ``limit``, only the first so many examples are read.

    Raises:
        ValueError: there are fewer examples than processes.
    """
    us = processes()
    examples = min(len(data.store(split)), limit or len(data.store(split)))
    sizes = range(max(size, us.world_size), max(size, us.world_size, examples) + 1)
    fitting = next((n for n in sizes if (examples % n or n) >= us.world_size), size)
    return data.batches(split, fitting, device=device, rank=us.rank, world_size=us.world_size, limit=limit)


@torch.no_grad()
def sum_over_all(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in float64, detached; the same on each of them.

    >>> sum_over_all(torch.ones(2))
    tensor([1., 1.], dtype=torch.float64)
    """
    total = values.detach().double()
    if processes().world_size > 1:
        total = total.clone()
        distributed.all_reduce(total)
    return total


def rows_of_all(values: Tensor) -> Tensor:
    """Collect a tensor of each process, ``(processes, ...)``, in float64, detached; the same result on all.

    >>> rows_of_all(torch.ones(2))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    us = processes()
    rows = values.new_zeros((us.world_size, *values.shape), dtype=torch.float64)
    rows[us.rank] = values.detach()
    return sum_over_all(rows)


def mean_over_all(values: Tensor) -> Tensor:
    """The mean over the examples of all processes, detached: over the first axis, ``(examples, ...)`` to ``(...)``.

    >>> mean_over_all(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """
    if processes().world_size == 1:
        return values.detach().mean(0)
    total = sum_over_all(torch.cat([values.double().sum(0).flatten(), values.new_tensor([len(values)]).double()]))
    return (total[:-1] / total[-1]).reshape(values.shape[1:]).to(values.dtype)


def on_any(flag: bool) -> bool:
    """Whether the flag is true on any process; the same answer on all.

    >>> on_any(False)
    False
    """
    return each_on_any(flag)[0]


def each_on_any(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process; the same answer on all, from one exchange.

    >>> each_on_any(False, True)
    [False, True]
    """
    if processes().world_size == 1:
        return list(flags)
    return sum_over_all(torch.tensor(flags, dtype=torch.float64)).bool().tolist()


def noise_states(device: torch.device) -> list[list[Tensor]]:
    """The states of every process's generators, CPU first; each process must call this."""
    mine = [torch.get_rng_state()]
    if device.type == "cuda":
        mine.append(torch.cuda.get_rng_state(device))
    states: list[Any] = [mine]
    if processes().world_size > 1:
        states = [None] * processes().world_size
        distributed.all_gather_object(states, mine)
    return states


def set_noise(states: list[list[Tensor]] | None, seed: int, step: int, device: torch.device) -> None:
    """Restore each process's noise from :func:`noise_states`, or seed it if there is none (a new training).

    Resumed on another number of processes, the training goes on with the same weights, the same data in the same order,
    and other noise; a line on stderr says so.
    """
    us = processes()
    known = 1 if states is None else len(states)
    if states is not None and known == us.world_size:
        cpu, *cuda = states[us.rank]
        torch.set_rng_state(cpu)
        if cuda and device.type == "cuda":
            torch.cuda.set_rng_state(cuda[0], device)
    elif us.world_size > 1:
        own = np.random.SeedSequence((seed, step, us.world_size, us.rank))
        torch.manual_seed(int(own.generate_state(1, np.uint64)[0]))
    if known != us.world_size and step and us.first:
        says = f"begun on {known} and going on with {us.world_size} processes: same weights and data, other noise from here on"
        print(says, file=sys.stderr)


def is_sharded(config: TrainingConfig) -> bool:
    """Whether weights are sharded, which takes several processes."""
    return config.shard_weights and processes().world_size > 1


def to_be_trained(vae: VAE, config: TrainingConfig) -> VAE:
    """The model itself, or a copy whose weights can be sharded: the model stays whole, and takes the best weights.

    Raises:
        ValueError: the network names no parts to shard, or weights are to be averaged as well.
    """
    if config.shard_weights and not list(vae.network.shards()):
        raise ValueError(
            f"shard_weights shards the blocks of a hierarchical network, and {type(vae.network).__name__} names none; leave it off: the"
            " gradients of several processes are shared anyway"
        )
    if config.shard_weights and config.decay is not None:
        raise ValueError("shard_weights and ema_decay do not go together, as averaging copies whole networks; leave one off")
    return copy.deepcopy(vae) if is_sharded(config) else vae


def shard(vae: VAE, mesh: "DeviceMesh") -> None:
    """Give each process a part of every block; a block is whole only while it computes.

    The likelihood's own parameters (a shared σ, a ν) stay on every process.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in vae.network.shards():
        fully_shard(block, mesh=mesh)
    fully_shard(vae.network, mesh=mesh)
    register_fsdp_forward_method(vae.network, "infer")


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state with sharded tensors put together; each process must call this."""
    return {name: _whole(value) for name, value in module.state_dict().items()}


def load_whole_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state into a module whose weights may be sharded; it has to have all of them, and no others."""
    own = module.state_dict()
    module.load_state_dict({name: _like(own[name], value) if name in own else value for name, value in state.items()})


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state with sharded tensors put together; each process must call this."""
    state = optimizer.state_dict()
    moments = {number: {name: _whole(value) for name, value in kept.items()} for number, kept in state["state"].items()}
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimiser whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like(parameters[number], value) if value.dim() else value for name, value in kept.items()}
        for number, kept in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _is_part(value: object) -> "TypeGuard[DTensor]":
    """Whether a tensor is sharded. Only a group of processes has such ones, and torch's module of them is slow to import."""
    if processes().world_size == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if _is_part(value) else value


def _like(target: Tensor, value: Tensor) -> Tensor:
    """The value, sharded as the target is."""
    if not _is_part(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are not sharded over processes."""
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= processes().world_size


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together; some may be sharded.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> gradient_norm([weight])
    tensor(5.)
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [gradient for gradient in gradients if _is_part(gradient)]
    whole = [gradient for gradient in gradients if not _is_part(gradient)]
    if not sharded:
        return torch.nn.utils.get_total_norm(whole)
    norms = [_whole(torch.nn.utils.get_total_norm(sharded)), *(gradient.norm() for gradient in whole)]
    total: Tensor = torch.stack(norms).norm()
    return total


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale gradients of this norm down to the largest norm allowed."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(_is_part(p.grad) for p in parameters):
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return
    factor = float((largest / (norm + 1e-6)).clamp(max=1))
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


@final
class GlobalBatchNorm(nn.Module):
    r"""Batch normalisation over all processes, in place of ``nn.BatchNorm1d``, ``2d`` or ``3d``.

    Process p has :math:`n_p` values of a channel, their mean :math:`m_p` and their squares' sum :math:`s_p` about it.
    In training

    .. math::
        n = \sum_p n_p, \quad m = \sum_p \frac{n_p}{n} m_p, \quad v = \frac1n \sum_p \left( s_p + n_p (m_p - m)^2 \right), \quad
        \hat x = \frac{x - m}{\sqrt{v + \epsilon}}, \quad y = \gamma \hat x + \beta

    (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance": nothing large cancels). With g what
    all processes minimise together, differentiated in y, the gradient in x is

    .. math::
        \frac{\gamma}{\sqrt{v + \epsilon}} \left( g - \frac1n \sum g - \frac{\hat x}n \sum g \hat x \right),

    sums being over the values of all processes (Ioffe and Szegedy 2015, arXiv 1502.03167, section 3). The gradients of
    γ and β are those of the share: data parallelism adds them up. Running statistics follow m and v n / (n − 1), alike
    on all processes. In eval mode it normalises by them, without communication.

    It shares the tensors of ``norm``, which has running statistics. Every process must call it as often as the others,
    forward and backward; a share may be empty.

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
        # A compiled graph ends where processes talk. Not as a decorator, which would import the compiler with this module.
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign, no-untyped-call]

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
    """Let batch normalisation take its statistics over all processes for as long as this lasts.

    The model's state keeps its names and shapes.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> with global_statistics(network):
    ...     type(network[1]).__name__  # of one process
    'BatchNorm1d'
    """
    if processes().world_size == 1:
        yield
        return
    modules = model.named_modules(remove_duplicate=False)
    norms = {path: norm for path, norm in modules if isinstance(norm, _BatchNorm) and _replaceable(norm)}
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


def check_processes(vae: VAE) -> None:
    """Refuse a network whose batch normalisation :func:`global_statistics` cannot share between several processes.

    Raises:
        ValueError: it is of another kind than ``nn.BatchNorm1d``, ``2d`` or ``3d``, or has no running statistics:
            validation, too, then takes the batch's.
    """
    norms = [module for module in vae.modules() if isinstance(module, _BatchNorm) and not _replaceable(module)]
    if processes().world_size > 1 and norms:
        raise ValueError(
            f"{type(vae.network).__name__} normalises by the statistics of a batch with {norms[0]}, and each process would take"
            " those of its share; use nn.BatchNorm1d, 2d or 3d with running statistics, whose batch is that of all processes, or"
            " train it on one process and evaluate it on any number"
        )


def _replaceable(norm: _BatchNorm) -> bool:
    return type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and norm.track_running_stats


class _Moments(NamedTuple):
    """Number ``()`` of a channel's values on all processes, their mean and variance ``(C,)``; in float32 at least."""

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
