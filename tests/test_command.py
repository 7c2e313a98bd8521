"""What people are told to run next is in the form in which they called."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

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


def test_help_of_every_command_shows_choices_and_no_empty_default() -> None:
    """In the words of the README: explain, evaluate, compare, cleanse, follow and ui are all there."""
    names = {"influence", "explain", "evaluate", "compare", "cleanse", "follow", "ui", "train", "verify", "register"}
    assert set(cli.cli.commands) == names
    assert cli.cli.commands["explain"] is cli.cli.commands["influence"]
    for name in names - {"ui"}:  # Whose help is that of mlflow ui.
        told = CliRunner().invoke(cli.cli, [name, "--help"], prog_name="dit-mlflow")
        assert told.exit_code == 0
        assert "[default: ]" not in told.output and 'default: ""' not in told.output
    told = CliRunner().invoke(cli.cli, ["cleanse", "--help"])
    assert "[drop|relabel|reweight]" in told.output and "[local|final|cumulative]" in told.output


def test_shells_complete_commands_and_choices() -> None:
    environment = {"COMP_WORDS": "dit-mlflow cleanse --action re", "COMP_CWORD": "3"}
    told = CliRunner().invoke(
        cli.cli, env={**environment, "_DIT_MLFLOW_COMPLETE": "bash_complete"}, prog_name="dit-mlflow"
    )
    assert told.output.split() == ["plain,relabel", "plain,reweight"]


def test_run_py_gives_parameters_as_options() -> None:
    with_options = runpy.run_path(str(Path(__file__).parents[1] / "run.py"))["with_options"]
    found = with_options(["-P", "training_run=abc", "-P", "drop=-1=2", "--port", "5001", "-P", "n_train=4"])
    assert found == ["--training-run=abc", "--drop=-1=2", "--port", "5001", "--n-train=4"]
    context = cli.cli.commands["influence"].make_context("influence", [*found[:2], found[-1]])
    assert context.params["training_run"] == "abc"
    assert cli.parse_settings(context.args) == {"drop": "-1=2", "n_train": "4"}


def test_ui_shows_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mine.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    calls: list[tuple[list[str], str]] = []

    def started(program: str, command: list[str], environment: dict[str, str]) -> None:
        calls.append((command[1:], environment["MLFLOW_BACKEND_STORE_URI"]))
        raise SystemExit(0)

    monkeypatch.setattr(cli.os, "execve", started)
    assert CliRunner().invoke(cli.cli, ["ui", "--port", "5001"]).exit_code == 0
    assert calls == [(["-m", "mlflow", "ui", "--port", "5001"], uri)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@example.org:5000")
    refused = CliRunner().invoke(cli.cli, ["ui"])
    assert refused.exit_code == 1 and "results are on a server" in refused.output and "secret" not in refused.output
