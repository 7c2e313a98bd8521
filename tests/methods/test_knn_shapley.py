"""Shapley values of nearest neighbours against the definition, coalition by coalition."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset
from workloads import datasets, digits_workload

from dit_mlflow import InputError, UnsupportedError, Workload, train
from dit_mlflow.methods import method
from dit_mlflow.methods.knn_shapley import KnnShapley, knn_shapley_values

SMALL = 8


def small(**changes: Any) -> Workload:
    """Eight samples, one with a wrong label: few enough for all coalitions."""
    train_set, validation_set = datasets()
    inputs, labels = (tensor[:SMALL].clone() for tensor in train_set.tensors)
    labels[2] = (labels[2] + 1) % 3
    changes = {"epochs": 2, "validation_set": Subset(validation_set, range(5)), **changes}
    return digits_workload(train_set=TensorDataset(inputs, labels), **changes)


def votes(points: np.ndarray, labels: np.ndarray, asked: np.ndarray, own: np.ndarray, k: int, members: Any) -> float:
    """Mean share of the ``k`` places that neighbours with the right label take."""
    chosen = np.array(sorted(members), dtype=int)
    right = 0
    for point, label in zip(asked, own, strict=True):
        nearest = chosen[np.argsort(((points[chosen] - point) ** 2).sum(axis=1))[:k]]
        right += int((labels[nearest] == label).sum())
    return right / k / len(asked)


def by_definition(value: Any, n: int) -> np.ndarray:
    """The mean gain of each member over all coalitions of the others, sizes weighing alike."""
    gains = np.zeros(n)
    for member in range(n):
        others = [i for i in range(n) if i != member]
        for size in range(n):
            for coalition in combinations(others, size):
                gain = value({*coalition, member}) - value(set(coalition))
                gains[member] += gain / n / comb(n - 1, size)
    return gains


@pytest.mark.parametrize("features", ["penultimate", "inputs"])
@pytest.mark.parametrize("k", [1, 3, SMALL, 11])
def test_values_are_those_of_the_definition(k: int, features: Any, tmp_path: Any) -> None:
    workload = small()
    trajectory = train(workload, tmp_path / "t")
    found = KnnShapley(k=k, features=features)(trajectory, workload)
    inputs, labels = workload.train_set.tensors  # type: ignore[attr-defined]
    asked, own = workload.collate(workload.validation_set, range(5))
    if features == "penultimate":
        model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model())
        inputs, asked = (torch.tanh(model[0](x)).detach() for x in (inputs, asked))  # type: ignore[index]
    given = (inputs.double().numpy(), labels.numpy(), asked.double().numpy(), own.numpy(), k)
    expected = by_definition(lambda members: votes(*given, members), SMALL)
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.of(0).sum(), votes(*given, range(SMALL)), rtol=1e-9)
    assert len(set(expected.round(9).tolist())) > 1


def test_values_do_not_depend_on_how_many_distances_are_held_at_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    whole = method("knn_shapley")(trajectory, workload).scores
    monkeypatch.setattr("dit_mlflow.methods.knn_shapley.QUERIES_AT_ONCE", 3)
    monkeypatch.setattr("dit_mlflow.methods.last_layer.FEATURES_PER_PASS", 5)
    np.testing.assert_allclose(method("knn_shapley")(trajectory, workload).scores, whole, rtol=1e-9, atol=1e-12)


class Headed(nn.Module):
    """A layer that is not called, batch statistics, dropout, and features by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)
        self.spare = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(input=self.body(inputs))  # type: ignore[no-any-return]


class Named(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples as dicts."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(zip(("pixels", "labels"), self.base[index], strict=True))


def test_features_are_those_of_evaluation_mode_from_any_batch(tmp_path: Any) -> None:
    train_set, validation_set = datasets()
    workload = digits_workload(
        model=Headed,
        loss=lambda model, batch: cross_entropy(model(batch["pixels"]), batch["labels"], reduction="none"),
        outputs=lambda model, batch: model(batch["pixels"]),
        train_set=Named(train_set),
        validation_set=Named(validation_set),
    )
    trajectory = train(workload, tmp_path / "t")
    model = trajectory.checkpoint(9).load_into(workload.build_model()).eval()
    (inputs, labels), (asked, own) = train_set.tensors, validation_set.tensors
    points, rows = (model.body(x).detach().double().numpy() for x in (inputs, asked))  # type: ignore[operator]
    expected = knn_shapley_values(points, labels.numpy(), rows, own.numpy(), 5)
    found = KnnShapley(k=5)(trajectory, workload)
    assert found.metadata["layer"] == "head"
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-9)


class NoLinear(nn.Module):
    """A network whose last map is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((64, 3), 0.1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.matrix


def test_a_model_without_a_linear_layer_has_its_inputs(tmp_path: Any) -> None:
    workload = small(model=NoLinear)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=r"NoLinear are the rows .* torch.nn.Linear is given; it calls none"):
        method("knn_shapley")(trajectory, workload)
    layered = small()
    found = KnnShapley(features="inputs")(trajectory, workload).scores
    expected = KnnShapley(features="inputs")(train(layered, tmp_path / "l"), layered).scores
    np.testing.assert_array_equal(found, expected)


def squared(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square()


def reconstruction(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0]).square().mean(dim=1)


@pytest.mark.parametrize("name", ["knn_shapley", "representer_points"])
def test_what_is_no_classification_is_refused(name: str, tmp_path: Any) -> None:
    (inputs, _), (asked, _) = (part.tensors for part in datasets())
    regression = digits_workload(
        loss=squared,
        train_set=TensorDataset(inputs, inputs.mean(dim=1)),
        validation_set=TensorDataset(asked, asked.mean(dim=1)),
        epochs=1,
    )
    with pytest.raises(UnsupportedError, match=r"are not one class of 0 … 2 per sample"):
        method(name)(train(regression, tmp_path / "r"), regression)
    unlabelled = digits_workload(
        loss=reconstruction, train_set=TensorDataset(inputs), validation_set=TensorDataset(asked), epochs=1
    )
    with pytest.raises(UnsupportedError, match="batches of type list hold no tensor of labels"):
        method(name)(train(unlabelled, tmp_path / "u"), unlabelled)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="k=0, features='penultimate'; expected k of 1 or more"):
        KnnShapley(k=0)
    with pytest.raises(InputError, match="features='pixels'; expected"):
        KnnShapley(features="pixels")  # type: ignore[arg-type]
