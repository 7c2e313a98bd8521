"""The vector-Jacobian product of an optimizer step, through PyTorch's own optimizer code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dit_mlflow.trajectory.dynamics import Dynamics
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.optimizers import optimizer_class
from dit_mlflow.trajectory.state import OptimizerState
from dit_mlflow.trajectory.step import Step

Slots = dict[tuple[str, str], Tensor]
"""Optimizer state as ``(parameter name, state key) -> tensor``."""


@dataclass(eq=False)
class Adjoint:
    """``lambda``: derivatives of ``A`` scalars with respect to a state.

    Attributes:
        parameters: ``[A, *shape]`` by parameter name.
        optimizer: ``[A, *shape]`` by parameter name and state key; absent = 0.
    """

    parameters: dict[str, Tensor]
    optimizer: Slots = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(next(iter(self.parameters.values())))

    def append(self, other: Adjoint) -> Adjoint:
        """Both adjoints' rows, this one's first."""
        optimizer: Slots = {}
        for key in {**self.optimizer, **other.optimizer}:
            pair = (self.optimizer.get(key), other.optimizer.get(key))
            like = next(value for value in pair if value is not None)
            zeros = [like.new_zeros((adjoint.rows, *like.shape[1:])) for adjoint in (self, other)]
            optimizer[key] = torch.cat([z if v is None else v for v, z in zip(pair, zeros, strict=True)])
        return Adjoint(
            {name: torch.cat([value, other.parameters[name]]) for name, value in self.parameters.items()},
            optimizer,
        )

    def keep(self, rows: Sequence[int]) -> Adjoint:
        """Only the given rows."""
        picked = list(rows)
        return Adjoint(
            {name: value[picked] for name, value in self.parameters.items()},
            {key: value[picked] for key, value in self.optimizer.items()},
        )


@dataclass(frozen=True, eq=False)
class Pulled:
    """What :class:`UpdateAdjoint` gives.

    Attributes:
        adjoint: at ``t``, without the Hessian term.
        gradients: ``lambda_g``, ``[A, *shape]`` by parameter name.
        undefined: by parameter name, the elements at which the step has no derivative, because every gradient there
            was 0 up to and including this step (Adam's ``v = 0``); parameters without any are absent.
    """

    adjoint: Adjoint
    gradients: dict[str, Tensor]
    undefined: dict[str, Tensor]


_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq"}


class UpdateAdjoint:
    """Pulls adjoints back through ``(theta, o)_{t+1} = U_t((theta, o)_t, g_t)``.

    ``U_t`` is gradient clipping and one step of PyTorch's own optimizer with ``differentiable=True``, whose
    parameters and state are non-leaf clones of the recorded ones.

    Args:
        dynamics: for the clipping.
        layout: the recorded optimizer.
        batched: pull several rows back in one vectorised pass instead of a loop.
    """

    def __init__(self, dynamics: Dynamics, layout: OptimizerLayout, batched: bool) -> None:
        self._dynamics = dynamics
        self._layout = layout
        placeholder = torch.zeros(1, requires_grad=True)
        self._optimizer = optimizer_class(layout.name)([placeholder], differentiable=True)  # type: ignore[call-arg]
        self._batched = batched

    def __call__(
        self,
        parameters: dict[str, Tensor],
        state: OptimizerState,
        gradients: dict[str, Tensor],
        step: Step,
        adjoint: Adjoint,
    ) -> Pulled:
        """``(lambda_theta, lambda_o), lambda_g`` from ``lambda`` at step ``t + 1``.

        Args:
            parameters, state, gradients: ``theta_t``, ``o_t`` and ``g_t`` (before clipping).
            step: the recorded hyperparameters.
            adjoint: at ``t + 1``.

        Cost: a few elementwise passes over parameters and state, per row.
        """
        theta = {name: parameters[name].detach().requires_grad_() for name in self._held}
        slots = {
            (name, key): value.detach().requires_grad_()
            for name in theta
            for key, value in state.get(name, {}).items()
            if _is_slot(key, value)
        }
        g = {name: value.detach().requires_grad_() for name, value in gradients.items()}
        with torch.enable_grad(), _DifferentiableArithmetic():
            stepped, stepped_slots = self._step(theta, state, slots, g, step)
        outputs = [stepped[name] for name in theta]
        cotangents = [adjoint.parameters[name] for name in theta]
        for key, value in adjoint.optimizer.items():
            if key in stepped_slots:
                outputs.append(stepped_slots[key])
                cotangents.append(value)
        inputs = [*theta.values(), *slots.values(), *g.values()]
        pulled = iter(vector_jacobian(outputs, inputs, cotangents, self._batched))
        return Pulled(
            Adjoint({name: next(pulled) for name in theta}, {key: next(pulled) for key in slots}),
            {name: next(pulled) for name in g},
            {
                name: (value == 0).detach()
                for (name, key), value in stepped_slots.items()
                if key in _SECOND_MOMENTS and name in g and bool((value == 0).any())
            },
        )

    @property
    def _held(self) -> list[str]:
        return [name for group in self._layout.groups for name in group]

    def _step(
        self,
        theta: dict[str, Tensor],
        state: OptimizerState,
        slots: Slots,
        g: dict[str, Tensor],
        step: Step,
    ) -> tuple[dict[str, Tensor], Slots]:
        clipped = self._dynamics.clip(g)
        work = {name: value.clone() for name, value in theta.items()}
        for name, value in clipped.items():
            if name in work:
                work[name].grad = value
        optimizer = self._optimizer
        optimizer.param_groups = []
        optimizer.state = defaultdict(dict)
        for names, recorded in zip(self._layout.groups, step.hyperparameters, strict=True):
            settings = {**recorded, "differentiable": True, "foreach": False, "fused": False}
            fresh = [name for name in names if _starts_momentum(settings, state.get(name, {}))]
            groups = [
                (settings, [name for name in names if name not in fresh]),
                # PyTorch takes SGD's first momentum buffer from a detached gradient; zeros, with dampening 0 for
                # this step, give the same value and keep the derivative.
                ({**settings, "dampening": 0.0}, fresh),
            ]
            for group, members in groups:
                stepped = [work[name] for name in members if name in clipped]
                if stepped:
                    optimizer.param_groups.append({**group, "params": stepped})
            for name in fresh:
                optimizer.state[work[name]]["momentum_buffer"] = torch.zeros_like(work[name])
        for name, entry in state.items():
            for key, value in entry.items():
                slot = slots.get((name, key))
                optimizer.state[work[name]][key] = _counter(value) if slot is None else slot.clone()
        optimizer.step()
        return work, _read_slots(optimizer, work)


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
        if func in (torch.sqrt, Tensor.sqrt) and not kwargs:
            (value,) = args
            zero = value == 0
            return torch.where(zero, 0.0, torch.where(zero, 1.0, value).sqrt())
        if func is torch.tensor and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def vector_jacobian(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], batched: bool
) -> list[Tensor]:
    """``cotangents^T d outputs / d inputs``, ``[A, *input shape]`` each, for cotangents ``[A, *output shape]``.

    The graph is kept. Inputs that no output depends on get zeros; so do all inputs for an output that is constant.
    Cost: ``A`` backward passes, in one vectorised pass if ``batched``.
    """
    rows = len(cotangents[0])
    moving = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not moving:
        return [value.new_zeros((rows, *value.shape)) for value in inputs]
    outputs, cotangents = zip(*moving, strict=True)
    if rows > 1 and batched:
        found = torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return [
            value.new_zeros((rows, *value.shape)) if part is None else part
            for value, part in zip(inputs, found, strict=True)
        ]
    each = [
        torch.autograd.grad(
            outputs,
            inputs,
            [cotangent[row] for cotangent in cotangents],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for row in range(rows)
    ]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _is_slot(key: str, value: Any) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.is_floating_point()


def _starts_momentum(settings: dict[str, Any], entry: Any) -> bool:
    return bool(settings.get("momentum")) and "nesterov" in settings and "momentum_buffer" not in entry


def _counter(value: Any) -> Any:
    return value.to(torch.float64, copy=True) if isinstance(value, Tensor) else value


def _read_slots(optimizer: Optimizer, work: dict[str, Tensor]) -> Slots:
    return {
        (name, key): value
        for name, tensor in work.items()
        for key, value in optimizer.state.get(tensor, {}).items()
        if _is_slot(key, value)
    }
