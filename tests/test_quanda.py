"""Our methods judged by quanda's own metrics; needs the real package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision_operators  # noqa: F401
from oracles import train_again
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from workloads import digits_model, digits_workload

from dit_mlflow import InputError, Trajectory, UnsupportedError, Window, Workload, sample_losses, train
from dit_mlflow.methods import NAMES, Method, method
from dit_mlflow.methods.data_shapley import DataShapley
from dit_mlflow.methods.datamodel import Datamodel
from dit_mlflow.methods.downsampling import Downsampling
from dit_mlflow.methods.exact import DitConfirmed, LeaveOneOut

pytest.importorskip("quanda", reason="quanda is not installed: pip install 'dit-mlflow[quanda]'")

from quanda.explainers import RandomExplainer
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric, ShortcutDetectionMetric
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from quanda.metrics.heuristics import ModelRandomizationMetric, TopKCardinalityMetric
from quanda.utils.training import Trainer

from dit_mlflow.quanda import MethodExplainer

SAMPLES, WRONG = 60, [3, 11, 17, 25, 38, 51]
SHORTCUTS = 8
"""Ones with a bright corner that no other digit has."""

FEWER: dict[str, Method] = {
    "leave_one_out": LeaveOneOut(dtype=torch.float64),
    "dit_confirmed": DitConfirmed(dtype=torch.float64),
    "downsampling": Downsampling(subsets=200, dtype=torch.float64),
    "datamodel": Datamodel(subsets=200, dtype=torch.float64),
    "data_shapley": DataShapley(retrainings=120, dtype=torch.float64),
}
"""In float64, since the clock decides how retrainings are batched, and that how they round."""


def images() -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = load_digits(n_class=3, return_X_y=True)
    return torch.from_numpy(inputs / 16).float(), torch.from_numpy(labels)


@pytest.fixture
def workload() -> Workload:
    """Sixty digits, six of them with wrong labels."""
    inputs, labels = images()
    labels[WRONG] = (labels[WRONG] + 1) % 3
    return digits_workload(
        train_set=TensorDataset(inputs[:SAMPLES], labels[:SAMPLES]),
        validation_set=TensorDataset(inputs[100:124], labels[100:124]),
        batch_size=12,
        epochs=12,
    )


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Any) -> Trajectory:
    return train(workload, tmp_path / "t")


@pytest.fixture
def model(workload: Workload, trajectory: Trajectory) -> nn.Module:
    return trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()


def asked(workload: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = workload.validation_set.tensors  # type: ignore[attr-defined]
    return inputs, targets


@pytest.mark.parametrize("name", NAMES)
def test_explanations_are_the_methods_scores_of_single_losses(
    name: str, workload: Workload, trajectory: Trajectory, model: nn.Module
) -> None:
    if name == "confident_learning":
        pytest.importorskip("cleanlab")
    inputs, targets = (part[:3] for part in asked(workload))
    run = FEWER.get(name) or method(name)
    explainer = MethodExplainer(model, workload.train_set, trajectory, workload, run)
    if run.measures == "suspicion":
        with pytest.raises(UnsupportedError, match="has self_influence"):
            explainer.explain(inputs, targets)
        own = run(trajectory, workload).of(0)
        found = explainer.self_influence().numpy()
        np.testing.assert_allclose(found / np.abs(found).max(), -own / np.abs(own).max(), rtol=1e-9)
        return
    found = explainer.explain(inputs, targets.tolist())
    expected = run(trajectory, workload, queries=sample_losses(workload, [0, 1, 2])).scores[0]
    assert found.shape == (3, SAMPLES)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("changed", [False, True])
def test_scores_are_what_removal_does_to_the_model_given(
    changed: bool, workload: Workload, trajectory: Trajectory, model: nn.Module
) -> None:
    """Plain trainings without a sample; a model that differs from the recorded one is moved by as much."""
    generator = torch.Generator().manual_seed(0)
    shifts = [torch.randn(p.shape, generator=generator) * changed for p in model.parameters()]
    with torch.no_grad():
        for parameter, shift in zip(model.parameters(), shifts, strict=True):
            parameter += shift
    inputs, targets = (part[:2] for part in asked(workload))

    def losses(without: int | None) -> np.ndarray:
        again = train_again(workload, trajectory, lambda t, i: float(i != without), trajectory.num_steps)
        with torch.no_grad():
            for parameter, shift in zip(again.parameters(), shifts, strict=True):
                parameter += shift.double()
        return cross_entropy(again(inputs.double()), targets, reduction="none").detach().numpy()

    run = LeaveOneOut(samples=None, dtype=torch.float64)
    found = MethodExplainer(model, workload.train_set, trajectory, workload, run).explain(inputs, targets)
    for j in (0, 3, 41):
        np.testing.assert_allclose(found[:, j], losses(j) - losses(None), rtol=1e-4, atol=1e-7)


def area(ranking: np.ndarray) -> float:
    found = np.cumsum(np.isin(ranking, WRONG)) / len(WRONG)
    return float(np.trapezoid(found) if hasattr(np, "trapezoid") else np.trapz(found)) / SAMPLES  # noqa: NPY201


@pytest.mark.parametrize("name", ["dit", "tracin", "loss"])
def test_mislabeling_detection(name: str, workload: Workload, trajectory: Trajectory, model: nn.Module) -> None:
    """The area under quanda's curve is that under the ranking by each sample's effect on its own loss."""
    how = {"trajectory": trajectory, "workload": workload, "method": name}
    metric = MislabelingDetectionMetric(model, workload.train_set, WRONG, MethodExplainer, how)
    if name == "loss":
        own = -method(name)(trajectory, workload).of(0)
    else:
        queries = sample_losses(workload, of="training")
        own = np.diag(method(name)(trajectory, workload, queries=queries).scores[0])
    found = metric.compute()["score"]
    assert found == pytest.approx(area(np.argsort(-own, kind="stable")), abs=1e-6)
    by_chance = MislabelingDetectionMetric(model, workload.train_set, WRONG, RandomExplainer).compute()["score"]
    assert found > 0.8 > by_chance


@pytest.mark.parametrize("name", ["dit", "tracin", "grad_cos"])
def test_class_detection(name: str, workload: Workload, trajectory: Trajectory, model: nn.Module) -> None:
    inputs, targets = asked(workload)
    scores = []
    for explainer in (
        MethodExplainer(model, workload.train_set, trajectory, workload, name),
        RandomExplainer(model, workload.train_set),
    ):
        metric = ClassDetectionMetric(model, workload.train_set, s=3)
        metric.update(explanations=explainer.explain(inputs, targets), test_targets=targets)
        scores.append(metric.compute()["score"])
    found = MethodExplainer(model, workload.train_set, trajectory, workload, name).explain(inputs, targets)
    best = workload.train_set.tensors[1][found.topk(3).indices]  # type: ignore[attr-defined]
    assert scores[0] == pytest.approx(float((best == targets[:, None]).float().mean()))
    assert scores[0] > 0.75 > 0.5 > scores[1]


def test_linear_datamodeling_score(
    workload: Workload, trajectory: Trajectory, model: nn.Module, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quanda trains on halves of the data by itself, and finds that our scores foretell the outcome."""
    monkeypatch.chdir(tmp_path)  # where Lightning logs
    inputs, targets = asked(workload)
    trainer = Trainer(
        torch.optim.SGD, lr=0.5, max_epochs=12, criterion=nn.CrossEntropyLoss(), enable_progress_bar=False
    )
    settings: Any = {"m": 24, "batch_size": 12, "cache_dir": str(tmp_path), "model_id": "digits"}
    scores = {}
    for name in ("dit", "tracin", "random"):
        metric = LinearDatamodelingMetric(
            digits_model() if name == "dit" else model, workload.train_set, trainer=trainer, **settings
        )
        explainer = RandomExplainer(model, workload.train_set)
        if name != "random":
            explainer = MethodExplainer(model, workload.train_set, trajectory, workload, name)
        metric.update(explanations=explainer.explain(inputs, targets), test_targets=targets, test_data=inputs)
        scores[name] = metric.compute()["score"]
    assert min(scores["dit"], scores["tracin"]) > 0.15 > scores["random"]


@pytest.mark.parametrize("name", ["dit", "grad_dot"])
def test_model_randomization(
    name: str, workload: Workload, trajectory: Trajectory, model: nn.Module, tmp_path: Any
) -> None:
    """Explanations of a model with random parameters are other ones; a model that is only loaded again keeps them."""
    inputs, targets = asked(workload)
    torch.save(model.state_dict(), path := str(tmp_path / "model.pth"))
    how = {"trajectory": trajectory, "workload": workload, "method": name}
    explainer = MethodExplainer(digits_model(), workload.train_set, checkpoints=path, **how)
    found = explainer.explain(inputs, targets)
    np.testing.assert_array_equal(found, MethodExplainer(model, workload.train_set, **how).explain(inputs, targets))
    metric = ModelRandomizationMetric(model, "digits", str(tmp_path), workload.train_set, path, MethodExplainer, how)
    metric.update(explanations=found, test_data=inputs, test_targets=targets)
    assert abs(metric.compute()["score"]) < 0.9


def test_shortcut_detection(tmp_path: Any) -> None:
    """Many zeros and twos with the corner of some ones are taken for ones, because of these ones."""
    inputs, labels = images()
    chosen = torch.where(labels[:SAMPLES] == 1)[0][:SHORTCUTS]
    inputs[chosen, :3] = 6.0
    workload = digits_workload(train_set=TensorDataset(inputs[:SAMPLES], labels[:SAMPLES]), batch_size=12, epochs=12)
    trajectory = train(workload, tmp_path / "t")
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
    tests = inputs[100:160][labels[100:160] != 1]
    truly = labels[100:160][labels[100:160] != 1]
    tests[:, :3] = 6.0
    taken = model(tests).argmax(dim=1)
    assert (taken == 1).sum() > 10
    scores = []
    for explainer in (
        MethodExplainer(model, workload.train_set, trajectory, workload, "dit"),
        RandomExplainer(model, workload.train_set),
    ):
        metric = ShortcutDetectionMetric(model, workload.train_set, chosen, shortcut_cls=1)
        metric.update(explainer.explain(tests, taken), tests, truly)
        scores.append(metric.compute()["score"])
    assert scores[0] > 2 * scores[1]


def test_top_k_cardinality(workload: Workload, trajectory: Trajectory, model: nn.Module) -> None:
    inputs, targets = asked(workload)
    found = MethodExplainer(model, workload.train_set, trajectory, workload).explain(inputs, targets)
    metric = TopKCardinalityMetric(model, workload.train_set, top_k=2)
    metric.update(explanations=found)
    assert metric.compute()["score"] == pytest.approx(len(found.topk(2).indices.unique()) / (2 * len(inputs)))


def test_windows_and_kinds(workload: Workload, trajectory: Trajectory, model: nn.Module) -> None:
    inputs, targets = (part[:2] for part in asked(workload))
    window = Window(20, 45)
    explainer = MethodExplainer(model, workload.train_set, trajectory, workload, window=window, kind="final")
    expected = method("dit")(trajectory, workload, [window], "final", sample_losses(workload, [0, 1])).scores[0]
    np.testing.assert_allclose(explainer.explain(inputs, targets), expected, rtol=1e-5, atol=1e-8)


def test_a_window_of_a_method_that_has_none_is_refused(
    workload: Workload, trajectory: Trajectory, model: nn.Module
) -> None:
    how: dict[str, Any] = {"trajectory": trajectory, "workload": workload, "method": "influence_function"}
    with pytest.raises(InputError, match=r"influence_function has no scores.*; steps 20-45 of 0-60 were asked for"):
        MethodExplainer(model, workload.train_set, window=Window(20, 45), **how)
    MethodExplainer(model, workload.train_set, window=Window(0, 60), **how)


@pytest.mark.parametrize("run", [LeaveOneOut(), method("tracin")])
def test_a_method_that_retrains_is_asked_once_for_all_self_influence(
    run: Method, workload: Workload, trajectory: Trajectory, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.diag(run(trajectory, workload, queries=sample_losses(workload, of="training")).scores[0])
    asked, real = [], type(run).estimate
    monkeypatch.setattr(type(run), "estimate", lambda self, q: asked.append(len(q.queries)) or real(self, q))
    found = MethodExplainer(model, workload.train_set, trajectory, workload, run).self_influence().numpy()
    np.testing.assert_allclose(found / np.abs(found).max(), expected / np.abs(expected).max(), rtol=1e-4, atol=1e-7)
    assert asked == ([60] if run.retrains else [32, 28])


def test_what_does_not_belong_to_the_training_is_refused(
    workload: Workload, trajectory: Trajectory, model: nn.Module
) -> None:
    inputs, labels = images()
    rest: Any = (trajectory, workload)
    with pytest.raises(InputError, match="has 59 samples, the recorded one 60"):
        MethodExplainer(model, TensorDataset(inputs[:59], labels[:59]), *rest)
    with pytest.raises(InputError, match="sample 3 has target"):
        MethodExplainer(model, TensorDataset(inputs[:60], labels[:60]), *rest)
    with pytest.raises(InputError, match="expected the same, in the same shapes"):
        MethodExplainer(nn.Linear(64, 3), workload.train_set, *rest)
    explainer = MethodExplainer(model, workload.train_set, *rest, method=LeaveOneOut(samples=[1, 2]))
    with pytest.raises(InputError, match="no score for 58 of 60 samples"):
        explainer.explain(inputs[:1], labels[:1])
    with pytest.raises(InputError, match="1 test samples and 2 targets"):
        explainer.explain(inputs[:1], [0, 1])
