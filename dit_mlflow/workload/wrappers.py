"""Take the module out of compiled and parallel wrappers, so that it can be differentiated twice."""

from __future__ import annotations

import copy
from types import MethodType

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dit_mlflow.errors import UnsupportedError, first_line
from dit_mlflow.torch_internals import COMPILED_MODULE, uncompiled


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` was given, however nested."""
    while True:
        if _is_compiled(model):
            model = model.get_submodule(COMPILED_MODULE)
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def plain_name(name: str) -> str:
    """The name of a parameter or module as it would be if no submodule were compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED_MODULE)


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
    # From the inside out and by every name, so that no nested or shared compiled module is missed.
    for name, module in reversed(list(copied.named_modules(remove_duplicate=False))):
        if _is_compiled(module):
            copied.set_submodule(name, module.get_submodule(COMPILED_MODULE))
    for module in copied.modules():
        # torch.compile on a method, in the class or as model.forward = torch.compile(model.forward).
        original = uncompiled(module.forward)
        if original is not None:
            module.forward = MethodType(getattr(original, "__func__", original), module)
    return copied


def _is_compiled(module: nn.Module) -> bool:
    return COMPILED_MODULE in dict(module.named_children())
