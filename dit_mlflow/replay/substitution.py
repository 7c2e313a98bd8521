"""Put other tensors in place of a module's parameters and buffers while a function runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")


class Substitution:
    """What ``torch.func.functional_call`` does, prepared once for a module, and for any function of it.

    Unlike there, a buffer that the function assigns anew (``self.mean = …``) is not lost.

    Args:
        module: its structure must not change afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = _places(module, "_parameters")
        self._buffers = _places(module, "_buffers")

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: MutableMapping[str, Tensor],
        function: Callable[[nn.Module], Result],
    ) -> Result:
        """``function(module)`` with the given tensors, by name; tied ones by their first name.

        ``buffers`` holds afterwards what the function left in the module's.
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


_Place = tuple[dict[str, Tensor], str]


def _places(module: nn.Module, kind: str) -> list[tuple[_Place, str]]:
    """Every slot of a tensor in the tree of modules, and the first name under which the tensor is known."""
    first: dict[int, str] = {}
    found = []
    for prefix, child in module.named_modules():
        for key, tensor in getattr(child, kind).items():
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                found.append(((getattr(child, kind), key), name))
    return found
