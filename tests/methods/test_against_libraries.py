"""What other libraries answer to the same question, where they are installed: captum gives [test, train] scores, dattri
[train, test]."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import datasets, digits_workload

from dit_mlflow import Trajectory, Workload, sample_losses, train
from dit_mlflow.methods.dvemb import Dvemb
from dit_mlflow.methods.fisher import InfluenceFunctionDatainf
from dit_mlflow.methods.newton_step import InfluenceFunctionArnoldi

RATE = 0.5


@pytest.fixture
def workload() -> Workload:
    """Softmax regression, so that every library has one layer and a Hessian without negative eigenvalues."""
    train_set, validation_set = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in datasets())
    return digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 3)).double(), train_set=train_set, validation_set=validation_set
    )


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Any) -> Trajectory:
    return train(workload, tmp_path / "t")


def model_at(workload: Workload, trajectory: Trajectory, t: int) -> nn.Module:
    (state,) = trajectory.states(workload, t, t)
    return state.load_into(workload.build_model())


def test_arnoldi_is_captums(workload: Workload, trajectory: Trajectory) -> None:
    arnoldi = pytest.importorskip("captum.influence._core.arnoldi_influence_function")
    theirs = arnoldi.ArnoldiInfluenceFunction(
        model_at(workload, trajectory, trajectory.num_steps),
        workload.train_set,
        checkpoint="",
        checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=24,
        projection_dim=15,
        arnoldi_dim=120,
        arnoldi_tol=1e-9,
        hessian_reg=0.05,
    )
    expected = theirs.influence(workload.validation_set.tensors).numpy()  # type: ignore[attr-defined]
    ours = InfluenceFunctionArnoldi(damping=0.05 / 24, iterations=120, rank=15)
    found = ours(trajectory, workload, queries=sample_losses(workload)).scores[0]
    # Captum's Hessian is that of the sum of the losses.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def task(workload: Workload, trajectory: Trajectory) -> tuple[Any, nn.Module]:
    dattri = pytest.importorskip("dattri.task")
    model = model_at(workload, trajectory, trajectory.num_steps)

    def loss(parameters: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = data
        outputs = torch.func.functional_call(model, parameters, (inputs,))
        return nn.functional.cross_entropy(outputs.reshape(-1, 3), target.reshape(-1))

    return dattri.AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()]), model


def test_datainf_is_dattris(tmp_path: Any) -> None:
    workload = digits_workload(model=lambda: nn.Sequential(nn.Linear(64, 3)))  # its sums are in float32
    trajectory = train(workload, tmp_path / "t")
    asked, model = task(workload, trajectory)
    from dattri.algorithm.influence_function import IFAttributorDataInf

    own = []
    for sample in range(24):
        inputs, targets = workload.batch([sample])
        parts = torch.autograd.grad(workload.loss(model, (inputs, targets)).sum(), list(model.parameters()))
        own.append(torch.cat([part.flatten() for part in parts]))
    damping = 0.2 * float(torch.stack(own).square().sum(dim=1).mean()) / len(own[0])
    theirs = IFAttributorDataInf(asked, regularization=damping)
    loaders = [DataLoader(data, batch_size=8) for data in (workload.train_set, workload.validation_set)]
    theirs.cache(loaders[0])
    expected = theirs.attribute(*loaders).detach().numpy().T / 24
    queries = sample_losses(workload)
    found = InfluenceFunctionDatainf(damping=0.2)(trajectory, workload, queries=queries).scores[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_dvemb_is_dattris(workload: Workload, trajectory: Trajectory) -> None:
    asked, model = task(workload, trajectory)
    from dattri.algorithm.dvemb import DVEmbAttributor

    theirs = DVEmbAttributor(asked)
    final = {name: value.clone() for name, value in model.state_dict().items()}
    for t in range(trajectory.num_steps):
        model.load_state_dict(model_at(workload, trajectory, t).state_dict())
        samples = trajectory.step(t).samples
        theirs.cache_gradients(0, workload.batch(samples), torch.from_numpy(samples), RATE)
    theirs.cache()
    model.load_state_dict(final)
    expected = theirs.attribute(DataLoader(workload.validation_set, batch_size=16)).detach().numpy().T
    found = Dvemb()(trajectory, workload, queries=sample_losses(workload)).scores[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())
