"""How pytorch-lightning is told of the processes, and the noise that each of them has."""

import sys
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed

from sigma_vae.config import TrainingConfig
from sigma_vae.training.distributed import is_sharded, of_shares_alone, processes
from sigma_vae.vae import VAE

__all__ = ["OwnNoise", "check_processes", "environment", "strategy"]


class OwnNoise(pl.Callback):
    """Each process draws its own posterior noise; checkpoints hold the generators of all.

    Resumed on as many processes, each goes on with its noise. On another number the run goes on with the same weights, the same data in
    the same order, and other noise, which is said.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self.loaded: list[list[Tensor]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The generators of all processes: each must call this."""
        mine = [torch.get_rng_state()]
        if self.device.type == "cuda":
            mine.append(torch.cuda.get_rng_state(self.device))
        noise: list[Any] = [mine]
        if processes().world_size > 1:
            noise = [None] * processes().world_size
            distributed.all_gather_object(noise, mine)
        return {"noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until all is in place."""
        self.loaded = state_dict["noise"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after everything else of a checkpoint was taken over."""
        us = processes()
        known = 1 if self.loaded is None else len(self.loaded)
        if self.loaded is not None and known == us.world_size:
            cpu, *cuda = self.loaded[us.rank]
            torch.set_rng_state(cpu.cpu())
            if cuda and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda[0].cpu(), self.device)
        elif us.world_size > 1:
            entropy = (self.seed, trainer.global_step, us.world_size, us.rank)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        if known != us.world_size and trainer.global_step and us.first:
            said = (
                f"begun on {known} and going on with {us.world_size} processes: same weights and data, other noise from here on"
            )
            print(said, file=sys.stderr)


def check_processes(vae: VAE) -> None:
    """Refuse what several processes would train differently from one.

    Raises:
        ValueError: the network normalises by statistics of the batch, in a way of which each process would take its share's.
    """
    norms = of_shares_alone(vae)
    if processes().world_size > 1 and norms:
        raise ValueError(
            f"{type(vae.network).__name__} normalises by the statistics of a batch with {norms[0]}, and each process would take"
            " those of its share; use nn.BatchNorm1d, 2d or 3d with running statistics, whose batch is that of all processes, or"
            " train it on one process and evaluate it on any number"
        )


def strategy(config: TrainingConfig) -> Strategy | str:
    """What each process holds: all weights, or its part."""
    if is_sharded(config):
        return ModelParallelStrategy(processes().world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return "auto" if processes().world_size == 1 else DDPStrategy()


def environment() -> list[ClusterEnvironment]:
    """Who the others are, or that there are none: said, not guessed from what a cluster's scheduler left behind."""
    return [LightningEnvironment() if processes().world_size == 1 else TorchElasticEnvironment()]
