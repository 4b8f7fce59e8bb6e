"""Adam and AdamW as torch has them, without its compiler.

torch's optimisers import the compiler, though a step has no use for it: a second of the processor and 100 MB, in every
training (docs/speed.md).
"""

import inspect
from typing import TypeVar, final

import torch

__all__ = ["Adam", "AdamW"]

_Optimiser = TypeVar("_Optimiser", bound=type[torch.optim.Optimizer])


def _without_compiler(optimiser: _Optimiser) -> _Optimiser:
    """Take off torch's decorators, which only the compiler needs; ``step`` keeps the one that switches gradients off."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step"):
        setattr(optimiser, name, inspect.unwrap(getattr(optimiser, name)))
    optimiser.step = torch.no_grad()(optimiser.step)  # type: ignore[method-assign]
    return optimiser


@_without_compiler
@final
class Adam(torch.optim.Adam):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), with the arguments and the steps of torch's."""


@_without_compiler
@final
class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), with the arguments and the steps of torch's."""
