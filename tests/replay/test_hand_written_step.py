"""Steps that are not a loss, then an optimizer: written by hand, replayed, swept, and run without samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader
from workloads import SAMPLES, datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import (
    Query,
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    UnsupportedError,
    Window,
    Workload,
    leave_one_out,
    track,
)
from dit_mlflow.replay.replay import Replay
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.retraining.counterfactuals import Retraining
from dit_mlflow.trajectory import State


class Taught(nn.Module):
    """A network, and the running average of its parameters that teaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_model()
        for key, value in self.net.named_parameters():
            self.register_buffer(f"mean_{key.replace('.', '_')}", value.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def taught(self, inputs: Tensor) -> Tensor:
        means = {key: getattr(self, f"mean_{key.replace('.', '_')}") for key, _ in self.net.named_parameters()}
        return functional_call(self.net, means, (inputs,))


def taught_losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy, and the distance to the teacher."""
    logits, teacher = model(batch[0]), model.taught(batch[0])  # type: ignore[operator]
    return cross_entropy(logits, batch[1], reduction="none") + mse_loss(logits, teacher, reduction="none").sum(dim=1)


class HandWritten(TrainingStep):
    """Weighted losses of a step's one batch, for steps written by hand."""

    def objective(self, parameters: Any, buffers: Any, micro: Any, weights: Tensor | None) -> Tensor:
        losses = self.dynamics.call(
            parameters, dict(buffers), lambda model: self.dynamics.workload.loss(model, micro.batch)
        )
        return (micro.coefficients.to(losses) * losses * (1 if weights is None else weights)).sum()


class MeanTeacherStep(HandWritten):
    """The average follows; the loss looks at it; SGD with momentum. The average is no optimizer's, and in the loss."""

    def forward(self, state: State, batches: Any, weights: Any, record: Any, over: Any = None) -> State:
        (settings,) = record.hyperparameters
        means = {}
        for key, value in state.parameters.items():
            mean = "mean_" + key.removeprefix("net.").replace(".", "_")
            means[mean] = torch.lerp(state.buffers[mean], value, 0.3)
        gradients = grad(self.objective)(state.parameters, means, batches[0], weights)
        held = {key: state.optimizer.get(key, {}).get("momentum_buffer", torch.zeros(())) for key in gradients}
        held = {key: settings["momentum"] * held[key] + gradient for key, gradient in gradients.items()}
        parameters = {key: value - settings["lr"] * held[key] for key, value in state.parameters.items()}
        return State(parameters, means, {key: {"momentum_buffer": value} for key, value in held.items()})


class SharpnessStep(HandWritten):
    """Two gradients a step: the second, taken uphill, goes into Adam."""

    def forward(self, state: State, batches: Any, weights: Any, record: Any, over: Any = None) -> State:
        (settings,) = record.hyperparameters
        beta1, beta2 = settings["betas"]
        gradients = grad(self.objective)(state.parameters, state.buffers, batches[0], weights)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
        above = {key: value + 0.5 * gradients[key] / norm for key, value in state.parameters.items()}
        gradients = grad(self.objective)(above, state.buffers, batches[0], weights)
        parameters, entries = {}, {}
        for key, g in gradients.items():
            entry = state.optimizer.get(key) or {"step": torch.zeros(()), "exp_avg": 0 * g, "exp_avg_sq": 0 * g}
            count = entry["step"] + 1
            mean = beta1 * entry["exp_avg"] + (1 - beta1) * g
            square = beta2 * entry["exp_avg_sq"] + (1 - beta2) * g.square()
            power = float(count)
            # Of inputs that are always 0; the root has no derivative there.
            root = torch.where(square > 0, square, 1).sqrt() * (square > 0)
            divisor = root / (1 - beta2**power) ** 0.5 + settings["eps"]
            parameters[key] = state.parameters[key] - settings["lr"] * mean / (1 - beta1**power) / divisor
            entries[key] = {"step": count, "exp_avg": mean, "exp_avg_sq": square}
        return State(parameters, state.buffers, entries)


HAND_WRITTEN: dict[str, Any] = {
    "mean teacher": (Taught, taught_losses, MeanTeacherStep),
    "sharpness-aware": (digits_model, sample_losses, SharpnessStep),
}


class Loop:
    """The same steps as an ordinary loop, recorded in float32 or run again in float64 with weights."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        if name == "mean teacher":
            self.optimizer: Any = SGD(model.parameters(), lr=0.2, momentum=0.9)
        else:
            self.optimizer = Adam(model.parameters(), lr=0.02, eps=1e-3)
        self.loss = HAND_WRITTEN[name][1]

    def step(self, batch: Any, weights: Tensor) -> None:
        self.optimizer.zero_grad()
        named = dict(self.model.named_parameters())
        if self.name == "mean teacher":
            with torch.no_grad():
                for key, value in self.model.net.named_parameters():  # type: ignore[union-attr]
                    getattr(self.model, f"mean_{key.replace('.', '_')}").lerp_(value, 0.3)
            (weights * self.loss(self.model, batch)).mean().backward()
        else:
            first = torch.autograd.grad((weights * self.loss(self.model, batch)).mean(), list(named.values()))
            norm = torch.sqrt(sum(g.square().sum() for g in first))
            above = {key: (p + 0.5 * g / norm).detach() for (key, p), g in zip(named.items(), first, strict=True)}
            above = {key: value.requires_grad_() for key, value in above.items()}
            losses = cross_entropy(functional_call(self.model, above, (batch[0],)), batch[1], reduction="none")
            for p, g in zip(
                named.values(), torch.autograd.grad((weights * losses).mean(), list(above.values())), strict=True
            ):
                p.grad = g
        self.optimizer.step()


def recorded(name: str, directory: Path) -> tuple[Trajectory, Workload]:
    """By the recorder, opened such that all that asks for a replay gets the step written by hand."""
    make_model, loss, make_step = HAND_WRITTEN[name]
    torch.manual_seed(0)
    loop = Loop(name, make_model())
    with TrajectoryRecorder(loop.model, loop.optimizer, directory) as recorder:
        for _ in range(3):
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8, shuffle=True)):
                loop.step(batch, torch.ones(8))

    class Opened(Trajectory):
        def replay(self, workload: Workload, dtype: Any = None, make_step: Any = make_step) -> Replay:
            return Replay(self, workload, dtype, make_step)

    return Opened.open(directory), digits_workload(model=make_model, loss=loss, optimizer=None)


def run_again(name: str, trajectory: Trajectory, workload: Workload, weight_of: Any, until: int) -> nn.Module:
    loop = Loop(name, trajectory.checkpoint(0).load_into(workload.build_model()).double())
    for t in range(until):
        samples = trajectory.step(t).samples
        inputs, targets = workload.batch(samples)
        loop.step(
            (inputs.double(), targets), torch.tensor([weight_of(t, int(i)) for i in samples], dtype=torch.float64)
        )
    return loop.model


@pytest.fixture(params=HAND_WRITTEN)
def hand_written(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    trajectory, workload = recorded(request.param, tmp_path / "t")
    yield (
        trajectory,
        workload,
        lambda weight_of, until: run_again(request.param, trajectory, workload, weight_of, until),
    )


def student_loss(model: nn.Module) -> Tensor:
    """Cross-entropy on the validation set; of the teacher too, where there is one."""
    inputs, targets = datasets()[1].tensors
    inputs = inputs.to(next(model.parameters()))
    found = cross_entropy(model(inputs), targets)
    return found + cross_entropy(model.taught(inputs), targets) if isinstance(model, Taught) else found


def test_a_step_written_by_hand_replays(hand_written: Any) -> None:
    trajectory, workload, again = hand_written
    assert trajectory.verify(workload).max_drift < 1e-5
    with pytest.raises(TrajectoryError, match="misses the checkpoint"):
        Trajectory.open(trajectory.directory).verify(workload)
    *_, last = trajectory.states(workload, 0, 9, torch.float64)
    for part, value in {
        **dict((m := again(lambda t, i: 1.0, 9)).named_parameters()),
        **dict(m.named_buffers()),
    }.items():
        torch.testing.assert_close({**last.parameters, **last.buffers}[part], value.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
def test_a_step_written_by_hand_is_swept(hand_written: Any, kind: Any) -> None:
    trajectory, workload, again = hand_written
    window = Window(2, 6)
    queries = [Query("student", student_loss), Query("bias", lambda model: list(model.parameters())[-1][0])]
    found = track(trajectory, workload, [window], kind, queries, dtype=torch.float64).of(0, "student")
    first, until = (0 if kind == "cumulative" else 2), (9 if kind == "final" else 6)

    def value(j: int, weight: float) -> float:
        def weight_of(t: int, i: int) -> float:
            return weight if i == j and first <= t < 6 else 1.0

        after = student_loss(again(weight_of, until)).item()
        return after - student_loss(again(weight_of, 2)).item() if kind == "cumulative" else after

    samples = range(0, SAMPLES, 5)
    expected = np.array([value(j, 1 - 1e-5) - value(j, 1 + 1e-5) for j in samples]) / 2e-5
    assert np.abs(found[list(samples)] - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("side_by_side", [True, False])
def test_a_step_written_by_hand_leaves_samples_out(
    hand_written: Any, side_by_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, workload, again = hand_written
    monkeypatch.setattr(Retraining, "_prefer_side_by_side", lambda *arguments: side_by_side)
    samples, queries = [0, 7, 13], [Query("student", student_loss)]
    found = leave_one_out(trajectory, workload, [Window(2, 6)], "final", queries, samples).of(0)[samples]
    whole = student_loss(again(lambda t, i: 1.0, 9)).item()
    expected = [
        student_loss(again(lambda t, i, j=j: float(i != j or not 2 <= t < 6), 9)).item() - whole for j in samples
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_methods_made_for_a_loss_and_an_optimizer_refuse_other_steps(hand_written: Any) -> None:
    trajectory, workload, _ = hand_written
    with pytest.raises(UnsupportedError, match=r"here a step is a \w+Step\. Use dit, removal or leave_one_out"):
        _ = trajectory.replay(workload).loss_step
