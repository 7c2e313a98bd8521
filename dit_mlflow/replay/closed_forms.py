"""Vector-Jacobian products of the commonest optimizers' steps, written out.

They give what :class:`dit_mlflow.replay.autograd_step.AutogradStep` gives, which the tests hold them against, in a
third of the time: for a small network, there, the update takes longer than the network itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.autograd_step import AutogradStep
from dit_mlflow.replay.step_adjoint import PulledGroup
from dit_mlflow.replay.update_groups import UpdateGroup
from dit_mlflow.trajectory.state import State


class SgdStep:
    """SGD is linear in parameters, momentum and gradient, so that its transpose needs neither their values nor a graph.

    ``h = ± g + weight_decay * theta``, ``m' = momentum * m + (1 - dampening) * h`` and ``theta' = theta - lr * d``,
    where ``d`` is ``m'``, or ``h + momentum * m'`` (Nesterov), or ``h`` (no momentum).

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
            share = 1.0 if group.starts_momentum else 1.0 - settings["dampening"]
            by_h = by_buffer if share == 1.0 else by_buffer * share
            if settings["nesterov"]:
                by_h = by_h.add(parameters, alpha=-rate)
            optimizer = {} if group.starts_momentum else {"momentum_buffer": by_buffer * momentum}
        if settings["weight_decay"]:
            parameters = torch.add(parameters, by_h, alpha=settings["weight_decay"])
        return PulledGroup(parameters, -by_h if settings["maximize"] else by_h, optimizer)


class AdamStep:
    """Adam and AdamW; groups with amsgrad go through :class:`AutogradStep`.

    With ``h = ± g + weight_decay * theta`` (``± g`` if the decay is decoupled), bias corrections ``b1, b2``:
    ``m' = beta1 * m + (1 - beta1) * h``, ``v' = beta2 * v + (1 - beta2) * h^2``, ``d = sqrt(v' / b2) + eps``,
    ``theta' = theta * (1 - lr * weight_decay if decoupled) - lr / b1 * m' / d``.

    The derivative of the square root counts as 0 at ``v' = 0``, where it is infinite: an element whose gradient was
    always 0 does not move.

    Args:
        name: ``Adam`` or ``AdamW``.

    Cost: about twelve elementwise passes, and seven per row.
    """

    needs_values = True

    def __init__(self, name: str) -> None:
        self._decoupled = name == "AdamW"
        self._amsgrad = AutogradStep(name)

    def __call__(
        self, state: State, groups: Sequence[UpdateGroup], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledGroup]:
        values = gradients()
        return [self._pull(state, group, values[group.gradient], adjoint) for group in groups]

    def _pull(self, state: State, group: UpdateGroup, gradient: Tensor, adjoint: Adjoint) -> PulledGroup:
        settings = group.settings
        if settings["amsgrad"]:
            return self._amsgrad.pull(state, group, gradient, adjoint)
        rate, decay, (beta1, beta2) = settings["lr"], settings["weight_decay"], settings["betas"]
        decoupled = settings.get("decoupled_weight_decay", self._decoupled)
        count = float(group.entry["step"]) + 1 if group.entry else 1.0
        correction1, root2 = 1 - beta1**count, math.sqrt(1 - beta2**count)

        h = -gradient if settings["maximize"] else gradient
        if decay and not decoupled:
            h = h.add(group.parameters(state), alpha=decay)
        mean, square = h * (1 - beta1), (h * h).mul_(1 - beta2)
        if group.entry:
            mean.add_(group.slot(state, "exp_avg"), alpha=beta1)
            square.add_(group.slot(state, "exp_avg_sq"), alpha=beta2)
        # Where v' is 0, so is m', and 0 over the smallest number is the 0 that is meant.
        root = square.sqrt().clamp_min_(torch.finfo(square.dtype).tiny)
        divisor = (root / root2).add_(settings["eps"])
        # What a unit of v' takes from theta', over what a unit of m' takes: -(m' / d) * d(d)/d(v').
        by_square = mean.div_(divisor).div_(root.mul_(2 * root2))

        parameters = adjoint.parameters[:, group.part]
        through = parameters / divisor.mul_(-correction1 / rate) if rate else torch.zeros_like(parameters)
        by_mean = through + adjoint.slot("exp_avg")[:, group.part]
        through = adjoint.slot("exp_avg_sq")[:, group.part] - through.mul_(by_square)
        by_h = torch.addcmul(by_mean * (1 - beta1), through, h, value=2 * (1 - beta2))
        if decay:
            alpha = -rate * decay if decoupled else decay
            parameters = parameters.add(parameters if decoupled else by_h, alpha=alpha)
        return PulledGroup(
            parameters,
            -by_h if settings["maximize"] else by_h,
            {"exp_avg": by_mean.mul_(beta1), "exp_avg_sq": through.mul_(beta2)} if group.entry else {},
            lambda: square == 0,
        )
