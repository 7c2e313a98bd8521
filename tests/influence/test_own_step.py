"""Training steps of a workload's own, held against retraining by a plain loop in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DataLoader
from workloads import digits_model, digits_workload, sample_losses

from dit_mlflow import (
    DitError,
    Effort,
    InputError,
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    UnsupportedError,
    Window,
    Workload,
    WorkloadError,
    expected_influence,
    explain,
    leave_one_out,
    mean_validation_loss,
    torch_internals,
    track,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.replay.training_step import SampleWeights
from dit_mlflow.workload import to_like

SOME = [0, 5, 11]


def once(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weights * sample_losses(model, batch)).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def sharpness_aware(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    """SAM (Foret et al. 2021) by hand."""
    optimizer.zero_grad()
    (weights * sample_losses(model, batch)).mean().backward()
    length = torch.stack([value.grad.norm() for value in model.parameters()]).norm()
    away = [0.05 * value.grad / (length + 1e-12) for value in model.parameters()]
    with torch.no_grad():
        for value, part in zip(model.parameters(), away, strict=True):
            value.add_(part)
    optimizer.zero_grad()
    loss = (weights * sample_losses(model, batch)).mean()
    loss.backward()
    with torch.no_grad():
        for value, part in zip(model.parameters(), away, strict=True):
            value.sub_(part)
    optimizer.step()
    return loss


class Taught(nn.Module):
    """A student, and the average of its weights, which teaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = digits_model()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(inputs)


def mean_teacher(model: Any, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    optimizer.zero_grad()
    with torch.no_grad():
        target = model.teacher(batch[0]).softmax(dim=1)
    apart = (model(batch[0]).softmax(dim=1) - target).square().sum(dim=1)
    loss = (weights * (sample_losses(model, batch) + apart)).mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for average, value in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            average.mul_(0.8).add_(value, alpha=0.2)
    return loss


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 64))
        self.critic = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.critic(inputs).squeeze(1)


def adversarial(model: Any, optimizers: Any, batch: Any, weights: Tensor) -> Tensor:
    real = batch[0]
    made = model.generator(real[:, 30:34])
    optimizers["critic"].zero_grad()
    loss = (weights * (softplus(-model(real)) + softplus(model(made.detach())))).mean()
    loss.backward()
    optimizers["critic"].step()
    optimizers["generator"].zero_grad()
    softplus(-model(made)).mean().backward()
    optimizers["generator"].step()
    return loss


def told(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    """A loss that is read, and decides nothing."""
    loss = once(model, optimizer, batch, weights)
    assert f"{loss.item():.3f}"
    return loss


def by_size(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    """A branch on a value, and a gradient of gradients."""
    optimizer.zero_grad()
    losses = sample_losses(model, batch)
    loss = (weights * losses).mean()
    if losses.mean().item() > 1:
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        loss = loss + 0.1 * torch.stack([part.square().sum() for part in found]).sum()
    loss.backward()
    optimizer.step()
    return loss


class Spectrum(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.rfft(values)).flatten(1)


def penalised(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    """A penalty on gradients, as a critic of a GAN has it, through layers that normalise."""
    optimizer.zero_grad()
    inputs = batch[0].clone().requires_grad_()
    outputs = model(inputs)
    (slope,) = torch.autograd.grad(outputs.logsumexp(dim=1).sum(), inputs, create_graph=True)
    losses = cross_entropy(outputs, batch[1], reduction="none") + (slope.norm(dim=1) - 1).square()
    loss = (weights * losses).mean()
    loss.backward()
    optimizer.step()
    return loss


def as_many_loops_have_it(model: Any, optimizer: Any, batch: Any, weights: Tensor) -> float:
    """A validation pass at the end, which the next step begins after; values through ``.data``; a plain number."""
    optimizer.zero_grad()
    loss = (weights * sample_losses(model, batch)).mean()
    loss.backward()
    kept = [value.data.clone() for value in model.parameters()]
    for value in model.parameters():
        value.data = 0.9 * value.data
    optimizer.step()
    for value, old in zip(model.parameters(), kept, strict=True):
        value.data = value.data + 0.1 * old
    model.eval()
    return float(loss.detach())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


def reversing(model: Any, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    """A gradient that is none of a function."""
    optimizer.zero_grad()
    hidden = model[:2](batch[0])
    loss = (weights * (cross_entropy(model[2](hidden), batch[1], reduction="none"))).mean()
    loss = loss + (weights * model[2](Reversed.apply(hidden))[:, 0].square()).mean()
    loss.backward()
    optimizer.step()
    return loss


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def decaying(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)


def by_its_loss(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> None:
    optimizer.zero_grad()
    loss = (weights * sample_losses(model, batch)).mean()
    (loss * (1 if loss.item() > 0.8 else 0.5)).backward()
    optimizer.step()


class Normalised(torch.optim.Optimizer):
    """Divides by a mean length of the gradients that it reads out; may keep it as a number."""

    def __init__(self, params: Any, where: str = "tensor") -> None:
        super().__init__(params, {})
        self.where = where

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            kept = self.param_groups[0] if self.where == "settings" else self.state[value]
            length = value.grad.norm().item()
            if self.where != "tensor":
                kept["length"] = length = 0.5 * kept.get("length", 1.0) + 0.5 * length
            value.sub_(0.1 * value.grad / length)


def muon_and_adamw(model: nn.Module, optimizers: Any, batch: Any, weights: Tensor) -> None:
    model.zero_grad()
    (weights * sample_losses(model, batch)).mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()


def of_matrices_and_others(model: nn.Module) -> Any:
    matrices = [value for value in model.parameters() if value.dim() == 2]
    others = [value for value in model.parameters() if value.dim() != 2]
    return {"muon": torch.optim.Muon(matrices, lr=0.05), "adamw": torch.optim.AdamW(others, lr=0.02)}


CASES: dict[str, dict[str, Any]] = {
    "AdamW, clipped": {"step": once, "optimizer": adamw, "scheduler": decaying},
    "SAM": {"step": sharpness_aware, "optimizer": adamw},
    "mean teacher": {
        "step": mean_teacher,
        "model": Taught,
        "optimizer": lambda model: torch.optim.SGD(model.student.parameters(), lr=0.2),
    },
    "GAN": {
        "step": adversarial,
        "model": Adversaries,
        "optimizer": lambda model: {
            "generator": torch.optim.Adam(model.generator.parameters(), lr=0.01),
            "critic": torch.optim.SGD(model.critic.parameters(), lr=0.1, momentum=0.5),
        },
        "loss": lambda model, batch: softplus(-model(batch[0])),
    },
    "a branch, a gradient penalty": {"step": by_size, "optimizer": sgd},
    "a gradient penalty through norms": {
        "step": penalised,
        "model": lambda: nn.Sequential(
            *(
                nn.Linear(64, 6, bias=False),
                nn.BatchNorm1d(6),
                nn.Tanh(),
                nn.Linear(6, 6),
                nn.LayerNorm(6),
                nn.Linear(6, 3),
            )
        ),
        "optimizer": sgd,
    },
    "complex values": {
        "step": once,
        "model": lambda: nn.Sequential(nn.Linear(64, 6), Spectrum(), nn.Tanh(), nn.Linear(8, 3)),
        "optimizer": adamw,
    },
    "a reversed gradient": {"step": reversing, "optimizer": sgd},
    "as many loops have it": {"step": as_many_loops_have_it, "optimizer": sgd},
    "Adafactor": {
        "step": once,
        "optimizer": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05, eps=(1e-7, 1e-3)),
    },
    "numbers read by an optimizer": {"step": once, "optimizer": lambda model: Normalised(model.parameters())},
}


def retrained(workload: Workload, trajectory: Trajectory, weights: Tensor) -> float:
    """The validation loss after a plain loop in float64 from the recorded start, on the recorded batches."""
    assert workload.step is not None and workload.optimizer is not None
    model = trajectory.checkpoint(0).load_into(workload.build_model()).double()
    optimizer = workload.optimizer(model)
    scheduler = workload.scheduler(optimizer) if workload.scheduler else None
    model.train()
    for t in range(trajectory.num_steps):
        indices = trajectory.step(t).samples
        batch = to_like(workload.batch(indices), torch.device("cpu"), torch.float64)
        workload.step(model, optimizer, batch, weights[indices])
        if scheduler is not None:
            scheduler.step()
    batch = to_like(workload.collate(workload.validation_set, range(16)), torch.device("cpu"), torch.float64)
    return workload.loss(model.eval(), batch).mean().item()


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_derivative_of_retraining(name: str, tmp_path: Path) -> None:
    workload = digits_workload(epochs=1, **CASES[name])
    trajectory = train(workload, tmp_path / "trajectory")
    assert trajectory.verify(workload).max_drift == 0
    window = Window(0, trajectory.num_steps)
    result = track(trajectory, workload, [window], kind="final", dtype=torch.float64)

    def at(sample: int, step: float) -> float:
        weights = torch.ones(24, dtype=torch.float64)
        weights[sample] += step
        return retrained(workload, trajectory, weights)

    expected = [(at(sample, -1e-5) - at(sample, 1e-5)) / 2e-5 for sample in SOME]
    np.testing.assert_allclose(result.scores[0, 0, SOME], expected, rtol=1e-6, atol=1e-9)
    if name not in ("mean teacher", "GAN"):
        return
    # Removal itself, side by side.
    exact = leave_one_out(trajectory, workload, [window], kind="final", samples=SOME, dtype=torch.float64)
    weights = torch.ones(24, dtype=torch.float64)
    whole = retrained(workload, trajectory, weights)
    gone = [retrained(workload, trajectory, weights.index_fill(0, torch.tensor(sample), 0)) - whole for sample in SOME]
    np.testing.assert_allclose(exact.scores[0, 0, SOME], gone, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_beside_adamw_is_differentiated_without_its_rounding(tmp_path: Path) -> None:
    workload = digits_workload(step=muon_and_adamw, optimizer=of_matrices_and_others, epochs=1)
    trajectory = train(workload, tmp_path / "rounded")
    assert trajectory.verify(workload).max_drift == 0
    with pytest.warns(UserWarning, match=r"Muon\+AdamW computes in bfloat16.* apart by [0-9.]+%") as told:
        track(trajectory, workload, [Window(0, 3)])
    assert len(told) == 1
    # Retraining takes the step as it is.
    exact = leave_one_out(trajectory, workload, [Window(0, 3)], samples=SOME, dtype=torch.float64).scores[0, 0, SOME]
    weights = torch.ones(24, dtype=torch.float64)
    gone = [
        retrained(workload, trajectory, weights.index_fill(0, torch.tensor(sample), 0))
        - retrained(workload, trajectory, weights)
        for sample in SOME
    ]
    np.testing.assert_allclose(exact, gone, rtol=1e-6, atol=1e-9)
    with torch_internals.widening(torch.float64, lambda dtype: None):
        trajectory = train(workload, tmp_path / "exact")
        with pytest.warns(UserWarning, match=r"apart by 0\.0%"):
            scores = track(trajectory, workload, [Window(0, 3)], dtype=torch.float64).scores[0, 0, SOME]

        def at(sample: int, step: float) -> float:
            return retrained(workload, trajectory, weights.index_fill(0, torch.tensor(sample), 1 + step))

        expected = [(at(sample, -1e-5) - at(sample, 1e-5)) / 2e-5 for sample in SOME]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("where", ["state", "settings"])
def test_numbers_that_an_optimizer_keeps_are_refused(where: str, tmp_path: Path) -> None:
    workload = digits_workload(
        step=once, optimizer=lambda model: Normalised(model.parameters(), where), loss=sample_losses, epochs=1
    )
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=r"keeps 'length', which depends on the gradients.* floating tensor"):
        track(trajectory, workload, [Window(0, trajectory.num_steps)])


@pytest.mark.parametrize(("step", "together"), [(told, True), (by_its_loss, False)])
def test_trainings_that_may_go_another_way_are_made_one_by_one(step: Any, together: bool, tmp_path: Path) -> None:
    workload = digits_workload(step=step, optimizer=sgd, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload, torch.float64)
    start, record = replay.checkpoint(0), trajectory.step(0)
    weights = torch.ones(3, 8, dtype=torch.float64)
    weights[1, :6] = 0
    with nullcontext() if together else pytest.raises(NotImplementedError, match="another way"):
        after = replay.training_step(start.side_by_side(3), record, weights)
        for copy in range(3):
            alone = replay.training_step(start, record, weights[copy])
            for name, value in alone.parameters.items():
                torch.testing.assert_close(after.parameters[name][copy], value)


def dropping(model: Any, optimizer: Any, batch: Any, weights: Tensor) -> None:
    optimizer.zero_grad()
    hidden = nn.functional.dropout(model[:2](batch[0]).T, 0.2).T
    (weights * cross_entropy(model[2](hidden), batch[1], reduction="none")).mean().backward()
    optimizer.step()


def test_masks_of_tensors_that_are_not_contiguous_are_those_of_the_record(tmp_path: Path) -> None:
    workload = digits_workload(step=dropping, optimizer=sgd, epochs=1)
    trajectory = train(workload, tmp_path / "trajectory")
    (score,) = track(trajectory, workload, [Window(0, 3)], dtype=torch.float64).scores[0, 0, :1]
    replay, query = trajectory.replay(workload, torch.float64), mean_validation_loss(workload)

    def at(weight: float) -> float:
        weights = SampleWeights(torch.ones(24).double().index_fill(0, torch.tensor(0), weight), 0, 3)
        *_, last = replay.forward(0, 3, weights)
        return float(replay.dynamics.evaluate(last.parameters, last.buffers, query))

    np.testing.assert_allclose(score, (at(1 - 1e-5) - at(1 + 1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["local", "cumulative"])
def test_windows_add_up_and_equal_those_of_the_standard_step(kind: Any, tmp_path: Path) -> None:
    own = digits_workload(step=once, optimizer=sgd, epochs=2)
    trajectory = train(own, tmp_path / "trajectory")
    standard = replace(own, step=None, clip_grad_norm=0.5)
    windows = [Window(0, 3), Window(3, 6), Window(0, 6)]
    ours, theirs = (track(trajectory, w, windows, kind=kind, dtype=torch.float64) for w in (own, standard))
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5, atol=1e-8)


def test_a_loop_of_ones_own_records_each_step_as_one(tmp_path: Path) -> None:
    workload = digits_workload(**CASES["GAN"])
    torch.manual_seed(0)
    model = Adversaries()
    optimizers = workload.optimizer(model)  # type: ignore[misc]
    loader = DataLoader(workload.train_set, batch_size=8, shuffle=True)
    with TrajectoryRecorder(model, optimizers, tmp_path / "own", workload) as recorder:
        for batch in recorder.watch(loader):
            with recorder.one_step():
                recorder.log(adversarial(model, optimizers, batch, torch.ones(len(batch[0]))))
    trajectory = Trajectory.open(tmp_path / "own")
    assert (trajectory.num_steps, trajectory.manifest.optimizer.name) == (3, "Adam+SGD")
    assert trajectory.verify(workload).max_drift == 0
    assert np.isfinite([trajectory.step(t).loss for t in range(3)]).all()


def test_a_step_within_a_step_is_refused(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = sgd(model)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for batch in recorder.watch(DataLoader(digits_workload().train_set, batch_size=12)):
            with recorder.one_step():
                once(model, optimizer, batch, torch.ones(12))
                if recorder.num_steps:
                    with pytest.raises(InputError, match="leave out the inner one"), recorder.one_step():
                        pass
    assert recorder.num_steps == 2


def test_several_optimizers_need_a_step(tmp_path: Path) -> None:
    workload = digits_workload(**CASES["GAN"])
    torch.manual_seed(0)
    model = Adversaries()
    optimizers: Any = workload.optimizer(model)  # type: ignore[misc]
    loader = DataLoader(workload.train_set, batch_size=8)
    with (
        pytest.raises(TrajectoryError, match=r"one_step"),
        TrajectoryRecorder(model, optimizers, tmp_path / "own") as recorder,
    ):
        for batch in recorder.watch(loader):
            adversarial(model, optimizers, batch, torch.ones(8))
    trajectory = train(workload, tmp_path / "trajectory")
    with pytest.raises(WorkloadError, match=r"Workload\.step"):
        track(trajectory, replace(workload, step=None), [Window(0, 3)])
    with pytest.raises(TrajectoryError, match="hold the same parameter"):
        TrajectoryRecorder(model, {"one": sgd(model), "two": sgd(model)}, tmp_path / "twice")


def unweighted(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> None:
    once(model, optimizer, batch, torch.ones_like(weights))


def by_numpy(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> None:
    optimizer.zero_grad()
    losses = sample_losses(model, batch)
    (weights * losses * torch.from_numpy(np.exp(-losses.detach().numpy()))).mean().backward()
    optimizer.step()


def clipped_by_a_number(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> None:
    """Only where the gradient is long: not in the first steps, whose derivative is held against differences."""
    optimizer.zero_grad()
    (weights * sample_losses(model, batch)).mean().backward()
    length = torch.stack([value.grad.norm() for value in model.parameters()]).norm().item()
    if length > 0.72:
        for value in model.parameters():
            value.grad.mul_(0.72 / length)
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "message"),
    [(unweighted, "weights"), (by_numpy, "leave_one_out"), (clipped_by_a_number, r"reads out of a tensor \(\.item")],
)
def test_what_cannot_be_swept_is_refused_and_can_be_retrained(step: Any, message: str, tmp_path: Path) -> None:
    workload = digits_workload(step=step, optimizer=sgd, epochs=1)
    trajectory = train(workload, tmp_path / "trajectory")
    with pytest.raises(UnsupportedError, match=message):
        track(trajectory, workload, [Window(0, 3)])
    if step is clipped_by_a_number:
        # The same step, asked again, refuses again.
        replay = trajectory.replay(workload)
        states = list(replay.forward(0, 2))
        refused = []
        for t, state in enumerate(states):
            for _ in range(2):
                try:
                    batches = replay.dynamics.load(trajectory.step(t))
                    replay.training_step.with_graph(state, batches, torch.ones(8), trajectory.step(t))
                except UnsupportedError:
                    refused.append(t)
        assert refused and all(refused.count(t) == 2 for t in refused)
    exact = leave_one_out(trajectory, workload, [Window(0, 3)], samples=[0], effort=Effort(jobs=1))
    assert (exact.scores[0, 0, 0] != 0) == (step is not unweighted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": None}, "optimizer"),
        ({"accumulate": 2}, "accumulate"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm"),
        ({"regularizer": lambda model: torch.zeros(())}, "regularizer"),
        ({"coefficients": lambda batch: torch.ones(8)}, "coefficients"),
    ],
)
def test_what_a_step_does_itself_is_not_given_twice(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        digits_workload(**({"step": once, "optimizer": sgd} | change))


@pytest.mark.parametrize("name", ["source", "dvemb", "tracin", "influence_function", "influence_function_ekfac"])
def test_methods_that_look_into_the_loss_refuse_by_name(name: str, tmp_path: Path) -> None:
    workload = digits_workload(step=once, optimizer=sgd, epochs=1)
    trajectory = train(workload, tmp_path / "trajectory")
    with pytest.raises(DitError, match="needs steps of a loss"):
        method(name)(trajectory, workload, [Window(0, 3)])


@pytest.mark.slow
def test_draws_and_explanations_take_any_step(tmp_path: Path) -> None:
    workload = digits_workload(step=mean_teacher, model=Taught, optimizer=CASES["mean teacher"]["optimizer"], epochs=1)
    trajectory = train(workload, tmp_path / "trajectory")
    found = expected_influence(trajectory, workload, [Window(0, 3)], draws=2)
    assert found.scores.any()
    explanation = explain(trajectory, workload, windows=[Window(0, 3)], kind="final")
    assert explanation.influence.metadata["derivative"] == "traced"


class Named(torch.optim.Optimizer):
    """Divides by a mean length of the gradients, kept under a name of the caller's."""

    def __init__(self, params: Any, name: str) -> None:
        super().__init__(params, {})
        self.name = name

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for value in self.param_groups[0]["params"]:
            state = self.state[value]
            state[self.name] = 0.9 * state.get(self.name, torch.ones(())) + 0.1 * value.grad.norm()
            value.sub_(0.1 * value.grad / state[self.name])


def test_a_moment_named_like_a_counter_is_refused(tmp_path: Path) -> None:
    for name, refused in (("rate", False), ("eta", True)):
        workload = digits_workload(
            step=once, optimizer=lambda model, name=name: Named(model.parameters(), name), loss=sample_losses
        )
        trajectory = train(workload, tmp_path / name)
        if not refused:
            assert track(trajectory, workload, [Window(0, trajectory.num_steps)]).scores.any()
            continue
        with pytest.raises(UnsupportedError, match="keeps 'eta', which depends on the gradients"):
            track(trajectory, workload, [Window(0, trajectory.num_steps)])
