"""The solver within ``torch.compile``: one operator of the graph where it iterates, whose kernel is the eager code.

Tracing cannot go through iterations that end when they have converged. The operator has no gradient and needs none: the optimum is
detached (envelope theorem).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor

from sigma_vae.likelihoods.laws import LAWS
from sigma_vae.likelihoods.scales import Per
from sigma_vae.likelihoods.solve import Observed, best_log_scale, shared_shape

__all__ = ["best_batch_log_scale"]


def best_batch_log_scale(observed: Observed, per: Per, event_dims: int, log_floor: float, levels: int | None) -> Tensor:
    """As :func:`best_log_scale`, of one batch; compiled without a graph break.

    Raises:
        ValueError: under ``torch.compile``, the law has to be solved by iteration and is none of :data:`LAWS`.
    """
    law, loc, _, x = observed
    iterates = levels is not None or not law.closed_form
    if not (iterates and torch.compiler.is_compiling()):
        return best_log_scale([observed], per, event_dims, log_floor, levels)
    if law.name not in LAWS:
        raise ValueError(f"torch.compile solves for the σ of the laws {list(LAWS)}, got {law.name!r}; add it to `laws.LAWS`")
    numbers = [p for p in law.parameters if not isinstance(p, Tensor)]
    tensors = [p.detach() for p in law.parameters if isinstance(p, Tensor)]
    result: Tensor = _solve(law.name, numbers, tensors, loc, x, per, event_dims, log_floor, levels)
    return result


@torch.library.custom_op("sigma_vae::best_log_scale", mutates_args=())
def _solve(
    law: str,
    numbers: list[float],
    tensors: list[Tensor],
    loc: Tensor,
    x: Tensor,
    per: str,
    event_dims: int,
    log_floor: float,
    levels: int | None,
) -> Tensor:
    observed = Observed(LAWS[law](*numbers, *tensors), loc, loc.new_zeros(()), x)
    stream = torch.accelerator.current_stream(x.device) if x.device.type == "cuda" else None

    def solve() -> Tensor:
        if stream is not None:
            torch.accelerator.set_stream(stream)
        return best_log_scale([observed], cast(Per, per), event_dims, log_floor, levels).contiguous()

    # The solver differentiates, and an operator of a compiled graph runs where autograd is off, for this thread.
    with ThreadPoolExecutor(1) as other:
        return other.submit(solve).result()


@_solve.register_fake
def _(
    law: str,
    numbers: list[float],
    tensors: list[Tensor],
    loc: Tensor,
    x: Tensor,
    per: str,
    event_dims: int,
    log_floor: float,
    levels: int | None,
) -> Tensor:
    return x.new_empty(shared_shape(x.shape, cast(Per, per), event_dims))
