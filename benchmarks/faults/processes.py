"""Processes that record, ask and look: forked in milliseconds from one that has imported all that they need."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.faults.work"])

Ready = Callable[[], None]
HUNG = "hung"
WAIT_SECONDS = 400.0
"""How long a process may take before it counts as hung."""


class Worker:
    """Runs ``function(ready, *arguments)`` in a process of its own, in its own folder.

    Attributes:
        folder: its working folder; ``said.txt`` is what it printed, ``result.json`` what the function returned.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._ready = CONTEXT.Event()
        inside = (folder, dict(environment), self._ready, function, arguments)
        self._process = CONTEXT.Process(target=_run, args=inside)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def until_ready(self, seconds: float = 120.0) -> None:
        """Wait until the function calls ``ready()``, or ends."""
        deadline = time.monotonic() + seconds
        while not self._ready.wait(0.05) and self.running and time.monotonic() < deadline:
            pass

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def exit_code(self, seconds: float = WAIT_SECONDS) -> int | str:
        """The exit code; :data:`HUNG` if the process had to be killed."""
        self._process.join(seconds)
        if self.running:
            self.kill()
            return HUNG
        code = self._process.exitcode
        assert code is not None
        return code

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace")

    def noted(self, name: str = "result") -> Any:
        """What the function returned, or noted under a name on its way; ``None`` if it did not come so far."""
        path = self.folder / f"{name}.json"
        text = path.read_text() if path.is_file() else ""
        return json.loads(text) if text else None


def note(name: str, value: Any) -> None:
    """In a worker: keep a value for the process that looks at it."""
    Path(os.environ["RELIABILITY_FOLDER"], f"{name}.json").write_text(json.dumps(value))


def answer(folder: Path, environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own."""
    worker = Worker(folder, environment, function, *arguments)
    if code := worker.exit_code():
        raise RuntimeError(f"{function.__name__} ended with {code}:\n{worker.said[-4000:]}")
    return worker.noted()


def codes(workers: Sequence[Worker]) -> list[int | str]:
    """All exit codes; together, they may take :data:`WAIT_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    return [worker.exit_code(max(deadline - time.monotonic(), 1.0)) for worker in workers]


def _run(folder: Path, environment: dict[str, str], ready: Any, function: Callable[..., Any], arguments: Any) -> None:
    said = os.open(folder / "said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(said, number)
    os.close(said)
    (folder / "tmp").mkdir()
    # What is left behind goes with the folder.
    os.environ.update({"TMPDIR": str(folder / "tmp"), **environment, "RELIABILITY_FOLDER": str(folder)})
    os.chdir(folder)
    tempfile.tempdir = None
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = function(ready.set, *arguments)
    with suppress(OSError):
        note("result", result)
