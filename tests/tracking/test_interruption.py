"""A job that is broken off, or loses its store, leaves a clear end."""

from __future__ import annotations

import os
import subprocess
import sys

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from dit_mlflow.cli import cli

INTERRUPTED_IMPORT = """
import sys

class Interrupt:
    # Once, as a person does who sees the typing error.
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

from dit_mlflow.cli import cli

sys.meta_path.insert(0, Interrupt())
cli(["influence", "--kind", "local"])
"""


def test_an_interruption_of_the_imports_ends_the_run_that_mlflow_made(store: str) -> None:
    run = MlflowClient().create_run("1")
    environment = {**os.environ, "MLFLOW_RUN_ID": run.info.run_id}
    command = [sys.executable, "-c", INTERRUPTED_IMPORT]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode != 0
    found = mlflow.get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["dit.error"]) == ("FAILED", "KeyboardInterrupt()"), ended.stderr


def test_the_reason_is_told_although_the_run_is_gone(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "beef")
    finished = CliRunner().invoke(cli, ["influence", "--kind", "foo"])
    assert finished.exit_code == 1
    assert isinstance(finished.exception, SystemExit)
    assert "kind='foo'" in finished.output
