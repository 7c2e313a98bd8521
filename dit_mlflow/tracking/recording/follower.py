"""Influence while training runs: ``dit-mlflow follow`` in a process of its own, beside the trainer."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import mkdtemp
from threading import Thread

import mlflow
from mlflow.entities import Run

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.figures import FOLLOW_SECONDS, STEPS_BEHIND
from dit_mlflow.progress import say
from dit_mlflow.recording.folder import Written
from dit_mlflow.told import logger_of, told
from dit_mlflow.tracking.store.artifacts import artifact_folder
from dit_mlflow.tracking.store.run_log import CHOSEN, CHOSEN_ID
from dit_mlflow.workload import Workload
from dit_mlflow.workload.projects import find_factory

LOG = "follow.log"
"""What the follower says: an artifact of the training run, if the store is local."""

PRIORITY = 10
"""Added to the niceness of the trainer: where both want a core, the trainer gets it."""

logger = logger_of(__name__)


@dataclass(frozen=True)
class Followed:
    """What a follower is told.

    Attributes:
        reference: the workload's name, by which another process loads it. The user has given it, no record.
        every: steps of a window; 0 = a window for each epoch.
    """

    reference: str
    every: int

    @classmethod
    def of(cls, workload: Workload | None, live: bool | int) -> Followed:
        """By the arguments of :func:`~dit_mlflow.tracking.record_trajectory`.

        Raises:
            InputError: the workload has no name, or ``live`` is no number of steps.
            WorkloadError: nothing of that name can be imported.
        """
        if live is not True and live < 1:
            raise InputError(f"live={live}; expected True (a window for each epoch), or the steps of a window")
        reference = None if workload is None else workload.reference
        if reference is None or reference.startswith("__main__:"):
            got = "no workload" if workload is None else "one that was built in this process"
            raise InputError(
                f"live={live} has another process load the workload by its name, and got {reference or got}; expected "
                "a workload=load_workload('package.module:function'), with the function in a file that can be "
                "imported, or a project folder"
            )
        find_factory(reference)
        return cls(reference, 0 if live is True else live)


class Follower:
    """Starts ``dit-mlflow follow`` when a record is first written, and tells it when the record has ended.

    The trainer never waits for it, and does not fail with it. The follower ends by itself: after the last window when
    it is told, or when the trainer's process is gone, whose end of a pipe the system closes.

    Args:
        run: that records.
        followed: what it is told to do.
    """

    def __init__(self, run: Run, followed: Followed) -> None:
        self._run, self._followed = run, followed
        self._process: Popen[bytes] | None = None
        self._wanted = True

    def __call__(self, written: Written) -> None:
        """Start it, once: there is something to read. A failure is logged."""
        if not self._wanted or self._process is not None:
            return
        try:
            self._start()
        except OSError as error:
            self._wanted = False
            logger.warning("training is not followed: %s: %s", type(error).__name__, error)

    def _start(self) -> None:
        run_id, folder = self._run.info.run_id, artifact_folder(self._run.info.artifact_uri)
        log = (folder or Path(mkdtemp(prefix="dit-mlflow-"))) / LOG
        windows = ["--workload", self._followed.reference, "--every", str(self._followed.every)]
        command = [sys.executable, "-m", "dit_mlflow.cli", "follow", run_id, *windows]
        command += ["--until-input-ends", "--patience", "inf"]
        with log.open("ab") as output:
            # In a session of its own: Ctrl-C ends the trainer, after which the follower comes to its end.
            process = Popen(
                command, stdin=PIPE, stdout=output, stderr=STDOUT, env=self._environment(), start_new_session=True
            )
        self._process = process
        with suppress(AttributeError, OSError):  # Windows, or a Mac; a process that has ended.
            os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + PRIORITY)
            # Linux may share the cores among sessions first, and among the processes of each then.
            Path(f"/proc/{process.pid}/autogroup").write_text(str(PRIORITY), encoding="ascii")
        say(
            told(
                f"process {process.pid} follows run {run_id}: influence of each window as soon as it is recorded. A "
                "window costs it a replay and two to three times its steps; its run logs the seconds "
                f"({FOLLOW_SECONDS.name}) and how far training is ahead ({STEPS_BEHIND.name}). It says more in {log}"
            )
        )
        Thread(target=self._watch, args=(process, log), name="dit-mlflow-follower", daemon=True).start()

    def _environment(self) -> dict[str, str]:
        """Ours, with what was set in Python; the trainer's own run is not handed over, as ``mlflow run`` does."""
        kept = {name: value for name, value in os.environ.items() if name not in (CHOSEN, "MLFLOW_RUN_ID")}
        return {
            **kept,
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            CHOSEN_ID: self._run.info.experiment_id,
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
            "PYTHONUNBUFFERED": "1",
        }

    def _watch(self, process: Popen[bytes], log: Path) -> None:
        code = process.wait()
        if code and self._wanted:
            with suppress(OSError):
                said = log.read_text(encoding="utf-8", errors="replace").strip()
                logger.warning(
                    "run %s is no longer followed (exit code %d), and training goes on: %s; more in %s",
                    *(self._run.info.run_id, code, said.rpartition("\n")[2], log),
                )

    def end(self) -> None:
        """The record is whole, or training has failed: the follower may come to its end, and is not waited for."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # It has ended.
                # Said, not only closed: a worker of a data loader may hold the pipe too.
                self._process.stdin.write(b"\n")
                self._process.stdin.close()

    def give_up(self) -> None:
        """Nothing was recorded: stop it. It has no run yet."""
        self._wanted = False
        if self._process is not None:
            self._process.kill()
