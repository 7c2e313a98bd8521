"""What a sweep must not be misled by: stateful models, losses that change their input, loops that depart."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plain_loop
import pytest
import torch
from oracles import finite_difference, validation_loss, window_effect
from plain_loop import whole
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, Dataset, default_collate
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import (
    InputError,
    Query,
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    Window,
    Workload,
    WorkloadError,
    leave_one_out,
    track,
    train,
)
from dit_mlflow.methods import method


class Records(Dataset[Any]):
    """Dictionaries, as tokenizers make them."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, target = self.data[index]
        return {"inputs": inputs, "labels": np.int64(target)}


def popping_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Takes its batch apart and works in place on it, as many loops do."""
    labels = batch.pop("labels")
    return cross_entropy(model(batch["inputs"].mul_(2)), labels, reduction="none")


def test_loss_that_changes_its_batch(tmp_path: Path) -> None:
    train_set, validation_set = datasets()
    workload = digits_workload(train_set=Records(train_set), validation_set=Records(validation_set), loss=popping_loss)
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    samples = [0, 7, 13]
    found = track(trajectory, workload, windows, dtype=torch.float64)
    exact = leave_one_out(trajectory, workload, windows, samples=samples)

    def doubled(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(2 * batch[0]), batch[1], reduction="none")

    plain = digits_workload(loss=doubled)
    for window in windows:
        expected = finite_difference(plain, trajectory, window, "local", samples, 1e-5)
        assert np.abs(found.of(window)[samples] - expected).max() < 1e-6 * np.abs(expected).max()
    expected_exact = leave_one_out(train(plain, tmp_path / "plain"), plain, windows, samples=samples)
    np.testing.assert_allclose(exact.scores, expected_exact.scores, rtol=1e-9)


def test_loss_in_another_dtype_than_the_parameters(tmp_path: Path) -> None:
    """Targets made inside the loss are float32 also when the rest is float64."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        targets = (batch[1] > 0).float()
        return binary_cross_entropy_with_logits(model(batch[0])[:, 0], targets, reduction="none")

    workload = digits_workload(loss=loss)
    trajectory = train(workload, tmp_path / "t")
    single = track(trajectory, workload, [Window(0, 9)]).of(0)
    double = track(trajectory, workload, [Window(0, 9)], dtype=torch.float64).of(0)
    assert np.abs(single - double).max() < 1e-4 * np.abs(double).max()
    exact = leave_one_out(trajectory, workload, [Window(0, 9)], samples=[0, 7, 13]).of(0)[[0, 7, 13]]
    expected = [window_effect(workload, trajectory, Window(0, 9), "local", j, 0.0) for j in (0, 7, 13)]
    np.testing.assert_allclose(exact, expected, atol=1e-7)  # torch makes a float32 loss of the two


class Noisy(nn.Module):
    """Dropout and Gaussian noise in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(self.first(inputs)), 0.3, self.training)
        if self.training:
            hidden = hidden + 0.3 * torch.randn_like(hidden) + torch.empty_like(hidden).uniform_(-0.1, 0.1)
        return self.last(hidden)


def test_random_draws_in_the_model_are_the_recorded_ones_in_every_dtype(tmp_path: Path) -> None:
    workload = digits_workload(model=Noisy)
    trajectory = train(workload, tmp_path / "t", order_seed=4)
    assert trajectory.verify(workload).max_drift == 0
    *_, last = trajectory.states(workload, 0, 9, dtype=torch.float64)
    recorded = trajectory.checkpoint(9)
    for name, value in recorded.parameters.items():
        torch.testing.assert_close(last.parameters[name].float(), value, rtol=1e-4, atol=1e-6)
    single = track(trajectory, workload, [Window(0, 9)]).of(0)
    double = track(trajectory, workload, [Window(0, 9)], dtype=torch.float64).of(0)
    assert np.abs(single - double).max() < 1e-4 * np.abs(double).max()


DRAWS = {
    "bernoulli": lambda x: 2 * x * torch.bernoulli(torch.full_like(x, 0.5)),
    "Tensor.bernoulli": lambda x: 2 * x * x.detach().sigmoid().bernoulli(),
    "bernoulli_": lambda x: 2 * x * torch.empty_like(x).bernoulli_(torch.full_like(x, 0.5)),
    "normal": lambda x: x + torch.normal(torch.zeros_like(x), torch.ones_like(x)),
    "normal, std=": lambda x: x + torch.normal(mean=torch.zeros_like(x), std=torch.ones_like(x)),
    "randn with dtype": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "rand with dtype": lambda x: x + torch.rand(*x.shape, dtype=x.dtype),
    "randn_like with dtype": lambda x: x + torch.randn_like(x, dtype=x.dtype),
    "poisson": lambda x: x + 0.1 * torch.poisson(torch.ones_like(x)),
    "multinomial": lambda x: x + 0.1 * torch.multinomial(x.detach().softmax(dim=1), 6, replacement=True),
    "Uniform": lambda x: x + torch.distributions.Uniform(torch.zeros_like(x), torch.ones_like(x)).rsample(),
    "Normal": lambda x: torch.distributions.Normal(x, torch.ones_like(x)).rsample(),
    "Gamma": lambda x: x + torch.distributions.Gamma(torch.ones_like(x), torch.ones_like(x)).rsample(),
    "Dirichlet": lambda x: x + torch.distributions.Dirichlet(torch.ones_like(x)).rsample(),
    "gumbel_softmax": lambda x: nn.functional.gumbel_softmax(x),
}


class Drawing(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(64, 6), nn.Linear(6, 3), draw

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.last(self.draw(hidden) if self.training else hidden)


@pytest.mark.parametrize("name", DRAWS)
def test_every_kind_of_draw_is_the_recorded_one_in_float64(name: str, tmp_path: Path) -> None:
    workload = digits_workload(model=lambda: Drawing(DRAWS[name]))
    trajectory = train(workload, tmp_path / "t")
    *_, last = trajectory.states(workload, 0, 9, dtype=torch.float64)
    for key, value in trajectory.checkpoint(9).parameters.items():
        torch.testing.assert_close(last.parameters[key].float(), value, rtol=1e-4, atol=1e-5)


class Averaged(nn.Module):
    """Keeps a running mean of its inputs by hand, and uses it in evaluation."""

    def __init__(self, reassign: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)
        self.reassign = reassign
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(dim=0)
            if self.reassign:
                self.mean = mean
            else:
                self.mean.copy_(mean)
            return self.linear(inputs)
        return self.linear(inputs - self.mean)


@pytest.mark.parametrize("reassign", [False, True])
def test_buffers_that_do_not_depend_on_the_parameters_are_constants(reassign: bool, tmp_path: Path) -> None:
    workload = digits_workload(model=lambda: Averaged(reassign))
    trajectory = train(workload, tmp_path / "t")
    windows, samples = [Window(0, 4), Window(4, 9)], [0, 7, 13]
    found = track(trajectory, workload, windows, dtype=torch.float64)
    exact = leave_one_out(trajectory, workload, windows, samples=samples)
    for window in windows:
        expected = finite_difference(workload, trajectory, window, "local", samples, 1e-5)
        assert np.abs(found.of(window)[samples] - expected).max() < 1e-6 * np.abs(expected).max()
        removed = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in samples]
        np.testing.assert_allclose(exact.of(window)[samples], removed, rtol=1e-8, atol=1e-12)


@dataclass
class Pair:
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class FrozenPair:
    inputs: Tensor
    labels: Tensor


class Opaque:
    """Knows itself, as graph batches do."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.stores = {"all": [self, {"inputs": inputs}]}
        self.labels = labels

    @property
    def inputs(self) -> Tensor:
        return self.stores["all"][1]["inputs"]  # type: ignore[index, no-any-return]

    @inputs.setter
    def inputs(self, value: Tensor) -> None:
        self.stores["all"][1]["inputs"] = value  # type: ignore[index]


class Fields(MutableMapping[str, Any]):
    """Is made by names, not of a mapping."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.content = {"inputs": inputs, "labels": labels}

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.content[key] = value

    def __delitem__(self, key: str) -> None:
        del self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


class Items(list[Tensor]):
    """A list whose constructor takes no list."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        super().__init__([inputs, labels])


class Seen(list[Tensor]):
    """Part of the inputs a second time, in the same memory."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        super().__init__([inputs[:, :40], labels, inputs])


def in_place_of_part(model: nn.Module, batch: Any) -> Tensor:
    batch[0].mul_(2).sub_(1)
    batch[-1][:, batch[0].shape[1] :].mul_(2).sub_(1)
    return cross_entropy(model(batch[-1]), batch[1], reduction="none")


def assigning_first(model: nn.Module, batch: Any) -> Tensor:
    batch[0] = batch[0] * 2 - 1
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def assigning(model: nn.Module, batch: Any) -> Tensor:
    batch.inputs = batch.inputs * 2 - 1
    return cross_entropy(model(batch.inputs), batch.labels, reduction="none")


def in_place(model: nn.Module, batch: Any) -> Tensor:
    batch.inputs.mul_(2).sub_(1)
    return cross_entropy(model(batch.inputs), batch.labels, reduction="none")


def assigning_item(model: nn.Module, batch: Any) -> Tensor:
    batch["inputs"] = batch["inputs"] * 2 - 1
    return cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (Pair, assigning),
        (Pair, in_place),
        (FrozenPair, in_place),
        (Opaque, assigning),
        (Opaque, in_place),
        (Fields, assigning_item),
        (Items, assigning_first),
        (Seen, in_place_of_part),
        (lambda inputs, labels: [inputs, labels, inputs], in_place_of_part),
    ],
)
def test_batches_of_any_type_are_new_for_every_step_and_query(kind: Any, loss: Any, tmp_path: Path) -> None:
    workload = digits_workload(loss=loss, collate_fn=lambda items: kind(*default_collate(items)), epochs=2)
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.verify(workload).max_drift == 0
    windows, samples = [Window(0, 2), Window(2, 4), Window(4, 6)], [0, 7, 13]
    found = track(trajectory, workload, windows, dtype=torch.float64)
    exact = leave_one_out(trajectory, workload, windows, samples=samples)
    static = method("grad_dot")(trajectory, workload, windows).scores

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return sample_losses(model, (batch[0] * 2 - 1, batch[1]))

    # The oracle is of ordinary batches and an ordinary loss.
    same = digits_workload(loss=plain, epochs=2)
    for window in windows:
        expected = finite_difference(same, trajectory, window, "local", samples, 1e-5)
        assert np.abs(found.of(window)[samples] - expected).max() < 1e-6 * np.abs(expected).max()
        removed = [window_effect(same, trajectory, window, "local", j, 0.0) for j in samples]
        np.testing.assert_allclose(exact.of(window)[samples], removed, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(static, method("grad_dot")(trajectory, same, windows).scores, rtol=1e-4)


def test_a_batch_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    def locked(items: Any) -> Any:
        made = Opaque(*default_collate(items))
        made.lock = threading.Lock()  # type: ignore[attr-defined]
        return made

    class Itself(Opaque):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    def same(items: Any) -> Any:
        return Itself(*default_collate(items))

    for collate, name in ((locked, "Opaque"), (same, r"\S*Itself")):
        with pytest.raises(WorkloadError, match=rf"batches hold a {name}, which cannot be copied .* Give a collate_fn"):
            train(digits_workload(loss=in_place, collate_fn=collate), tmp_path / name[:3])


class CodeBook(nn.Module):
    """A running mean of a hidden layer, kept by hand without a derivative, used in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(hidden.mean(dim=0), 0.1)
        return self.last(hidden - self.mean)


@pytest.mark.parametrize("model", [CodeBook, lambda: nn.utils.spectral_norm(nn.Linear(64, 3))])
def test_buffers_that_depend_on_the_parameters_are_followed(model: Any, tmp_path: Path) -> None:
    workload, samples = digits_workload(model=model), [0, 7, 13]
    trajectory = train(workload, tmp_path / "t")
    found = track(trajectory, workload, [Window(0, 9)], dtype=torch.float64).of(0)
    expected = finite_difference(workload, trajectory, Window(0, 9), "local", samples, 1e-5)
    assert np.abs(found[samples] - expected).max() < 1e-6 * np.abs(found).max()


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
def test_influence_through_running_statistics_in_windows(kind: Any, tmp_path: Path) -> None:
    """Several adjoints at once; the last step's query sees statistics of earlier parameters."""
    model = lambda: nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    workload = digits_workload(model=model, optimizer=lambda model: SGD(model.parameters(), lr=0.2, momentum=0.5))
    trajectory = train(workload, tmp_path / "t")
    windows, samples = [Window(0, 4), Window(4, 9), Window(2, 7)], [0, 7, 13]
    found = track(trajectory, workload, windows, kind, dtype=torch.float64)
    single = track(trajectory, workload, windows, kind)
    exact = leave_one_out(trajectory, workload, windows, kind, samples=samples)
    for window in windows:
        expected = finite_difference(workload, trajectory, window, kind, samples, 1e-5)
        assert np.abs(found.of(window)[samples] - expected).max() < 1e-6 * np.abs(expected).max()
        assert np.abs(single.of(window) - found.of(window)).max() < 1e-4 * np.abs(found.of(window)).max()
        removed = [window_effect(workload, trajectory, window, kind, j, 0.0) for j in samples]
        np.testing.assert_allclose(exact.of(window)[samples], removed, rtol=1e-8, atol=1e-12)


def test_counters_that_move_in_training_do_not_reach_the_query(tmp_path: Path) -> None:
    """A query between two windows must see the buffers of its own step."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 3)
            self.register_buffer("count", torch.tensor(1))

        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                self.count += 1
            return self.linear(inputs) / self.count

    workload = digits_workload(model=Counting)
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    together = track(trajectory, workload, windows)
    for window in windows:
        np.testing.assert_array_equal(track(trajectory, workload, [window]).of(0), together.of(window))


def record(tmp_path: Path, skip: int | None = None, clip_from: int = 99) -> Trajectory:
    """A loop of one's own, which may leave out a batch, or begin to clip."""
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    loader = DataLoader(datasets()[0], batch_size=8)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for number, batch in enumerate(batch for _ in range(3) for batch in recorder.watch(loader)):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            if number == skip:
                continue
            if number >= clip_from:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    return Trajectory.open(tmp_path / "t")


@pytest.mark.parametrize("loop", [{"skip": 5}, {"clip_from": 6}])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_loop_that_departs_from_the_workload_late_is_refused(loop: Any, dtype: Any, tmp_path: Path) -> None:
    trajectory = record(tmp_path, **loop)
    workload = digits_workload(optimizer=None)
    with pytest.raises(TrajectoryError, match="misses the checkpoint"):
        track(trajectory, workload, [Window(2, trajectory.num_steps - 1)], dtype=dtype)
    with pytest.raises(TrajectoryError, match="misses the checkpoint"):
        leave_one_out(trajectory, workload, [Window(2, 6)], samples=2)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda model: Adam(model.parameters()), "optimizer is Adam; the trajectory was recorded with SGD"),
        (lambda model: SGD(model[2].parameters(), lr=0.5), "other parameter groups"),
    ],
)
def test_another_optimizer_is_refused(optimizer: Any, message: str, tmp_path: Path) -> None:
    trajectory = train(digits_workload(), tmp_path / "t")
    with pytest.raises(TrajectoryError, match=message):
        track(trajectory, digits_workload(optimizer=optimizer), [Window(0, 9)])


def test_query_without_derivative_is_named(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match="query 'steps' does not depend on the trained parameters"):
        track(trajectory, workload, [Window(0, 9)], queries=[Query("steps", lambda model: torch.tensor(3.0))])
    with pytest.raises(InputError, match=r"query 'row' returned \[3\]; expected a tensor with one element"):
        track(trajectory, workload, [Window(0, 9)], queries=[Query("row", lambda model: model[2].bias)])


def test_cancelled_gradients_under_adam_warn_and_blank_inputs_do_not(tmp_path: Path) -> None:
    """Two samples that pull a parameter exactly against each other leave ``v = 0`` with gradients that are not 0."""

    class Pull(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(2))

    data: Any = torch.utils.data.TensorDataset(torch.tensor([1.0, -1.0]))
    workload = Workload(
        Pull,
        lambda model, batch: batch[0] * model.theta[0] + (model.theta[1] - 1) ** 2,
        data,
        data,
        optimizer=lambda model: Adam(model.parameters(), lr=0.1),
        batch_size=2,
        epochs=2,
    )
    query = [Query("theta 0", lambda model: model.theta[0])]
    trajectory = train(workload, tmp_path / "cancelled")
    with pytest.warns(UserWarning, match=r"at step 1, sample \d has a gradient in elements of \['theta'\]"):
        track(trajectory, workload, [Window(0, 2)], queries=query)
    blank = digits_workload(optimizer=lambda model: Adam(model.parameters(), lr=0.01))
    trajectory = train(blank, tmp_path / "blank")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        track(trajectory, blank, [Window(0, 9)])


@pytest.mark.parametrize("to_none", [True, False])
def test_layer_frozen_late_and_unfrozen(to_none: bool, tmp_path: Path) -> None:
    """Its gradient is absent, or 0 with momentum and weight decay going on; differences by a plain loop."""
    train_set, validation_set = datasets()

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, weight: float = 1.0) -> None:
        like = next(model.parameters())
        for number, (inputs, targets) in enumerate(batches):
            model[0].requires_grad_(number not in (2, 3, 4))  # type: ignore[index]
            optimizer.zero_grad(set_to_none=to_none)
            weights = torch.ones(len(inputs), dtype=like.dtype)
            # Sample 5 is in the first batch of every epoch.
            weights[5] = weight if number % 3 == 0 else 1.0
            (weights * sample_losses(model, (inputs.to(like.dtype), targets))).mean().backward()
            optimizer.step()

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)

    loader = DataLoader(train_set, batch_size=8)
    torch.manual_seed(0)
    model = digits_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        run(model, optimizer, (batch for _ in range(3) for batch in recorder.watch(loader)))
    trajectory = Trajectory.open(tmp_path / "t")
    workload = digits_workload(optimizer=None)
    assert trajectory.verify(workload).max_drift == 0

    def loss(weight: float) -> float:
        other = digits_model()
        other.load_state_dict(start)
        other.double()
        run(other, make_optimizer(other), (batch for _ in range(3) for batch in loader), weight)
        with torch.no_grad():
            inputs, targets = validation_set.tensors
            return float(sample_losses(other, (inputs.double(), targets)).mean())

    window = [Window(0, 9)]
    found = track(trajectory, workload, window, dtype=torch.float64).of(0)[5]
    assert found == pytest.approx((loss(1 - 1e-5) - loss(1 + 1e-5)) / 2e-5, rel=1e-6)
    exact = leave_one_out(trajectory, workload, window, samples=[5, 6, 7]).of(0)[5]
    assert exact == pytest.approx(loss(0.0) - loss(1.0), rel=1e-8)


class Coded(nn.Module):
    """Its first tensor is a table of integers: a frozen parameter, or a buffer."""

    def __init__(self, as_parameter: bool = True) -> None:
        super().__init__()
        codes = torch.arange(64) % 5 - 2
        if as_parameter:
            self.codes = nn.Parameter(codes, requires_grad=False)
        else:
            self.register_buffer("codes", codes)
        self.inner, self.last = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(inputs * self.codes)))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


@pytest.mark.parametrize("held", [trainable, lambda model: list(model.parameters())])
@pytest.mark.parametrize("optimizer", [lambda held: SGD(held, lr=0.3, momentum=0.5), lambda held: Adam(held, lr=0.02)])
def test_a_first_parameter_of_integers_does_not_give_the_dtype(held: Any, optimizer: Any, tmp_path: Path) -> None:
    workload = digits_workload(model=Coded, optimizer=lambda model: optimizer(held(model)))
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.verify(workload).max_drift == 0
    windows, samples = [Window(0, 9)], [0, 7, 13]
    found = track(trajectory, workload, windows, dtype=torch.float64).of(0)
    expected = finite_difference(workload, trajectory, windows[0], "local", samples, 1e-5)
    assert np.abs(found[samples] - expected).max() < 1e-6 * np.abs(found).max()
    single = track(trajectory, workload, windows).of(0)
    assert np.abs(single - found).max() < 1e-3 * np.abs(found).max()
    exact = leave_one_out(trajectory, workload, windows, samples=samples).of(0)[samples]
    removed = [window_effect(workload, trajectory, windows[0], "local", j, 0.0) for j in samples]
    np.testing.assert_allclose(exact, removed, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        *("tracin", "tracin_renormalized", "grad_dot", "source", "dvemb", "mirrored_influence", "trak", "knn_shapley"),
        *("influence_function", "influence_function_ekfac", "influence_function_datainf", "representer_points"),
        *("grad_norm", "loss", "aum", "downsampling"),
    ],
)
def test_methods_take_such_a_parameter_for_a_buffer(name: str, tmp_path: Path) -> None:
    found = []
    for as_parameter in (True, False):
        workload = digits_workload(
            model=lambda as_parameter=as_parameter: Coded(as_parameter),
            optimizer=lambda model: SGD(trainable(model), lr=0.3),
        )
        trajectory = train(workload, tmp_path / str(as_parameter))
        found.append(method(name)(trajectory, workload, [Window(0, 9)]).scores)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-7 * np.abs(found[1]).max())


class Scaled(nn.Module):
    """Its first parameter is a scale, in float64 where the others are in float32."""

    def __init__(self, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, inside: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, 1.1, dtype=dtype))
        self.inner, self.last = nn.Linear(64, 6), nn.Linear(6, 3)
        self.inside = inside

    def forward(self, inputs: Tensor) -> Tensor:
        if self.inside:
            inputs = (inputs * self.scale).to(self.inner.weight.dtype)
        found = self.last(torch.tanh(self.inner(inputs)))
        return found if self.inside else found * self.scale


class Tabulated(nn.Module):
    """Its first parameter is a frozen table in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(0.5, 1.5, 64).half(), requires_grad=False)
        self.layers = digits_model()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs * self.table.to(inputs.dtype))


@pytest.mark.parametrize("model", [Scaled, lambda: Scaled(inside=True), Tabulated], ids=["around", "inside", "float16"])
def test_a_first_parameter_of_another_floating_dtype_does_not_give_the_dtype(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    workload = digits_workload(model=model, optimizer=lambda net: SGD(trainable(net), lr=0.3))
    low = {"low_precision": True} if model is Tabulated else {}
    made = model()
    trajectory = plain_loop.record(tmp_path / "t", made, SGD(trainable(made), lr=0.3), **low)
    windows, samples = whole(trajectory), [0, 7, 13]
    found = track(trajectory, workload, windows, dtype=torch.float64).of(0)
    expected = finite_difference(workload, trajectory, windows[0], "local", samples, 1e-5)
    assert np.abs(found[samples] - expected).max() < 1e-6 * np.abs(found).max()
    single = track(trajectory, workload, windows).of(0)
    assert np.abs(single - found).max() < 1e-3 * np.abs(found).max()
    exact = leave_one_out(trajectory, workload, windows, samples=samples).of(0)[samples]
    removed = [window_effect(workload, trajectory, windows[0], "local", j, 0.0) for j in samples]
    np.testing.assert_allclose(exact, removed, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        *("tracin", "tracin_renormalized", "grad_dot", "source", "dvemb", "mirrored_influence", "trak"),
        *("influence_function", "influence_function_ekfac", "influence_function_datainf", "grad_norm"),
    ],
)
def test_a_parameter_without_dimensions_is_as_one_with_one(name: str, tmp_path: Path) -> None:
    found = []
    for shape in ((), (1,)):
        workload = digits_workload(model=lambda shape=shape: Scaled(shape, torch.float32))
        trajectory = train(workload, tmp_path / str(len(shape)))
        found.append(method(name)(trajectory, workload, whole(trajectory)).scores)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-7 * np.abs(found[1]).max())


@pytest.mark.parametrize("settings", [{"lr": 0.3}, {"lr": 0.2, "momentum": 0.9}])
def test_a_step_without_gradients_moves_nothing_and_scores_0(settings: dict[str, float], tmp_path: Path) -> None:
    """Differences by a plain loop that makes the same step."""

    def run(model: nn.Module, batches: Any, weight: float = 1.0) -> nn.Module:
        optimizer = SGD(model.parameters(), **settings)  # type: ignore[arg-type]
        return steps(model, optimizer, batches, weight)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, weight: float = 1.0) -> nn.Module:
        like = next(model.parameters())
        for number, (inputs, targets) in enumerate(batches):
            optimizer.zero_grad()
            weights = torch.ones(len(inputs), dtype=like.dtype)
            weights[3] = weight if number == 0 else 1.0
            if number != 2:
                (weights * sample_losses(model, (inputs.to(like.dtype), targets))).mean().backward()
            optimizer.step()
        return model

    loader = DataLoader(datasets()[0], batch_size=4)
    torch.manual_seed(0)
    model = digits_model()
    start = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), **settings)  # type: ignore[arg-type]
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        steps(model, optimizer, recorder.watch(loader))
    trajectory = Trajectory.open(tmp_path / "t")
    workload = digits_workload(optimizer=None)
    assert trajectory.verify(workload).max_drift == 0

    def loss(weight: float) -> float:
        return validation_loss(workload, run(copy.deepcopy(start).double(), loader, weight))

    found = track(trajectory, workload, [Window(0, 6)], dtype=torch.float64).of(0)
    assert found[3] == pytest.approx((loss(1 - 1e-5) - loss(1 + 1e-5)) / 2e-5, rel=1e-6)
    exact = leave_one_out(trajectory, workload, [Window(0, 6)], samples=[3, 8, 9]).of(0)
    assert exact[3] == pytest.approx(loss(0.0) - loss(1.0), rel=1e-8)
    assert not found[8:12].any() and not exact[8:10].any()
