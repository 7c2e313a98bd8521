"""The vector-Jacobian product of an optimizer's step, through PyTorch's own optimizer code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_mlflow.replay.adjoint import Adjoint, vector_jacobian
from dit_mlflow.replay.optimizers import optimizer_class
from dit_mlflow.replay.step_adjoint import PulledGroup, UpdateGroup
from dit_mlflow.replay.traced import root
from dit_mlflow.trajectory.state import COUNTERS, State


class AutogradStep:
    """Any optimizer that works elementwise: one step of PyTorch's own code with ``differentiable=True``.

    A group's parameters, and each kind of its state, are joined to one vector.

    Args:
        name: of the class in ``torch.optim``.

    Cost: one step of the optimizer, and a backward pass through it for all rows together.
    """

    needs_values = True

    def __init__(self, name: str) -> None:
        self._denominator = _DENOMINATORS.get(name)
        self._divides_by_rate = name in ("Adam", "AdamW")
        placeholder = torch.zeros(1, requires_grad=True)
        self._optimizer = optimizer_class(name)([placeholder], differentiable=True)  # type: ignore[call-arg]

    def __call__(
        self, state: State, groups: Sequence[UpdateGroup], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledGroup]:
        clipped = gradients()
        return [self._pull(state, group, clipped[group.gradient], adjoint) for group in groups]

    def _pull(self, state: State, group: UpdateGroup, gradient: Tensor, adjoint: Adjoint) -> PulledGroup:
        """One group's part, from its gradient ``[size]``."""
        if group.settings["lr"] == 0.0 and self._divides_by_rate:
            # PyTorch divides by lr. At 0 (the start of a warm-up) only the state moves, as at any other rate.
            still = Adjoint(torch.zeros_like(adjoint.parameters), adjoint.buffers, adjoint.optimizer)
            moving = self._pull(state, replace(group, settings={**group.settings, "lr": 1.0}), gradient, still)
            return replace(moving, parameters=moving.parameters + adjoint.parameters[:, group.part])
        theta = group.parameters(state).requires_grad_()
        stored = {key: _stored(state, group, key, value) for key, value in group.entry.items()}
        slots = {key: value.requires_grad_() for key, value in stored.items() if _is_slot(key, value)}
        g = gradient.detach().requires_grad_()
        with torch.enable_grad(), _DifferentiableArithmetic():
            moved, moved_slots = self._step(group, theta, stored, g)
        followed = [key for key in moved_slots if key in adjoint.optimizer]
        by_theta, by_g, *by_slots = vector_jacobian(
            [moved, *(moved_slots[key] for key in followed)],
            [theta, g, *slots.values()],
            [adjoint.parameters[:, group.part], *(adjoint.optimizer[key][:, group.part] for key in followed)],
            adjoint.rows,
            batched=True,
        )
        undefined = None
        if self._denominator is not None:
            divisor = moved_slots[self._denominator].detach()
            # Adamax adds eps before it takes the maximum, the others after the root.
            smallest = group.settings["eps"] if self._denominator == "exp_inf" else 0.0
            undefined = partial(torch.le, divisor, smallest)
        return PulledGroup(by_theta.clone(), by_g, dict(zip(slots, by_slots, strict=True)), undefined)

    def _step(
        self, group: UpdateGroup, theta: Tensor, stored: dict[str, Any], gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Parameters and state vectors after the step, as functions of those before and of the gradients."""
        optimizer, moved = self._optimizer, theta.clone()
        moved.grad = gradient
        flags = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}
        optimizer.param_groups = [{**group.settings, **flags, "params": [moved]}]
        optimizer.state = defaultdict(dict)
        if stored:
            optimizer.state[moved] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in stored.items()}
        optimizer.step()
        return moved, {key: value for key, value in optimizer.state[moved].items() if _is_slot(key, value)}


_DENOMINATORS = {
    "Adam": "exp_avg_sq",
    "AdamW": "exp_avg_sq",
    "NAdam": "exp_avg_sq",
    "RAdam": "exp_avg_sq",
    "Adamax": "exp_inf",
    "Adagrad": "sum",
    "RMSprop": "square_avg",
}
"""Optimizers whose denominator has no derivative at 0, and the key of the state that it is computed from."""


class _DifferentiableArithmetic(TorchFunctionMode):
    """Two corrections to what an optimizer computes with ``differentiable=True``.

    The square root has the derivative 0 at 0, see :func:`root`. Adam-like optimizers divide by ``sqrt(v) + eps``; an
    element whose gradient was always 0 has ``v = 0`` and does not move, but ``0 * inf`` would make every score NaN.

    Step counters are float64. In float32, in which the optimizers create them, the bias correction
    ``1 - beta ** step`` would be off by 6e-5 at ``beta = 0.999``; without ``differentiable`` it is in double precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SQUARE_ROOTS and not kwargs:
            return root(*args)
        if func is torch.tensor and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


# Optimizers call the one in place on temporaries only, and use its result.
_SQUARE_ROOTS = (torch.sqrt, Tensor.sqrt, Tensor.sqrt_)


def _stored(state: State, group: UpdateGroup, key: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if key in COUNTERS else group.slot(state, key)
    return value


def _is_slot(key: str, value: Any) -> bool:
    # ASGD's average "ax" never reaches the parameters.
    return key not in COUNTERS and key != "ax" and isinstance(value, Tensor) and value.is_floating_point()
