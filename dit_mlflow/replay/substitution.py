"""Replace a module's parameters and buffers by other tensors while a function runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.torch_internals import tensor_slots

Result = TypeVar("Result")


class Substitution:
    """``torch.func.functional_call``, prepared once for a module, and for any function of it.

    Unlike there, a buffer that the function assigns anew (``self.mean = …``) is kept.

    Args:
        module: its structure must not change afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters, self._buffers = _places(module, "parameters"), _places(module, "buffers")

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: MutableMapping[str, Tensor],
        function: Callable[[nn.Module], Result],
    ) -> Result:
        """``function(module)`` with the given tensors by name; tied tensors have their first name.

        Afterwards ``buffers`` holds the module's buffers as the function left them.
        """
        places = [(at, parameters[name]) for at, name in self._parameters]
        places += [(at, buffers[name]) for at, name in self._buffers]
        original = [owner[key] for (owner, key), _ in places]
        try:
            for (owner, key), tensor in places:
                owner[key] = tensor
            result = function(self._module)
            for (owner, key), name in self._buffers:
                buffers[name] = owner[key]
            return result
        finally:
            for ((owner, key), _), tensor in zip(places, original, strict=True):
                owner[key] = tensor

    def withdraw(self) -> None:
        """Remove the module's values, so that it can run only inside a call.

        Code that runs later, when a gradient is taken, would otherwise use other tensors than those of the call.
        """
        withdrawn: dict[int, Tensor] = {}
        for (owner, key), _ in [*self._parameters, *self._buffers]:
            value = owner[key]
            owner[key] = withdrawn.setdefault(id(value), value.detach().to("meta").as_subclass(_Withdrawn))


class _Withdrawn(Tensor):
    """Has a shape and a dtype; every operation on it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs)
        raise UnsupportedError(
            "a part of the model runs again when its gradient is taken (gradient checkpointing by other means than "
            "torch.utils.checkpoint, a reversible layer or another autograd function that calls modules), and a "
            "replayed model no longer has the parameters of its forward pass then. Train without it, or with "
            "torch.utils.checkpoint, which a replay skips"
        )


_Place = tuple[dict[str, Tensor], str]


def _places(module: nn.Module, kind: Literal["parameters", "buffers"]) -> list[tuple[_Place, str]]:
    """Every place of a tensor in the tree of modules, and the first name of that tensor."""
    first: dict[int, str] = {}
    found = []
    for prefix, child in module.named_modules():
        slots = tensor_slots(child, kind)
        for key, tensor in slots.items():
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                found.append(((slots, key), name))
    return found
