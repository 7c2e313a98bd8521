"""The module behind compilation and parallel wrappers: the one that can be differentiated twice."""

from __future__ import annotations

import copy
from types import MethodType

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dit_mlflow.errors import UnsupportedError, first_line

_COMPILED = "_orig_mod"
"""Where ``torch.compile`` keeps a module in its wrapper. Importing the wrapper's class would load the compiler."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` was given, however nested."""
    while True:
        if _is_compiled(model):
            model = model.get_submodule(_COMPILED)
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def plain_name(name: str) -> str:
    """The name of a parameter or module as it would be if no submodule were compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of ``unwrapped(model)`` in which nothing is compiled: compiled code has no second derivative.

    Raises:
        UnsupportedError: it cannot be copied.
    """
    try:
        copied = copy.deepcopy(unwrapped(model))
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"the model ({type(unwrapped(model)).__name__}) cannot be copied ({first_line(error)}). Modules must not "
            "keep tensors of a forward pass (detach them), open files or locks; use "
            "torch.nn.utils.parametrizations.weight_norm in place of torch.nn.utils.weight_norm"
        ) from error
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if child is not None and _is_compiled(child):
                parent._modules[name] = child.get_submodule(_COMPILED)
    for module in copied.modules():
        # torch.compile on a method, in the class or as model.forward = torch.compile(model.forward).
        original = getattr(module.forward, "_torchdynamo_orig_callable", None)
        if original is not None:
            module.forward = MethodType(getattr(original, "__func__", original), module)
    return copied


def _is_compiled(module: nn.Module) -> bool:
    return _COMPILED in module._modules
