"""Compiled steps against eager ones: the same scores, or eager for a reason that is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset, default_collate
from workloads import digits_workload, sample_losses

from dit_mlflow import InputError, Query, Trajectory, Window, Workload, expected_influence, parse_windows, track, train
from dit_mlflow.influence import Influence, self_influence
from dit_mlflow.influence.query import mean_validation_loss
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.removal import Removal
from dit_mlflow.replay import step_graphs
from dit_mlflow.replay.compiled_step import CompiledStep
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.trajectory import StepRecord


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: all but the compiler."""
    monkeypatch.setattr(step_graphs, "BACKEND", "eager")


def momentum(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.2, momentum=0.9)


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def in_two_groups(model: nn.Module) -> AdamW:
    first, *others = model.parameters()
    return AdamW([{"params": [first], "lr": 0.03}, {"params": others}], lr=0.02, weight_decay=0.1)


def warm_up(optimizer: Any) -> LambdaLR:
    """From 0 on; another rate at each step."""
    return LambdaLR(optimizer, lambda step: min(1.0, step / 3) / (1 + 0.1 * step))


def squares(model: nn.Module) -> Tensor:
    return 0.01 * torch.stack([value.square().sum() for value in model.parameters()]).sum()


def convolutions() -> nn.Module:
    body = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(27, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.unflatten(1, (8, 8))).mean(dim=1))


def normalised(frozen: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def margins(workload: Workload) -> list[Query]:
    def first(model: nn.Module) -> Tensor:
        return model(workload.validation_set.tensors[0].to(next(model.parameters()).dtype))[0, 0]  # type: ignore[attr-defined]

    return [mean_validation_loss(workload), Query("logit", first)]


def half_frozen() -> nn.Module:
    model = digits_workload().build_model()
    model[0].bias.requires_grad_(False)
    return model


def selects(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    losses = cross_entropy(model(inputs), targets, reduction="none")
    own = torch.zeros_like(losses)
    own[targets > 0] = losses[targets > 0]
    return own


WORKLOADS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": momentum},
    "weight decay and clipping": {"optimizer": adamw, "clip_grad_norm": 0.5},
    "two groups whose rates move": {"optimizer": in_two_groups, "scheduler": warm_up, "clip_grad_norm": 0.5},
    "amsgrad": {"optimizer": lambda model: Adam(model.parameters(), lr=0.02, weight_decay=0.1, amsgrad=True)},
    "clipped values": {"optimizer": momentum, "clip_grad_value": 0.01},
    "micro-batches, a smaller one last, a regularizer": {
        "optimizer": momentum,
        "batch_size": 5,
        "accumulate": 2,
        "regularizer": squares,
    },
    "convolutions": {"model": convolutions, "optimizer": momentum},
    "attention": {"model": Attention, "optimizer": adamw},
    "running statistics": {"model": normalised, "optimizer": momentum},
    "a frozen parameter": {"model": half_frozen, "optimizer": momentum},
    "weights written out": {
        "model": lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(64, 6)), nn.Tanh(), nn.Linear(6, 3)
        ),
        "optimizer": momentum,
    },
}


def both(
    workload: Workload, trajectory: Trajectory, windows: str = "2", dtype: Any = torch.float64, **asked: Any
) -> tuple[Influence, Influence]:
    """Compiled, and eager."""
    of = trajectory, workload, parse_windows(windows, trajectory)
    made, eager = (track(*of, dtype=dtype, compile=how, **asked) for how in ("always", "never"))
    assert "compile" not in eager.metadata
    return made, eager


def apart(one: Influence, other: Influence) -> float:
    """The largest difference over the largest score."""
    return float(np.abs(one.scores - other.scores).max() / np.abs(other.scores).max())


def compare_all(name: str, folder: Path) -> None:
    workload = digits_workload(**WORKLOADS[name])
    trajectory = train(workload, folder)
    steps = trajectory.num_steps
    made, eager = both(workload, trajectory, queries=margins(workload))
    assert made.metadata["compile"].startswith(f"compiled: {steps - len(kinds(trajectory))} of {steps} steps")
    assert 0 < apart(made, eager) < 1e-12 or np.array_equal(made.scores, eager.scores)


def kinds(trajectory: Trajectory) -> set[tuple[int, ...]]:
    """Sizes of the micro-batches; the first step of each is made eagerly, to compare."""
    return {tuple(map(len, trajectory.step(t).indices)) for t in range(trajectory.num_steps)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "attention" else ()) for name in WORKLOADS]
)
def test_traced_steps_give_the_same_scores(name: str, tmp_path: Path) -> None:
    compare_all(name, tmp_path / "t")


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_compiled_steps_give_the_same_scores(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compare_all(name, tmp_path / "t")


@pytest.mark.slow
def test_other_weights_and_kinds_of_window_give_the_same_scores(tmp_path: Path) -> None:
    workload = digits_workload(optimizer=momentum)
    trajectory = train(workload, tmp_path / "t")
    weights = np.linspace(0.2, 1.5, workload.num_samples)
    for asked in ({"weights": weights}, {"kind": "cumulative"}, {"kind": "final"}):
        made, eager = both(workload, trajectory, **asked)
        assert apart(made, eager) < 1e-12
        assert made.metadata["compile"].startswith("compiled")
    of = trajectory, workload, parse_windows("1", trajectory)
    for asked_of in (partial(expected_influence, *of, draws=2), partial(self_influence, *of)):
        made, eager = (asked_of(dtype=torch.float64, compile=how) for how in ("always", "never"))
        assert apart(made, eager) < 1e-12


def test_the_recorded_dtype_is_compared_by_its_own_rounding(tmp_path: Path) -> None:
    workload = digits_workload(optimizer=momentum)
    made, eager = both(workload, train(workload, tmp_path / "t"), dtype=None)
    assert made.metadata["compile"].startswith("compiled")
    assert apart(made, eager) < 1e-5


def drops(model: nn.Module, batch: Any) -> Tensor:
    return sample_losses(model, batch) * (2.0 if random.random() < 0.5 else 0.0)


def subtracts(model: nn.Module, batch: Any) -> Tensor:
    batch[0].sub_(0.5)
    return sample_losses(model, batch)


def reads(model: nn.Module, batch: Any) -> Tensor:
    losses = sample_losses(model, batch)
    return losses * (2.0 if float(batch[0].sum()) > 0 else 1.0)


def with_arrays(items: list[Any]) -> Any:
    return torch.stack([item[0] for item in items]), np.array([int(item[1]) for item in items])


def of_arrays(model: nn.Module, batch: Any) -> Tensor:
    return sample_losses(model, (batch[0], torch.from_numpy(batch[1])))


def with_names(items: list[Any]) -> Any:
    return torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items]), object()


class Drops(nn.Module):
    """Random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 6), nn.Dropout(0.3), nn.Linear(6, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


EAGER: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"model": Drops}, "the forward pass draws random numbers"),
    "Python's numbers": ({"loss": drops}, "the forward pass draws random numbers"),
    "in place": ({"loss": subtracts}, "the loss changes its batch"),
    "a number": ({"loss": reads}, ""),
    "arrays": ({"collate_fn": with_arrays, "loss": of_arrays}, "batches hold NumPy arrays"),
    "objects": ({"collate_fn": with_names, "loss": lambda m, b: sample_losses(m, b[:2])}, "batches hold a object"),
}


def test_what_depends_on_values_is_not_a_constant(tmp_path: Path) -> None:
    """A selection has another length at each step; whether it can be compiled depends on torch's version."""
    workload = digits_workload(optimizer=momentum, loss=selects)
    made, eager = both(workload, train(workload, tmp_path / "t"))
    assert apart(made, eager) < 1e-12


class Timed(list[Any]):
    """Has a number that its repr does not show."""

    factor: float


@dataclass
class Silent:
    """The same."""

    inputs: Tensor
    targets: Tensor
    factor: float = field(repr=False)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.inputs, self.targets))


@pytest.mark.parametrize("kind", ["attribute of a list", "field without repr"])
def test_numbers_in_a_batch_are_not_constants(kind: str, tmp_path: Path) -> None:
    def collate(items: list[Any]) -> Any:
        inputs, targets = default_collate(items)
        factor = float(inputs[0].mean())
        if kind != "attribute of a list":
            return Silent(inputs, targets, factor)
        made = Timed([inputs, targets])
        made.factor = factor
        return made

    workload = digits_workload(collate_fn=collate, loss=lambda net, batch: batch.factor * sample_losses(net, batch))
    made, eager = both(workload, train(workload, tmp_path / "t"))
    assert apart(made, eager) < 1e-12


@pytest.mark.parametrize("name", EAGER)
def test_what_cannot_be_compiled_stays_eager(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes, reason = EAGER[name]
    workload = digits_workload(optimizer=momentum, epochs=1, **changes)
    made, eager = both(workload, train(workload, tmp_path / "t"), "1")
    assert made.metadata["compile"].startswith(f"eager: {reason}")
    assert np.array_equal(made.scores, eager.scores)
    told = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert len(told) == 1
    assert reason in told[0]


def test_only_the_standard_step_is_compiled(tmp_path: Path) -> None:
    def detached(model: nn.Module, batch: Any) -> Tensor:
        losses = sample_losses(model, batch)
        return losses * losses.detach()

    workload = digits_workload(loss=detached, epochs=1)
    made, eager = both(workload, train(workload, tmp_path / "t"), "1")
    assert made.metadata["derivative"] == "traced"
    assert made.metadata["compile"] == "eager: only a loss, then an optimizer, differentiated by autograd, is compiled"
    assert np.array_equal(made.scores, eager.scores)


def refusing(graph: Any, inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("no C++ compiler here")


def off(graph: Any, inputs: Any) -> Callable[..., Any]:
    return lambda *values: [1.0001 * value for value in graph(*values)]


def failing(graph: Any, inputs: Any) -> Callable[..., Any]:
    """Later: the third call."""
    calls: list[None] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(*values: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("the third")
        return graph(*values)

    return call


@pytest.mark.parametrize("optimizer", [momentum, adamw])
@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (refusing, "eager: BackendCompilerFailed: backend='refusing' raised: RuntimeError: no C++ compiler here"),
        (off, "eager: compiled "),
        (failing, "eager after 2 compiled steps: RuntimeError: the third"),
    ],
)
def test_a_compiler_that_fails_or_errs_is_left(
    backend: Any, reason: str, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graphs, "BACKEND", backend)
    workload = digits_workload(optimizer=optimizer)
    made, eager = both(workload, train(workload, tmp_path / "t"))
    assert made.metadata["compile"].startswith(reason)
    assert apart(made, eager) < 1e-12


class Clock:
    """Seconds: as many as were told for an eager and a compiled step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, eager: float, compiled: float) -> None:
        self.now = 0.0
        monkeypatch.setattr(CompiledStep, "_clock", lambda step: self.now)
        for owner, name, seconds in ((LossStep, "derivatives", eager), (CompiledStep, "_by_graphs", compiled)):
            monkeypatch.setattr(owner, name, self._taking(seconds, getattr(owner, name)))

    def _taking(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def worked(*given: Any) -> Any:
            self.now += seconds
            return work(*given)

        return worked


@pytest.mark.parametrize(
    ("eager", "compiled", "choice"),
    [
        (0.01, 0.005, "eager: 18 steps in 0.18 s; compiled, about 0.117 s, and about 28 s to compile"),
        (10.0, 5.0, "compiled: 10 of 18 steps, 5e+03 ms each; eager ones, 1e+04 ms; compiling took"),
        (10.0, 11.0, "eager: 1e+04 ms a step; compiled ones, 1.1e+04 ms"),
    ],
)
def test_auto_compiles_where_it_pays(
    eager: float, compiled: float, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = digits_workload(optimizer=momentum, epochs=6)
    trajectory = train(workload, tmp_path / "t")
    Clock(monkeypatch, eager, compiled)
    found = track(trajectory, workload, parse_windows("1", trajectory))
    assert found.metadata["compile"].startswith(choice)


class Pull(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))


def test_elements_without_a_derivative_are_told_at_compiled_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samples pull a parameter exactly against each other; the first step, an eager one, is not looked at."""
    data: Any = TensorDataset(torch.tensor([1.0, -1.0]))
    workload = Workload(
        Pull,
        lambda model, batch: batch[0] * model.theta[0] + (model.theta[1] - 1) ** 2,
        data,
        data,
        optimizer=lambda model: AdamW(model.parameters(), lr=0.1),
        batch_size=2,
        epochs=2,
    )
    trajectory = train(workload, tmp_path / "t")
    watch = CompiledStep._watch

    def from_step_0(step: CompiledStep, record: StepRecord, *given: Any, **named: Any) -> None:
        if record.index == 0:
            watch(step, record, *given, **named)

    monkeypatch.setattr(CompiledStep, "_watch", from_step_0)
    query = [Query("theta 0", lambda model: model.theta[0])]
    with pytest.warns(UserWarning, match=r"at step 0, sample \d has a gradient in elements of \['theta'\]"):
        found = track(trajectory, workload, [Window(0, 2)], queries=query, compile="always")
    assert found.metadata["compile"].startswith("compiled: 1 of 2 steps")


@pytest.mark.parametrize("asked", ["", "sometimes"])
def test_another_choice_is_refused(asked: Any, tmp_path: Path) -> None:
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    of = trajectory, workload, parse_windows("1", trajectory)
    for work in (partial(track, *of), partial(self_influence, *of), partial(expected_influence, *of), Dit, Removal):
        with pytest.raises(InputError, match=rf"compile='{asked}'; expected 'auto' .*, 'always' or 'never'"):
            work(compile=asked)
