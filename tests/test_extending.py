"""The pages of docs/extending: what they show is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import stores
import torch
from building import LOSS_DROP
from click.testing import CliRunner
from oracles import finite_difference
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload

from dit_mlflow import Trajectory, Window, leave_one_out, track
from dit_mlflow.cli import cli
from dit_mlflow.replay.optimizers import SUPPORTED
from dit_mlflow.tracking import load_trajectory

PAGES = Path(__file__).parents[1] / "docs" / "extending"


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL | re.M)


def run(source: str) -> dict[str, Any]:
    """What a block leaves behind."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(source, "page", "exec"), names)
    return names


def test_the_method_is_the_distribution_that_the_tests_build() -> None:
    assert blocks("method.md", "toml") == [(LOSS_DROP / "pyproject.toml").read_text(encoding="utf-8")]
    assert blocks("method.md") == [(LOSS_DROP / "dit_loss_drop.py").read_text(encoding="utf-8")]


def test_the_workload_is_found_trained_and_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIT_MLFLOW_CACHE", str(tmp_path / "cache"))
    project, use = blocks("workload.md")
    Path("wine").mkdir()
    Path("wine/__init__.py").write_text(project, encoding="utf-8")
    found = run(use)
    influence, trajectory, workload = found["influence"], found["trajectory"], found["workload"]
    assert trajectory.verify(workload).max_drift == 0
    samples = range(0, workload.num_samples, 32)
    for window in found["windows"]:
        expected = finite_difference(workload, trajectory, window, "local", samples, 1e-5)
        scores = influence.of(window)[list(samples)]
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    (command,) = re.findall(r"^ +dit-mlflow (.+)$", (PAGES / "workload.md").read_text(encoding="utf-8"), re.M)
    with stores.sqlite(tmp_path) as store, stores.tracking(store, tmp_path, monkeypatch):
        finished = CliRunner().invoke(cli, command.split())
    assert finished.exit_code == 0, finished.output
    (agreement,) = re.findall(r"^Whole run: LDS of removals ([01]\.\d+)", finished.stdout, re.M)
    assert float(agreement) > 0.9


@pytest.mark.slow
def test_the_step_is_trained_recorded_and_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = blocks("step.md")
    page = run(first)
    workload = page["workload"]
    assert page["influence"].scores.any(axis=2).all()
    exec(compile(second, "page", "exec"), page)
    own = Trajectory.open("own")
    assert (own.num_steps, own.verify(workload).max_drift) == (3, 0)
    # What is drawn in a step is drawn again.
    window = Window(0, 12)
    (score,) = track(page["trajectory"], workload, [window], dtype=torch.float64).scores[0, 0, :1]
    exact = leave_one_out(page["trajectory"], workload, [window], samples=[0], dtype=torch.float64).scores[0, 0, 0]
    np.testing.assert_allclose(score, exact, rtol=0.2)


def test_the_optimizers_that_torch_can_differentiate_are_supported() -> None:
    (source,) = blocks("optimizer.md")
    assert run(source)["candidates"] - {"Rprop"} == set(SUPPORTED)


def test_the_trainer_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = blocks("trainer.md")
    page = run(source)
    torch.manual_seed(0)
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(datasets()[0], batch_size=8, shuffle=True)
    with stores.sqlite(tmp_path) as store, stores.tracking(store, tmp_path, monkeypatch):
        with mlflow.start_run() as recorded:
            page["Trainer"](model, optimizer, loader, page["TrajectoryCallback"]()).fit(epochs=2)
        trajectory = load_trajectory(recorded.info.run_id)
    assert (trajectory.complete, trajectory.epoch_ends) == (True, (3, 6))
    assert trajectory.verify(digits_workload()).max_drift == 0
    last = trajectory.checkpoint(6).parameters
    assert all(torch.equal(last[name], value) for name, value in model.named_parameters())
