"""What people are told to run next is in the form in which they called."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click
import pytest

from dit_mlflow import cli
from dit_mlflow.command import CALLED_AS, command, option, ui_command


def asked(job: str, **options: str) -> click.Context:
    """What click makes of a command of ``dit-mlflow``."""
    program, name, *arguments = shlex.split(command(job, **options))
    assert program == "dit-mlflow"
    return cli.cli.commands[name].make_context(name, arguments)


def test_from_the_console_script_the_command_is_one_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/dit-mlflow", "train"])
    assert command("influence", training_run="abc") == "dit-mlflow influence --training-run abc"
    assert asked("influence", training_run="abc", workload="a.b:c").params["training_run"] == "abc"
    assert asked("register", influence_run="abc", model_name="mine").params["model_name"] == "mine"
    assert option("influence_model", "<id>") == "--influence-model <id>"
    assert ui_command() == "mlflow ui"


def test_from_mlflow_run_it_names_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the shell need not be in; without an MLproject, the same module was called by hand."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [cli.__file__, "train"])
    assert command("influence") == "dit-mlflow influence"
    (folder / "MLproject").touch()
    assert shlex.split(command("influence", training_run="abc")) == [
        *("mlflow", "run", str(folder), "-e", "influence", "--env-manager", "local", "-P", "training_run=abc")
    ]
    assert option("model", "<id>") == "-P model=<id>"


def test_from_run_py_it_is_run_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the path that it was called by, whose environment need not be active."""
    monkeypatch.setitem(os.environ, CALLED_AS, "python3 ../run.py")
    monkeypatch.setattr(sys, "argv", [cli.__file__, "train"])
    assert command("influence", training_run="abc") == "python3 ../run.py influence -P training_run=abc"
    assert ui_command() == "python3 ../run.py ui"
