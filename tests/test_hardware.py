"""What a training step makes of the hardware: what is chosen where, that it can be overruled, and that no result depends on calls."""

import json
from dataclasses import replace

import pytest
import torch
from test_non_finite import look_later
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import speed_gpu
from sigma_vae import models
from sigma_vae.config import DataConfig, HardwareConfig, ModelConfig, TrainingConfig
from sigma_vae.data import load
from sigma_vae.training import fit
from sigma_vae.training.hardware import Machine, Work, applied, choices_for, choose, machine_of, work_of

NEW = Machine("cpu", "a processor", bfloat16=True, glibc=True, threads=8)
OLD = replace(NEW, bfloat16=False)
GPU = replace(NEW, device="cuda", name="a card")
CONV, NARROW, TINY = Work(12e9, widest_kernel=6), Work(12e9, widest_kernel=4), Work(1e7, widest_kernel=0)


@pytest.mark.parametrize(
    ("machine", "work", "expected"),
    [
        (NEW, CONV, {"precision": "bfloat16", "memory_format": "channels-last", "steps_per_call": 1}),
        (NEW, NARROW, {"precision": "bfloat16", "memory_format": "contiguous"}),
        (NEW, TINY, {"precision": "float32", "memory_format": "contiguous", "steps_per_call": 16}),
        (NEW, replace(CONV, measured=False), {"precision": "float32"}),
        (OLD, CONV, {"precision": "float32", "memory_format": "contiguous"}),
        (NEW, CONV, {"allocator": "retain", "fused_optimiser": True, "compile": False}),
        (replace(NEW, glibc=False), CONV, {"allocator": "default"}),
        (GPU, CONV, {"allocator": "default", "precision": "float32", "steps_per_call": 16}),
        (replace(NEW, processors=1.5), CONV, {"threads": 2}),
        (NEW, CONV, {"threads": 8}),
    ],
)
def test_what_is_chosen(machine, work, expected):
    chosen = choose(TrainingConfig(), machine, work)
    assert {name: getattr(chosen, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"precision": "float32"}, "float32"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"memory_format": "channels-last"}, "channels-last"),
        ({"memory_format": "contiguous"}, "contiguous"),
        ({"fused_optimiser": "no"}, False),
        ({"allocator": "default"}, "default"),
        ({"compile": True}, True),
        ({"threads": 3}, 3),
        ({"steps_per_call": 5}, 5),
    ],
)
@pytest.mark.parametrize("machine", [NEW, OLD, GPU])
def test_each_choice_can_be_overruled(asked, expected, machine):
    (name,) = asked
    chosen = choose(TrainingConfig(hardware=HardwareConfig(**asked)), machine, CONV)
    assert getattr(chosen, name) == expected


def test_the_old_word_for_retain_warns_and_means_the_same():
    with pytest.warns(DeprecationWarning, match="called 'retain' now"):
        old = HardwareConfig(allocator="patient")
    assert old == HardwareConfig(allocator="retain")


@pytest.mark.parametrize("name", ["threads", "steps_per_call"])
def test_counts_that_mean_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is at least 1, got 0"):
        HardwareConfig(**{name: 0})


@pytest.fixture(scope="module")
def digits():
    return load(DataConfig("digits"))


def vae_of(digits, network="mlp", width=32):
    torch.manual_seed(0)
    return models.vae(ModelConfig(network=network, latent_dim=4, width=width), digits.shape, digits.scaling)


def test_work_is_counted(digits):
    work = work_of(vae_of(digits), digits, batch_size=10)
    weights = 64 * 32 + 32 * 32 + 32 * 8 + 4 * 32 + 32 * 32 + 32 * 64
    assert work == Work(flops=2.0 * weights * 10, widest_kernel=0)
    assert work_of(vae_of(digits, "conv", 4), digits, batch_size=1).widest_kernel == 6


def test_a_training_says_in_one_line_what_was_chosen(digits, capsys):
    fit(vae_of(digits), digits, TrainingConfig(epochs=1), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    chosen = choices_for(vae_of(digits), digits, TrainingConfig(), torch.device("cpu"))
    assert lines[0] == f"{chosen}; start: principal"
    assert "float32, contiguous, fused optimiser, not compiled" in lines[0]
    assert lines[0].startswith(machine_of(torch.device("cpu")).name)


def test_threads_and_memory_format_are_put_back(digits):
    vae, threads = vae_of(digits, "conv", 4), torch.get_num_threads()
    kernel = vae.network.encoder[5].weight
    chosen = choose(
        TrainingConfig(hardware=HardwareConfig(memory_format="channels-last", threads=threads + 1, allocator="default")),
        NEW,
        CONV,
    )
    with applied(chosen, vae):
        assert not kernel.is_contiguous()
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert torch.get_num_threads() == threads + 1
    assert kernel.is_contiguous()
    assert torch.get_num_threads() == threads


CHOSEN = HardwareConfig()


def trained(digits, out=None, resume=False, network="mlp", epochs=2, hardware=CHOSEN, **options):
    vae = vae_of(digits, network, 4 if network == "conv" else 32)
    config = TrainingConfig(epochs=epochs, hardware=hardware, **options)
    fit(vae, digits, config, out=out, resume=resume, device="cpu", progress=False)
    return vae.state_dict()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 17},
        {"validate_every": 7, "ema_decay": 0.9},
        {"warmup_steps": 5, "schedule": "cosine", "gradient_clip_norm": 100.0, "skip_gradient_norm": 3000.0},
    ],
)
def test_no_result_depends_on_how_many_steps_a_call_makes_and_when_losses_are_looked_at(digits, options, monkeypatch):
    one, five, many = (trained(digits, hardware=HardwareConfig(steps_per_call=n), **options) for n in (1, 5, 100))
    assert same(one, five)
    assert same(one, many)
    look_later(monkeypatch, True)
    assert same(one, trained(digits, hardware=HardwareConfig(steps_per_call=5), **options))


@pytest.mark.parametrize("steps", [(1, 4), (4, 1), (5, 3)])
def test_a_run_goes_on_with_calls_of_another_length(digits, tmp_path, steps):
    before, after = (HardwareConfig(steps_per_call=n) for n in steps)
    trained(digits, tmp_path, epochs=1, hardware=before)
    assert same(trained(digits, tmp_path, resume=True, hardware=after), trained(digits, hardware=before))


def test_a_run_that_ended_amid_a_call_goes_on(digits, tmp_path):
    hardware = HardwareConfig(steps_per_call=4)
    trained(digits, tmp_path, max_steps=5, hardware=hardware)
    assert same(trained(digits, tmp_path, resume=True, hardware=hardware), trained(digits, hardware=hardware))


class Dtypes(TorchDispatchMode):
    """Notes the precision of convolutions and of logarithms and squares."""

    def __init__(self):
        super().__init__()
        self.seen = {"convolution": set(), "other": set()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "pow", "log", "exp", "sigmoid") and isinstance(result, torch.Tensor):
            self.seen["convolution" if name == "convolution" else "other"].add(result.dtype)
        return result


def test_bfloat16_is_for_the_network_and_float32_for_the_likelihood(digits):
    vae = vae_of(digits, "conv", 4)
    x = digits.values("test")[:8]
    chosen = choose(TrainingConfig(hardware=HardwareConfig(precision="bfloat16")), NEW, CONV)
    halved = []
    vae.likelihood.register_forward_pre_hook(lambda *_: halved.append(torch.is_autocast_enabled("cpu")))
    with Dtypes() as noted, chosen.autocast():
        elbo = vae.elbo(x)
    assert halved == [False]
    assert noted.seen["convolution"] == {torch.bfloat16}
    assert torch.float32 in noted.seen["other"]
    assert torch.bfloat16 not in noted.seen["other"]
    assert elbo.log_likelihood.dtype == elbo.kl.dtype == torch.float32


def test_training_in_bfloat16_keeps_float32_weights_and_resumes_to_the_same(digits, tmp_path):
    hardware = HardwareConfig(precision="bfloat16", memory_format="channels-last")
    options = {"network": "conv", "hardware": hardware, "batch_size": 512}
    whole = trained(digits, **options)
    trained(digits, tmp_path, epochs=1, **options)
    assert same(trained(digits, tmp_path, resume=True, **options), whole)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert all(value.is_contiguous() for value in whole.values())
    plain = HardwareConfig(precision="float32", memory_format="channels-last")
    assert not same(whole, trained(digits, network="conv", batch_size=512, hardware=plain))


def test_the_benchmark_for_a_gpu_is_whole(tmp_path, capsys):
    """Its lines run on a CPU, with small shapes; numbers of the same model agree with themselves."""
    speed_gpu.main(tmp_path / "gpu.json", device="cpu", cases=("conv, float32", "sequence"), small=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert set(found) == {"conv, float32", "sequence"}
    for row in found.values():
        assert row["agreement"]["float32"]["relative_difference"] == 0
        assert row["flops_of_a_step"] > 0
        assert {"plain loop", "ours", "ours, one process of a group"} <= set(row)
    assert "| sequence | ours |" in capsys.readouterr().out
    distributed.destroy_process_group()
