"""What the second derivative of a step needs of its operations, and errors that name those without one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.torch_internals import MISSING_DERIVATIVE, REFUSING_NODE


class PlainAttention:
    """A context: of the attention kernels, only the plain one can be differentiated twice.

    Choosing it takes a tenth of a small model's step, so the first step shows whether there is attention at all.
    """

    def __init__(self) -> None:
        self._attends: bool | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._attends is False:
            yield
            return
        with sdpa_kernel(SDPBackend.MATH), _Calls() as calls:
            yield
        self._attends = not calls.seen.isdisjoint(_ATTENTION)


@contextmanager
def naming_missing_derivatives() -> Iterator[None]:
    """Inside it, an error of torch about a missing derivative becomes :class:`UnsupportedError`."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(sign in str(error) for sign in MISSING_DERIVATIVE):
            raise
        raise UnsupportedError(
            f"the model or its loss cannot be differentiated twice, which influence needs: {error}. Use another "
            "implementation of that operation, one made of ordinary PyTorch operations"
        ) from error


def refuse_dead_ends(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients that autograd would take for constants: it does not run into the error that it planted there."""
    seen: set[Any] = set()
    left = [gradient.grad_fn for gradient in gradients]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == REFUSING_NODE:
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        left += [following for following, _ in node.next_functions]


class _Calls(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
