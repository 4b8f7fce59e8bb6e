"""What torch makes of the likelihoods: graphs compiled without a break, exported programs, half precision around them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import CASES, FAMILIES, Case
from test_discrete import ALL as UNSCALED
from torch import Tensor, nn

from sigma_vae import VAE, Gaussian, Laplace, Logistic, RunningMinimum, StudentT, mlp
from sigma_vae.likelihoods import base, densities
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.types import Likelihood

EVENT = (2, 2, 3)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated",  # torch's own, tracing an autograd.Function
    "ignore::DeprecationWarning:torch",  # and exporting
    "ignore::FutureWarning:torch",
)


@dataclass(frozen=True)
class Row:
    """A likelihood, ready for use, and the shape of its data."""

    name: str
    make: Callable[[], Likelihood]
    event: tuple[int, int, int] = EVENT
    levels: int = 256
    gradients: bool = True
    """Whether the compiled gradient is looked at: tracing it takes seconds, and is the same code for several rows."""

    def batch(self) -> tuple[Tensor, Tensor]:
        """Features and data."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, self.levels, (3, *self.event), generator=generator) / (self.levels - 1)
        h = 0.3 * torch.randn((3, self.make().in_channels, *self.event[1:]), generator=generator)
        h[:, : self.event[0]] += x
        return h, x


def of_case(case: Case) -> Row:
    # Scales and families meet in one line of code: every scale with the first family, and every family where it is solved.
    differs = case.scale.name == "optimal" or (case.family is FAMILIES[0] and case.observes == "density")
    return Row(case.name, lambda: case.settled(EVENT).float(), gradients=differs)


def begun(likelihood: LocationScale) -> LocationScale:
    """After a first step of training."""
    x = torch.linspace(0, 1, 24).reshape(2, *EVENT)
    h = torch.zeros(2, likelihood.in_channels, *EVENT[1:])
    with torch.no_grad():
        likelihood(h, x)
    return likelihood


SCALED = tuple(of_case(case) for case in CASES)
SPECIAL = (
    Row("student-t:learned/optimal", lambda: begun(StudentT(2, df="learned"))),
    Row("student-t:predicted/optimal", lambda: begun(StudentT(2, df="predicted"))),
    *(
        Row(f"{family.__name__.lower()}/running-minimum", lambda family=family: begun(family(2, RunningMinimum())))
        for family in (Gaussian, Laplace, Logistic, StudentT)
    ),
)
FRESH = (  # the first step of training, which makes the buffers
    Row("first step of gaussian/optimal", lambda: Gaussian(2)),
    Row("first step of student-t:learned/running-minimum", lambda: StudentT(2, RunningMinimum(), df="learned")),
)
WITHOUT_SCALE = tuple(
    Row(
        family.name,
        lambda family=family: family.make(family.channels, spatial_dims=2, levels=family.levels),
        (family.channels, *EVENT[1:]),
        family.levels,
    )
    for family in UNSCALED
)


def named(rows: tuple[Row, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


@pytest.fixture(autouse=True)
def short_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing fifteen equal steps of the Student-t law's continued fraction takes seconds a case; two say as much."""
    monkeypatch.setattr(densities, "FRACTION_PAIRS", 2)


# -- torch.compile -----------------------------------------------------------------------------------------------------------------


def one_step(row: Row, training: bool, backend: str | None) -> list[Tensor]:
    """Log-probabilities, all gradients and buffers."""
    likelihood, (h, x) = row.make().train(training), row.batch()
    h.requires_grad_()

    def log_prob(h: Tensor) -> Tensor:
        return likelihood(h, x).log_prob(x)

    value = (torch.compile(log_prob, fullgraph=True, backend=backend) if backend else log_prob)(h)
    value.sum().backward()
    return [value.detach(), h.grad, *(p.grad for p in likelihood.parameters()), *likelihood.buffers()]


def check_compiled(row: Row, training: bool) -> None:
    torch._dynamo.reset()
    compiled = one_step(row, training, "aot_eager" if row.gradients else "eager")
    for ours, eager in zip(compiled, one_step(row, training, None), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@named((*SCALED, *SPECIAL, *WITHOUT_SCALE))
def test_one_graph_gives_the_same_numbers(row: Row, training: bool) -> None:
    check_compiled(row, training)


@named(FRESH)
def test_one_graph_begins_a_training(row: Row) -> None:
    check_compiled(row, training=True)


# -- torch.export ------------------------------------------------------------------------------------------------------------------


class Scored(nn.Module):
    """Log-probability and, where there is one, log-mass of the data: what is observed in training makes no third formula."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.vae.network.infer(x, noise=torch.zeros).h
        likelihood = self.vae.likelihood
        return [likelihood(h).log_prob(x), *([likelihood.log_mass(h, x)] if likelihood.normalised else [])]


@named((*(row for row in SCALED if row.name.endswith("density")), *SPECIAL, *WITHOUT_SCALE))
def test_a_vae_with_it_is_exported(row: Row) -> None:
    likelihood, (_, x) = row.make(), row.batch()
    scored = Scored(VAE(mlp(row.event, likelihood.in_channels, latent_dim=2, width=4), likelihood)).eval()
    with torch.no_grad():
        exported = torch.export.export(scored, (x,)).module()
        for ours, eager in zip(exported(x), scored(x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-5)


# -- autocast ----------------------------------------------------------------------------------------------------------------------


def numbers(likelihood: Likelihood, h: Tensor, x: Tensor) -> list[Tensor]:
    """σ, log-probability, log-mass and mean, in training and evaluation."""
    result = []
    for training in (True, False):
        p = likelihood.train(training)(h, x)
        result += [p.log_prob(x), p.mean, *([p.scale] if isinstance(likelihood, LocationScale) else [])]
        result += [likelihood.log_mass(h, x)] if likelihood.normalised else []
    return result


def check_autocast(row: Row) -> None:
    """A network under autocast gives half-precision features; nothing computed of them is less than float32, or other."""
    h, x = row.batch()
    with torch.no_grad():
        exact = numbers(row.make(), h.bfloat16().float(), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            identity = torch.eye(h.shape[1])[..., None, None]
            half = nn.functional.conv2d(h, identity)
            assert half.dtype == torch.bfloat16
            ours = numbers(row.make(), half, x)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@named((*SCALED, *SPECIAL, *WITHOUT_SCALE))
def test_probabilities_are_float32_under_autocast(row: Row) -> None:
    check_autocast(row)


@named((*(row for row in SCALED if "/optimal/" in row.name), *SPECIAL, *WITHOUT_SCALE))
def test_without_the_cast_it_would_be_seen(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "at_least_float32", lambda h: h)
    with pytest.raises((AssertionError, RuntimeError)):  # or the half-precision operation does not exist
        check_autocast(row)
