"""What a training step makes of the hardware: what is chosen where, that it can be overruled, and that no result depends on calls."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_start import look_later
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import speed_gpu
from sigma_vae import VAE, Gaussian, hierarchical, models, optimisers
from sigma_vae.config import DataConfig, HardwareConfig, ModelConfig, TrainingConfig, read
from sigma_vae.data import as_splits, load
from sigma_vae.training import fit
from sigma_vae.training.hardware import (
    STEPS_TO_WIN_COMPILATION,
    Machine,
    Work,
    applied,
    choices_for,
    choose,
    compiled,
    machine_of,
    work_of,
)
from sigma_vae.training.objective import balance, losses
from sigma_vae.types import Batch

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
        ({"compile": "yes"}, True),
        ({"compile": "no"}, False),
        ({"threads": 3}, 3),
        ({"steps_per_call": 5}, 5),
    ],
)
@pytest.mark.parametrize("machine", [NEW, OLD, GPU])
def test_each_choice_can_be_overruled(asked, expected, machine):
    (name,) = asked
    chosen = choose(TrainingConfig(hardware=HardwareConfig(**asked)), machine, CONV)
    assert getattr(chosen, name) == expected


COMPILES, MLP = replace(NEW, compiles=True), Work(2e8, widest_kernel=0, gains_compiled=True)
(LARGE_FLOPS, FEW), (_, MANY) = STEPS_TO_WIN_COMPILATION


@pytest.mark.parametrize(
    ("machine", "work", "steps", "options", "expected"),
    [
        (COMPILES, MLP, FEW, {}, True),
        (COMPILES, MLP, FEW - 1, {}, False),
        (COMPILES, replace(MLP, flops=LARGE_FLOPS - 1), MANY, {}, True),
        (COMPILES, replace(MLP, flops=LARGE_FLOPS - 1), MANY - 1, {}, False),
        (COMPILES, replace(MLP, gains_compiled=False), MANY, {}, False),
        (COMPILES, replace(MLP, measured=False), MANY, {}, False),
        (NEW, MLP, MANY, {}, False),
        (replace(GPU, compiles=True), MLP, MANY, {}, False),
        (COMPILES, MLP, MANY, {"max_minutes": 60.0}, False),
        (COMPILES, MLP, MANY, {"kl_weight": 0.5}, False),
    ],
)
def test_long_trainings_of_dense_layers_are_compiled(machine, work, steps, options, expected):
    assert choose(TrainingConfig(**options), machine, work, steps).compile == expected


@pytest.mark.parametrize("name", ["compile", "fused_optimiser"])
@pytest.mark.parametrize(
    ("written", "meant"), [("yes", "yes"), ("no", "no"), ("true", "yes"), ("auto", "auto"), ("'no'", "no")]
)
def test_a_file_may_say_yes_and_no(name, written, meant, tmp_path):
    path = tmp_path / "hardware.yaml"
    path.write_text(f"{name}: {written}\n")
    assert getattr(read(path, HardwareConfig), name) == meant


def test_compile_true_is_yes():
    assert HardwareConfig(compile=True) == HardwareConfig(compile="yes")


@pytest.mark.skipif(not machine_of(torch.device("cpu")).compiles, reason="no C++ compiler, or no headers of Python")
def test_a_compiled_training_is_that_without_but_for_rounding(digits):
    """With the same noise: weights after a few steps agree, and differ from those of another seed."""
    options = {"epochs": 1, "max_steps": 4, "batch_size": 40, "start": "random"}
    plain, made = (trained(digits, hardware=HardwareConfig(compile=how), **options) for how in ("no", "yes"))
    for name, value in plain.items():
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not machine_of(torch.device("cpu")).compiles, reason="no C++ compiler, or no headers of Python")
def test_a_compiled_training_is_resumed_to_the_very_same_model(digits, tmp_path):
    """Also after an epoch that ends with a smaller batch, whose size must not change how later ones are computed."""
    options = {"hardware": HardwareConfig(compile="yes"), "batch_size": 200, "start": "random"}
    whole = trained(digits, epochs=2, **options)
    trained(digits, tmp_path, epochs=1, **options)
    assert same(trained(digits, tmp_path, resume=True, epochs=2, **options), whole)


def test_where_torch_cannot_compile_a_training_goes_on_unless_it_is_needed(monkeypatch):
    def broken(x):
        raise RuntimeError("no compiler\nand many lines")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    called, needed = compiled(abs, needed=False), compiled(abs, needed=True)
    with pytest.warns(UserWarning, match=r"not compiled, torch cannot do it here: no compiler$"):
        assert called(-3) == 3
    assert called(-4) == 4
    with pytest.raises(RuntimeError, match="no compiler"):
        needed(-3)


NO_COMPILER = """
import sys, torch
from sigma_vae import VAE, Gaussian, Optimal, mlp
from sigma_vae.config import TrainingConfig
from sigma_vae.training import fit
x = torch.rand(200, 1, 8, 8)
fit(VAE(mlp(x.shape[1:], 1, 2, 8), Gaussian(1, Optimal(), levels=None)), x, TrainingConfig(max_steps=3, ema_decay=0.9), progress=False)
sys.exit("torch._dynamo" in sys.modules)
"""


def test_a_training_that_is_not_compiled_imports_no_compiler():
    assert subprocess.run([sys.executable, "-c", NO_COMPILER]).returncode == 0


@pytest.mark.parametrize(("ours", "theirs"), [(optimisers.Adam, torch.optim.Adam), (optimisers.AdamW, torch.optim.AdamW)])
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimiser_without_compiler_takes_torchs_steps(ours, theirs, fused):
    def after_three(kind):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        optimiser = kind(layer.parameters(), lr=0.1, weight_decay=0.01, fused=fused)
        for _ in range(3):
            optimiser.zero_grad()
            (layer(torch.randn(7, 5)) ** 2).sum().backward()
            optimiser.step()
            optimiser.load_state_dict(optimiser.state_dict())
        assert all(p.requires_grad for p in layer.parameters())
        return layer.state_dict()

    assert same(after_three(ours), after_three(theirs))


def test_the_old_word_for_retain_warns_and_means_the_same():
    with pytest.warns(DeprecationWarning, match="called 'retain' now"):
        old = HardwareConfig(allocator="patient")
    assert old == HardwareConfig(allocator="retain")


@pytest.mark.parametrize("name", ["threads", "steps_per_call"])
def test_counts_that_mean_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is at least 1, got 0"):
        HardwareConfig(**{name: 0})


@pytest.fixture(scope="module")
def digits(deep_digits):
    """Twelve batches of 40 to train on."""
    return replace(deep_digits, train=deep_digits.train.select(torch.arange(480)))


def vae_of(digits, network="mlp", width=32):
    torch.manual_seed(0)
    return models.vae(ModelConfig(network=network, latent_dim=4, width=width), digits.shape, digits.scaling)


def test_work_is_counted(digits):
    work = work_of(vae_of(digits), digits, batch_size=10)
    weights = 64 * 32 + 32 * 32 + 32 * 8 + 4 * 32 + 32 * 32 + 32 * 64
    assert work == Work(flops=2.0 * weights * 10, widest_kernel=0, gains_compiled=True)
    conv = work_of(vae_of(digits, "conv", 4), digits, batch_size=1)
    assert (conv.widest_kernel, conv.gains_compiled) == (6, False)
    bernoulli = models.vae(ModelConfig(likelihood="bernoulli", network="mlp", width=32), digits.shape, digits.scaling)
    assert not work_of(bernoulli, digits, batch_size=1).gains_compiled


def test_a_training_says_in_one_line_what_was_chosen(digits, capsys):
    fit(vae_of(digits), digits, TrainingConfig(epochs=1), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    chosen = choices_for(vae_of(digits), digits, TrainingConfig(), torch.device("cpu"))
    assert lines[0] == f"{chosen}; batches of 128; start: principal"
    assert "float32, contiguous, fused optimiser, not compiled" in lines[0]
    assert lines[0].startswith(machine_of(torch.device("cpu")).name)


@pytest.mark.parametrize(
    ("shape", "asked", "size"), [((1, 8, 8), None, 128), ((1, 256, 128), None, 32), ((1, 256, 128), 40, 40)]
)
def test_large_examples_come_in_smaller_batches(shape, asked, size):
    data = as_splits(torch.rand(100, *shape))
    vae = models.vae(ModelConfig("mlp", latent_dim=1, width=2), data.shape, data.scaling)
    done = fit(vae, data, TrainingConfig(epochs=1, batch_size=asked, start="random"), device="cpu", progress=False)
    assert done.steps == -(-len(data.train) // size)


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
    config = TrainingConfig(**{"epochs": epochs, "batch_size": 40, "hardware": hardware, **options})
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
    options = {"network": "conv", "hardware": hardware, "batch_size": 160}
    whole = trained(digits, **options)
    trained(digits, tmp_path, epochs=1, **options)
    assert same(trained(digits, tmp_path, resume=True, **options), whole)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert all(value.is_contiguous() for value in whole.values())
    plain = HardwareConfig(precision="float32", memory_format="channels-last")
    assert not same(whole, trained(digits, network="conv", batch_size=160, hardware=plain))


# -- What training a deep ladder adds: skipped steps, free bits, a balance over layers, and exact resumption with all of them

STEPS_PER_EPOCH = -(-1455 // 64)


@pytest.fixture(scope="module")
def deep_digits():
    return load(DataConfig("digits"))


def small_vae(deep_digits, network="mlp"):
    torch.manual_seed(0)
    return models.vae(ModelConfig(network=network, latent_dim=2, width=16), deep_digits.shape, deep_digits.scaling)


def train(vae, deep_digits, out=None, resume=False, **options):
    config = TrainingConfig(**{"epochs": 1, "batch_size": 64, "log_every": 1, **options})
    fit(vae, deep_digits, config, out=out, device="cpu", resume=resume, progress=False)
    return vae


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["train/loss_nats"]]


def same_values(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def poison(vae, after: int) -> None:
    """From this step on a gradient is not a number, while the loss is one."""
    calls = iter(range(10_000))
    vae.network.encoder[1].bias.register_hook(lambda gradient: gradient * float("nan") if next(calls) >= after else gradient)


# -- skipped steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"gradient_clip_norm": 10.0, "weight_decay": 0.1}], ids=str)
def test_a_skipped_step_moves_neither_weights_nor_their_average(deep_digits, options):
    stopped = train(small_vae(deep_digits), deep_digits, max_steps=8, **options)
    skipping = small_vae(deep_digits)
    poison(skipping, after=8)
    train(skipping, deep_digits, max_steps=16, skip_gradient_norm=1e9, **options)
    assert same_values(stopped, skipping)
    assert not same_values(stopped, train(small_vae(deep_digits), deep_digits, max_steps=16, **options))


def test_a_limit_that_no_gradient_reaches_changes_nothing(deep_digits):
    assert same_values(
        train(small_vae(deep_digits), deep_digits), train(small_vae(deep_digits), deep_digits, skip_gradient_norm=1e9)
    )


def test_the_limit_is_on_the_norm_before_clipping(deep_digits, tmp_path):
    train(small_vae(deep_digits), deep_digits, tmp_path / "free", gradient_clip_norm=1e-3, skip_gradient_norm=1e9)
    norms = [float(row["train/gradient_norm"]) for row in rows(tmp_path / "free")]
    assert min(norms) > 1  # far above what clipping leaves
    assert {row["train/skipped_steps"] for row in rows(tmp_path / "free")} == {"0"}
    limit = float(np.nextafter(np.float32(norms[0]), np.float32(0)))  # just below: the first step is skipped
    with pytest.raises(ValueError, match="the 1 steps of this training were all skipped"):
        train(
            small_vae(deep_digits),
            deep_digits,
            tmp_path / "skip",
            gradient_clip_norm=1e-3,
            skip_gradient_norm=limit,
            max_steps=1,
        )
    assert [row["train/skipped_steps"] for row in rows(tmp_path / "skip")] == ["1"]


def test_the_gradient_norm_is_that_of_all_parameters(deep_digits, tmp_path):
    train(small_vae(deep_digits), deep_digits, tmp_path, max_steps=1, batch_size=1455, start="random")
    vae = small_vae(deep_digits)
    x = deep_digits.values("train")
    vae.calibrate([x[:128]])
    (row,) = rows(tmp_path)
    assert float(row["train/gradient_norm"]) > 0
    elbo = []
    for seed in range(3):  # another draw of the noise: nearly the same gradient
        torch.manual_seed(seed)
        vae.zero_grad()
        (-vae.train().elbo(x).total.mean()).backward()
        elbo.append(np.sqrt(sum(float(p.grad.square().sum()) for p in vae.parameters() if p.grad is not None)))
    assert float(row["train/gradient_norm"]) == pytest.approx(np.mean(elbo), rel=0.05)


def test_the_count_of_skipped_steps_survives_a_resumption(deep_digits, tmp_path):
    train(small_vae(deep_digits), deep_digits, tmp_path / "free")
    limit = float(np.median([float(row["train/gradient_norm"]) for row in rows(tmp_path / "free")]))
    train(small_vae(deep_digits), deep_digits, tmp_path / "whole", skip_gradient_norm=limit, epochs=2)
    train(small_vae(deep_digits), deep_digits, tmp_path / "parts", skip_gradient_norm=limit)
    train(small_vae(deep_digits), deep_digits, tmp_path / "parts", skip_gradient_norm=limit, epochs=2, resume=True)
    whole, parts = ([int(row["train/skipped_steps"]) for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    assert 0 < parts[-1] < 2 * STEPS_PER_EPOCH


def test_a_training_that_skips_every_step_stops(deep_digits, tmp_path):
    vae = small_vae(deep_digits)
    poison(vae, after=5)
    with pytest.raises(ValueError, match=r"the last 100 steps, up to step 104, were all skipped.*lower the learning rate"):
        train(vae, deep_digits, tmp_path, skip_gradient_norm=1e9, epochs=20, log_every=1000)
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        counts = [row["train/skipped_steps"] for row in csv.DictReader(file) if row["train/skipped_steps"]]
    assert counts == [str(count) for count in range(100)]  # each is logged, the last one in the error
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_the_count_of_skipped_steps_is_a_result(deep_digits):
    vae = small_vae(deep_digits)
    poison(vae, after=8)
    config = TrainingConfig(max_steps=16, batch_size=64, skip_gradient_norm=1e9)
    assert fit(vae, deep_digits, config, progress=False).skipped_steps == 8


def test_without_the_option_nothing_is_counted(deep_digits, tmp_path):
    train(small_vae(deep_digits), deep_digits, tmp_path, max_steps=3, log_every=2)
    assert all("train/skipped_steps" not in row and row["train/gradient_norm"] for row in rows(tmp_path))
    assert len(rows(tmp_path)) == 2


# -- objectives ------------------------------------------------------------------------------------------------------------


def ladder() -> VAE:
    torch.manual_seed(0)
    vae = VAE(hierarchical((1, 8, 8), 1, latent_dim=2, width=8), Gaussian(1))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


def both(vae: VAE, step: int = 0, **options):
    """What is minimised with and without options, on the same draw."""
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for config in (TrainingConfig(**options), TrainingConfig()):
        torch.manual_seed(1)
        found.append(losses(vae, Batch(x, torch.arange(len(x))), config, step))
    return found


def expected_objective(elbo, latents, free_bits=0.0, weight=1.0, balanced=False) -> float:
    """In NumPy."""
    kl = elbo.kl.detach().numpy().astype(np.float64).mean(0)
    factor = np.ones(len(kl))
    if balanced:
        factor = kl / latents
        factor = factor * len(kl) / factor.sum()
    return float(elbo.distortion.detach().double().mean()) + weight * float((factor * np.maximum(kl, free_bits)).sum())


@pytest.mark.parametrize(
    ("options", "step", "arguments"),
    [
        ({"free_bits_nats": 1.0}, 0, {"free_bits": 1.0}),
        ({"free_bits_nats": 50.0, "kl_weight": 0.5}, 0, {"free_bits": 50.0, "weight": 0.5}),
        ({"kl_balancing_steps": 10}, 9, {"balanced": True}),
        ({"kl_balancing_steps": 10}, 10, {}),
        ({"kl_balancing_steps": 10, "free_bits_nats": 2.0}, 0, {"balanced": True, "free_bits": 2.0}),
    ],
    ids=str,
)
def test_what_is_minimised_is_what_is_documented(options, step, arguments):
    vae = ladder()
    weighted, plain = both(vae, step, **options)
    latents = np.array([np.prod(shape) for shape in vae.network.latents.shapes])
    kl = plain.elbo.kl.detach().mean(0)
    assert kl.min() < 2 < kl.max()  # the bounds of the rows above mean something
    assert float(weighted.minimised.detach().mean()) == pytest.approx(
        expected_objective(plain.elbo, latents, **arguments), rel=1e-4
    )
    torch.testing.assert_close(weighted.elbo.total, plain.elbo.total)


def test_free_bits_leave_layers_below_them_alone():
    vae = ladder()
    weighted, _ = both(vae, free_bits_nats=1e6)
    alone, _ = both(vae, kl_weight=1e-30)
    parameters = list(vae.network.parameters())
    found = torch.autograd.grad(weighted.minimised.mean(), parameters, materialize_grads=True)
    without = torch.autograd.grad(alone.minimised.mean(), parameters, materialize_grads=True)
    for ours, theirs in zip(found, without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_balance_weighs_by_kl_per_latent_and_averages_to_one():
    kl = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = balance(kl, [1, 2, 50, 3])
    assert not weights.requires_grad
    density = kl.detach().numpy().mean(0) / np.array([1, 2, 50, 3])
    np.testing.assert_allclose(weights.numpy(), density / density.mean(), rtol=1e-4)
    torch.testing.assert_close(balance(torch.zeros(3, 2), [1, 8]), torch.ones(2))


@pytest.mark.parametrize(
    ("network", "options", "says"),
    [
        ("mlp", {"kl_balancing_steps": 5}, "balances several layers of latents, and FlatNetwork has one"),
        ("mlp", {"kl_balancing_steps": -1}, "kl_balancing_steps is at least 0"),
        ("mlp", {"free_bits_nats": -1.0}, "free_bits_nats is at least 0"),
        ("mlp", {"free_bits_nats": float("nan")}, "free_bits_nats is at least 0"),
        ("mlp", {"skip_gradient_norm": 0.0}, "skip_gradient_norm is above 0"),
    ],
)
def test_impossible_options_are_refused(deep_digits, network, options, says):
    with pytest.raises(ValueError, match=says):
        train(small_vae(deep_digits, network), deep_digits, **options)


# -- all of it -------------------------------------------------------------------------------------------------------------

SMALL = "hierarchical:2,2d2,1/1,2m1,2"
EVERYTHING = {"ema_decay": 0.9, "free_bits_nats": 0.5, "kl_balancing_steps": 15}


@pytest.mark.parametrize("network", ["residual", "conv"])
def test_other_networks_resume_to_the_very_same_model(digits, tmp_path, network):
    whole, halved = (small_vae(digits, network) for _ in range(2))
    train(whole, digits, epochs=2, batch_size=80, ema_decay=0.9)
    train(halved, digits, tmp_path, epochs=1, batch_size=80, ema_decay=0.9)
    train(halved, digits, tmp_path, epochs=2, batch_size=80, ema_decay=0.9, resume=True)
    assert same_values(whole, halved)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_ladder_resumes_to_the_very_same_model(digits, tmp_path, options):
    if options:
        train(small_vae(digits, SMALL), digits, tmp_path / "first", batch_size=40)
        norms = [float(row["train/gradient_norm"]) for row in rows(tmp_path / "first")]
        options = options | {"skip_gradient_norm": float(np.quantile(norms, 0.8))}
    whole, halved = (small_vae(digits, SMALL) for _ in range(2))
    train(whole, digits, tmp_path / "whole", epochs=2, batch_size=40, **options)
    train(halved, digits, tmp_path / "halved", epochs=1, batch_size=40, **options)
    train(halved, digits, tmp_path / "halved", epochs=2, batch_size=40, resume=True, **options)
    assert same_values(whole, halved)
    assert rows(tmp_path / "whole") == rows(tmp_path / "halved")
    if options:
        assert 0 < int(rows(tmp_path / "whole")[-1]["train/skipped_steps"]) < len(rows(tmp_path / "whole"))
        assert all(row["train/weighted_objective_nats"] for row in rows(tmp_path / "whole"))


def test_the_benchmark_for_a_gpu_is_whole(tmp_path, capsys):
    """Its lines run on a CPU, with small shapes; numbers of the same model agree with themselves."""
    try:
        speed_gpu.main(tmp_path / "gpu.json", device="cpu", cases=("conv, float32", "sequence"), small=True)
    finally:
        distributed.destroy_process_group()
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert set(found) == {"conv, float32", "sequence"}
    for row in found.values():
        assert row["agreement"]["float32"]["relative_difference"] == 0
        assert row["flops_of_a_step"] > 0
        assert {"plain loop", "ours", "ours, one process of a group"} <= set(row)
    assert "| sequence | ours |" in capsys.readouterr().out
