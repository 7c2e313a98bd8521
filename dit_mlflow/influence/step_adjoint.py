"""Vector-Jacobian products of the optimizer's own step, without clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_mlflow.influence.adjoint import Adjoint, vector_jacobian
from dit_mlflow.influence.runs import Run
from dit_mlflow.trajectory.optimizers import optimizer_class
from dit_mlflow.trajectory.state import COUNTERS, State


@dataclass(frozen=True, eq=False)
class PulledRun:
    """Adjoints of one run before the step: of its parameters, gradients and optimizer state.

    Attributes:
        parameters: ``[A, size]``; may be the adjoint's own part, which is not needed any more.
        gradients: ``[A, size]``.
        optimizer: ``[A, size]`` by key of the state.
        undefined: bool ``[size]``: where the step has no derivative, because every gradient there was 0 up to and
            including this step (Adam's ``v = 0``); ``None`` = nowhere.
    """

    parameters: Tensor
    gradients: Tensor
    optimizer: dict[str, Tensor]
    undefined: Tensor | None = None


class StepAdjoint(Protocol):
    """How adjoints travel back through one step of an optimizer, run by run.

    Attributes:
        needs_values: whether the optimizer's state must have its values, or only its keys.
    """

    @property
    def needs_values(self) -> bool: ...

    def __call__(
        self, state: State, runs: Sequence[Run], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledRun]:
        """From ``adjoint`` at ``t + 1`` to the runs' parts at ``t``.

        Args:
            state: ``s_t``.
            runs: of this step.
            gradients: the step's gradients, clipped, ``[sum of sizes]``; asked only if their values matter.
            adjoint: at ``t + 1``.
        """
        ...


def step_adjoint(optimizer: str) -> StepAdjoint:
    """The way for an optimizer, by the name of its class."""
    return SgdStep() if optimizer == "SGD" else AutogradStep(optimizer)


class SgdStep:
    """SGD is linear in parameters, momentum and gradient, so that its transpose needs neither their values nor a graph.

    ``h = ± g + weight_decay * theta``, ``m' = momentum * m + (1 - dampening) * h`` and ``theta' = theta - lr * d``,
    where ``d`` is ``m'``, or ``h + momentum * m'`` (Nesterov), or ``h`` (no momentum).

    Cost: three or four elementwise passes per row, a third of :class:`AutogradStep`'s.
    """

    needs_values = False

    def __call__(
        self, state: State, runs: Sequence[Run], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledRun]:
        return [self._pull(run, adjoint) for run in runs]

    def _pull(self, run: Run, adjoint: Adjoint) -> PulledRun:
        settings = run.settings
        rate, momentum = settings["lr"], settings["momentum"]
        parameters = adjoint.parameters[:, run.part]
        if not momentum:
            by_h, optimizer = parameters * -rate, {}
        else:
            through = -rate * momentum if settings["nesterov"] else -rate
            later = adjoint.optimizer.get("momentum_buffer")
            # In place: the adjoint after the step is not needed any more.
            by_buffer = parameters * through if later is None else later[:, run.part].add_(parameters, alpha=through)
            # The first buffer is the gradient itself, whatever the dampening.
            share = 1.0 if run.starts_momentum else 1.0 - settings["dampening"]
            by_h = by_buffer if share == 1.0 else by_buffer * share
            if settings["nesterov"]:
                by_h = by_h.add(parameters, alpha=-rate)
            optimizer = {} if run.starts_momentum else {"momentum_buffer": by_buffer * momentum}
        if settings["weight_decay"]:
            parameters = torch.add(parameters, by_h, alpha=settings["weight_decay"])
        return PulledRun(parameters, -by_h if settings["maximize"] else by_h, optimizer)


class AutogradStep:
    """Any optimizer that works elementwise: one step of PyTorch's own code with ``differentiable=True``.

    A run's parameters and state are non-leaf clones of the recorded ones, joined to one vector each.

    Args:
        name: of the class in ``torch.optim``.

    Cost: one step of the optimizer, and a backward pass through it for all rows together.
    """

    needs_values = True

    def __init__(self, name: str) -> None:
        self._denominator = _DENOMINATORS.get(name)
        placeholder = torch.zeros(1, requires_grad=True)
        self._optimizer = optimizer_class(name)([placeholder], differentiable=True)  # type: ignore[call-arg]

    def __call__(
        self, state: State, runs: Sequence[Run], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledRun]:
        clipped = gradients()
        return [self._pull(state, run, clipped[run.gradient], adjoint) for run in runs]

    def _pull(self, state: State, run: Run, gradient: Tensor, adjoint: Adjoint) -> PulledRun:
        theta = _joined(state.parameters[name] for name in run.names).requires_grad_()
        stored = {key: _stored(state, run, key, value) for key, value in run.entry.items()}
        slots = {key: value.requires_grad_() for key, value in stored.items() if _is_slot(key, value)}
        g = gradient.detach().requires_grad_()
        with torch.enable_grad(), _DifferentiableArithmetic():
            moved, moved_slots = self._step(run, theta, stored, g)
        followed = [key for key in moved_slots if key in adjoint.optimizer]
        by_theta, by_g, *by_slots = vector_jacobian(
            [moved, *(moved_slots[key] for key in followed)],
            [theta, g, *slots.values()],
            [adjoint.parameters[:, run.part], *(adjoint.optimizer[key][:, run.part] for key in followed)],
            adjoint.rows,
            batched=True,
        )
        undefined = None
        if self._denominator is not None:
            # Adamax adds eps before it takes the maximum, the others after the root.
            at_zero = moved_slots[self._denominator] <= (run.settings["eps"] if self._denominator == "exp_inf" else 0)
            undefined = at_zero if bool(at_zero.any()) else None
        return PulledRun(by_theta.clone(), by_g, dict(zip(slots, by_slots, strict=True)), undefined)

    def _step(
        self, run: Run, theta: Tensor, stored: dict[str, Any], gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Parameters and state vectors after the step, as functions of those before and of the gradients."""
        optimizer, moved = self._optimizer, theta.clone()
        moved.grad = gradient
        flags = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}
        optimizer.param_groups = [{**run.settings, **flags, "params": [moved]}]
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
"""Optimizers that divide by something which has no derivative at 0, and the state it is made from."""


class _DifferentiableArithmetic(TorchFunctionMode):
    """Two corrections to what an optimizer computes when it is differentiated.

    The square root gets the derivative 0 at 0, where it is infinite. Adam-like optimizers divide by
    ``sqrt(v) + eps``; an element whose gradient was always 0 has ``v = 0`` and does not move, whatever the adjoint, but
    ``0 * inf`` would turn every score into NaN.

    Step counters are float64. As tensors in float32, which the optimizers make for themselves, the bias correction
    ``1 - beta ** step`` would be off by 6e-5 at ``beta = 0.999``; without ``differentiable`` it is in double precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SQUARE_ROOTS and not kwargs:
            (value,) = args
            zero = value == 0
            return torch.where(zero, 0.0, torch.where(zero, 1.0, value).sqrt())
        if func is torch.tensor and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


# In place only on temporaries, whose result is used.
_SQUARE_ROOTS = (torch.sqrt, Tensor.sqrt, Tensor.sqrt_)


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _stored(state: State, run: Run, key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key in COUNTERS:
        return value.double()
    return _joined(state.optimizer[name][key] for name in run.names)


def _is_slot(key: str, value: Any) -> bool:
    # ASGD's average "ax" never reaches the parameters.
    return key not in COUNTERS and key != "ax" and isinstance(value, Tensor) and value.is_floating_point()
