"""Batch normalisation on several processes is torch's own on one process with the whole batch."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launched import results_of
from torch import Tensor, nn

from sigma_vae.training.distributed import GlobalBatchNorm, global_statistics, joined, processes


class Case(NamedTuple):
    norm: nn.Module
    shape: tuple[int, ...]
    """Of an example."""
    shares: tuple[int, int]
    """Of each batch."""
    offset: float = 0.0
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-11


CASES = {
    "flat": Case(nn.BatchNorm1d(3), (3,), (5, 2)),
    "one-each": Case(nn.BatchNorm1d(3), (3,), (1, 1)),
    "mean-of-all": Case(nn.BatchNorm1d(3, momentum=None), (3, 4), (1, 4)),
    "maps": Case(nn.BatchNorm2d(3, eps=0.1), (3, 4, 4), (3, 4)),
    "nothing": Case(nn.BatchNorm2d(3), (3, 2, 2), (0, 4)),
    "volumes": Case(nn.BatchNorm3d(2, momentum=0.5, affine=False), (2, 2, 2, 3), (2, 1)),
    "far-off": Case(nn.BatchNorm2d(3), (3, 4, 4), (6, 5), offset=1e3, dtype=torch.float32, tolerance=3e-3),
    "half": Case(nn.BatchNorm2d(3), (3, 4, 4), (6, 5), offset=1.0, dtype=torch.bfloat16, tolerance=0.05),
}
BATCHES = 2
ROWS = ("y", "of x")


def started(case: Case) -> nn.Module:
    """Gains and biases that are not 1 and 0, in float64 or float32."""
    norm, generator = copy.deepcopy(case.norm), torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0, generator=generator)
    return norm.double() if case.dtype == torch.float64 else norm


def passed(norm: nn.Module, case: Case, share: slice) -> dict[str, Tensor]:
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
        for name, case in CASES.items():
            model = nn.Sequential(started(case))
            with global_statistics(model):
                share = slice(sum(case.shares[: us.rank]), sum(case.shares[: us.rank + 1]))
                found[name] = passed(model[0], case, share)
        return found


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(2, shares_passed, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_the_batch_is_that_of_all_processes(name, on_two):
    case, shares = CASES[name], [found[name] for found in on_two]
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
