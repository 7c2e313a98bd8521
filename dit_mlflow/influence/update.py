"""The vector-Jacobian product of an optimizer step, through PyTorch's own optimizer code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_mlflow.influence.adjoint import Adjoint, Flat, vector_jacobian
from dit_mlflow.trajectory.dynamics import Dynamics
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.optimizers import optimizer_class
from dit_mlflow.trajectory.state import COUNTERS, State
from dit_mlflow.trajectory.step import Step


@dataclass(frozen=True, eq=False)
class Pulled:
    """What :class:`UpdateAdjoint` gives.

    Attributes:
        adjoint: at ``t``, without the Hessian term.
        gradients: ``lambda_g``, ``[A, sum of sizes]``, in the order of the gradients given.
        undefined: bool ``[sum of sizes]``: where the step has no derivative, because every gradient there was 0 up to
            and including this step (Adam's ``v = 0``); ``None`` = nowhere.
    """

    adjoint: Adjoint
    gradients: Tensor
    undefined: Tensor | None


@dataclass(frozen=True, eq=False)
class _Run:
    """Neighbouring parameters that the optimizer treats alike: stepped as one vector.

    Attributes:
        part: where they stand among the parameters that the optimizer holds.
        gradient: where their gradients stand among the gradients.
        theta: their values ``[size]``, a leaf.
        settings: hyperparameters of their group.
        state: their optimizer state: vectors ``[size]``, counters, plain numbers.
        fresh: SGD's momentum starts at this step.
    """

    part: slice
    gradient: slice
    theta: Tensor
    settings: Mapping[str, Any]
    state: dict[str, Any]
    fresh: bool

    @property
    def slots(self) -> dict[str, Tensor]:
        """The vectors among the state, leaves."""
        return {key: value for key, value in self.state.items() if _is_slot(key, value)}


class UpdateAdjoint:
    """Pulls adjoints back through ``(theta, o)_{t+1} = U_t((theta, o)_t, g_t)``.

    ``U_t`` is gradient clipping and one step of PyTorch's own optimizer with ``differentiable=True``, whose parameters
    and state are non-leaf clones of the recorded ones, joined to one vector per group: optimizers work elementwise.

    Args:
        dynamics: for the clipping.
        layout: the recorded optimizer.
        held: the parameters that it holds, group after group.
    """

    def __init__(self, dynamics: Dynamics, layout: OptimizerLayout, held: Flat) -> None:
        self._dynamics = dynamics
        self._layout = layout
        self._held = held
        placeholder = torch.zeros(1, requires_grad=True)
        self._optimizer = optimizer_class(layout.name)([placeholder], differentiable=True)  # type: ignore[call-arg]

    def __call__(self, state: State, gradients: Mapping[str, Tensor], step: Step, adjoint: Adjoint) -> Pulled:
        """``(lambda_theta, lambda_o), lambda_g`` from ``lambda`` at step ``t + 1``.

        Args:
            state: ``s_t``.
            gradients: ``g_t`` (before clipping) by parameter name: first those that the optimizer holds, in its order.
            step: the recorded hyperparameters.
            adjoint: at ``t + 1``.

        Cost: a few elementwise passes over parameters and state, per row.
        """
        joined = Flat({name: value.shape for name, value in gradients.items()})
        runs = self._runs(state, step, joined)
        if not runs:
            return Pulled(adjoint, adjoint.parameters.new_zeros((adjoint.rows, joined.size)), None)
        g = joined.join([value.detach() for value in gradients.values()]).requires_grad_()
        with torch.enable_grad(), _DifferentiableArithmetic():
            (clipped,) = self._dynamics.clip({"all": g}).values()
            stepped = self._step(runs, clipped)

        outputs, cotangents = [], []
        for run, (moved, moved_slots) in zip(runs, stepped, strict=True):
            outputs.append(moved)
            cotangents.append(adjoint.parameters[:, run.part])
            for key in adjoint.optimizer.keys() & moved_slots.keys():
                outputs.append(moved_slots[key])
                cotangents.append(adjoint.optimizer[key][:, run.part])
        inputs = [g, *(run.theta for run in runs), *(value for run in runs for value in run.slots.values())]
        by_g, *rest = vector_jacobian(outputs, inputs, cotangents, adjoint.rows, batched=True)
        return Pulled(self._replaced(adjoint, runs, rest), by_g, self._undefined(runs, stepped, joined.size))

    def _runs(self, state: State, step: Step, gradients: Flat) -> list[_Run]:
        """The parameters with a gradient, as long as neighbours share group, counters and keys of state."""

        def kind(name: str) -> Any:
            entry = state.optimizer.get(name, {})
            counters = [(k, float(v) if k in COUNTERS else None) for k, v in entry.items()]
            return name in gradients.shapes, counters

        runs = []
        for names, settings in zip(self._layout.groups, step.hyperparameters, strict=True):
            for (active, _), members in groupby(names, key=kind):
                if active:
                    runs.append(self._run(list(members), settings, state, gradients))
        return runs

    def _run(self, names: Sequence[str], settings: Mapping[str, Any], state: State, gradients: Flat) -> _Run:
        def joined(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

        def stored(key: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if key in COUNTERS:
                return value.to(torch.float64, copy=True)
            return joined(state.optimizer[name][key] for name in names).requires_grad_(_is_slot(key, value))

        first = state.optimizer.get(names[0], {})
        return _Run(
            part=_span(self._held, names),
            gradient=_span(gradients, names),
            theta=joined(state.parameters[name] for name in names).requires_grad_(),
            settings=settings,
            state={key: stored(key, value) for key, value in first.items()},
            fresh=_starts_momentum(settings, first),
        )

    def _step(self, runs: Sequence[_Run], clipped: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Parameters and state vectors after the step, per run, as functions of those before and of the gradients."""
        optimizer = self._optimizer
        optimizer.param_groups = []
        optimizer.state = defaultdict(dict)
        work = [run.theta.clone() for run in runs]
        for run, moved in zip(runs, work, strict=True):
            moved.grad = clipped[run.gradient]
            settings = {**run.settings, "differentiable": True, "foreach": False, "fused": False, "capturable": False}
            entry = run.state | {key: value.clone() for key, value in run.slots.items()}
            if run.fresh:
                # PyTorch takes SGD's first momentum buffer from a detached gradient; zeros, with dampening 0 for this
                # step, give the same value and keep the derivative.
                settings["dampening"] = 0.0
                entry["momentum_buffer"] = torch.zeros_like(moved)
            optimizer.param_groups.append({**settings, "params": [moved]})
            if entry:
                optimizer.state[moved] = entry
        optimizer.step()
        return [
            (moved, {key: value for key, value in optimizer.state.get(moved, {}).items() if _is_slot(key, value)})
            for moved in work
        ]

    def _replaced(self, adjoint: Adjoint, runs: Sequence[_Run], pulled: Sequence[Tensor]) -> Adjoint:
        """``adjoint`` with the runs' parts replaced by what was pulled back; the rest passes a step unchanged."""
        by_theta, by_slot = pulled[: len(runs)], iter(pulled[len(runs) :])
        if len(runs) == 1 and runs[0].part == slice(0, self._held.size):
            return Adjoint(by_theta[0], adjoint.buffers, dict(zip(runs[0].slots, by_slot, strict=True)))
        parameters = adjoint.parameters.clone()
        optimizer = {key: value.clone() for key, value in adjoint.optimizer.items()}
        for run, part in zip(runs, by_theta, strict=True):
            parameters[:, run.part] = part
            for value in optimizer.values():
                value[:, run.part] = 0
            for key in run.slots:
                optimizer.setdefault(key, torch.zeros_like(parameters))[:, run.part] = next(by_slot)
        return Adjoint(parameters, adjoint.buffers, optimizer)

    def _undefined(
        self, runs: Sequence[_Run], stepped: Sequence[tuple[Tensor, Mapping[str, Tensor]]], size: int
    ) -> Tensor | None:
        key = _DENOMINATORS.get(self._layout.name)
        if key is None:
            return None
        found = None
        for run, (_, slots) in zip(runs, stepped, strict=True):
            # Adamax adds eps before it takes the maximum, the others after the root.
            at_zero = slots[key].detach() <= (run.settings["eps"] if key == "exp_inf" else 0)
            if bool(at_zero.any()):
                found = at_zero.new_zeros(size) if found is None else found
                found[run.gradient] = at_zero
        return found


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


def _span(flat: Flat, names: Sequence[str]) -> slice:
    return slice(flat.slices[names[0]].start, flat.slices[names[-1]].stop)


def _is_slot(key: str, value: Any) -> bool:
    # ASGD's average "ax" never reaches the parameters.
    return key not in COUNTERS and key != "ax" and isinstance(value, Tensor) and value.is_floating_point()


def _starts_momentum(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return bool(settings.get("momentum")) and "nesterov" in settings and "momentum_buffer" not in entry
