"""The written-out steps against PyTorch's own code under autograd, on random states."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.autograd_step import AutogradStep
from dit_mlflow.replay.closed_forms import AdamStep, SgdStep
from dit_mlflow.replay.update_groups import UpdateGroup
from dit_mlflow.trajectory import State

SIZE, ROWS = 12, 3
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
ADAM = {
    "lr": 0.02,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": False,
}
CASES = [
    ("SGD", SGD | changes)
    for changes in (
        {},
        {"momentum": 0.0, "weight_decay": 0.1},
        {"dampening": 0.3, "weight_decay": 0.1},
        {"nesterov": True, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
    )
] + [
    ("Adam", ADAM | changes)
    for changes in (
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True, "weight_decay": 0.1},
        {"lr": 0.0},
    )
    # Torch 2.6 has that in AdamW alone.
    if not changes.get("decoupled_weight_decay") or "decoupled_weight_decay" in signature(Adam).parameters
]


def random_adjoint(generator: torch.Generator, keys: list[str]) -> Adjoint:
    def rows() -> Tensor:
        return torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)

    return Adjoint(rows(), torch.zeros(ROWS, 0), {key: rows() for key in keys})


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_closed_forms_equal_autograd(name: str, settings: dict[str, Any], first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn(SIZE, generator=generator, dtype=torch.float64) for key in ("w", "g", "m", "v")}
    gradient, square = values["g"], values["v"].square()
    # Elements whose gradients were always 0.
    gradient[:2], square[:2], values["m"][:2] = 0, 0, 0
    entry: dict[str, Any] = {}
    if name == "Adam" and not first:
        entry = {"step": torch.tensor(4.0), "exp_avg": values["m"], "exp_avg_sq": square}
    elif settings.get("momentum") and not first:
        entry = {"momentum_buffer": values["m"]}
    whole = slice(0, SIZE)
    group = UpdateGroup(("w",), whole, whole, settings, entry)
    state = State({"w": values["w"]}, {}, {"w": entry})
    keys = [key for key in ("exp_avg", "exp_avg_sq") if name == "Adam"]
    keys += ["momentum_buffer"] if settings.get("momentum") else []
    adjoint = random_adjoint(generator, keys)

    # SGD's first momentum buffer is the one thing that autograd gets wrong: PyTorch detaches it.
    if name == "SGD" and first and settings["momentum"]:
        expected = first_momentum_step(settings, adjoint)
    else:
        (pulled,) = AutogradStep(name)(state, [group], lambda: gradient, adjoint)
        expected = (pulled.parameters, pulled.gradients, pulled.optimizer)
    written = SgdStep() if name == "SGD" else AdamStep(name)
    (found,) = written(state, [group], lambda: gradient, adjoint)
    torch.testing.assert_close(found.parameters, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.gradients, expected[1], rtol=1e-12, atol=1e-14)
    assert found.optimizer.keys() == expected[2].keys()
    for key, value in expected[2].items():
        torch.testing.assert_close(found.optimizer[key], value, rtol=1e-12, atol=1e-14)


def first_momentum_step(settings: dict[str, Any], adjoint: Adjoint) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """``buffer' = h`` and ``theta' = theta - lr * d`` with ``d`` the buffer, or ``h + momentum * buffer``."""
    sign = -1 if settings["maximize"] else 1
    by_step = -settings["lr"] * adjoint.parameters * (1 + settings["momentum"] * settings["nesterov"])
    by_h = by_step + adjoint.optimizer["momentum_buffer"]
    return adjoint.parameters + settings["weight_decay"] * by_h, sign * by_h, {}
