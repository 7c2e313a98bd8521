"""Commands that people are told to run next, in the form in which this process was called."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

CALLED_AS = "DIT_CALLED_AS"
"""Environment variable in which run.py tells its children how it was called."""


def command(job: str, **options: str) -> str:
    """A job (``influence``, ``register``, …) with its options: ``python3 run.py job``, ``mlflow run … -e job`` or
    ``dit-mlflow job``, as this process was called.
    """
    if called := os.environ.get(CALLED_AS):
        start = f"{called} {job}"
    elif _of_project():
        start = f"mlflow run {shlex.quote(str(Path.cwd()))} -e {job} --env-manager local"
    else:
        start = f"dit-mlflow {job}"
    return " ".join([start, *(option(name, value) for name, value in options.items())])


def option(name: str, value: str) -> str:
    """``-P training_run=value`` or ``--training-run value``."""
    if os.environ.get(CALLED_AS) or _of_project():
        return f"-P {name}={value}"
    return f"--{name.replace('_', '-')} {value}"


def ui_command() -> str:
    """The command that starts the MLflow UI; it works without run.py's environment being active."""
    called = os.environ.get(CALLED_AS)
    return f"{called} ui" if called else "mlflow ui"


def _of_project() -> bool:
    """Whether MLproject called: it runs the module's file in the project's folder."""
    return Path(sys.argv[0]).parts[-2:] == ("dit_mlflow", "cli.py") and Path("MLproject").is_file()
