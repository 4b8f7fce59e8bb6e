"""Laws of every network with flat latents: one table, one row a network."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launched import results_of
from scipy import integrate, special, stats
from torch import Tensor, nn

from sigma_vae import VAE, Gaussian, Optimal, conv, mlp, residual
from sigma_vae.networks import FlatNetwork
from sigma_vae.networks.flat import GAIN, START_LOG_VARIANCE, _Transposed
from sigma_vae.training.distributed import GlobalBatchNorm, global_statistics, joined, processes

LATENT, WIDTH, BATCH = 3, 4, 6


@dataclass(frozen=True)
class Case:
    """A network and the shapes of the examples that it reads."""

    network: Callable[..., FlatNetwork]
    shapes: tuple[tuple[int, ...], ...]
    refused: tuple[tuple[int, ...], ...] = ()


IMAGES = ((1, 4, 4), (3, 5, 6), (1, 7, 4), (3, 8, 8), (3, 9, 8), (1, 13, 30), (1, 28, 28), (3, 31, 34), (1, 65, 4))
SERIES = ((1, 4), (2, 9), (3, 16), (1, 101))
TABLES = ((1,), (5,))

CASES = {
    "mlp": Case(mlp, (*TABLES, *SERIES, *IMAGES, (1, 3, 4, 5))),
    "conv": Case(conv, IMAGES, refused=((5,), (1, 9), (1, 3, 20), (3, 20, 3), (1, 4, 4, 4))),
    "residual": Case(residual, (*SERIES, *IMAGES), refused=((5,), (1, 3), (1, 3, 20), (3, 20, 3), (1, 4, 4, 4))),
}

BIGGEST = {name: max(case.shapes, key=math.prod) for name, case in CASES.items()}
EVERY_SHAPE = [pytest.param(name, shape, id=f"{name}-{shape}") for name, case in CASES.items() for shape in case.shapes]
REFUSED = [pytest.param(name, shape, id=f"{name}-{shape}") for name, case in CASES.items() for shape in case.refused]

every_shape = pytest.mark.parametrize(("name", "shape"), EVERY_SHAPE)
every_network = pytest.mark.parametrize(("name", "shape"), BIGGEST.items())


def build(name: str, shape: tuple[int, ...], out_channels: int = 2, seed: int = 0) -> FlatNetwork:
    torch.manual_seed(seed)
    width = 8 * WIDTH if name == "mlp" else WIDTH  # a narrow layer of ReLU can be dead from the start
    return CASES[name].network(shape, out_channels, latent_dim=LATENT, width=width)


def examples(shape: tuple[int, ...]) -> Tensor:
    return torch.rand((BATCH, *shape), generator=torch.Generator().manual_seed(1))


def unit_noise(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@every_shape
def test_features_are_of_the_data_s_size(name: str, shape: tuple[int, ...]) -> None:
    network = build(name, shape)
    x = examples(shape)
    inference = network.infer(x)
    assert inference.h.shape == (BATCH, 2, *shape[1:])
    assert inference.target is x
    assert inference.kl.shape == (BATCH, 1)
    assert network.posterior(x).loc.shape == (BATCH, LATENT)
    assert network.generate(5).shape == (5, 2, *shape[1:])


@every_shape
def test_every_parameter_learns(name: str, shape: tuple[int, ...]) -> None:
    channels = shape[0]
    network = build(name, shape, out_channels=channels)
    vae = VAE(network, Gaussian(channels, Optimal(), spatial_dims=len(shape) - 1))
    (-vae.elbo(examples(shape), noise=unit_noise).total.mean()).backward()
    idle = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not idle


@every_shape
def test_every_feature_depends_on_the_latents(name: str, shape: tuple[int, ...]) -> None:
    """None is left where only a bias reaches: at the edge of a size that is no multiple of anything."""
    network = build(name, shape).double()
    z = torch.randn(50, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (network.decode(z).std(0) > 0).all()


@every_shape
def test_the_encoder_sees_every_value(name: str, shape: tuple[int, ...]) -> None:
    network = build(name, shape).double()
    x = examples(shape).double().requires_grad_()
    network.posterior(x).loc.sum().backward()
    assert x.grad is not None
    assert x.grad.ne(0).any(0).all()


@every_network
def test_a_seed_decides_the_weights(name: str, shape: tuple[int, ...]) -> None:
    first, again, other = (torch.cat([p.flatten() for p in build(name, shape, seed=seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("value", [0.0, 1.0])
@every_shape
def test_an_untrained_network_says_little(name: str, shape: tuple[int, ...], value: float) -> None:
    """Posteriors near the prior (or as narrow as they are meant to start), features near 0 that differ little from z to z."""
    start = START_LOG_VARIANCE if name == "mlp" else 0.0
    started = LATENT * 0.5 * (math.exp(start) - 1 - start)  # KL of N(0, exp(start)) from N(0, 1)
    network = build(name, shape)
    inference = network.infer(torch.full((BATCH, *shape), value), noise=unit_noise)
    assert inference.h.isfinite().all()
    assert inference.h.abs().max() < 1.5
    assert inference.h.std(0).mean() < 0.3
    assert (inference.kl - started).abs().max() < 0.5 * LATENT


@every_network
def test_a_state_dict_is_the_whole_network(name: str, shape: tuple[int, ...]) -> None:
    network, other = build(name, shape), build(name, shape, seed=1)
    x = examples(shape)
    before = other.infer(x, noise=unit_noise)
    other.load_state_dict(network.state_dict())
    ours, theirs = (one.infer(x, noise=unit_noise) for one in (network, other))
    assert torch.equal(ours.h, theirs.h)
    assert torch.equal(ours.kl, theirs.kl)
    assert not torch.equal(before.h, theirs.h)


@every_network
def test_no_example_depends_on_its_batch_or_on_the_mode(name: str, shape: tuple[int, ...]) -> None:
    network = build(name, shape).double()
    x = examples(shape).double()
    training = network.train().infer(x, noise=unit_noise)
    evaluating = network.eval().infer(x, noise=unit_noise)
    assert torch.equal(training.h, evaluating.h)
    alone = [
        network.train().infer(x[i : i + 1], noise=lambda shape, i=i: unit_noise(torch.Size([BATCH, LATENT]))[i : i + 1]).h
        for i in range(BATCH)
    ]
    torch.testing.assert_close(torch.cat(alone), training.h)


@pytest.mark.parametrize(("name", "shape"), REFUSED)
def test_data_that_a_network_cannot_read_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"the {name} network reads .*shape \(.*; use the mlp network"):
        build(name, shape)


@every_network
def test_a_network_in_half_precision_has_densities_in_float32(name: str, shape: tuple[int, ...]) -> None:
    network, x = build(name, shape).bfloat16(), examples(shape).bfloat16()
    inference = network.infer(x, noise=unit_noise)
    assert inference.h.dtype == network.generate(2).dtype == torch.bfloat16
    assert inference.kl.dtype == inference.log_ratio.dtype == torch.float32
    exact = build(name, shape).infer(x.float(), noise=unit_noise)
    torch.testing.assert_close(inference.kl, exact.kl, rtol=0.1, atol=0.05)


# -- conv ------------------------------------------------------------------------------------------------------------------


def test_conv_has_the_size_of_the_released_network() -> None:
    assert sum(p.numel() for p in conv((1, 28, 28), out_channels=1).parameters()) == 990_249


# -- residual --------------------------------------------------------------------------------------------------------------


def multiply_adds(network: nn.Module, x: Tensor) -> int:
    """Of one pass over x, biases left out, counted layer by layer from the shapes that pass by."""
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            counts.append(output.numel() * module.in_features)
        elif isinstance(module, nn.Conv2d):
            counts.append(output.numel() * module.in_channels * math.prod(module.kernel_size))
        elif isinstance(module, nn.ConvTranspose2d):
            counts.append(inputs[0].numel() * module.out_channels * math.prod(module.kernel_size))

    for module in network.modules():
        module.register_forward_hook(count)
    network.infer(x)  # type: ignore[operator]
    return sum(counts)


def test_residual_costs_a_fraction_of_conv() -> None:
    x = torch.zeros(1, 1, 28, 28)
    ours, papers = (multiply_adds(network((1, 28, 28), 1), x) for network in (residual, conv))
    assert ours < papers / 10


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (1, 200, 200), (2, 1000)])
def test_what_z_changes_neither_vanishes_nor_explodes_with_depth(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = residual(shape, out_channels=1)
    with torch.no_grad():
        h = network.generate(16, generator=torch.Generator().manual_seed(0))
    assert 0.01 < h.std(0).mean() < 0.2


def test_the_gain_is_what_the_activation_takes() -> None:
    taken, _ = integrate.quad(lambda u: (u * special.expit(u)) ** 2 * stats.norm.pdf(u), -12, 12)
    assert pytest.approx(taken**-0.5, abs=0.005) == GAIN


# -- Batch normalisation on several processes is torch's own on one process with the whole batch -----------------------


class NormCase(NamedTuple):
    norm: nn.Module
    shape: tuple[int, ...]
    """Of an example."""
    shares: tuple[int, int]
    """Of each batch."""
    offset: float = 0.0
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-11


NORM_CASES = {
    "flat": NormCase(nn.BatchNorm1d(3), (3,), (5, 2)),
    "one-each": NormCase(nn.BatchNorm1d(3), (3,), (1, 1)),
    "mean-of-all": NormCase(nn.BatchNorm1d(3, momentum=None), (3, 4), (1, 4)),
    "maps": NormCase(nn.BatchNorm2d(3, eps=0.1), (3, 4, 4), (3, 4)),
    "nothing": NormCase(nn.BatchNorm2d(3), (3, 2, 2), (0, 4)),
    "volumes": NormCase(nn.BatchNorm3d(2, momentum=0.5, affine=False), (2, 2, 2, 3), (2, 1)),
    "far-off": NormCase(nn.BatchNorm2d(3), (3, 4, 4), (6, 5), offset=1e3, dtype=torch.float32, tolerance=3e-3),
    "half": NormCase(nn.BatchNorm2d(3), (3, 4, 4), (6, 5), offset=1.0, dtype=torch.bfloat16, tolerance=0.05),
}
BATCHES = 2
ROWS = ("y", "of x")


def started(case: NormCase) -> nn.Module:
    """Gains and biases that are not 1 and 0, in float64 or float32."""
    norm, generator = copy.deepcopy(case.norm), torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0, generator=generator)
    return norm.double() if case.dtype == torch.float64 else norm


def passed(norm: nn.Module, case: NormCase, share: slice) -> dict[str, Tensor]:
    """Outputs and gradients of a weighted sum of them, over two batches, and the state that they leave."""
    generator, found = torch.Generator().manual_seed(0), {}
    for batch in range(BATCHES):
        x, upstream = torch.randn(2, sum(case.shares), *case.shape, generator=generator, dtype=torch.float64)
        x = (x + case.offset).to(case.dtype)[share].requires_grad_()
        y = norm(x)
        assert y.dtype == x.dtype
        (y * upstream[share]).sum().backward()
        found |= {f"y {batch}": y.detach(), f"of x {batch}": x.grad}
    found |= {f"of {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return found | dict(norm.state_dict())


def shares_passed(_: Path) -> dict[str, Any]:
    with joined(torch.device("cpu")) as us:
        found = {}
        for name, case in NORM_CASES.items():
            model = nn.Sequential(started(case))
            with global_statistics(model):
                share = slice(sum(case.shares[: us.rank]), sum(case.shares[: us.rank + 1]))
                found[name] = passed(model[0], case, share)
        return found


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(2, shares_passed, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", NORM_CASES)
def test_the_batch_is_that_of_all_processes(name, on_two):
    case, shares = NORM_CASES[name], [found[name] for found in on_two]
    whole = case._replace(dtype=torch.float64)
    truth = passed(started(case).double(), whole, slice(None))
    close = {"rtol": case.tolerance, "atol": case.tolerance}
    assert shares[0].keys() == shares[1].keys() == truth.keys()
    for key, value in truth.items():
        first, second = (share[key] for share in shares)
        if key.startswith(ROWS):
            torch.testing.assert_close(torch.cat([first, second]).double(), value, **close, msg=key)
        elif key.startswith("of "):
            torch.testing.assert_close((first + second).double(), value, **close, msg=key)
        else:
            assert torch.equal(first, second), key
            torch.testing.assert_close(first.to(value.dtype), value, **close, msg=key)


class Twice(nn.Module):
    """A norm in two places, under names that a saved model has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.first[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


def ended_by_an_error(model: Twice, x: Tensor, found: dict[str, Any]) -> None:
    with global_statistics(model):
        model(x)
        found["state"] = [list(model.state_dict()), [id(parameter) for parameter in model.parameters()]]
        found["one"] = isinstance(model.again, GlobalBatchNorm) and model.again is model.first[1]
        model.double().eval()  # buffers are other tensors now
        found["y"] = model(x.double())
        raise KeyError("of the training")


def replaced(_: Path) -> dict[str, Any]:
    with joined(torch.device("cpu")):
        model, x, found = Twice(), torch.rand(5, 3), {}
        norm, state = model.again, [list(model.state_dict()), [id(parameter) for parameter in model.parameters()]]
        with pytest.raises(KeyError, match="of the training"):
            ended_by_an_error(model, x, found)
        return {
            "state": found["state"] == state,
            "one": found["one"] and model.again is model.first[1] is norm,
            "eval": torch.equal(model(x.double()), found["y"]) and not norm.training,
            "tracked": int(norm.num_batches_tracked),
            "dtype": str(norm.running_var.dtype),
        }


def test_a_model_is_what_it_was_when_training_ends_whatever_ends_it(tmp_path):
    for found in results_of(2, replaced, tmp_path):
        assert found == {"state": True, "one": True, "eval": True, "tracked": 2, "dtype": "torch.float64"}


def test_one_process_keeps_the_norms_of_torch():
    model = Twice()
    with global_statistics(model):
        assert processes().world_size == 1
        assert type(model.again) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("kernel", "stride", "channels"), [(6, 2, (5, 3)), (10, 2, (2, 1)), (9, 3, (3, 4)), (5, 1, (6, 1)), (3, 1, (4, 3))]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_transposed_convolution_is_that_of_torch(kernel, stride, channels, bias, memory_format):
    torch.manual_seed(0)
    asked = {"stride": stride, "padding": (kernel - stride) // 2, "bias": bias, "dtype": torch.float64}
    theirs, ours = nn.ConvTranspose2d(*channels, kernel, **asked), _Transposed(*channels, kernel, **asked)
    ours.load_state_dict(theirs.state_dict())
    ours.to(memory_format=memory_format)
    x = torch.randn(3, channels[0], 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    found = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = layer(given)
        (y**2).sum().backward()
        found.append([y, given.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
