"""Set up an environment beside this file and use it: ``python3 run.py influence`` or ``python3 run.py test``.

Needs Python 3.10 or later with pip, nothing else. The environment is ``.venv`` in this folder; it is made once
and brought up to date when pyproject.toml or constraints.txt change. Results go to ``mlflow.db`` and ``mlruns`` in this
folder, unless MLFLOW_TRACKING_URI says otherwise.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv"
SCRIPTS = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
JOBS = ("influence", "explain", "evaluate", "compare", "cleanse", "register", "train", "follow", "verify", "ui")
"""Commands of ``dit-mlflow``."""
COMMANDS = {
    **{job: ["-m", "dit_mlflow.cli", job] for job in JOBS},
    "reproduce": ["-m", "mlflow", "run", str(HERE), "-e", "reproduce", "--env-manager", "local"],
    "test": ["-m", "pytest"],
    "docs": ["-m", "sphinx", "-W", "--keep-going", "-b", "html", str(HERE / "docs"), str(HERE / "build" / "docs")],
    "setup": ["-c", "pass"],
}
USAGE = """usage: python3 run.py COMMAND [ARGUMENT ...]

  influence [-P name=value ...]   the main job: train, compute influence per window, log everything (or: explain)
  evaluate -P scores=FILE.csv     scores computed elsewhere, held against exact retraining
  compare [-P name=value ...]     methods side by side: fidelity, detection, cost
  cleanse [-P name=value ...]     drop the samples that influence flags, train again, see whether it helped
  reproduce [-P name=value ...]   the paper's tables, on its data: docs/reproduction.md
  register -P name=value ...      keep influence with the model: influence_run=ID and model_name=NAME
  train, follow, verify           as dit-mlflow: docs/commands.md
  ui [--port N ...]               the MLflow UI on those results
  test [pytest argument ...]      the tests
  docs [sphinx argument ...]      this project's pages as a site, in build/docs; runs the tutorial, fails on warnings
  setup                           only make or update the environment, with what the tests need"""


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE, file=sys.stderr)
        return 2
    name, *rest = arguments
    extras = {
        "test": "[dev]",
        "setup": "[dev]",
        "docs": "[docs]",
        "compare": "[methods]",
        "evaluate": "[methods]",
        "reproduce": "[methods]",
    }
    set_up(extras.get(name, ""))
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{(HERE / 'mlflow.db').as_posix()}",
        **os.environ,
        "PATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")]),
        "VIRTUAL_ENV": str(ENVIRONMENT),
    }
    if name == "test":
        environment.pop("MLFLOW_TRACKING_URI")
    if name in JOBS:
        # What people are told to run next is then written so too.
        environment["DIT_CALLED_AS"] = shlex.join(["python3", sys.argv[0]])
        rest = with_options(rest)
    command = [str(PYTHON), *COMMANDS[name], *rest]
    os.chdir(HERE)
    if os.name != "nt":
        # In place of this process, so that signals reach the command.
        os.execve(command[0], command, environment)
    return subprocess.run(command, env=environment, check=False).returncode


def with_options(arguments: list[str]) -> list[str]:
    """``-P name=value`` as the option ``--name=value``; the rest as it is."""
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-P" and rest and "=" in rest[0]:
            name, _, value = rest.pop(0).partition("=")
            found.append(f"--{name.replace('_', '-')}={value}")
        else:
            found.append(argument)
    return found


def set_up(extras: str) -> None:
    """Make the environment, or bring it up to date; does nothing if it is."""
    # What the tests need holds all that the rest needs, but for the site.
    enough = (extras,) if extras == "[docs]" else (extras, "[dev]")
    stamps = [ENVIRONMENT / f"installed{installed}" for installed in dict.fromkeys(enough)]
    sources = [(HERE / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"".join([*sources, str(HERE).encode()])).hexdigest()
    if PYTHON.exists() and any(stamp.is_file() and stamp.read_text() == wanted for stamp in stamps):
        return
    if sys.version_info < (3, 10):  # noqa: UP036  (this file is also run by what is there)
        sys.exit(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}")
    print(f"setting up {ENVIRONMENT} (once; it downloads about 1 GB and takes some minutes)", file=sys.stderr)
    pip = pip_of_environment()
    subprocess.run([*pip, "install", "-q", "-c", "constraints.txt", "-e", f".{extras}"], cwd=HERE, check=True)
    stamps[0].write_text(wanted)


def pip_of_environment() -> list[str]:
    """The command that runs pip in ``.venv``, which is made if it is not there or was made elsewhere."""
    own_pip = [str(PYTHON), "-m", "pip"]
    if PYTHON.exists() and subprocess.run([*own_pip, "--version"], capture_output=True, check=False).returncode == 0:
        return own_pip
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=False)
    if made.returncode == 0:
        return own_pip
    # Some distributions leave ensurepip out of venv; the pip that runs us can install into it from outside.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(ENVIRONMENT)], check=True)
    return [sys.executable, "-m", "pip", "--python", str(PYTHON)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
