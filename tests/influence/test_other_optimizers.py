"""Optimizers that are not PyTorch's differentiable ones: swept through a trace of their step, against differences."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, window_effect
from plain_loop import record, whole
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from workloads import digits_model, digits_workload

from dit_mlflow import (
    Effort,
    Trajectory,
    TrajectoryError,
    UnsupportedError,
    Window,
    Workload,
    leave_one_out,
    torch_internals,
    track,
    train,
)
from dit_mlflow.replay.traced import traced

SOME = [0, 5, 11]


class Lamb(Optimizer):
    """Each matrix's step has the length of the matrix; written with ``.data`` and a counter that is a number."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state["step"] = 0
                    state["first"], state["second"] = torch.zeros_like(value.data), torch.zeros_like(value.data)
                state["step"] += 1
                first, second = state["first"], state["second"]
                first.mul_(group["betas"][0]).add_(value.grad.data, alpha=1 - group["betas"][0])
                second.mul_(group["betas"][1]).addcmul_(value.grad.data, value.grad.data, value=1 - group["betas"][1])
                corrected = first / (1 - group["betas"][0] ** state["step"])
                move = corrected / (second.sqrt() + 1e-3)
                trust = value.data.norm() / move.norm() if value.dim() > 1 else 1.0
                value.data.sub_(group["lr"] * trust * move)


class Factored(Optimizer):
    """Second moments of rows and columns alone, state of other shapes than the parameters', and a 0-dimensional one."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                state, square = self.state[value], value.grad.square() + 1e-6
                state["count"] = state.get("count", torch.zeros(())) + 1
                if value.dim() == 1:
                    state["all"] = torch.lerp(state.get("all", square), square, 0.3)
                    value.sub_(group["lr"] * value.grad / state["all"].sqrt())
                    continue
                for axis, key in enumerate(("row", "column")):
                    mean = square.mean(dim=1 - axis)
                    state[key] = torch.lerp(state.get(key, mean), mean, 0.3)
                factored = torch.outer(state["row"], state["column"]) / state["row"].mean()
                value.sub_(group["lr"] * value.grad / factored.sqrt())


class Mine(SGD):
    """A subclass that does something else."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                value.sub_(group["lr"] * torch.tanh(3 * value.grad))


class Signs(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            mean = self.state[value].setdefault("mean", torch.zeros_like(value))
            mean.lerp_(value.grad, 0.5)
            value.sub_(0.01 * mean.sign())


class Reading(Optimizer):
    """Computes with norms that it reads out, wherever torch takes a number."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            grad, mean = value.grad, self.state[value].setdefault("mean", torch.zeros_like(value))
            length, own = grad.norm().item(), max(0.1, value.norm().item())
            mean.lerp_(grad, 1 / (1 + length))
            value.add_(mean, alpha=-0.05 * own / (0.1 + length))
            value.addcdiv_(grad, 1 + grad.square(), value=-0.01 / min(own, 10 * length))
            value.addcmul_(value, value, value=-0.01 * length).sub_(0.01 * own)


class Rooting(Optimizer):
    """Takes a number where a derivative cannot follow."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            value.sub_(0.1 * value.grad / (0.1 + math.sqrt(value.grad.square().sum().item())))


class Choosy(Rooting):
    """Does with a counter that it reads what no tensor does, also in a step that is not checked; keeps a flag."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            made = self.state[value].setdefault("made", torch.zeros(()))
            made += 1
            self.state[value]["flag"] = True
            rate = {1.0: 0.3, 6.0: 0.2}.get(made.item(), 0.1)
            value.sub_(rate * torch.tanh(3 * value.grad))


class Averaging(Optimizer):
    """Divides by a mean norm that it keeps as a number."""

    def __init__(self, params: Any, where: str) -> None:
        super().__init__(params, {"mean": 1.0})
        self.where = where

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for value in group["params"]:
            kept = group if self.where == "settings" else self.state[value]
            mean = 0.9 * kept.get("mean", 1.0) + 0.1 * value.grad.norm()
            kept["mean"] = float(mean) if self.where != "tensor" else mean
            value.sub_(0.1 * value.grad / mean)


class Counting(Optimizer):
    """A counter in its param group, which is a tensor and there from the first step on, a word among its settings, and
    a second moment that is one number."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "norm": "whole", "betas": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        if "made" not in group:
            group["made"] = torch.tensor(0.0)
        group["made"].add_(1)
        for value in group["params"]:
            state = self.state[value]
            if not state:
                state["second"] = value.new_zeros([])
            second = state["second"]
            length = value.grad.square().sum() if group["norm"] == "whole" else value.grad.abs().max()
            if second == 0:
                second.copy_(length)
            else:
                second.mul_(0.9).add_(length, alpha=0.1)
            value.sub_(group["lr"] * (1 - 0.5 ** group["made"].item()) * value.grad / (second.sqrt() + 1e-3))


class Seldom(Optimizer):
    """Its rate follows one number, of the gradients or of the parameters, that changes at every third step only."""

    def __init__(self, params: Any, of: str, where: str = "state") -> None:
        super().__init__(params, {})
        self.of, self.where = of, where

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for value in group["params"]:
            state = self.state[value]
            kept = group if self.where == "settings" else state
            state["made"] = state.get("made", 0) + 1
            if state["made"] % 3 == 1:
                kept["length"] = (value.grad if self.of == "gradients" else value).norm()
            value.sub_(0.1 * value.grad / (0.5 + kept["length"]))


class Warming(Lamb):
    """Its rate is 0 at first, and in some of its steps it moves nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        made = max((entry.get("step", 0) for entry in self.state.values()), default=0)
        rate, group["lr"] = group["lr"], 0.0 if made % 3 == 0 else group["lr"]
        super().step()
        group["lr"] = rate


def of(cls: Any, **settings: Any) -> Workload:
    return digits_workload(optimizer=lambda model: cls(model.parameters(), **settings))


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        pytest.param(Lamb, "local", marks=pytest.mark.slow),
        (Lamb, "final"),
        pytest.param(Lamb, "cumulative", marks=pytest.mark.slow),
        (Factored, "final"),
        (lambda parameters: Mine(parameters, lr=0.3), "cumulative"),
        (Counting, "local"),
        (partial(Averaging, where="tensor"), "cumulative"),
        pytest.param(Reading, "cumulative", marks=pytest.mark.slow),
        (Choosy, "local"),
        pytest.param(partial(torch.optim.Adafactor, lr=0.05, eps=(1e-7, 1e-3)), "local", marks=pytest.mark.slow),
        (partial(torch.optim.Adafactor, lr=0.05, eps=(1e-7, 0.5), d=1.1, weight_decay=0.1), "final"),
        pytest.param(
            partial(torch.optim.Adafactor, lr=0.05, eps=(1e-7, 1e-3), maximize=True),
            "cumulative",
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        *("lamb-local", "lamb-final", "lamb-cumulative", "factored", "mine", "counting", "averaging", "reading"),
        *("choosy", "adafactor-local", "adafactor-final", "adafactor-cumulative"),
    ],
)
def test_scores_and_leave_one_out_are_those_of_the_loop(tmp_path: Path, cls: Any, kind: Any) -> None:
    workload = of(cls)
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.verify(workload).max_drift == 0
    window = Window(2, 8)
    scores = track(trajectory, workload, [window], kind, dtype=torch.float64).of(0)
    exact = finite_difference(workload, trajectory, window, kind, SOME, 1e-5)
    assert np.abs(scores[SOME] - exact).max() < 1e-6 * np.abs(scores).max()
    removed = leave_one_out(trajectory, workload, [window], kind, samples=SOME).of(0)[SOME]
    expected = [window_effect(workload, trajectory, window, kind, j, 0.0) for j in SOME]
    np.testing.assert_allclose(removed, expected, rtol=1e-7)


def test_steps_that_move_nothing_are_no_signs(tmp_path: Path) -> None:
    workload = of(Warming)
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)
    scores = track(trajectory, workload, [window], dtype=torch.float64).of(0)
    exact = finite_difference(workload, trajectory, window, "local", SOME, 1e-5)
    assert np.abs(scores[SOME] - exact).max() < 1e-6 * np.abs(scores).max()


@pytest.mark.parametrize("root", [torch.sqrt, lambda value: value**0.5, lambda value: value.clone().sqrt_()])
def test_roots_in_the_trace_of_an_optimizer_have_the_derivative_0_at_0(root: Any) -> None:
    values = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    for settings, at_0 in (({"roots": True}, 0), ({}, np.inf)):
        (found,) = traced(lambda value: [root(value)], [values.detach()], **settings)(values)
        assert found.tolist() == [0, 2]
        (slope,) = torch.autograd.grad(found.sum(), values)
        assert slope.tolist() == [at_0, 0.25]


@pytest.mark.parametrize(
    ("cls", "number"),
    [
        (partial(Averaging, where="settings"), "mean"),
        (partial(Averaging, where="number"), "mean"),
        (partial(Seldom, of="gradients", where="settings"), "length"),
        (partial(Seldom, of="parameters", where="settings"), "length"),
    ],
)
def test_numbers_that_carry_influence_are_refused(tmp_path: Path, cls: Any, number: str) -> None:
    workload = of(cls)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=f"keeps the number '{number}', which depends on the gradients or"):
        track(trajectory, workload, whole(trajectory))


def test_adafactor_rounds_as_in_the_recorded_dtype(tmp_path: Path) -> None:
    """Its smallest variance is that of the dtype, so that a replay in float64 would be another training."""
    trajectory = train(of(torch.optim.Adafactor), tmp_path / "t")
    assert trajectory.step(0).hyperparameters[0]["eps"] == (torch.finfo(torch.float32).eps, 1e-3)


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
@pytest.mark.parametrize(
    "kind", ["final", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("local", "cumulative"))]
)
def test_muon_is_differentiated_without_its_rounding(tmp_path: Path, kind: Any) -> None:
    workload = digits_workload(model=matrices, optimizer=lambda model: torch.optim.Muon(model.parameters(), lr=0.05))
    trajectory = train(workload, tmp_path / "rounded")
    assert trajectory.verify(workload).max_drift == 0
    window = Window(2, 8)
    with pytest.warns(UserWarning, match=r"Muon computes in bfloat16.* apart by [0-9.]+% of the length") as told:
        track(trajectory, workload, [window], kind)
    assert len(told) == 1
    # Where nothing is rounded in training either, scores are those of the training.
    with torch_internals.widening(torch.float64, lambda dtype: None):
        trajectory = train(workload, tmp_path / "exact")
        with pytest.warns(UserWarning, match=r"apart by 0\.0%"):
            scores = track(trajectory, workload, [window], kind, dtype=torch.float64).of(0)
        exact = finite_difference(workload, trajectory, window, kind, SOME, 1e-5)
    assert np.abs(scores[SOME] - exact).max() < 1e-6 * np.abs(scores).max()


@pytest.mark.slow
def test_with_clipping_groups_and_workers(tmp_path: Path) -> None:
    def optimizer(model: Any) -> Optimizer:
        return Lamb([{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters()}])

    workload = digits_workload(optimizer=optimizer, clip_grad_norm=0.2)
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)
    scores = track(trajectory, workload, [window], dtype=torch.float64).of(0)
    exact = finite_difference(workload, trajectory, window, "local", SOME, 1e-5)
    assert np.abs(scores[SOME] - exact).max() < 1e-6 * np.abs(scores).max()
    here, there = (
        leave_one_out(trajectory, workload, [window], samples=SOME, effort=effort).of(0)[SOME]
        for effort in (None, Effort(jobs=2))
    )
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Signs, "Signs has the derivative 0 in the gradients"),
        (Rooting, r"Rooting changes by .* the derivative of its trace is .* takes out of tensors \(float\(\), math"),
    ],
)
def test_steps_without_a_right_derivative_are_refused_and_leave_one_out_goes_on(
    tmp_path: Path, cls: Any, message: str
) -> None:
    workload = of(cls)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=message):
        track(trajectory, workload, whole(trajectory))
    (window,) = whole(trajectory)
    removed = leave_one_out(trajectory, workload, [window], samples=SOME).of(0)[SOME]
    expected = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in SOME]
    np.testing.assert_allclose(removed, expected, rtol=1e-7)


def test_its_code_comes_from_the_workload_and_from_nowhere_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = digits_model()
    trajectory = record(tmp_path / "t", model, Lamb(model.parameters()))
    assert trajectory.manifest.optimizer.name == f"{Lamb.__module__}.Lamb"
    with pytest.raises(TrajectoryError, match=r"recorded with the optimizer .*Lamb.*give Workload\(optimizer="):
        track(trajectory, digits_workload(optimizer=None), whole(trajectory))
    with pytest.raises(TrajectoryError, match=r"the workload's optimizer is Adam; .* recorded with .*Lamb"):
        track(trajectory, of(Adam), whole(trajectory))
    assert np.isfinite(track(Trajectory.open(tmp_path / "t"), of(Lamb), whole(trajectory)).scores).all()


def test_state_that_is_no_tensor_or_number_is_refused_when_recorded(tmp_path: Path) -> None:
    class Listing(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for value in self.param_groups[0]["params"]:
                past: list[Tensor] = self.state[value].setdefault("past", [])
                past.append(value.grad.clone())
                value.sub_(0.1 * past[0])

    model = digits_model()
    with pytest.raises(UnsupportedError, match=r"Listing keeps .*'past'.* list"):
        record(tmp_path / "t", model, Listing(model.parameters()))


@pytest.mark.parametrize(("rule", "called"), [(max, "builtin"), (torch.zeros(3), "Tensor")])
def test_a_setting_that_a_record_cannot_hold_is_refused_when_recorded(tmp_path: Path, rule: Any, called: str) -> None:
    model = digits_model()
    optimizer = SGD([{"params": model.parameters(), "rule": rule}], lr=0.1)
    with pytest.raises(UnsupportedError, match=rf"setting 'rule' is a {called}.*; expected numbers"):
        record(tmp_path / "t", model, optimizer)


@pytest.mark.parametrize("where", ["under a name", "as a number"])
def test_state_that_belongs_to_no_parameter_is_refused_when_recorded(tmp_path: Path, where: str) -> None:
    class Counting(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for value in self.param_groups[0]["params"]:
                value.sub_(0.1 * value.grad)
                if where == "as a number":
                    self.state[value] = 1
            if where == "under a name":
                self.state["all"] = {"calls": 1}  # type: ignore[index]

    model = digits_model()
    with pytest.raises(UnsupportedError, match="Counting keeps state that belongs to no parameter"):
        record(tmp_path / "t", model, Counting(model.parameters()))
