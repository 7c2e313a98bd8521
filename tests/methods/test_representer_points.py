"""The representer theorem's identity, with a last layer that PyTorch's own optimizer has fitted."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear
from torch.utils.data import TensorDataset
from workloads import SAMPLES, digits_workload

from dit_mlflow import (
    InputError,
    Trajectory,
    UnsupportedError,
    Workload,
    logits,
    mean_validation_loss,
    parameter_value,
    sample_losses,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.methods.representer_points import RepresenterPoints

ASKED = [1, 4, 9]
L2 = 0.02


def final_model(workload: Workload, trajectory: Trajectory) -> nn.Module:
    return trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).double()


def features(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the last linear layer, ``model[2]``, is given, and a 1."""
    rows = model[1](model[0](inputs.double())).detach()  # type: ignore[index]
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


def fitted(rows: torch.Tensor, outputs: int, loss: Any) -> torch.Tensor:
    """Weights ``[outputs, D]`` at the minimum of ``loss + L2 |W|^2``, by LBFGS."""
    weights = torch.zeros(outputs, rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(linear(rows, weights)) + L2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


@pytest.mark.parametrize("targets", ["labels", "model"])
def test_terms_of_a_logit_add_up_to_it(targets: Any, tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    model = final_model(workload, trajectory)
    inputs, labels = workload.train_set.tensors  # type: ignore[attr-defined]
    rows = features(model, inputs)
    wanted = nn.functional.one_hot(labels, 3).double() if targets == "labels" else model(inputs.double()).softmax(1)
    wanted = wanted.detach()
    weights = fitted(rows, 3, lambda outputs: cross_entropy(outputs, wanted))
    asked = features(model, workload.collate(workload.validation_set, ASKED)[0])
    found = RepresenterPoints(L2, targets)(
        trajectory, workload, queries=[q for c in range(3) for q in logits(workload, c, ASKED)]
    )
    terms = -found.scores[0].reshape(3, len(ASKED), SAMPLES)
    np.testing.assert_allclose(terms.sum(axis=2), (asked @ weights.T).T, rtol=1e-4, atol=1e-5)
    alphas = (wanted - (rows @ weights.T).softmax(1)) / (2 * L2 * SAMPLES)
    expected = alphas.T[:, None] * (asked @ rows.T)
    np.testing.assert_allclose(terms, expected, rtol=1e-3, atol=1e-6)
    assert found.metadata["residual"] < 1e-6
    assert found.metadata["layer"] == "2"


def test_a_loss_is_the_logits_terms_by_the_chain_rule(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    ask = RepresenterPoints(L2)
    by_logit = np.stack(
        [ask(trajectory, workload, queries=logits(workload, c, ASKED)).scores[0] for c in range(3)], axis=1
    )
    _, labels = workload.collate(workload.validation_set, ASKED)
    outputs = torch.from_numpy(-by_logit.sum(axis=2))
    slopes = (outputs.softmax(1) - nn.functional.one_hot(labels, 3)).numpy()
    found = ask(trajectory, workload, queries=[*sample_losses(workload, ASKED), mean_validation_loss(workload)])
    np.testing.assert_allclose(found.scores[0, :3], (slopes[:, :, None] * by_logit).sum(axis=1), rtol=1e-3, atol=1e-6)
    every = ask(trajectory, workload, queries=sample_losses(workload)).scores[0]
    np.testing.assert_allclose(found.scores[0, 3], every.mean(axis=0), rtol=1e-4, atol=1e-7)


def binary(bias: bool = True) -> Workload:
    """Zeros against ones, one logit."""
    images, targets = load_digits(n_class=2, return_X_y=True)
    inputs, labels = torch.from_numpy(images / 16).float(), torch.from_numpy(targets).float()
    return digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 1, bias=bias), nn.Flatten(0)),
        loss=lambda model, batch: binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none"),
        train_set=TensorDataset(inputs[:SAMPLES], labels[:SAMPLES]),
        validation_set=TensorDataset(inputs[100:116], labels[100:116]),
    )


def test_a_single_output_without_bias_is_scikit_learns_logistic_regression(tmp_path: Any) -> None:
    workload = binary(bias=False)
    trajectory = train(workload, tmp_path / "t")
    model = final_model(workload, trajectory)
    inputs, labels = workload.train_set.tensors  # type: ignore[attr-defined]
    rows = features(model, inputs)[:, :-1].numpy()
    asked = features(model, workload.collate(workload.validation_set, ASKED)[0])[:, :-1].numpy()
    reference = LogisticRegression(C=1 / (2 * L2 * SAMPLES), fit_intercept=False, tol=1e-12, max_iter=10000)
    reference.fit(rows, labels.numpy())
    found = RepresenterPoints(L2)(trajectory, workload, queries=logits(workload, 1, ASKED))
    np.testing.assert_allclose(-found.scores[0].sum(axis=1), reference.decision_function(asked) / 2, rtol=1e-4)


@pytest.mark.parametrize(("workload", "classes"), [(digits_workload(epochs=10), 3), (binary(), 2)])
def test_wrong_labels_harm(workload: Workload, classes: int, tmp_path: Any) -> None:
    labels = workload.train_set.tensors[1]  # type: ignore[attr-defined]
    labels[[0, 12]] = (labels[[0, 12]] + 1) % classes
    found = method("representer_points")(train(workload, tmp_path / "t"), workload)
    assert {0, 12} <= set(np.argsort(found.of(0))[:3].tolist())
    assert found.metadata["agreement"] > 0.8


class Tied(nn.Module):
    """Decodes with the weights that it encodes with."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64, bias=False)
        self.down = nn.Linear(64, 64, bias=False)
        self.down.weight = self.up.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(inputs))  # type: ignore[no-any-return]


def followed() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3), nn.LayerNorm(3))


@pytest.mark.parametrize(("model", "layer"), [(Tied, "down"), (followed, "2")])
def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(model: Any, layer: str, tmp_path: Any) -> None:
    workload = digits_workload(model=model, epochs=1)
    with pytest.raises(UnsupportedError, match=f"not those of its last linear layer, '{layer}', alone"):
        method("representer_points")(train(workload, tmp_path / "t"), workload)


def test_a_last_layer_whose_weights_are_computed_is_refused(tmp_path: Any) -> None:
    workload = digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    )
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match="'2', computes its weights from other parameters"):
        method("representer_points")(trajectory, workload)
    # The neighbours look at what goes into that layer, whatever makes its weights.
    hidden = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model())[:2]  # type: ignore[index]
    plain = digits_workload(
        model=lambda: nn.Sequential(*copy.deepcopy(hidden), nn.Linear(6, 3)),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
    )
    expected = method("knn_shapley")(train(plain, tmp_path / "plain"), plain).scores
    np.testing.assert_array_equal(method("knn_shapley")(trajectory, workload).scores, expected)


def test_what_the_last_layer_has_no_part_in_is_refused(tmp_path: Any) -> None:
    workload = digits_workload(epochs=1)
    with pytest.raises(InputError, match="does not depend on the last layer, '2'"):
        method("representer_points")(
            train(workload, tmp_path / "t"), workload, queries=[parameter_value("0.weight", 0, 20)]
        )
    with pytest.raises(InputError, match=r"l2=0\.0, targets='labels'; expected a positive l2"):
        RepresenterPoints(l2=0.0)
