"""Uploads what a recorder writes to the artifact store of a run, in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient

from dit_mlflow.recording.folder import Written
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.store.names import TRAJECTORY
from dit_mlflow.trajectory.manifest import FILE_NAME

RETRY_SECONDS = 30.0
"""Wait before the next try after a failure; there is one more try at the end."""

logger = logger_of(__name__)


class Upload:
    """Uploads files in the order in which they are written, a manifest after the files that it lists.

    At any moment the store holds a trajectory that can be opened, or none. Only names are kept in memory; the files
    stay in their folder until all are uploaded. An unreachable store is logged once and tried again.

    Args:
        folder: of the files.
        run_id: the run that gets them as ``trajectory/``.

    Attributes:
        failure: the error of the last attempt; ``None`` if it succeeded.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        self.failure: Exception | None = None
        self._client = MlflowClient(mlflow.get_tracking_uri())
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._manifest: bytes | None = None
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dit-mlflow-upload", daemon=True)
        self._thread.start()

    def __call__(self, written: Written) -> None:
        """Queue new files; returns at once."""
        with self._lock:
            self._names += written.names
            self._manifest = written.manifest
        self._wake.set()

    def finish(self) -> None:
        """Wait until everything is uploaded or has failed once more."""
        self._ending.set()
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ending.is_set():
            self._wake.wait()
            self._wake.clear()
            if not self._attempt():
                self._ending.wait(RETRY_SECONDS)
                self._wake.set()
        self._attempt()

    def _attempt(self) -> bool:
        with self._lock:
            names, self._names = self._names, []
            manifest, self._manifest = self._manifest, None
        try:
            while names:
                self._client.log_artifact(self.run_id, str(self.folder / names[0]), TRAJECTORY)
                names.pop(0)
            if manifest is not None:
                self._send(manifest)
        except Exception as error:  # Any kind: stores raise what their libraries raise.
            self._keep(names, manifest, error)
            return False
        if self.failure is not None:
            logger.warning("the trajectory of run %s is being uploaded again; nothing is missing", self.run_id)
        self.failure = None
        return True

    def _send(self, manifest: bytes) -> None:
        with TemporaryDirectory() as temporary:
            path = Path(temporary) / FILE_NAME
            path.write_bytes(manifest)
            self._client.log_artifact(self.run_id, str(path), TRAJECTORY)

    def _keep(self, names: list[str], manifest: bytes | None, error: Exception) -> None:
        with self._lock:
            self._names = names + self._names
            self._manifest = self._manifest or manifest
        if self.failure is None:
            logger.warning(
                "the trajectory of run %s cannot be uploaded: %s: %s. Training goes on; the trajectory is kept in %s, "
                "and uploading is tried again",
                *(self.run_id, type(error).__name__, error, self.folder),
            )
        self.failure = error
