"""What every project must do: the paper's settings, training that replays, influence that agrees with leaving out."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from public_files import posts, real, write_archive, write_cifar, write_image_files
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegressionCV
from torch import nn

from dit_mlflow import Workload, leave_one_out, load_workload, parse_windows, track, train
from dit_mlflow.retraining.retrain import _packed

REPOSITORY = Path(__file__).parents[2]

PAPER = """
mnist      logreg  0.003   sqrt  21  64   256
mnist      dnn     0.0005  none  21  64   256
mnist      cnn     0.0004  none  21  64   256
newsgroups logreg  0.1     sqrt  21  64   256
newsgroups dnn     0.1     sqrt  21  64   200
adult      logreg  0.1     sqrt  21  64   256
adult      dnn     0.3     sqrt  21  64   256
emnist     logreg  0.003   sqrt  21  64   256
emnist     dnn     0.06    sqrt  21  64   256
emnist     cnn     0.2     sqrt  21  64   256
cifar10    cnn     0.01    sqrt  50  128  256
"""
"""Data, model, learning rate, decay, epochs, batch size, samples in each split: the authors' code."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files in the public formats, with random images and words."""
    folder = tmp_path_factory.mktemp("data")
    for name, prefix in (("mnist", ("train", "t10k")), ("emnist", ("emnist-letters-train", "emnist-letters-test"))):
        classes = np.array([1, 7] if name == "mnist" else [1, 2])
        write_image_files(folder / name, prefix, (np.tile(classes, 300), np.tile(classes, 130)))
    write_cifar(folder / "cifar10", rows=1300)
    write_archive(folder / "posts.tar.gz", posts(280))
    return {
        "emnist": str(folder / "emnist"),
        "cifar10": str(folder / "cifar10"),
        "newsgroups": str(folder / "posts.tar.gz"),
    }


def data(project: str, folders: dict[str, str]) -> dict[str, Any]:
    if project in ("mnist", "digits"):
        return {}
    return {"data_dir": real("adult") if project == "adult" else folders[project]}


@pytest.mark.parametrize("row", PAPER.strip().splitlines(), ids=lambda row: "-".join(row.split()[:2]))
def test_preset_paper(row: str, folders: dict[str, str]) -> None:
    project, model, lr, decay, epochs, batch, samples = row.split()
    workload = load_workload(f"projects/{project}", model=model, preset="paper", **data(project, folders))
    sets: list[Any] = [workload.train_set, workload.validation_set, workload.test_set]
    assert [len(part) for part in sets] == [int(samples)] * 3
    # The authors split an epoch into ceil(n / batch) batches of nearly equal size.
    batches = math.ceil(int(samples) / int(batch))
    assert workload.plan.epoch_ends == tuple(batches * epoch for epoch in range(1, int(epochs) + 1))
    assert workload.batch_size == int(samples) / batches
    assert workload.optimizer is not None
    module = workload.build_model()
    optimizer = workload.optimizer(module)
    assert type(optimizer) is torch.optim.SGD
    assert {name: optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay")} == {
        "lr": float(lr),
        "momentum": 0,
        "weight_decay": 0,
    }
    rates = []
    scheduler = workload.scheduler(optimizer) if workload.scheduler else None
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert rates == pytest.approx([float(lr) / (math.sqrt(t + 1) if decay == "sqrt" else 1) for t in range(4)])
    if model != "logreg":
        assert workload.settings["l2"] == 0.001
    alpha = workload.settings["l2"]
    inputs, targets = workload.batch(range(5))
    penalty = 0.5 * alpha * sum(float(p.detach().square().sum()) for p in module.parameters())
    expected = nn.BCEWithLogitsLoss(reduction="none")(module(inputs), targets) + penalty
    torch.testing.assert_close(workload.loss(module, [inputs, targets]), expected, rtol=1e-5, atol=1e-6)
    sizes = [tuple(p.shape) for p in module.parameters() if p.dim() > 1]
    features = inputs.shape[1]
    if model == "logreg":
        assert sizes == [(1, features)]
    elif model == "dnn":
        assert sizes == [(8, features), (1, 8)]
    else:
        channels, side = (3, 32) if project == "cifar10" else (1, 28)
        assert sizes == [(32, channels, 3, 3), (64, 32, 3, 3), (1, 64 * (side // 4) ** 2)]


def test_l2_of_logistic_regression_is_cross_validated(folders: dict[str, str]) -> None:
    """With scikit-learn's own search over the same grid."""
    workload = load_workload("projects/adult", model="logreg", preset="paper", **data("adult", folders))
    inputs, labels = (tensor.numpy() for tensor in workload.train_set.tensors)  # type: ignore[attr-defined]
    search = LogisticRegressionCV(
        Cs=10, fit_intercept=False, cv=5, max_iter=1000, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False
    )
    chosen = float(search.fit(inputs, labels).C_)
    assert workload.settings["l2"] == pytest.approx(1 / (chosen * 256))


GENTLE: dict[str, dict[str, Any]] = {
    "mnist": {"model": "dnn", "classes": "all", "lr": 0.01},
    "adult": {"model": "dnn", "lr": 0.05},
    "newsgroups": {"model": "dnn", "lr": 0.003},
    "digits": {"model": "cnn", "lr": 0.03},
    "emnist": {"model": "dnn", "lr": 0.003},
    # Batches of 9 through BatchNorm: far from linear in any sample at larger steps.
    "cifar10": {"model": "resnet9", "width": 2, "lr": 1e-4, "n_train": 18, "epochs": 2, "batch_size": 9},
}


@pytest.mark.parametrize("project", list(GENTLE))
def test_training_replays_and_influence_agrees_with_leaving_out(
    project: str, folders: dict[str, str], tmp_path: Path
) -> None:
    settings = {"n_train": 32, "n_validation": 32, "n_test": 32, "epochs": 3, "batch_size": 8, **GENTLE[project]}
    workload = load_workload(f"projects/{project}", **settings, **data(project, folders))
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.verify(workload).max_drift == 0
    whole = parse_windows("1", trajectory)
    estimate, truth = (
        found(trajectory, workload, whole, dtype=torch.float64).of(0)  # type: ignore[operator]
        for found in (track, leave_one_out)
    )
    assert spearmanr(estimate, truth).statistic > 0.95


@pytest.mark.parametrize("project", list(GENTLE))
def test_recorded_settings_build_the_same_workload(project: str, folders: dict[str, str]) -> None:
    settings = {"n_train": 32, "n_validation": 16, "n_test": 8, "corrupt": 0.25, **GENTLE[project]}
    first = load_workload(f"projects/{project}", **settings, **data(project, folders))
    second = load_workload(f"projects/{project}", **first.settings)
    assert second.settings == first.settings
    assert _described(first) == _described(second)
    assert all(map(torch.equal, first.train_set.tensors, second.train_set.tensors))  # type: ignore[attr-defined]
    assert len(first.corrupted) == settings["n_train"] // 4
    assert all("\n" not in line for line in _described(first))


def _described(workload: Workload) -> list[str]:
    assert workload.describe is not None
    return [workload.describe(index) for index in range(workload.num_samples)]


@pytest.mark.parametrize("project", ["adult", "newsgroups"])
def test_a_project_of_several_modules_reaches_processes_without_it(
    project: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = load_workload(f"projects/{project}", n_train=16, n_validation=16, n_test=4, **data(project, folders))
    sent, line = _packed(workload), _described(workload)[3]  # type: ignore[arg-type]
    for name in [name for name in sys.modules if name.startswith(f"dit_mlflow_project_{project}")]:
        monkeypatch.delitem(sys.modules, name)
    arrived = cloudpickle.loads(sent)
    assert arrived.describe(3) == line
    torch.manual_seed(0)
    expected = workload.loss(workload.build_model(), workload.batch([0, 1]))
    torch.manual_seed(0)
    assert torch.equal(arrived.loss(arrived.build_model(), arrived.batch([0, 1])), expected)


def test_the_table_of_defaults_is_of_validation_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choice between rates that learn, do not, and break off; the accuracy by hand."""
    settings = {"n_train": 64, "epochs": 4}
    script = REPOSITORY / "projects" / "choose_defaults.py"
    options = ["projects/digits", "--models", "dnn", "--seeds", "1", "--rates", "0.000001", "0.3", "1e30"]
    monkeypatch.setattr(sys, "argv", [str(script), *options, "--set", *(f"{k}={v}" for k, v in settings.items())])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.rstrip().splitlines()
    workload = load_workload("projects/digits", model="dnn", lr=0.3, **settings)
    trajectory = train(workload, tmp_path / "t")
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model())
    inputs, labels = workload.validation_set.tensors  # type: ignore[attr-defined]
    accuracy = float((model(inputs).argmax(dim=1) == labels).float().mean())
    assert printed[-1].split()[:3] == ["dnn", "0.3000", f"{accuracy:.4f}"]
    assert accuracy > 0.3
