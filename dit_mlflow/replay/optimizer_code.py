"""An optimizer's own code, run such that a trace of it has the derivative of what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_mlflow.replay.dynamics import Parameters
from dit_mlflow.torch_internals import widening


class NumbersAsTensors(TorchFunctionMode):
    """Numbers that code reads out of floating tensors (``.item()``) stay tensors, so that they have a derivative.

    They have 0 dimensions and double precision, as Python's have, and do to the dtype of others what numbers do. Where
    torch takes numbers alone (``add(alpha=…)``), the same is computed in another way. Those that leave torch
    (``math.sqrt``, ``float``) are numbers all the same, and constants of a trace.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.item and args[0].is_floating_point():
            return args[0].reshape([]).double()
        name = getattr(func, "__name__", "").removesuffix("_")
        if isinstance(factor := kwargs.get(_FACTORS.get(name, "")), Tensor) and len(args) > 1:
            del kwargs[_FACTORS[name]]
            scaled = args[1] * factor
            args = (args[0], scaled.to(args[1]) if isinstance(args[1], Tensor) else scaled, *args[2:])
        if name == "lerp" and len(args) > 2 and isinstance(args[2], Tensor):
            args = (*args[:2], args[2].to(args[0]))
        return func(*args, **kwargs)


_FACTORS = {"add": "alpha", "sub": "alpha", "addcmul": "value", "addcdiv": "value"}
"""What multiplies the first of the tensors that a function adds to its own."""


class HighPrecision:
    """Runs code such that what it computes in bfloat16 or float16 is computed in a wider dtype.

    Rounding has no derivative. That of the same operations without it is what a sweep can take.

    Args:
        what: whose code it is, to be told.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._met: set[torch.dtype] = set()
        self._warned = False

    @property
    def needed(self) -> bool:
        """Whether anything in low precision was met so far."""
        return bool(self._met)

    def __call__(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """A context in which low precision is ``dtype``, or float32 if that is low too."""
        return widening(torch.promote_types(dtype, torch.float32), self._met.add)

    def warn(self, before: Parameters, as_it_is: Callable[[], Parameters], widened: Callable[[], Parameters]) -> None:
        """Warn once of what was met, and of how far a step in high precision is from the step as it is.

        Args:
            before: the parameters before a step.
            as_it_is, widened: those after it.
        """
        if self._warned or not self._met:
            return
        self._warned, right = True, widened()
        apart, way = (
            float(torch.stack([(one[name] - value).double().norm() for name, value in right.items()]).norm())
            for one in (as_it_is(), before)
        )
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self._met))
        warnings.warn(
            f"{self._what} computes in {names}, and rounding has no derivative: training is replayed as it ran, and "
            "scores are derivatives of the same steps without that rounding. Here the two are apart by "
            f"{apart / way if way else 0:.1%} of the length of a step. docs/exactness.md says what that does to "
            "scores; leave_one_out takes no derivative",
            stacklevel=2,
        )
