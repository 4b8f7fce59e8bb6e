"""A small trained run that several tests look at."""

from pathlib import Path

import pytest

from sigma_vae import runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig

MODEL = ModelConfig(network="mlp", likelihood="gaussian/optimal", latent_dim=4, width=32, prior="standard")
TRAINING = TrainingConfig(epochs=6, batch_size=32, learning_rate=5e-3, log_every=5)


@pytest.fixture(scope="session")
def digits_config() -> RunConfig:
    """Seconds to train."""
    return RunConfig(DataConfig("digits"), MODEL, TRAINING, seed=1, device="cpu")


@pytest.fixture(scope="session")
def digits_run(digits_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests read it, and write elsewhere."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    runs.train(digits_config, folder, progress=False)
    return folder
