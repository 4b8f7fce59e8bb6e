"""Batches hand out every example once, in an order that can be repeated, shared out and resumed."""

import inspect

import numpy as np
import pytest
import torch

from sigma_vae.data import Batches, Scaling, Splits
from sigma_vae.data.stores import InMemory


def numbered(examples=23):
    """Splits whose example i is the level i."""
    part = torch.arange(examples, dtype=torch.uint8).reshape(-1, 1, 1)
    one = InMemory(part[:1])
    return Splits("numbers", InMemory(part), one, one, Scaling(levels=256), record={})


def seen(batches):
    return [batch.positions.tolist() for batch in batches]


def flat(parts):
    return [index for part in parts for index in part]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "world_size"), [(5, 1), (23, 1), (100, 1), (5, 2), (5, 3), (9, 4), (23, 23), (7, 2)])
def test_ranks_share_every_batch(batch_size, world_size, shuffle):
    options = {"shuffle": shuffle, "seed": 3}
    whole = seen(numbered().batches("train", batch_size, **options))
    ranks = [
        seen(numbered().batches("train", batch_size, **options, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == whole
    assert sorted(flat(whole)) == list(range(23))
    for parts in zip(*ranks, strict=True):
        sizes = [len(part) for part in parts]
        assert 1 <= min(sizes)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("levels", [2, 17, 256, 4096, 65536])
def test_scaling_is_exact(levels):
    stored = torch.arange(levels, dtype=torch.int32 if levels > 256 else torch.int64).reshape(-1, 1)
    (batch,) = Batches(InMemory(stored.to(torch.uint8) if levels <= 256 else stored), Scaling(levels), levels)
    expected = (np.arange(levels, dtype=np.float64) / (levels - 1)).astype(np.float32)
    assert np.array_equal(batch.x[:, 0].numpy(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scaling_on_the_device_is_exact():
    splits = numbered()
    batches = splits.batches("train", 23, device="cuda", shuffle=True)
    (batch,) = batches
    assert batch.x.is_cuda
    assert not batch.positions.is_cuda
    assert torch.equal(batch.x.cpu(), splits.values("train")[batch.positions])
    assert batches.store is splits.batches("train", 5, device="cuda").store


def test_batch_is_what_the_index_says():
    splits = numbered()
    for batch in splits.batches("train", 5, shuffle=True):
        assert batch.x.dtype == torch.float32
        assert batch.positions.dtype == torch.int64
        assert torch.equal(batch.x, splits.values("train")[batch.positions])


def test_order_is_a_function_of_seed_and_epoch():
    first, again = (numbered().batches("train", 5, shuffle=True, seed=4) for _ in range(2))
    epochs = [seen(first) for _ in range(3)]
    assert epochs == [seen(again) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert seen(numbered().batches("train", 5, shuffle=True, seed=5)) not in epochs
    global_state = torch.get_rng_state()
    seen(first)
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.mark.parametrize("stop", range(11))
def test_resuming_equals_going_on(stop):
    straight = numbered().batches("train", 5, shuffle=True)
    expected = [index for _ in range(3) for index in seen(straight)]
    batches = numbered().batches("train", 5, shuffle=True)
    seen_one_by_one = []
    while len(seen_one_by_one) < stop:
        for batch in batches:
            seen_one_by_one.append(batch.positions.tolist())
            if len(seen_one_by_one) == stop:
                break
    resumed = numbered().batches("train", 5, shuffle=True)
    resumed.load_state_dict(batches.state_dict())
    iter(resumed)  # making an iterator takes nothing
    while len(seen_one_by_one) < len(expected):
        seen_one_by_one.extend(seen(resumed))
    assert seen_one_by_one == expected


def test_an_iteration_left_early_starts_a_new_epoch():
    straight = numbered().batches("train", 5, shuffle=True)
    epochs = [seen(straight) for _ in range(2)]
    batches = numbered().batches("train", 5, shuffle=True)
    assert next(iter(batches)).positions.tolist() == epochs[0][0]
    assert seen(batches) == epochs[1]
    evaluation = numbered().batches("train", 5)
    next(iter(evaluation))
    assert flat(seen(evaluation)) == list(range(23))


def test_state_of_another_order_is_refused():
    batches = numbered().batches("train", 5, shuffle=True)
    next(iter(batches))
    for options in ({"seed": 1}, {"limit": 20}, {"shuffle": False}):
        with pytest.raises(ValueError, match="cannot go on in the middle of an epoch"):
            numbered().batches("train", 5, **{"shuffle": True, **options}).load_state_dict(batches.state_dict())
    seen(batches)
    other = numbered().batches("train", 7, shuffle=True)
    other.load_state_dict(batches.state_dict())  # between epochs, nothing is lost
    assert other.state_dict()["epoch"] == 2


def test_limit_takes_the_first_examples():
    batches = numbered().batches("train", 5, limit=7)
    assert seen(batches) == [[0, 1, 2, 3, 4], [5, 6]]
    assert len(batches) == 2
    assert flat(seen(numbered().batches("train", 5, limit=100))) == list(range(23))


def test_batches_copy_nothing():
    splits = numbered()
    assert splits.batches("train", 5).store is splits.train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size counts examples and is at least 1, got 0"),
        ({"seed": -1}, "seed of the order is not negative, got -1"),
        ({"limit": 0}, "limit counts the examples"),
        ({"rank": 2, "world_size": 2}, "rank is one of"),
        ({"batch_size": 2, "world_size": 3}, "leave 2 for the last one|leave 1 for the last one"),
        ({"batch_size": 11, "world_size": 2}, "23 examples in batches of 11 leave 1 for the last one; batch_size 12 would do"),
        ({"world_size": 24}, "use at most 23 processes"),
        ({"split": "tset"}, "a split is one of train, validation, test, got 'tset'"),
    ],
)
def test_bad_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        numbered().batches(**{"split": "train", "batch_size": 5, **options})


def test_no_batches_of_nothing():
    with pytest.raises(ValueError, match="at least one example"):
        Batches(InMemory(torch.zeros(0, 1)), Scaling(), 5)
    with pytest.raises(ValueError, match="every split needs an example"):
        Splits("none", InMemory(torch.zeros(1, 1)), InMemory(torch.zeros(0, 1)), InMemory(torch.zeros(1, 1)), Scaling(), {})


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning's own code
def test_lightning_trains_and_resumes_in_the_middle_of_an_epoch(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append(batch.positions.tolist())
            return (self.weight - batch.x).square().mean()

        def validation_step(self, batch, _):
            assert len(batch.x) in (5, 3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(steps, checkpoint=None):
        recorder = Recorder()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = numbered().batches("train", 5, shuffle=True)
        known = inspect.signature(trainer.fit).parameters
        whole = {"weights_only": False} if "weights_only" in known else {}  # older Lightning loads whole checkpoints anyway
        trainer.fit(recorder, batches, numbered().batches("train", 5), ckpt_path=checkpoint, **whole)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return recorder.seen

    whole = fit(13)
    straight = numbered().batches("train", 5, shuffle=True)
    assert whole == [index for _ in range(3) for index in seen(straight)][:13]
    for steps in (3, 5, 7):
        start = fit(steps)
        assert start + fit(13, tmp_path / f"{steps}.ckpt") == whole
