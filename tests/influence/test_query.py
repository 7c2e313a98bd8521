"""Queries of every sort against finite differences; many of them in one call, within bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, window_effect
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import SGD, AdamW
from torch.utils.data import Dataset, TensorDataset
from workloads import datasets, digits_workload

from dit_mlflow import (
    InputError,
    Query,
    UnsupportedError,
    Window,
    Workload,
    WorkloadError,
    leave_one_out,
    logits,
    margins,
    mean_validation_loss,
    parameter_value,
    probabilities,
    sample_losses,
    self_influence,
    track,
    train,
)
from dit_mlflow.influence.engine import Engine
from dit_mlflow.methods import method


def binary_workload() -> Workload:
    """Digit 0 against the others, one output per sample."""
    parts = [TensorDataset(data.tensors[0], (data.tensors[1] == 0).float()) for data in datasets()]
    return digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)),
        loss=lambda model, batch: binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none"),
        train_set=parts[0],
        validation_set=parts[1],
        optimizer=lambda model: SGD(model.parameters(), lr=0.2),
    )


def queries_of(workload: Workload) -> list[Query]:
    return [
        *sample_losses(workload, [3, 5]),
        *sample_losses(workload, [2], of="training"),
        *logits(workload, 1, [4]),
        *margins(workload, [4]),
        *probabilities(workload, [6], of="training"),
        parameter_value("0.weight", 2, 20),
    ]


def value_of(query: Query) -> Callable[[nn.Module], float]:
    return lambda model: float(query(model).detach())


@pytest.mark.parametrize("make", [digits_workload, binary_workload])
def test_queries_match_finite_differences(make: Any, tmp_path: Path) -> None:
    workload = make()
    trajectory = train(workload, tmp_path / "t")
    queries, window, samples = queries_of(workload), Window(2, 9), [0, 7, 13]
    found = track(trajectory, workload, [window], queries=queries, dtype=torch.float64)
    assert found.queries == (
        "loss of validation sample 3",
        "loss of validation sample 5",
        "loss of training sample 2",
        "logit 1 of validation sample 4",
        "margin of validation sample 4",
        "probability of training sample 6",
        "0.weight[2, 20]",
    )
    for query in queries:
        expected = finite_difference(workload, trajectory, window, "local", samples, 1e-5, value_of(query))
        error = np.abs(found.of(window, query.name)[samples] - expected).max()
        assert error < 1e-6 * np.abs(expected).max(), query.name


def test_binary_outputs_are_logits_of_class_one() -> None:
    workload = binary_workload()
    model = workload.build_model()
    image, label = workload.validation_set[4]
    output = float(model(image[None]).detach())
    sign = 1 if label else -1
    assert value_of(margins(workload, [4])[0])(model) == pytest.approx(sign * output)
    assert value_of(probabilities(workload, [4])[0])(model) == pytest.approx(1 / (1 + np.exp(-sign * output)))


@pytest.mark.parametrize("kind", ["local", "cumulative"])
def test_every_training_sample_on_every_validation_sample(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call; its mean over validation samples is the default query's; in parts it is the same."""
    workload = digits_workload(optimizer=lambda model: AdamW(model.parameters(), lr=0.02))
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    matrix = track(trajectory, workload, windows, kind, sample_losses(workload), dtype=torch.float64)
    assert matrix.scores.shape == (2, 16, 24)
    mean = track(trajectory, workload, windows, kind, dtype=torch.float64)
    np.testing.assert_allclose(matrix.scores.mean(axis=1), mean.scores[:, 0], rtol=1e-10, atol=1e-15)

    walks = []
    run = Engine.run

    def counted(self: Engine, queries: Any, *rest: Any) -> Any:
        walks.append(len(queries))
        return run(self, queries, *rest)

    monkeypatch.setattr(Engine, "run", counted)
    budget = 8 * 10 * trajectory.checkpoint(9).nbytes
    parts = track(
        trajectory, workload, windows, kind, sample_losses(workload), dtype=torch.float64, memory_budget=budget
    )
    assert len(walks) > 1
    assert sum(walks) == 16
    np.testing.assert_allclose(parts.scores, matrix.scores, rtol=1e-10, atol=1e-15)


def test_self_influence_is_the_same_in_parts(tmp_path: Path) -> None:
    """With little memory, queries are answered a few at a time."""
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    in_one = self_influence(trajectory, workload, windows, dtype=torch.float64)
    in_parts = self_influence(trajectory, workload, windows, dtype=torch.float64, memory_budget=60_000)
    np.testing.assert_allclose(in_parts.scores, in_one.scores, rtol=1e-9)


def test_self_influence_is_the_diagonal(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    found = self_influence(trajectory, workload, windows, dtype=torch.float64)
    assert found.queries == ("own loss",)
    queries = sample_losses(workload, of="training")
    every = track(trajectory, workload, windows, queries=queries, dtype=torch.float64)
    np.testing.assert_allclose(found.scores[:, 0], np.diagonal(every.scores, axis1=1, axis2=2), rtol=1e-10)
    for j in (3, 11):
        expected = finite_difference(
            workload, trajectory, windows[0], "local", [j], 1e-5, lambda model, j=j: queries[j](model).item()
        )
        assert found.of(windows[0])[j] == pytest.approx(expected[0], rel=1e-6)


def test_leave_one_out_takes_the_same_queries(tmp_path: Path) -> None:
    workload = digits_workload(optimizer=lambda model: SGD(model.parameters(), lr=0.01))
    trajectory = train(workload, tmp_path / "t")
    queries = queries_of(workload)
    window, samples = Window(2, 9), [0, 7, 13]
    exact = leave_one_out(trajectory, workload, [window], "final", queries, samples=samples)
    for query in queries:
        expected = [window_effect(workload, trajectory, window, "final", j, 0.0, value_of(query)) for j in samples]
        np.testing.assert_allclose(exact.of(window, query.name)[samples], expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda workload: sample_losses(workload, [16]), r"validation samples \[16\]: expected indices within 0 … 15"),
        (lambda workload: sample_losses(workload, of="test"), "'test' set: the workload has validation, training"),
        (lambda workload: [mean_validation_loss(workload)] * 2, "with different names"),
        (lambda workload: logits(workload, 3, [0]), r"'logit 3' on class 3: the model has classes 0 … 2"),
        (lambda workload: [parameter_value("1.weight", 0)], r"parameter '1.weight': the model has \['0.bias'"),
        (lambda workload: [parameter_value("0.bias", 6)], r"0.bias\[6\]: the parameter has shape \[6\]"),
    ],
)
def test_queries_that_cannot_be_asked(make: Any, message: str, tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match=message):
        track(trajectory, workload, [Window(0, 9)], queries=make(workload))


def test_outputs_are_asked_for_where_they_cannot_be_guessed(tmp_path: Path) -> None:
    records = [{"image": image, "labels": label} for image, label in datasets()[0]]
    workload = digits_workload(train_set=records, validation_set=records)
    with pytest.raises(WorkloadError, match=r"Workload\.outputs is needed to read logits"):
        margins(workload, [0])[0](workload.build_model())


class Named(Dataset[Any]):
    """Samples with names of their own."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, digit = self.data[index]
        return {"image": image, "digit": digit}


def test_targets_say_where_the_labels_are(tmp_path: Path) -> None:
    plain = digits_workload()
    changes: dict[str, Any] = {
        "train_set": Named(plain.train_set),
        "validation_set": Named(plain.validation_set),
        "loss": lambda model, batch: cross_entropy(model(batch["image"]), batch["digit"], reduction="none"),
        "outputs": lambda model, batch: model(batch["image"]),
    }
    trajectory = train(plain, tmp_path / "t")
    model = trajectory.checkpoint(0).load_into(plain.build_model())
    with pytest.raises(UnsupportedError, match=r"batches of type dict hold no tensor of labels.*Workload\.targets"):
        margins(digits_workload(**changes), [3])[0](model)

    named = digits_workload(**changes, targets=lambda batch: batch["digit"])
    for queries in (margins, probabilities):
        assert [q(model) for q in queries(named, [3, 9])] == [q(model) for q in queries(plain, [3, 9])]
    whole = [Window(0, trajectory.num_steps)]
    for name in ("aum", "representer_points", "knn_shapley"):
        expected = method(name)(trajectory, plain, whole, "final")
        found = method(name)(train(named, tmp_path / name), named, whole, "final")
        np.testing.assert_array_equal(found.scores, expected.scores)
