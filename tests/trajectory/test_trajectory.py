"""What was recorded can be rebuilt, and what was not recorded is not accepted."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import TensorDataset
from workloads import datasets, digits_workload, sample_losses

from dit_mlflow import InputError, TrainingError, Trajectory, TrajectoryError, WorkloadError, track, train
from dit_mlflow.influence import Window
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.trajectory import State


def adamw_workload(**changes: Any) -> Any:
    return digits_workload(optimizer=lambda model: AdamW(model.parameters(), lr=0.02), epochs=6, **changes)


def same(first: State, second: State) -> bool:
    pairs = [(first.parameters[name], value) for name, value in second.parameters.items()]
    pairs += [
        (first.optimizer[name][key], value) for name, entry in second.optimizer.items() for key, value in entry.items()
    ]
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_state_is_rebuilt_bit_for_bit_from_few_checkpoints(tmp_path: Path) -> None:
    workload = adamw_workload()
    dense = train(workload, tmp_path / "dense", checkpoint_every=1)
    sparse = train(workload, tmp_path / "sparse", checkpoint_every=0)
    default = train(workload, tmp_path / "default")
    expected = {t: dense.checkpoint(t) for t in range(dense.num_steps + 1)}
    for trajectory in (sparse, default, dense):
        for a, b in ((0, 18), (3, 11), (9, 9), (10, 16), (18, 18)):
            states = list(trajectory.states(workload, a, b))
            assert len(states) == b - a + 1
            assert all(same(state, expected[t]) for t, state in enumerate(states, start=a))


@pytest.mark.parametrize("states", [4, 5, 8, None])
@pytest.mark.parametrize("every", [0, 7, "sqrt", 1])
@pytest.mark.parametrize(("a", "b"), [(0, 18), (2, 17), (9, 10), (0, 1)])
def test_backward_walk_meets_every_state_once(every: Any, states: int | None, a: int, b: int, tmp_path: Path) -> None:
    workload = adamw_workload()
    trajectory = train(workload, tmp_path / "t", checkpoint_every=every)
    expected = dict(enumerate(trajectory.states(workload, 0, 18)))
    budget = None if states is None else states * expected[1].nbytes
    walk = trajectory.replay(workload).backward(a, b, budget)
    walked = [(t, state.map(torch.clone)) for t, state in walk]
    assert [t for t, _ in walked] == list(range(b, a - 1, -1))
    assert all(same(state, expected[t]) for t, state in walked)


@pytest.mark.parametrize(("states", "replays"), [(4, 3.2), (8, 2.2), (20, 2.0), (50, 1.0)])
def test_memory_budget_trades_states_for_replay(
    states: int, replays: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty-five steps between two checkpoints: few states alive at a time, each step made a few times."""
    workload = digits_workload(epochs=15)
    trajectory = train(workload, tmp_path / "t", checkpoint_every=0)
    replay = trajectory.replay(workload)
    steps = []
    forward = LossStep.forward
    monkeypatch.setattr(LossStep, "forward", lambda *args: (steps.append(1), forward(*args))[1])
    alive: weakref.WeakSet[State] = weakref.WeakSet()
    make = State.__init__

    def counted(self: State, *args: Any) -> None:
        make(self, *args)
        if args[0] and args[0]["0.weight"].requires_grad is False:
            alive.add(self)

    monkeypatch.setattr(State, "__init__", counted)
    most = 0
    for _ in replay.backward(0, 45, states * trajectory.checkpoint(0).nbytes):
        most = max(most, len(alive))
    # Beside the budget: both ends, the state in training, and the two that the caller may look at.
    assert 3 < most <= states + 5
    assert len(steps) <= replays * 45


def test_memory_budget_that_holds_too_few_states_is_refused(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match=r"memory_budget=100 bytes; one state takes \d+, and at least 4 must fit"):
        track(trajectory, workload, [Window(0, 9)], memory_budget=100)
    with pytest.raises(InputError, match="memory_budget=nan bytes"):
        track(trajectory, workload, [Window(0, 9)], memory_budget=math.nan)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float64", torch.int64])
def test_what_is_no_floating_dtype_is_refused(dtype: Any, tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match=rf"dtype is .*{str(dtype)[-3:]}.*; expected torch.float64, torch.float32"):
        track(trajectory, workload, [Window(0, 9)], dtype=dtype)


def drift_of(folder: Path) -> dict[int, float]:
    return Trajectory.open(folder).verify(adamw_workload()).drift


def test_replay_is_bit_for_bit_in_another_process(tmp_path: Path) -> None:
    train(adamw_workload(), tmp_path / "t")
    assert processes.answer(drift_of, tmp_path / "t") == {1: 0.0, 4: 0.0, 9: 0.0, 16: 0.0, 18: 0.0}


def test_float64_replay_runs_from_the_start_without_reanchoring(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    *_, last = trajectory.states(workload, 0, 9, dtype=torch.float64)
    model = trajectory.checkpoint(0).load_into(workload.build_model()).double()
    optimizer = SGD(model.parameters(), lr=0.5)
    for t in range(9):
        optimizer.zero_grad()
        inputs, targets = workload.batch(trajectory.step(t).samples)
        sample_losses(model, (inputs.double(), targets)).mean().backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(last.parameters[name], value.detach(), rtol=1e-13, atol=1e-14)
        recorded = trajectory.checkpoint(9).parameters[name]
        assert not torch.equal(last.parameters[name], recorded.double())


def test_incomplete_trajectory_keeps_the_steps_before_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    workload = digits_workload(optimizer=lambda model: SGD(model.parameters(), lr=1e38, momentum=0.9), epochs=20)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step"):
        train(workload, tmp_path / "t")
    trajectory = Trajectory.open(tmp_path / "t")
    assert not trajectory.complete
    assert trajectory.num_steps > 0


def test_incomplete_trajectory_verifies_and_can_be_swept(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop_at_seven(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def factor(t: int) -> float:
        if t == 7:
            raise Stopped
        return 1.0

    workload = digits_workload(scheduler=stop_at_seven)
    with pytest.raises(Stopped):
        train(workload, tmp_path / "t")
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.complete, trajectory.num_steps) == (False, 7)
    assert trajectory.verify(workload).max_drift == 0
    whole = train(digits_workload(), tmp_path / "whole")
    expected = track(whole, workload, [Window(0, 7)]).scores
    assert (track(trajectory, workload, [Window(0, 7)]).scores == expected).all()


def other_data() -> TensorDataset:
    inputs, targets = datasets()[0].tensors
    return TensorDataset(inputs + 1e-3, targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_set": other_data()}, "train_set is not the recorded one"),
        (
            {"model": lambda: nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))},
            "'0.weight' has shape",
        ),
        ({"model": lambda: nn.Linear(64, 3)}, "is not the recorded one"),
        ({"loss": lambda model, batch: 2 * sample_losses(model, batch)}, "misses the checkpoint"),
        ({"clip_grad_norm": 1e-3}, "misses the checkpoint"),
        ({"regularizer": lambda model: sum(p.square().sum() for p in model.parameters())}, "misses"),
    ],
)
def test_another_workload_is_refused_before_the_sweep(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    trajectory = train(digits_workload(), tmp_path / "t")
    with pytest.raises(TrajectoryError, match=message):
        track(trajectory, digits_workload(**changes), [Window(0, 9)])


def test_loss_that_is_not_per_sample_is_refused(tmp_path: Path) -> None:
    workload = digits_workload(loss=lambda model, batch: sample_losses(model, batch).mean())
    with pytest.raises(WorkloadError, match=r"expected \[8\], one value per sample"):
        train(workload, tmp_path / "t")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, Any] = {
    "checkpoint changed": (lambda d: flip_a_byte(next(d.glob("checkpoints*"))), "damaged: SHA-256"),
    "steps changed": (lambda d: flip_a_byte(next(d.glob("steps*"))), "damaged: SHA-256"),
    "file cut": (lambda d: next(d.glob("steps*")).write_bytes(b"four"), "damaged: 4 bytes"),
    "file gone": (lambda d: next(d.glob("checkpoints*")).unlink(), "is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest not JSON": (lambda d: (d / "manifest.json").write_text("{"), "not a trajectory manifest"),
    "another format": (lambda d: edit_manifest(d, format=2), "has format 2"),
    "unknown field": (lambda d: edit_manifest(d, surprise=1), "surprise"),
    "a step too many": (lambda d: edit_manifest(d, num_steps=10), "steps until step 9 are stored, 10 are announced"),
    "a name that leaves the folder": (
        lambda d: edit_manifest(d, files={"../x": {"sha256": "0", "size": 1}}),
        "not a plain file name",
    ),
    "no checkpoints": (lambda d: edit_manifest(d, checkpoints=[]), "checkpoints must start at step 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    workload = digits_workload()
    train(workload, tmp_path / "t")
    damage(tmp_path / "t")
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t").verify(workload)


def test_states_outside_training_are_refused(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match="states 3 … 10 were asked; the trajectory has 0 … 9"):
        list(trajectory.states(workload, 3, 10))
