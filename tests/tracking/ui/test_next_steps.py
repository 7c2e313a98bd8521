"""The commands that a page suggests are ones that the command line takes, with the run's own ids."""

from __future__ import annotations

import os
import shlex
import sys

import pytest
from mlflow.entities import Param, Run, RunData, RunInfo

from dit_mlflow import cli
from dit_mlflow.command import CALLED_AS
from dit_mlflow.tracking.ui.next_steps import next_steps, rest_of_scores


def training(workload: str) -> Run:
    info = RunInfo("trained", "0", "me", "FINISHED", 0, 1, "active")
    return Run(info, RunData(params=[Param("resolved.workload", workload)] if workload else []))


@pytest.mark.parametrize(
    ("workload", "named"),
    [("projects/mnist", ""), ("mine.jobs:workload", "mine.jobs:workload"), ("", "package.module:function")],
)
def test_commands_are_taken_and_name_runs_and_workload(
    monkeypatch: pytest.MonkeyPatch, workload: str, named: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/dit-mlflow", "influence"])
    found = {}
    for _, line in next_steps(training(workload), "answered"):
        program, job, *arguments = shlex.split(line)
        assert program == "dit-mlflow"
        found[job] = cli.cli.commands[job].make_context(job, arguments).params
    assert list(found) == ["cleanse", "compare", "influence", "register"]
    for job in ("cleanse", "compare", "influence"):
        assert (found[job]["training_run"], found[job]["workload"]) == ("trained", named)
    assert found["influence"]["windows"] == "epochs"
    assert (found["register"]["influence_run"], found["register"]["model_name"]) == ("answered", "<name>")


def test_from_run_py_they_are_of_run_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, CALLED_AS, "python3 run.py")
    (_, first), *_ = next_steps(training("projects/mnist"), "answered")
    assert first == "python3 run.py cleanse -P training_run=trained"


def test_where_the_rest_is_names_files_of_the_run() -> None:
    told = rest_of_scores("answered")
    assert "answered: influence/scores.parquet" in told
    assert "influence/whole_run/scores.parquet" in told
