"""The vector-Jacobian product of what turns a gradient into the next state: clipping and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from dit_mlflow.replay.adjoint import Adjoint, Flat, vector_jacobian
from dit_mlflow.replay.autograd_step import AutogradStep
from dit_mlflow.replay.optimizers import is_others
from dit_mlflow.replay.step_adjoint import PulledGroup, StepAdjoint, UpdateGroup, update_groups
from dit_mlflow.replay.traced_update import TracedUpdate
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord


@dataclass(frozen=True, eq=False)
class Pulled:
    """What :class:`UpdateAdjoint` returns.

    Attributes:
        adjoint: at ``t``, without the Hessian term.
        gradients: ``lambda_g``, ``[A, *shape]`` each, in the order of the given gradients.
        undefined: returns bool, ``[*shape]`` each: the elements at which the step has no derivative, because every
            gradient was 0 up to and including this step.
    """

    adjoint: Adjoint
    gradients: list[Tensor]
    undefined: Callable[[], list[Tensor]]


class UpdateAdjoint:
    """Pulls adjoints back through ``(theta, o)_{t+1} = U_t((theta, o)_t, g_t)``: gradient clipping, then one step.

    Args:
        layout: the recorded optimizer.
        held: the parameters that it holds, param group after param group.
        optimizer: the optimizer, over no parameters.
        clip: differentiable clipping of gradients by name; ``None`` = no clipping.

    Attributes:
        needs_values: whether the optimizer's state must have its values; ``False`` = its keys are enough.
    """

    def __init__(
        self,
        layout: OptimizerLayout,
        held: Flat,
        optimizer: Optimizer,
        clip: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._clip = clip
        self._layout = layout
        self._held = held
        self._step = _step_adjoint(layout, held, optimizer)
        self.needs_values = self._step.needs_values

    def __call__(self, state: State, gradients: Mapping[str, Tensor], step: StepRecord, adjoint: Adjoint) -> Pulled:
        """``(lambda_theta, lambda_o), lambda_g`` from ``lambda`` at step ``t + 1``.

        Args:
            state: ``s_t``.
            gradients: ``g_t`` (before clipping) by parameter name: first those that the optimizer holds, in its order.
            step: the record of step ``t``, for its hyperparameters.
            adjoint: at ``t + 1``.

        Cost: a few elementwise passes over parameters and state, per row.
        """
        if not gradients:
            # Parameters without a gradient are not stepped.
            return Pulled(adjoint, [], list)
        flat = Flat({name: value.shape for name, value in gradients.items()})
        groups = update_groups(self._layout, self._held, state, step, flat)

        def joined() -> Tensor:
            return flat.join([value.detach() for value in gradients.values()])

        if self._clip is not None and groups:
            unclipped = joined().requires_grad_()
            with torch.enable_grad():
                parts = flat.split_rows(unclipped.unsqueeze(0))
                found = self._clip({name: part[0] for name, part in zip(flat.shapes, parts, strict=True)})
                clipped = flat.join([found[name] for name in flat.shapes])
            pulled = self._step(state, groups, clipped.detach, adjoint)
            by_clipped = self._by_gradient(groups, pulled, adjoint, flat.size)
            (by_gradient,) = vector_jacobian([clipped], [unclipped], [by_clipped], adjoint.rows, batched=True)
        else:
            pulled = self._step(state, groups, joined, adjoint)
            by_gradient = self._by_gradient(groups, pulled, adjoint, flat.size)
        undefined = partial(_undefined, groups, pulled, flat)
        return Pulled(self._replaced(adjoint, groups, pulled), flat.split_rows(by_gradient), undefined)

    def _by_gradient(
        self, groups: Sequence[UpdateGroup], pulled: Sequence[PulledGroup], adjoint: Adjoint, size: int
    ) -> Tensor:
        if len(groups) == 1 and groups[0].gradient == slice(0, size):
            return pulled[0].gradients
        by_gradient = adjoint.parameters.new_zeros((adjoint.rows, size))
        for group, part in zip(groups, pulled, strict=True):
            by_gradient[:, group.gradient] = part.gradients
        return by_gradient

    def _replaced(self, adjoint: Adjoint, groups: Sequence[UpdateGroup], pulled: Sequence[PulledGroup]) -> Adjoint:
        """``adjoint`` with each group's part replaced by what was pulled back; the step leaves the rest unchanged."""
        if len(groups) == 1 and groups[0].part == slice(0, self._held.size):
            return Adjoint(pulled[0].parameters, adjoint.buffers, pulled[0].optimizer)
        parameters = adjoint.parameters.clone()
        optimizer = {key: value.clone() for key, value in adjoint.optimizer.items()}
        for group, part in zip(groups, pulled, strict=True):
            parameters[:, group.part] = part.parameters
            for value in optimizer.values():
                value[:, group.part] = 0
            for key, value in part.optimizer.items():
                optimizer.setdefault(key, torch.zeros_like(parameters))[:, group.part] = value
        return Adjoint(parameters, adjoint.buffers, optimizer)


class SgdStep:
    """SGD, which is linear in parameters, momentum and gradient: its transpose needs neither their values nor a graph.

    ``h = ± g + weight_decay * theta``, ``m' = momentum * m + (1 - dampening) * h`` and ``theta' = theta - lr * d``,
    where ``d`` is ``m'``, or ``h + momentum * m'`` (Nesterov), or ``h`` (no momentum). Autograd through PyTorch's code
    is wrong for the first step with momentum, whose buffer that code detaches from the gradient.

    Cost: three or four elementwise passes per row.
    """

    needs_values = False

    def __call__(
        self, state: State, groups: Sequence[UpdateGroup], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledGroup]:
        return [self._pull(group, adjoint) for group in groups]

    def _pull(self, group: UpdateGroup, adjoint: Adjoint) -> PulledGroup:
        settings = group.settings
        rate, momentum = settings["lr"], settings["momentum"]
        parameters = adjoint.parameters[:, group.part]
        if not momentum:
            by_h, optimizer = parameters * -rate, {}
        else:
            through = -rate * momentum if settings["nesterov"] else -rate
            later = adjoint.optimizer.get("momentum_buffer")
            # In place: the adjoint after the step is not needed any more.
            by_buffer = parameters * through if later is None else later[:, group.part].add_(parameters, alpha=through)
            # The first buffer is the gradient itself, whatever the dampening.
            first = "momentum_buffer" not in group.entry
            share = 1.0 if first else 1.0 - settings["dampening"]
            by_h = by_buffer if share == 1.0 else by_buffer * share
            if settings["nesterov"]:
                by_h = by_h.add(parameters, alpha=-rate)
            optimizer = {} if first else {"momentum_buffer": by_buffer * momentum}
        if settings["weight_decay"]:
            parameters = torch.add(parameters, by_h, alpha=settings["weight_decay"])
        return PulledGroup(parameters, -by_h if settings["maximize"] else by_h, optimizer)


class AdamStep(AutogradStep):
    """Adam and AdamW written out; with AMSGrad, as :class:`AutogradStep`, which takes several times as long.

    ``h = ± g + weight_decay * theta`` (``± g`` if the decay is decoupled), ``m' = beta1 * m + (1 - beta1) * h``,
    ``v' = beta2 * v + (1 - beta2) * h^2``, ``d = sqrt(v' / (1 - beta2^t)) + eps`` and
    ``theta' = theta * (1 - lr * weight_decay if decoupled) - lr / (1 - beta1^t) * m' / d``. The square root has the
    derivative 0 at ``v' = 0``, where it is infinite: an element whose gradient was always 0 does not move.

    Cost: some fifteen elementwise passes, and six per row.
    """

    def _pull(self, state: State, group: UpdateGroup, gradient: Tensor, adjoint: Adjoint) -> PulledGroup:
        settings = group.settings
        if settings["amsgrad"] or "max_exp_avg_sq" in group.entry:
            return super()._pull(state, group, gradient, adjoint)
        rate, decay, (beta1, beta2) = settings["lr"], settings["weight_decay"], settings["betas"]
        decoupled = settings.get("decoupled_weight_decay", isinstance(self._optimizer, torch.optim.AdamW))
        count = float(group.entry.get("step", 0)) + 1
        rate1, root2 = rate / (1 - beta1**count), math.sqrt(1 - beta2**count)

        h = -gradient if settings["maximize"] else gradient
        if decay and not decoupled:
            h = h.add(group.parameters(state), alpha=decay)
        mean, square = (
            group.slot(state, key) if group.entry else torch.zeros_like(h) for key in ("exp_avg", "exp_avg_sq")
        )
        mean.lerp_(h, 1 - beta1)
        square.mul_(beta2).addcmul_(h, h, value=1 - beta2)
        zero = square == 0
        root = square.sqrt_()
        over = root.div(root2).add_(settings["eps"]).reciprocal_()
        # m' / d^2 / sqrt(v'), of the derivative of 1 / d.
        by_square = mean.mul_(over).mul_(over).div_(root.masked_fill_(zero, math.inf))

        parameters = adjoint.parameters[:, group.part]
        by_mean_later, by_square_later = (
            adjoint.optimizer[key][:, group.part] if key in adjoint.optimizer else torch.zeros_like(parameters)
            for key in ("exp_avg", "exp_avg_sq")
        )
        mean_rows = torch.addcmul(by_mean_later, parameters, over, value=-rate1)
        square_rows = torch.addcmul(by_square_later, parameters, by_square, value=rate1 / (2 * root2))
        by_h = mean_rows.mul(1 - beta1).addcmul_(square_rows, h, value=2 * (1 - beta2))
        if decay:
            parameters = parameters * (1 - rate * decay) if decoupled else torch.add(parameters, by_h, alpha=decay)
        optimizer = {"exp_avg": mean_rows.mul_(beta1), "exp_avg_sq": square_rows.mul_(beta2)} if group.entry else {}
        return PulledGroup(parameters, -by_h if settings["maximize"] else by_h, optimizer, lambda: zero)


def _undefined(groups: Sequence[UpdateGroup], pulled: Sequence[PulledGroup], flat: Flat) -> list[Tensor]:
    found = torch.zeros((1, flat.size), dtype=torch.bool, device=pulled[0].gradients.device if pulled else None)
    for group, part in zip(groups, pulled, strict=True):
        if part.undefined is not None:
            found[:, group.gradient] = part.undefined()
    return [part[0] for part in flat.split_rows(found)]


def _step_adjoint(layout: OptimizerLayout, held: Flat, optimizer: Optimizer) -> StepAdjoint:
    if is_others(layout.name):
        return TracedUpdate(optimizer, layout.groups, held)
    if layout.name == "SGD":
        return SgdStep()
    if layout.name in ("Adam", "AdamW"):
        return AdamStep(layout.name)
    return AutogradStep(layout.name)
