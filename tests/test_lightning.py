"""The LightningModule: its loss is the negative ELBO, and a trainer trains it; alone and on two processes with the exact σ."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from launched import results_of
from test_processes import Case, toy_data, toy_vae
from torch.utils.data import DataLoader

from sigma_vae.config import TrainingConfig
from sigma_vae.types import Batch

pl = pytest.importorskip("pytorch_lightning")

from sigma_vae.lightning import VAEModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:::lightning_fabric")


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**(quiet | {"accelerator": "cpu", "devices": 1} | options))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x, torch.zeros(len(x))], lambda x: Batch(x, torch.arange(len(x)))])
def test_the_loss_is_the_negative_bound(form):
    vae, x = toy_vae(Case()).train(), toy_data().values("train")[:10]
    module = VAEModule(vae)
    module.log = module.log_dict = lambda *_, **__: None
    module.trainer = trainer()
    loss = module.training_step(form(x), 0)
    torch.testing.assert_close(loss, -vae.elbo(x).total.mean())


def test_a_trainer_of_ones_own_trains_it():
    class Mine(VAEModule):
        def on_train_epoch_end(self) -> None:
            losses.append(float(self.trainer.callback_metrics["train/loss_nats"]))

    losses: list[float] = []
    vae, data = toy_vae(Case("gaussian/shared")), toy_data()
    loader, held_out = (DataLoader(data.values(split), batch_size=16) for split in ("train", "validation"))
    module = Mine(vae, TrainingConfig(learning_rate=5e-3))
    mine = trainer(max_epochs=2)
    mine.fit(module, loader, held_out)
    assert losses[1] < losses[0]
    assert math.isfinite(float(mine.callback_metrics["validation/elbo_nats"]))
    rates = [group["lr"] for group in mine.optimizers[0].param_groups]
    assert rates == pytest.approx([5e-3, 5e-2])  # the shared σ has its own
    trainer(fast_dev_run=True).fit(module, loader, held_out)


def shares(_: Path) -> dict[str, torch.Tensor]:
    """One step of each process's share, with gradients averaged as DDP does."""
    warnings.simplefilter("ignore")
    from sigma_vae.training.distributed import joined

    with joined(torch.device("cpu")) as us:
        vae, x = toy_vae(Case()).train(), toy_data().values("train")[:9]
        share = x[:4] if us.world_size == 2 and us.rank == 0 else x[4:] if us.world_size == 2 else x
        module = VAEModule(vae)
        module.log = module.log_dict = lambda *_, **__: None
        module.trainer = trainer()
        wrapped = torch.nn.parallel.DistributedDataParallel(_Step(module)) if us.world_size == 2 else _Step(module)
        loss = wrapped(share)
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad for name, p in vae.named_parameters()}


class _Step(torch.nn.Module):
    def __init__(self, module: VAEModule) -> None:
        super().__init__()
        self.vae = module.vae
        self.step = module.training_step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x, 0)


def test_two_processes_have_loss_and_gradient_of_one(tmp_path):
    alone = shares(tmp_path)
    for found in results_of(2, shares, tmp_path):
        for name, truth in alone.items():
            torch.testing.assert_close(found[name], truth, rtol=1e-9, atol=1e-11, msg=name)
