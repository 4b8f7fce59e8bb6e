"""Adam and AdamW as torch has them, without its compiler.

torch's optimisers import the compiler, though a step has no use for it: a second of the processor and 100 MB, in every
training (docs/speed.md).
"""

import inspect
from typing import TypeVar

import torch

_Optimiser = TypeVar("_Optimiser", bound=torch.optim.Optimizer)


def _without_compiler(optimiser: type[_Optimiser]) -> type[_Optimiser]:
    """A subclass whose methods have lost torch's decorators, of which the compiler has need and no one else.

    ``step`` has one that switches gradients off, which it keeps.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    methods = {name: inspect.unwrap(getattr(optimiser, name)) for name in names}
    return type(optimiser.__name__, (optimiser,), methods | {"step": torch.no_grad()(methods["step"])})


Adam = _without_compiler(torch.optim.Adam)
AdamW = _without_compiler(torch.optim.AdamW)
