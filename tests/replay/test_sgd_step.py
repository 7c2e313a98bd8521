"""SGD's transpose against PyTorch's own code under autograd, on random states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.autograd_step import AutogradStep
from dit_mlflow.replay.step_adjoint import PulledGroup, UpdateGroup
from dit_mlflow.replay.update import SgdStep
from dit_mlflow.trajectory import State

SIZE, ROWS = 12, 3
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
CASES = (
    {},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"dampening": 0.3, "weight_decay": 0.1},
    {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("changes", CASES)
def test_the_transpose_of_sgd_equals_autograd(changes: dict[str, Any], first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = SGD | changes
    theta, gradient, buffer = torch.randn(3, SIZE, generator=generator, dtype=torch.float64)
    entry: dict[str, Any] = {"momentum_buffer": buffer} if settings["momentum"] and not first else {}
    group = UpdateGroup(("w",), slice(0, SIZE), slice(0, SIZE), settings, entry)
    state = State({"w": theta}, {}, {"w": entry})
    by_theta, by_buffer = torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64)
    slots = {"momentum_buffer": by_buffer} if settings["momentum"] else {}
    adjoint = Adjoint(by_theta, torch.zeros(ROWS, 0), slots)

    # SGD's first momentum buffer is the one thing that autograd gets wrong: PyTorch detaches it.
    if first and settings["momentum"]:
        expected = first_momentum_step(settings, adjoint)
    else:
        (expected,) = AutogradStep("SGD")(state, [group], lambda: gradient, adjoint)
    (found,) = SgdStep()(state, [group], lambda: gradient, adjoint)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.optimizer, expected.optimizer, rtol=1e-12, atol=1e-14)


def first_momentum_step(settings: dict[str, Any], adjoint: Adjoint) -> PulledGroup:
    """``buffer' = h`` and ``theta' = theta - lr * d`` with ``d`` the buffer, or ``h + momentum * buffer``."""
    sign = -1 if settings["maximize"] else 1
    by_step = -settings["lr"] * adjoint.parameters * (1 + settings["momentum"] * settings["nesterov"])
    by_h: Tensor = by_step + adjoint.optimizer["momentum_buffer"]
    return PulledGroup(adjoint.parameters + settings["weight_decay"] * by_h, sign * by_h, {})
