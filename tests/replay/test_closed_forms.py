"""The steps that are written out against PyTorch's own code under autograd, on random states."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.autograd_step import AutogradStep
from dit_mlflow.replay.step_adjoint import PulledGroup, UpdateGroup
from dit_mlflow.replay.update import AdamStep, SgdStep
from dit_mlflow.trajectory import State

SIZE, ROWS = 12, 3
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
SGD_CASES = (
    {},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"dampening": 0.3, "weight_decay": 0.1},
    {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
)
ADAM = {
    "lr": 0.02,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    # Torch 2.6 has it in no group.
    **({"decoupled_weight_decay": False} if "decoupled_weight_decay" in signature(Adam).parameters else {}),
}
ADAM_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "lr": 0.0}),
    ("Adam", {"weight_decay": 0.1, "maximize": True}),
    ("AdamW", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.0}),
)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("changes", SGD_CASES)
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
    compare(found, expected)


def first_momentum_step(settings: dict[str, Any], adjoint: Adjoint) -> PulledGroup:
    """``buffer' = h`` and ``theta' = theta - lr * d`` with ``d`` the buffer, or ``h + momentum * buffer``."""
    sign = -1 if settings["maximize"] else 1
    by_step = -settings["lr"] * adjoint.parameters * (1 + settings["momentum"] * settings["nesterov"])
    by_h: Tensor = by_step + adjoint.optimizer["momentum_buffer"]
    return PulledGroup(adjoint.parameters + settings["weight_decay"] * by_h, sign * by_h, {})


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("name", "changes"), ADAM_CASES)
def test_adam_written_out_equals_autograd(name: str, changes: dict[str, Any], first: bool, later: bool) -> None:
    """``later``: whether anything depends on the optimizer's state after the step."""
    generator = torch.Generator().manual_seed(0)
    theta, gradient, mean, square = torch.randn(4, SIZE, generator=generator, dtype=torch.float64)
    square = square.square()
    # Elements whose gradients were always 0; gradients that are 0 now; gradients whose squares are 0.
    for value in (gradient, square, mean, theta):
        value[:2] = 0
    gradient[2], gradient[3], mean[3], square[3], theta[3] = 0, 1e-170, 1e-170, 0, 0
    entry = {} if first else {"step": torch.tensor(4.0), "exp_avg": mean, "exp_avg_sq": square}
    group = UpdateGroup(("w",), slice(0, SIZE), slice(0, SIZE), ADAM | changes, entry)
    state = State({"w": theta}, {}, {"w": entry})
    by_theta, *by_slots = torch.randn(3, ROWS, SIZE, generator=generator, dtype=torch.float64)
    slots = dict(zip(("exp_avg", "exp_avg_sq"), by_slots, strict=True)) if later else {}
    expected, found = (
        kind(name)(state, [group], lambda: gradient, Adjoint(by_theta, torch.zeros(ROWS, 0), dict(slots)))[0]
        for kind in (AutogradStep, AdamStep)
    )
    compare(found, expected)
    assert expected.undefined is not None
    assert found.undefined is not None
    assert torch.equal(found.undefined(), expected.undefined())
    assert found.undefined()[:2].all()


def compare(found: PulledGroup, expected: PulledGroup) -> None:
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.optimizer, expected.optimizer, rtol=1e-12, atol=1e-14)
