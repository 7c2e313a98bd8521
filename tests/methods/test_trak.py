"""TRAK against dense kernels, and against its authors' library where that is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from workloads import SAMPLES, datasets, digits_workload

from dit_mlflow import (
    InputError,
    Query,
    Trajectory,
    UnsupportedError,
    Workload,
    mean_validation_loss,
    sample_losses,
    train,
)
from dit_mlflow.methods import sample_gradients as gradients_module
from dit_mlflow.methods.trak import RandomProjection, Trak
from dit_mlflow.workload import to_like

PARAMETERS = 64 * 6 + 6 + 6 * 3 + 3


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square()


def regression() -> Workload:
    (inputs, _), (asked, _) = (part.tensors for part in datasets())
    return digits_workload(
        loss=squared,
        train_set=TensorDataset(inputs, inputs.mean(dim=1)),
        validation_set=TensorDataset(asked, asked.mean(dim=1)),
    )


def row(value: Tensor, model: nn.Module) -> Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def kernel_scores(workload: Workload, trajectory: Trajectory, damping: float, matrices: dict[int, list[Tensor]]) -> Any:
    """The formula with dense matrices, for the mean validation loss and the loss of validation sample 3."""
    pairs, pulls = [], []
    for t, projections in matrices.items():
        model = trajectory.checkpoint(t).load_into(workload.build_model()).double()
        inputs, targets = (to_like(x, x.device, torch.float64) for x in workload.train_set.tensors)  # type: ignore
        if targets.is_floating_point():
            outputs, pull = -workload.loss(model, (inputs, targets)), torch.ones(SAMPLES)
        else:
            probability = model(inputs).softmax(1).gather(1, targets[:, None])[:, 0]
            outputs, pull = (probability / (1 - probability)).log(), 1 - probability
        asked, wanted = (to_like(x, x.device, torch.float64) for x in workload.validation_set.tensors)  # type: ignore
        losses = workload.loss(model, (asked, wanted))
        gradients = torch.stack([row(value, model) for value in outputs])
        queries = torch.stack([row(value, model) for value in (losses.mean(), losses[3])])
        pulls.append(pull.detach())
        for matrix in projections:
            phi = gradients @ matrix
            kernel = phi.T @ phi
            kernel = kernel + damping * kernel.trace() / len(kernel) * torch.eye(len(kernel))
            pairs.append(queries @ matrix @ torch.linalg.pinv(kernel, rtol=1e-12, hermitian=True) @ phi.T)
    return (-torch.stack(pairs).mean(0) * torch.stack(pulls).mean(0)).numpy()


def queries_of(workload: Workload) -> list[Query]:
    return [mean_validation_loss(workload), *sample_losses(workload, [3])]


@pytest.mark.parametrize("workload", [digits_workload(), regression()], ids=["classes", "regression"])
@pytest.mark.parametrize("dim", [5, PARAMETERS])
def test_scores_are_those_of_the_dense_kernel(dim: int, workload: Workload, tmp_path: Any) -> None:
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.checkpoint_steps == (0, 1, 4, 9)
    found = Trak(dim=dim, checkpoints=2, damping=0.2, seed=7)(trajectory, workload, queries=queries_of(workload))
    every = torch.eye(PARAMETERS)
    matrices = {t: [RandomProjection(PARAMETERS, dim, (7, t, k))(every) for k in range(2)] for t in (4, 9)}
    expected = kernel_scores(workload, trajectory, 0.2, matrices)
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max())
    assert found.metadata["checkpoints"] == [4, 9]


def test_a_projection_is_of_signs_and_keeps_inner_products() -> None:
    matrix = RandomProjection(60, 50, (1, 2))(torch.eye(60))
    np.testing.assert_allclose(matrix.abs(), 50**-0.5)
    assert abs(float(matrix.sign().mean())) < 0.05
    many = torch.stack([(m := RandomProjection(60, 50, (1, k))(torch.eye(60))) @ m.T for k in range(200)]).mean(0)
    np.testing.assert_allclose(many, torch.eye(60), atol=0.06)
    assert not torch.equal(matrix, RandomProjection(60, 50, (1, 3))(torch.eye(60)))


def test_a_projection_is_the_same_for_one_row_and_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_mlflow.methods.trak.BLOCK", 40)
    rows = torch.randn(4, 30)
    project = RandomProjection(30, 8, (3,))
    matrix = project(torch.eye(30))
    assert torch.linalg.matrix_rank(matrix) == 8
    np.testing.assert_allclose(project(rows), rows.double() @ matrix, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(torch.cat([project(one[None]) for one in rows]), project(rows), rtol=1e-4, atol=1e-6)


def hesitant(model: nn.Module, batch: Any) -> Tensor:
    """Control flow that depends on data, so that ``vmap`` does not take it."""
    losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
    return torch.stack([loss * 2 if loss > 1 else loss for loss in losses])


def test_gradients_are_the_same_side_by_side_and_one_by_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = digits_workload(loss=hesitant)
    trajectory = train(workload, tmp_path / "t")
    fallen_back, real = [], gradients_module._one_by_one
    monkeypatch.setattr(gradients_module, "_one_by_one", lambda *given: fallen_back.append(1) or real(*given))
    side_by_side = Trak(dim=PARAMETERS)(trajectory, workload).scores
    assert not fallen_back
    monkeypatch.setattr(torch.func, "vmap", lambda *_, **__: failing)
    one_by_one = Trak(dim=PARAMETERS)(trajectory, workload).scores
    assert len(fallen_back) == 3
    np.testing.assert_allclose(one_by_one, side_by_side, rtol=1e-3, atol=1e-5 * np.abs(side_by_side).max())
    monkeypatch.undo()
    monkeypatch.setattr("dit_mlflow.methods.sample_gradients.GRADIENTS_IN_MEMORY", 5 * 4 * PARAMETERS)
    in_parts = Trak(dim=PARAMETERS)(trajectory, workload).scores
    np.testing.assert_allclose(in_parts, side_by_side, rtol=1e-3, atol=1e-5 * np.abs(side_by_side).max())


@pytest.mark.parametrize("dim", [7, 10**6])
def test_batch_statistics_are_constants_side_by_side_too(
    dim: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    )
    trajectory = train(workload, tmp_path / "t")
    found = Trak(dim=dim)(trajectory, workload).scores
    monkeypatch.setattr(torch.func, "vmap", lambda *_, **__: failing)
    expected = Trak(dim=dim)(trajectory, workload).scores
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def failing(*_: Any) -> Any:
    raise RuntimeError("vmap cannot")


def test_a_loss_that_vmap_does_not_take_is_differentiated_one_by_one(tmp_path: Any) -> None:
    workload = digits_workload(loss=hesitant)
    trajectory = train(workload, tmp_path / "t")
    found = Trak(dim=PARAMETERS, checkpoints=1, output="loss")(trajectory, workload).of(0)
    model = trajectory.checkpoint(9).load_into(workload.build_model()).double()
    losses = [workload.loss(model, (x[None].double(), y[None]))[0] for x, y in workload.train_set]  # type: ignore
    phi = torch.stack([row(loss, model) for loss in losses])
    asked, wanted = workload.validation_set.tensors  # type: ignore[attr-defined]
    query = row(workload.loss(model, (asked.double(), wanted)).mean(), model)
    kernel = phi.T @ phi
    kernel += 0.1 * kernel.trace() / PARAMETERS * torch.eye(PARAMETERS)
    expected = (phi @ torch.linalg.solve(kernel, query)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max())


def test_without_damping_directions_without_samples_count_for_nothing(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    found = Trak(dim=PARAMETERS, checkpoints=1, damping=0.0)(trajectory, workload, queries=queries_of(workload))
    matrices = {9: [RandomProjection(PARAMETERS, PARAMETERS, (0, 9, k))(torch.eye(PARAMETERS)) for k in range(2)]}
    expected = kernel_scores(workload, trajectory, 0.0, matrices)
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max())


def test_what_cannot_be_used_is_refused(tmp_path: Any) -> None:
    workload = regression()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match="if it is a classification"):
        Trak(output="margin")(trajectory, workload)
    with pytest.raises(InputError, match=r"dim=0, checkpoints=3, projections=2, damping=0\.1; expected 1 or more"):
        Trak(dim=0)
    with pytest.raises(InputError, match="output='logit'; expected 'margin', 'loss'"):
        Trak(output="logit")  # type: ignore[arg-type]


class TwoLogits(nn.Module):
    """``[B, 4] -> [B, 2]``, with a kernel of full rank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        half = self.linear(inputs) / 2
        return torch.cat([-half, half], dim=1)


def test_scores_are_those_of_the_authors_library_but_for_a_factor(tmp_path: Any) -> None:
    """It divides the inverse kernel by its mean entry; all checkpoints have the same one here, ``f`` being linear."""
    trak = pytest.importorskip("trak")
    from trak.projectors import NoOpProjector

    (inputs, labels), (asked, wanted) = (part.tensors for part in datasets())
    columns = [20, 29, 36, 43]
    labels, wanted = (labels == 1).long(), (wanted == 1).long()
    workload = digits_workload(
        model=TwoLogits,
        train_set=TensorDataset(inputs[:, columns], labels),
        validation_set=TensorDataset(asked[:, columns], wanted),
    )
    trajectory = train(workload, tmp_path / "t")

    def log_odds(index: int) -> Query:
        sign = 2 * int(wanted[index]) - 1
        given = asked[index : index + 1, columns]
        return Query(f"f {index}", lambda model: sign * (model(given)[0, 1] - model(given)[0, 0]))

    model = workload.build_model()
    theirs = trak.TRAKer(
        model=model.eval(),
        task="image_classification",
        train_set_size=SAMPLES,
        save_dir=str(tmp_path / "trak"),
        device="cpu",
        projector=NoOpProjector(grad_dim=5, device="cpu"),
        use_half_precision=False,
        logging_level=40,
    )
    for k, t in enumerate((4, 9)):
        theirs.load_checkpoint(trajectory.checkpoint(t).load_into(model).state_dict(), model_id=k)
        theirs.featurize(batch=[inputs[:, columns], labels], num_samples=SAMPLES)
    theirs.finalize_features()
    for k, t in enumerate((4, 9)):
        checkpoint = trajectory.checkpoint(t).load_into(model).state_dict()
        theirs.start_scoring_checkpoint("all", checkpoint, model_id=k, num_targets=16)
        theirs.score(batch=[asked[:, columns], wanted], num_samples=16)
    expected = theirs.finalize_scores("all")
    found = Trak(dim=5, checkpoints=2, damping=0.0)(trajectory, workload, queries=[log_odds(i) for i in range(16)])
    scores = -found.scores[0].T
    np.testing.assert_allclose(scores / np.linalg.norm(scores), expected / np.linalg.norm(expected), atol=1e-5)
