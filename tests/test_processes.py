"""Several processes train and measure what one would: the laws of data parallelism, on gloo."""

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from launched import on_processes, results_of
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from sigma_vae import VAE, models
from sigma_vae.cli import main
from sigma_vae.conditions import Conditions
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Scaling, Splits
from sigma_vae.data.stores import InMemory, Labelled
from sigma_vae.training import NonFiniteLossError, fit
from sigma_vae.training.distributed import ElsewhereError, from_first, joined, mean_over_all, on_any, processes, shard, shared
from sigma_vae.training.objective import FILE, first_broken, load_broken_step
from sigma_vae.types import Elbo
from sigma_vae.vae import keyed_noise

SHAPE, LEVELS = (2, 4, 4), 17
EXAMPLES = 41  # in batches of 16 the last one has 9: 4 and 5 on two processes, 2, 2, 2 and 3 on four


LADDER = "hierarchical:4x1,4d4/1,4m1"


class Case(NamedTuple):
    likelihood: str = "gaussian/optimal"
    network: str = "mlp"
    observes: str = "density"
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    shape: tuple[int, ...] = SHAPE
    own_norm: bool = False
    """Of the codes, as a user's own network may have it."""
    conditions: Conditions | None = None
    loose: bool = False
    """A bias that batch norm or a softmax takes away has gradient 0, and Adam makes steps of what rounding leaves of that."""


CASES = {
    "optimal": Case(),
    "optimal-level": Case(observes="level"),
    "optimal-channel": Case("laplace/optimal-channel"),
    "optimal-pixel": Case("gaussian/optimal-pixel"),
    "optimal-image": Case("gaussian/optimal-image"),
    "running-minimum": Case("gaussian/running-minimum"),
    "shared": Case("gaussian/shared"),
    "student-t": Case("student-t:learned/optimal"),
    "per-pixel": Case("gaussian/per-pixel", options={"beta_nll": 0.5}),
    "clipped": Case(options={"gradient_clip_norm": 1.0, "ema_decay": 0.9, "patience": 1}),
    "ladder": Case(network=LADDER, options={"free_bits_nats": 0.5, "kl_balancing_steps": 2}),
    "residual": Case(network="residual"),
    "map": Case(network="spatial:f2c2", options={"random_crop": 2, "flip": True}, loose=True),
    "label": Case(conditions=Conditions.of({"label": [0, 1, 2]})),
    "sharded": Case(
        "gaussian/shared", "hierarchical:tiny", options={"shard_weights": True, "gradient_clip_norm": 5.0, "accumulate": 2}
    ),
    "sequence": Case(network="sequence", options={"ema_decay": 0.9}, shape=(4, 1, 8, 8), loose=True),
    "own-norm": Case(own_norm=True),
    "micro-batches": Case("gaussian/fixed:0.3", options={"accumulate": 3}),
}


FOUR = ("optimal", "optimal-channel", "shared", "per-pixel", "sequence")
"""On four processes."""


def toy_data(examples: int = EXAMPLES, shape: tuple[int, ...] = SHAPE, conditions: Conditions | None = None) -> Splits:
    x = torch.randint(0, LEVELS, (examples + 20, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    parts = [InMemory(part) for part in x.split([examples, 13, 7])]
    if conditions is not None:
        parts = [Labelled(part, conditions, torch.arange(len(part))[:, None] % 3.0) for part in parts]
    return Splits("toy", *parts, Scaling(LEVELS), record={}, clips=len(shape) == 4)


def toy_vae(case: Case) -> VAE:
    """In float64, under noise that belongs to the example: nothing then depends on who draws it."""
    torch.manual_seed(0)
    latent_dim = 3 if models.has_size(case.network, "latent_dim") else None
    config = ModelConfig(case.network, case.likelihood, latent_dim=latent_dim, width=8, observes=case.observes)
    vae = models.vae(config, case.shape[-3:], Scaling(LEVELS), clips=len(case.shape) == 4, conditions=case.conditions)
    if case.own_norm:
        vae.network.decoder.insert(0, torch.nn.BatchNorm1d(3, momentum=None))
    vae.double()

    def repeatable(self, x, context=None, mask=None, noise=None, *condition):
        keys = (x.flatten(1) * torch.arange(1, x[0].numel() + 1) * 16).sum(1).round().long()
        return type(self).infer(self, x.double(), context, mask, keyed_noise(keys) if noise is None else noise, *condition)

    vae.network.infer = MethodType(repeatable, vae.network)  # a copy of the network has its own
    return vae


def trained(out: Path, case: Case, *, resume: bool = False, epochs: int = 1, **options: Any) -> dict[str, Any]:
    """All that a training leaves."""
    vae, data = toy_vae(case), toy_data(shape=case.shape, conditions=case.conditions)
    config = TrainingConfig(**({"epochs": epochs, "batch_size": 16, "log_every": 1} | case.options | options))
    fit(vae, data, config, out=out, device="cpu", resume=resume, progress=False)
    with joined(torch.device("cpu")):  # so that the first process has written
        from_first(lambda: None)
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        metrics = [{name: float(value or math.nan) for name, value in row.items()} for row in csv.DictReader(file)]
    moments = {f"{key} of {n}": m[key] for n, m in state["optimizer"]["state"].items() for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": dict(vae.state_dict()), "last": state["model"], "moments": moments, "metrics": metrics}


def all_trained(folder: Path) -> dict[str, Any]:
    with joined(torch.device("cpu")) as us:
        names = FOUR if us.world_size == 4 else CASES
        return {name: trained(folder / f"{name}-{us.world_size}", CASES[name]) for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return all_trained(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(2, all_trained, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(4, all_trained, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize(("together", "name"), [*(("on_two", name) for name in CASES), *(("on_four", name) for name in FOUR)])
def test_any_number_of_processes_trains_the_same_model(together, name, alone, request):
    """Gradients (as Adam's moments), weights, σ, what is logged and validated, and the calibration: on every process."""
    for found in request.getfixturevalue(together):
        for kind in ("moments", "last", "weights"):
            assert found[name][kind].keys() == alone[name][kind].keys()
            for key, truth in alone[name][kind].items():
                says = partial("{} {}: {}".format, kind, key)
                atol = 1e-7 if CASES[name].loose and kind != "moments" else 1e-9
                torch.testing.assert_close(found[name][kind][key], truth, rtol=1e-6, atol=atol, msg=says)
        for row, truth in zip(found[name]["metrics"], alone[name]["metrics"], strict=True):
            assert row == pytest.approx(truth, rel=1e-6, nan_ok=True)


# -- noise, interruptions, failures ----------------------------------------------------------------------------------------


def plain_vae(network: str = "mlp") -> VAE:
    torch.manual_seed(0)
    return models.vae(ModelConfig(network, latent_dim=3, width=8), SHAPE, Scaling(LEVELS))


def plain(out: Path, *, resume: bool = False, network: str = "mlp", **options: Any) -> dict[str, torch.Tensor]:
    """Train with the noise that each process has; the weights before the best are chosen."""
    vae = plain_vae(network)
    config = TrainingConfig(**({"epochs": 4, "batch_size": 16, "log_every": 1} | options))
    fit(vae, toy_data(), config, out=out, device="cpu", resume=resume, progress=False)
    return last(out)["model"]


def last(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


def interrupted_and_resumed(folder: Path) -> dict[str, Any]:
    with joined(torch.device("cpu")) as us:
        whole = plain(folder / "whole")
        elbo, calls = VAE.elbo, iter(range(1000))

        def interrupting(*arguments, **keywords):
            if next(calls) == 6 and us.rank == 1:  # one process alone hears of it
                signal.raise_signal(signal.SIGINT)
            return elbo(*arguments, **keywords)

        VAE.elbo = interrupting
        with pytest.raises(KeyboardInterrupt):
            plain(folder / "stopped")
        VAE.elbo = elbo
        at, noise = from_first(lambda: (last(folder / "stopped")["step"], last(folder / "stopped")["noise"]))
        return {"at": at, "noise": noise, "whole": whole, "resumed": plain(folder / "stopped", resume=True)}


def test_ctrl_c_on_one_process_stops_all_and_they_resume_exactly(tmp_path):
    found = results_of(2, interrupted_and_resumed, tmp_path)
    for process in found:
        assert 0 < process["at"] < 12
        assert process["whole"].keys() == process["resumed"].keys()
        assert all(torch.equal(process["resumed"][name], value) for name, value in process["whole"].items())
    (first,), (second,) = found[0]["noise"]
    assert not torch.equal(first, second)  # no process draws what another does


def resumed(folder: Path) -> list[str]:
    with joined(torch.device("cpu")), redirect_stderr(io.StringIO()) as said:
        plain(folder, resume=True, epochs=6)
        return [from_first(lambda: str(last(folder)["step"])), said.getvalue()]


@pytest.mark.parametrize("count", [1, 2])
def test_another_number_of_processes_goes_on_and_says_so(count, tmp_path):
    on_processes(2, begun, tmp_path) if count == 1 else plain(tmp_path)
    found = results_of(count, resumed, tmp_path)
    assert [steps for steps, _ in found] == ["18"] * count
    assert f"begun on {3 - count} and going on with {count} processes" in found[0][1]


def begun(_: int, folder: Path) -> None:
    plain(folder)


def diverged(folder: Path, network: str, options: dict[str, Any]) -> list[Any]:
    with joined(torch.device("cpu")) as us:
        elbo, calls = VAE.elbo, iter(range(1000))

        def breaking(*arguments, **keywords):
            found: Elbo = elbo(*arguments, **keywords)
            if next(calls) != 5:
                return found
            shares.append(arguments[1])
            return found._replace(kl=found.kl * math.nan) if us.rank == 1 else found

        shares: list[torch.Tensor] = []
        VAE.elbo = breaking
        with pytest.raises(NonFiniteLossError) as error:
            plain(folder / "run", network=network, **options)
        return [str(error.value), shares[0]]


@pytest.mark.parametrize(("network", "options"), [("mlp", {}), (LADDER, {"shard_weights": True})], ids=["whole", "in parts"])
def test_a_loss_that_breaks_on_one_process_stops_all_at_the_same_step_and_that_one_keeps_it(network, options, tmp_path):
    (first, _), (second, share) = results_of(2, diverged, tmp_path, network, options)
    assert all("not finite at step 4" in text for text in (first, second))
    assert "broken term: another process's" in first
    assert "broken term: KL" in second
    assert "could not be kept" not in first + second
    step = load_broken_step(tmp_path / "run" / FILE)
    assert torch.equal(step.batch.x, share)
    assert "broken term: KL" in step.about["diagnosis"]
    assert first_broken(plain_vae(network), step) == []  # weights are whole, and it was not the model that broke


def agreements(_: Path) -> dict[str, Any]:
    with joined(torch.device("cpu")) as us:
        found: dict[str, Any] = {"first": from_first(lambda: processes().world_size + us.rank)}
        try:
            from_first(lambda: 1 // 0)
        except (ElsewhereError, ZeroDivisionError) as error:
            found["failure"] = [type(error).__name__, str(error)]
        found["any"] = [on_any(us.rank == 1), on_any(False)]
        found["mean"] = mean_over_all(torch.arange(3.0)[us.rank :])
        data = toy_data(29)  # 9 in threes, and 9 in tens that leave a process without any
        found["shares"] = [[batch.positions.tolist() for batch in shared(data, "train", size)] for size in (3, 14)]
        found["limited"] = [batch.positions.tolist() for batch in shared(data, "train", 4, limit=5)]
        return found


def test_what_processes_agree_on(tmp_path):
    first, second = results_of(2, agreements, tmp_path)
    assert first["first"] == second["first"] == 1  # the first one, which then is alone
    assert first["failure"] == ["ZeroDivisionError", "integer division or modulo by zero"]
    assert second["failure"] == ["ElsewhereError", "the first process stopped: ZeroDivisionError: " + first["failure"][1]]
    for found in (first, second):
        assert found["any"] == [True, False]
        assert float(found["mean"]) == pytest.approx((0 + 1 + 2 + 1 + 2) / 5)
    for size in (0, 1):
        batches = list(zip(first["shares"][size], second["shares"][size], strict=True))
        assert [i for pair in batches for share in pair for i in share] == list(range(29))
        assert all(share for pair in batches for share in pair)
    assert sorted(chain(*first["limited"], *second["limited"])) == list(range(5))


def test_each_process_needs_an_example_of_every_batch(tmp_path):
    with pytest.raises(Exception, match="batch_size 21 would do"):
        on_processes(2, too_small, tmp_path)


def too_small(_: int, folder: Path) -> None:
    plain(folder, batch_size=20)


# -- weights in parts ------------------------------------------------------------------------------------------------------


def held(_: Path) -> float:
    with joined(torch.device("cpu")) as us:
        vae = toy_vae(CASES["sharded"])
        whole = sum(p.numel() for p in vae.network.parameters())
        shard(vae, init_device_mesh("cpu", (us.world_size,)))
        return sum(p.to_local().numel() for p in vae.network.parameters()) / whole


def test_each_process_holds_a_part(tmp_path):
    shares = results_of(2, held, tmp_path)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.7


def first_half(_: int, folder: Path) -> None:
    with joined(torch.device("cpu")):
        trained(folder, CASES["sharded"])


def second_half(folder: Path) -> dict[str, Any]:
    with joined(torch.device("cpu")):
        return trained(folder, CASES["sharded"], resume=True, epochs=2)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(tmp_path_factory.mktemp("epochs"), CASES["sharded"], epochs=2)


@pytest.mark.parametrize("then", [1, 2])
def test_a_checkpoint_of_parts_is_whole(then, two_epochs, tmp_path):
    """It goes on without FSDP, and FSDP goes on from one without parts."""
    on_processes(2, first_half, tmp_path) if then == 1 else first_half(0, tmp_path)
    (found, *_) = [second_half(tmp_path)] if then == 1 else results_of(2, second_half, tmp_path)
    for kind in ("moments", "last"):
        for name, truth in two_epochs[kind].items():
            torch.testing.assert_close(found[kind][name], truth, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("network", "options", "says"),
    [("mlp", {}, "blocks of a hierarchical network"), (LADDER, {"ema_decay": 0.9}, "do not go together")],
)
def test_what_cannot_be_shared_out_is_refused(network, options, says):
    vae = models.vae(ModelConfig(network, latent_dim=3, width=8), SHAPE, Scaling(LEVELS))
    with pytest.raises(ValueError, match=says):
        fit(vae, toy_data(), TrainingConfig(shard_weights=True, **options), device="cpu", progress=False)


# -- batch normalisation ---------------------------------------------------------------------------------------------------


class OwnNorm(torch.nn.BatchNorm1d):
    """A user's own."""


OF_SHARES = (OwnNorm(6), torch.nn.SyncBatchNorm(6), torch.nn.BatchNorm1d(6, track_running_stats=False))


def refusals(_: Path) -> list[str]:
    with joined(torch.device("cpu")):
        said = []
        for norm in OF_SHARES:
            vae = models.vae(ModelConfig("mlp", latent_dim=3, width=8), SHAPE, Scaling(LEVELS))
            vae.network.encoder.append(norm)
            with pytest.raises(ValueError, match="statistics of a batch") as error:
                fit(vae, toy_data(), device="cpu", progress=False)
            said.append(str(error.value))
        return said


def test_statistics_of_a_share_are_refused(tmp_path):
    for said in results_of(2, refusals, tmp_path):
        for norm, text in zip(OF_SHARES, said, strict=True):
            assert str(norm) in text
            assert "use nn.BatchNorm1d" in text


# -- Runs on several processes: the commands, the folder that they leave, and that evaluation and calibration are those of one

METRICS = ["iwae", "oracle", "information", "calibration"]


def command(_: int, *words: str) -> None:
    assert main(words) == 0


def numbers(report: Any) -> Any:
    """Without what says where and when it was measured."""
    return {key: value for key, value in report.items() if key != "how"}


def close(found: Any, truth: Any, where: str = "") -> None:
    assert type(found) is type(truth), where
    if isinstance(truth, dict):
        assert found.keys() == truth.keys(), where
        for key in truth:
            close(found[key], truth[key], f"{where}.{key}")
    elif isinstance(truth, list):
        assert len(found) == len(truth), where
        for i, pair in enumerate(zip(found, truth, strict=True)):
            close(*pair, f"{where}[{i}]")
    elif isinstance(truth, float):
        assert found == pytest.approx(truth, rel=1e-6, abs=1e-6), where
    else:
        assert found == truth, where


@pytest.fixture(scope="module", params=["evaluate", "calibrate", "fit-prior"])
def both(request: pytest.FixtureRequest, digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and what three leave of the same command."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("alone", "together"):
        shutil.copytree(digits_run, folder / name)
    options = {
        "evaluate": ["--metrics", *METRICS, "--draws", "4"],
        "calibrate": ["--split", "validation"],
        "fit-prior": ["--prior", "gaussian"],
    }[request.param]
    assert main([request.param, str(folder / "alone"), *options, "--device", "cpu"]) == 0
    on_processes(3, command, request.param, str(folder / "together"), *options, "--device", "cpu")
    return folder / "alone", folder / "together"


def test_three_processes_measure_and_fit_what_one_does(both):
    alone, together = both
    assert sorted(path.name for path in alone.rglob("*")) == sorted(path.name for path in together.rglob("*"))
    reports = [json.loads((out / "evaluation.json").read_text()) for out in (together, alone)]
    close(*map(numbers, reports))
    weights, truth = (load_file(out / "model" / "model.safetensors") for out in (together, alone))
    close({name: value.tolist() for name, value in weights.items()}, {name: value.tolist() for name, value in truth.items()})


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sigma_vae"]
    return subprocess.run(
        [*start, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )


def test_torchrun_trains_one_run_and_the_first_process_speaks(tmp_path):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8))
    size = ["--network", "mlp", "--width", "16", "--latent-dim", "2", "--epochs", "1", "--accumulate", "2"]
    words = ["--test-fraction", "0.2", "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]
    done = torchrun("train", str(tmp_path / "few.npy"), *size, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # of one process
    assert report == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["examples"] == 20
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "model.safetensors", "samples.png"} <= left


def groups_in_a_row(_: Path) -> list[int]:
    """Each other group is left by one process a moment before the other has it."""
    rank, seen = int(os.environ["RANK"]), []
    for turn in range(12):
        time.sleep(0.05 * (turn % 2 == rank))
        with joined(torch.device("cpu")):
            if turn % 3 == 0:
                seen.append(from_first(lambda turn=turn: turn))
    return seen


def test_groups_follow_each_other(tmp_path):
    assert results_of(2, groups_in_a_row, tmp_path) == [[0, 3, 6, 9]] * 2


def twice(_: Path, run: str) -> list[int]:
    return [main(["train", "digits", "--out", run]), main(["evaluate", "nowhere"])]


def test_a_refusal_is_one_on_every_process(tmp_path, digits_run):
    before = {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}
    assert results_of(2, twice, tmp_path, str(digits_run)) == [[1, 1]] * 2
    assert before == {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}


def alone_only(_: Path) -> str:
    with pytest.raises(SystemExit, match="runs on one process"):
        main(["sample", "runs/any"])
    return "refused"


def test_a_command_of_one_process_is_refused_on_several(tmp_path):
    assert results_of(2, alone_only, tmp_path) == ["refused"] * 2
