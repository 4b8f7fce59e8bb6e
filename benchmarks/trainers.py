"""One training by one trainer, timed from step to step; what :mod:`benchmarks.speed` runs, each in a process of its own.

A time is the processor's, which other work on the machine does not lengthen; there is one thread. pythae has its own trainer and VAE,
with the encoder and decoder of the network that all train: `pip install --no-deps pythae==0.1.2`, with cloudpickle, imageio, pydantic,
scikit-learn, scipy and tqdm.
"""

import io
import logging
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from benchmarks.plain import BATCH, LATENTS, RATE, PlainLoop, images_of, usual
from sigma_vae import VAE, Fixed, Gaussian, models
from sigma_vae.config import HardwareConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.data.stores import Store
from sigma_vae.networks import FlatNetwork
from sigma_vae.training import fit
from sigma_vae.types import Network


@dataclass
class Timed:
    """When each step began and the training ended, and what was trained."""

    network: Any
    starts: list[float] = field(default_factory=list)
    end: float = 0.0

    def milliseconds(self, warmup: int) -> float:
        """Of a step, what happens between epochs included, without the first ones."""
        return 1000 * (self.starts[-1] - self.starts[warmup]) / (len(self.starts) - 1 - warmup)


def tiny(data: Splits) -> FlatNetwork:
    """784-32-20-32-784: what is left is what surrounds a step."""
    size = data.train.shape.numel() if isinstance(data.train.shape, torch.Size) else torch.Size(data.train.shape).numel()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, 2 * LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 32), nn.ReLU(), nn.Linear(32, size), nn.Unflatten(1, data.shape))
    return FlatNetwork(encoder, decoder, LATENTS)


def network_named(name: str, data: Splits, seed: int) -> Network:
    """``tiny``, or one of the library's (``mlp 100``: of that width; ``usual conv``), with one feature channel a data channel."""
    torch.manual_seed(seed)
    if name == "tiny":
        return tiny(data)
    if name.startswith(USUAL):
        return usual(network_named(name.removeprefix(USUAL), data, seed))
    name, _, width = name.partition(" ")
    return models.network(name, data.shape, data.shape[0], width=int(width) if width else None)


def plain_loop(network: FlatNetwork, data: Splits, steps: int) -> Timed:
    """As :mod:`benchmarks.plain`, with σ = 1."""
    loop, timed = PlainLoop(network.encoder, network.decoder, sigma=1.0), Timed(network)
    loader = images_of(data)
    for x in islice((x for epoch in repeat(loader) for x in epoch), steps):
        timed.starts.append(time.process_time())
        loop.step(x)
    timed.end = time.process_time()
    return timed


def ours(network: Network, data: Splits, config: TrainingConfig, likelihood: Gaussian | None = None) -> Timed:
    """The library's trainer with everything on: bar, CSV, TensorBoard, validation, checkpoints; its final calibration is in the end."""
    timed = Timed(network)
    watched = replace(data, train=Watched(data.train, timed.starts, config.examples_per_step(data.values_per_example)))
    vae = VAE(network, likelihood or Gaussian(data.shape[0], Fixed(1.0), mean="unit"))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        fit(vae, watched, config, out=Path(folder) / "run", device="cpu")
    timed.end = time.process_time()
    return timed


@final
class Watched(Store):
    """A store that notes when training asks it for a batch."""

    def __init__(self, store: Store, starts: list[float], batch_size: int) -> None:
        self.store = store
        self.starts = starts
        self.batch_size = batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape

    def __len__(self) -> int:
        return len(self.store)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        if len(positions) == self.batch_size:
            self.starts.append(time.process_time())
        return self.store.take(positions, epoch)

    def select(self, rows: Tensor) -> Store:
        return self.store.select(rows)

    def to(self, device: torch.device) -> Store:
        return Watched(self.store.to(device), self.starts, self.batch_size)

    def fingerprint(self) -> str:
        return self.store.fingerprint()


def pythae(network: FlatNetwork, data: Splits, steps: int) -> Timed:
    """pythae's trainer and VAE: half the squared error and the KL, which is ``gaussian/fixed:1.0`` up to a constant."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = network.encoder

        def forward(self, x: Tensor) -> Any:
            mean, log_variance = self.body(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = network.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.body(z)))

    epochs, rest = divmod(steps, -(-len(data.train) // BATCH))
    values = data.values("train") if epochs else data.values("train")[: rest * BATCH]
    training, validation = (BaseDataset(x, torch.zeros(len(x))) for x in (values, data.values("validation")))
    model = PythaeVAE(VAEConfig(input_dim=data.shape, latent_dim=LATENTS), Encoder(), Decoder())
    timed = Timed(network)
    model.register_forward_pre_hook(lambda module, _: timed.starts.append(time.process_time()) if module.training else None)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=max(epochs, 1),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=RATE,
            no_cuda=True,
        )
        BaseTrainer(model, training, validation if epochs else None, config).train()
    timed.end = time.process_time()
    return timed


USUAL = "usual "
OFF = HardwareConfig(precision="float32", memory_format="contiguous", fused_optimiser="no", allocator="default", compile="no")
"""None of what the library chooses."""
OURS: dict[str, HardwareConfig] = {
    "ours, nothing chosen": OFF,
    "ours, retaining allocator": replace(OFF, allocator="retain"),
    "ours, fused optimiser": replace(OFF, fused_optimiser="yes"),
    "ours, bfloat16": replace(OFF, precision="bfloat16"),
    "ours, bfloat16, channels last": replace(OFF, precision="bfloat16", memory_format="channels-last"),
    "ours, one step a call": replace(OFF, steps_per_call=1),
    "ours, float32": HardwareConfig(precision="float32"),
    "ours, compiled": HardwareConfig(compile="yes"),
    "ours": HardwareConfig(),
    "ours, all": HardwareConfig(precision="bfloat16", memory_format="channels-last"),
}
"""What each lever gives by itself, what is chosen in float32, what is chosen, and what is chosen once bfloat16 is."""
WITH_LINEAR_PATH = "ours, principal start"
"""The library's default, which adds a linear encoder and decoder; the others start at random, as the same network has to."""


def train_one(case: str, network: str, data: Splits, steps: int, seed: int) -> Timed:
    """A case of the table: so many steps of 128 images, with σ = 1."""
    torch.set_num_threads(1)
    made = network_named(network, data, seed)
    if case in OURS or case == WITH_LINEAR_PATH:
        per_epoch = -(-len(data.train) // BATCH)
        amid = {"max_steps": steps} if steps < per_epoch else {}
        config = TrainingConfig(
            epochs=max(steps // per_epoch, 1),
            batch_size=BATCH,
            learning_rate=RATE,
            start="principal" if case == WITH_LINEAR_PATH else "random",
            hardware=OURS.get(case, HardwareConfig()),
        )
        return ours(made, data, replace(config, **amid))
    made = usual(made)
    assert isinstance(made, FlatNetwork)
    return {"pythae": pythae, "plain loop": plain_loop}[case](made, data, steps)
