"""What methods that look at single states see: the same samples every time, the objective that training had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from workloads import SAMPLES, datasets, digits_model, digits_workload

from dit_mlflow import (
    Trajectory,
    UnsupportedError,
    Workload,
    leave_one_out,
    parameter_value,
    parse_windows,
    track,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.methods.fisher import InfluenceFunctionEkfac
from dit_mlflow.methods.mirrored_influence import MirroredInfluence
from dit_mlflow.methods.newton_step import InfluenceFunction, InfluenceFunctionArnoldi, InfluenceFunctionLissa
from dit_mlflow.methods.source import Source

AT_STATES = [
    "tracin_checkpoints",
    "influence_function",
    "influence_function_lissa",
    "influence_function_arnoldi",
    "influence_function_datainf",
    "influence_function_ekfac",
    "grad_dot",
    "grad_cos",
    "grad_norm",
    "loss",
    "mirrored_influence",
    "source",
    "trak",
    "representer_points",
    "knn_shapley",
    "confident_learning",
]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Every look at a sample adds noise of all three generators."""

    def __init__(self, base: TensorDataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.base[index]
        drawn = torch.from_numpy(np.random.standard_normal(len(inputs)).astype(np.float32))  # noqa: NPY002
        return inputs + 0.2 * torch.randn_like(inputs) + 0.2 * drawn, target


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectory, Workload]:
    workload = digits_workload(train_set=Augmented(datasets()[0]))
    return train(workload, tmp_path_factory.mktemp("augmented") / "t"), workload


@pytest.mark.parametrize("name", AT_STATES)
def test_augmented_samples_look_the_same_every_time(name: str, augmented: tuple[Trajectory, Workload]) -> None:
    if name == "confident_learning":
        pytest.importorskip("cleanlab")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found.append(method(name)(*augmented).scores)
    np.testing.assert_array_equal(*found)


def test_a_step_of_no_length_changes_no_augmented_loss(augmented: tuple[Trajectory, Workload]) -> None:
    assert not MirroredInfluence(lr=1e-30)(*augmented).scores.any()
    cosines = method("grad_cos")(*augmented).scores
    assert np.abs(cosines).max() <= 1


class Autoencoder(nn.Module):
    """Draws the noise of its code in every mode, as is usual."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 8), nn.Linear(4, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        mean, log_variance = self.encoder(inputs).chunk(2, dim=1)
        return torch.sigmoid(self.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean)))


def reconstruction(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[0]).square().mean(dim=1)


def test_a_loss_that_draws_in_evaluation_mode_is_one_function_of_the_model(tmp_path: Path) -> None:
    """Otherwise the difference of two models would be that of their noise, which is larger by far."""
    workload = digits_workload(model=Autoencoder, loss=reconstruction)
    trajectory = train(workload, tmp_path / "t")
    whole = parse_windows("1", trajectory)
    truth = leave_one_out(trajectory, workload, whole).of(0)
    one_by_one = leave_one_out(trajectory, workload, whole, samples=[3]).of(0)[3]
    assert one_by_one == pytest.approx(truth[3], rel=1e-9)
    swept = track(trajectory, workload, whole).of(0)
    assert pearsonr(swept, truth).statistic > 0.99
    np.testing.assert_allclose(track(trajectory, workload, whole, dtype=torch.float64).of(0), swept, rtol=1e-3)
    np.testing.assert_array_equal(method("grad_dot")(trajectory, workload).scores, grad_dot(trajectory, workload))


def grad_dot(trajectory: Trajectory, workload: Workload) -> np.ndarray:
    torch.manual_seed(9)
    return method("grad_dot")(trajectory, workload).scores


OBJECTIVES = {
    "sum": (0.02, lambda batch: torch.ones(len(batch[1]), dtype=torch.float64)),
    "class 0 does not count": (0.2, lambda batch: (batch[1] > 0).double() / SAMPLES),
    "class 2 counts four times": (0.1, lambda batch: torch.where(batch[1] == 2, 4.0, 1.0).double() / SAMPLES),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_the_minimum_of_a_weighted_loss_the_newton_step_is_the_influence(objective: str, tmp_path: Path) -> None:
    rate, coefficients = OBJECTIVES[objective]
    double = [TensorDataset(data.tensors[0].double(), data.tensors[1]) for data in datasets()]
    workload = digits_workload(
        model=lambda: nn.Linear(64, 3).double(),
        train_set=double[0],
        validation_set=double[1],
        batch_size=SAMPLES,
        epochs=400,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=rate),
        coefficients=coefficients,
        regularizer=lambda model: 0.1 * sum(p.square().sum() for p in model.parameters()),
    )
    trajectory = train(workload, tmp_path / "t")
    exact = track(trajectory, workload, parse_windows("1", trajectory)).of(0)
    uncounted = datasets()[0].tensors[1].numpy() == 0
    for estimator in (
        InfluenceFunction(damping=1e-9),
        InfluenceFunctionLissa(damping=1e-9, tolerance=1e-3),
        InfluenceFunctionArnoldi(damping=1e-9),
        Source(segments=1, states=1),
    ):
        found = estimator(trajectory, workload).of(0)
        np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max(), err_msg=estimator.name)
        if objective == "class 0 does not count":
            assert not found[uncounted].any()


@pytest.mark.parametrize(
    "name", ["influence_function_datainf", "influence_function_ekfac", "trak", "tracin_checkpoints"]
)
def test_rankings_follow_the_weights_of_the_loss(name: str, tmp_path: Path) -> None:
    """Of two copies of a sample, one that counts three times has three times the score; one that does not count, 0."""
    inputs, targets = (tensor.repeat(2, *[1] * (tensor.dim() - 1)) for tensor in datasets()[0].tensors)
    weights = torch.ones(2 * SAMPLES, dtype=torch.float64)
    weights[0], weights[1] = 3, 0
    workload = digits_workload(
        train_set=TensorDataset(inputs, targets, weights),
        batch_size=2 * SAMPLES,
        coefficients=lambda batch: batch[2] / (2 * SAMPLES),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
    )
    trajectory = train(workload, tmp_path / "t")
    found = method(name)(trajectory, workload).of(0)
    assert found[0] == pytest.approx(3 * found[SAMPLES], rel=1e-3)
    assert found[1] == 0 and found[SAMPLES + 1] != 0


class Experts(nn.Module):
    """Each sample goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        to_first = inputs[:, 20] > 0.5
        found = inputs.new_zeros(len(inputs), 3)
        for expert, chosen in ((self.first, to_first), (self.second, ~to_first)):
            if chosen.any():
                found = found.index_add(0, chosen.nonzero()[:, 0], expert(inputs[chosen]))
        return found


@pytest.mark.parametrize(
    "name",
    ["influence_function", "influence_function_datainf", "influence_function_ekfac", "grad_dot", "source", "trak"],
)
def test_an_expert_that_the_last_batch_did_not_call_is_not_frozen(name: str, tmp_path: Path) -> None:
    workload = digits_workload(model=Experts, batch_size=SAMPLES - 1, epochs=4)  # one sample in an epoch's last batch
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.step(trajectory.num_steps - 1).no_gradient
    assert np.abs(method(name)(trajectory, workload).of(0)).min() > 0


def test_frozen_layers_are_still_left_out(tmp_path: Path) -> None:
    def model() -> nn.Module:
        made = digits_model()
        made[0].requires_grad_(False)
        return made

    workload = digits_workload(model=model)
    trajectory = train(workload, tmp_path / "t")
    scores = method("grad_norm")(trajectory, workload).of(0)
    final = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model())
    inputs, targets = datasets()[0].tensors
    loss = nn.functional.cross_entropy(final(inputs[:1]), targets[:1])
    parts = torch.autograd.grad(loss, list(final[2].parameters()))
    assert -scores[0] == pytest.approx(float(torch.cat([part.flatten() for part in parts]).norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["tracin", "tracin_renormalized", "tracin_checkpoints", "grad_dot", "dvemb", "source"])
def test_climbing_is_refused_where_it_would_turn_the_sign(name: str, tmp_path: Path) -> None:
    workload = digits_workload(
        loss=lambda model, batch: -nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, maximize=True),
    )
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=r"maximize=True"):
        method(name)(trajectory, workload)
    # What differentiates the training itself has no need to.
    query = [parameter_value("2.bias", 0)]
    whole = parse_windows("1", trajectory)
    swept = track(trajectory, workload, whole, queries=query).of(0)
    truth = leave_one_out(trajectory, workload, whole, queries=query).of(0)
    assert pearsonr(swept, truth).statistic > 0.99


class Scaled(nn.Module):
    """Without any layer that has factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 64), 0.01))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(input=inputs)


@pytest.mark.parametrize(("model", "diagonal"), [(Scaled, ["weight"]), (Named, [])])
def test_ekfac_takes_models_without_layers_and_layers_called_by_name(
    model: type[nn.Module], diagonal: list[str], tmp_path: Path
) -> None:
    workload = digits_workload(model=model)
    trajectory = train(workload, tmp_path / "t")
    found = InfluenceFunctionEkfac()(trajectory, workload)
    assert found.metadata["diagonal"] == diagonal
    assert pearsonr(found.of(0), InfluenceFunction()(trajectory, workload).of(0)).statistic > 0.5


def test_ekfac_refuses_a_regularizer(tmp_path: Path) -> None:
    workload = digits_workload(regularizer=lambda model: sum(p.square().sum() for p in model.parameters()))
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match="regularizer is of no sample"):
        InfluenceFunctionEkfac()(trajectory, workload)
