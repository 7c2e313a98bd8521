"""Set up an environment beside this file and use it: ``python3 run.py influence`` or ``python3 run.py test``.

Needs Python 3.10 or later with pip, nothing else. The environment is ``.venv`` in this folder; it is made once
and brought up to date when pyproject.toml or constraints.txt change. Results of ``influence`` go to ``mlflow.db`` and
``mlruns`` in this folder, unless MLFLOW_TRACKING_URI says otherwise.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv"
SCRIPTS = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
USAGE = """usage: python3 run.py COMMAND [ARGUMENT ...]

  influence [-P name=value ...]   the main job: train, compute influence per window, log everything to MLflow
  ui [...]                        the MLflow UI on those results
  test [pytest argument ...]      the tests
  setup                           only make or update the environment"""


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    commands = {
        "influence": ["mlflow", "run", str(HERE), "-e", "influence", "--env-manager", "local"],
        "ui": ["mlflow", "ui"],
        "test": [str(PYTHON), "-m", "pytest"],
        "setup": [],
    }
    if not arguments or arguments[0] not in commands:
        print(USAGE, file=sys.stderr)
        return 2
    set_up()
    command = commands[arguments[0]]
    if not command:
        return 0
    if command[0] == "mlflow":
        command = [str(PYTHON), "-m", *command]
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(ENVIRONMENT)}
    return subprocess.run([*command, *arguments[1:]], cwd=HERE, env=environment, check=False).returncode


def set_up() -> None:
    """Make the environment, or bring it up to date; does nothing if it is."""
    stamp = ENVIRONMENT / "installed-from"
    wanted = hashlib.sha256(
        b"".join((HERE / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")) + str(HERE).encode()
    ).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted and PYTHON.exists():
        return
    if sys.version_info < (3, 10):  # noqa: UP036  (this file is also run by what is there)
        sys.exit(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}")
    print(f"setting up {ENVIRONMENT} (once; a few minutes)", file=sys.stderr)
    pip = make_environment()
    subprocess.run([*pip, "install", "-q", "-c", "constraints.txt", "-e", ".[dev]"], cwd=HERE, check=True)
    stamp.write_text(wanted)


def make_environment() -> list[str]:
    """Make ``.venv`` from scratch and return the command that runs pip in it."""
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=False)
    if made.returncode == 0:
        return [str(PYTHON), "-m", "pip"]
    # Some distributions leave ensurepip out of venv; the pip that runs us can install into it from outside.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(ENVIRONMENT)], check=True)
    return [sys.executable, "-m", "pip", "--python", str(PYTHON)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
