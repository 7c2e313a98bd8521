"""A small real world in a tracking server, made by the jobs as users start them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from dit_mlflow.cli import cli

SMALL = {"model": "logreg", "n_train": 40, "n_validation": 30, "n_test": 20, "epochs": 4, "batch_size": 16}
METHODS = ("dit", "tracin", "grad_dot", "loss")
WINDOWS = ["w00 0-2", "w01 2-4", "w02 4-7", "w03 7-9", "w04 9-12"]
COMPARED = "by_window/ground_truth/spearman"


@dataclass(frozen=True)
class World:
    """What is there.

    Attributes:
        experiment: id of the experiment that holds two trainings, two influence runs on the first, one comparison.
        first, second: training runs.
        local, cumulative: influence runs.
        comparison: of :data:`METHODS`.
        said: what the terminal showed for ``local``.
        said_of_methods: what it showed for ``comparison``.
        hostile_experiment: id of the experiment with the workload of hostile.py.
        hostile: its influence run.
    """

    experiment: str
    first: str
    second: str
    local: str
    cumulative: str
    comparison: str
    said: str
    said_of_methods: str
    hostile_experiment: str
    hostile: str


def build(url: str, folder: Path) -> World:
    """Make it in the server at ``url``, with caches in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", url)
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.setenv("DIT_MLFLOW_CACHE", str(folder / "cache"))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
        mlflow.set_tracking_uri(url)
        try:
            return _built()
        finally:
            mlflow.set_tracking_uri(None)
            patch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)


def _built() -> World:
    experiment = mlflow.set_experiment("digits").experiment_id
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    said = run("influence", *small)
    run("train", "--init-seed", "1", *small)
    second, first = found(experiment, "training")
    run("influence", "--training-run", first, "--kind", "cumulative", "--windows", "2")
    cumulative, local = found(experiment, "influence")
    methods = ["--methods", ",".join(METHODS), "--subsets", "10"]
    said_of_methods = run("compare", "--training-run", first, *methods)
    (comparison,) = found(experiment, "comparison")
    hostile_experiment = mlflow.set_experiment("hostile").experiment_id
    run("influence", "--workload", "hostile:workload", "--windows", "2", "--ground-truth", "4", "--trust", "0")
    (hostile,) = found(hostile_experiment, "influence")
    return World(
        experiment, first, second, local, cumulative, comparison, said, said_of_methods, hostile_experiment, hostile
    )


def run(*arguments: str) -> str:
    """One job of the command line; returns what it printed."""
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def found(experiment: str, kind: str) -> list[str]:
    """Runs of a kind, the newest first."""
    return [run.info.run_id for run in MlflowClient().search_runs([experiment], f"tags.`dit.kind` = '{kind}'")]


def saved(world: World) -> str:
    return json.dumps(asdict(world))


def restored(text: str) -> World:
    return World(**json.loads(text))
