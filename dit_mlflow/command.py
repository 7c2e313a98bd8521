"""Commands that messages suggest, in the form in which this process was called, so that they work there."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

CALLED_AS = "DIT_CALLED_AS"
"""Set by run.py to the command by which it was called."""


def command(job: str, **options: str) -> str:
    """A job (``influence``, ``register``, …) with its options, in the form of :func:`option`.

    From run.py: ``python3 run.py job``; from ``mlflow run``: the same with this project, whatever the shell's folder;
    from anything else: the console script ``dit-mlflow``.
    """
    if called := os.environ.get(CALLED_AS):
        start = f"{called} {job}"
    elif _of_project():
        start = f"mlflow run {shlex.quote(str(Path.cwd()))} -e {job} --env-manager local"
    else:
        start = f"dit-mlflow {job}"
    return " ".join([start, *(option(name, value) for name, value in options.items())])


def option(name: str, value: str) -> str:
    """``-P training_run=value`` or ``--training-run value``; a switch is ``-P name=true`` or ``--name``."""
    if os.environ.get(CALLED_AS) or _of_project():
        return f"-P {_quoted(f'{name}={value}')}"
    switch = f"--{name.replace('_', '-')}"
    return switch if value == "true" else f"{switch} {_quoted(value)}"


def _quoted(value: str) -> str:
    """For a shell; placeholders such as ``<id>`` and ``projects/…`` as they are."""
    plain = re.fullmatch(r"(\w+=)?(<\w+>|[\w@%+=:,./…-]+)", value)
    return value if plain else shlex.quote(value)


def ui_command() -> str:
    """The command that starts the MLflow UI; with run.py, no environment need be active."""
    called = os.environ.get(CALLED_AS)
    return f"{called} ui" if called else "mlflow ui"


def _of_project() -> bool:
    """Whether MLproject called: it does so by the module's name, in the project's folder."""
    return Path(sys.argv[0]).parts[-2:] == ("dit_mlflow", "cli.py") and Path("MLproject").is_file()
