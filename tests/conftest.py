from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# One thread: the tests' models are small, and their subprocesses must replay with the same number.
os.environ["OMP_NUM_THREADS"] = "1"
# Nobody is told that tests ran; MLflow would also keep a number for this machine in the home folder.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parents[1] / ".pytest_cache" / "hypothesis"))

# What the tables measure is measured in every session, once for all its workers.
if "DIT_REPRODUCTION_MEMORY" not in os.environ:
    os.environ["DIT_REPRODUCTION_MEMORY"] = tempfile.mkdtemp(prefix="dit-reproduction-")
    atexit.register(shutil.rmtree, os.environ["DIT_REPRODUCTION_MEMORY"], ignore_errors=True)

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import litter
from browsing import browser, page, shot  # noqa: F401

torch.set_num_threads(1)
# What torch and MLflow leave in memory, a million objects, is walked seldom: it was a fifth of the tests' CPU time.
gc.set_threshold(50_000, 10, 10)

BEFORE = pytest.StashKey[set[Path]]()
LEFT_BEHIND = pytest.StashKey[list[Path]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    # Workers of pytest-xdist come and go within the session of the process that started them.
    if not hasattr(session.config, "workerinput"):
        session.config.stash[BEFORE] = litter.there()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if BEFORE in session.config.stash:
        session.config.stash[LEFT_BEHIND] = found = sorted(litter.there() - session.config.stash[BEFORE])
        if found and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if found := terminalreporter.config.stash.get(LEFT_BEHIND, []):
        terminalreporter.section("left behind by the tests", red=True)
        for path in found:
            terminalreporter.line(str(path))
