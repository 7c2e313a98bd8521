"""A trajectory in a remote artifact store: the manifest is downloaded at once, other files when first needed."""

from __future__ import annotations

import posixpath
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from mlflow.entities import Run

from dit_mlflow.errors import InputError, TrajectoryError, cause
from dit_mlflow.replay import Trajectory
from dit_mlflow.told import masked
from dit_mlflow.tracking.mlflow_internals import artifact_store, download_file
from dit_mlflow.tracking.store.cache import FileCache
from dit_mlflow.tracking.store.names import TRAJECTORY
from dit_mlflow.tracking.store.patience import asked_again, broken_off
from dit_mlflow.trajectory.manifest import FILE_NAME, FileEntry

MANIFEST_BYTES = 256 * 2**20
"""Largest manifest that is downloaded."""


def open_remote(run: Run) -> Trajectory | None:
    """The trajectory of a run, read through the user's file cache; ``None`` if the run has none.

    Raises:
        InputError: the store cannot be read, or the cache folder cannot be used.
        TrajectoryError: the manifest, or a file that it names, is missing in the store or has another size there.
    """
    files = RemoteFiles(run, FileCache.of_user())
    if not files.sizes:
        return None
    folder = mkdtemp(prefix="dit-mlflow-")
    try:
        files.fetch_manifest(Path(folder))
        with files.named(FILE_NAME):
            trajectory = Trajectory.open(folder, fetch=files)
        files.compare(trajectory.manifest.files)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(trajectory, shutil.rmtree, folder, ignore_errors=True)
    return trajectory


class RemoteFiles:
    """Fetches the files of a run's trajectory, through a cache.

    Attributes:
        sizes: bytes by file name, as the store lists them; ``None`` where it does not say.
    """

    def __init__(self, run: Run, cache: FileCache) -> None:
        self._run = run
        self._cache = cache
        self._held: dict[str, Path] = {}
        with reading(run, f"{TRAJECTORY}/"):
            # Made once, with the current tracking URI: later calls must not read another store.
            self._store = artifact_store(_uri(run))
        self.sizes = self._listing()

    def __call__(self, name: str, entry: FileEntry) -> Path:
        """The local path of the file, whose size and SHA-256 are those of ``entry``.

        Raises:
            InputError: the store cannot be read, or the cache folder cannot be used.
            TrajectoryError: the file in the store has another size or checksum.
        """
        held = self._held.get(name)
        if held is None or not self._cache.touch(held):
            with self.named(name):
                held = self._cache.get(entry.sha256, entry.size, lambda folder: self._download(name, folder))
            self._held[name] = held
        return held

    def fetch_manifest(self, folder: Path) -> None:
        """Download ``manifest.json`` into ``folder``; it is not cached, since no checksum of it is known."""
        with self.named(FILE_NAME):
            if FILE_NAME not in self.sizes:
                raise TrajectoryError("missing; expected a training run of dit-mlflow")
            if (self.sizes[FILE_NAME] or 0) > MANIFEST_BYTES:
                raise TrajectoryError(f"{self.sizes[FILE_NAME]} bytes; expected {MANIFEST_BYTES} at most")
            self._download(FILE_NAME, folder)

    def compare(self, files: dict[str, FileEntry]) -> None:
        """Compare the names and sizes in a manifest with the store, without a download."""
        # Listed again, since a running training may have added files before it replaced the manifest.
        self.sizes = self._listing()
        for name, entry in files.items():
            with self.named(name):
                if name not in self.sizes:
                    raise TrajectoryError("missing; log the trajectory again")
                # Checked before the download, which may be of any length.
                if self.sizes[name] not in (entry.size, None):
                    raise TrajectoryError(f"{self.sizes[name]} bytes, recorded {entry.size}; log the trajectory again")

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Name the file and the run in errors."""
        try:
            yield
        except TrajectoryError as error:
            raise TrajectoryError(f"{TRAJECTORY}/{name} of {_described(self._run)}: {error}") from error

    def _download(self, name: str, folder: Path) -> Path:
        path = folder / name
        with reading(self._run, f"{TRAJECTORY}/{name}"):
            asked_again(partial(download_file, self._store, f"{TRAJECTORY}/{name}", path), broken_off)
        return path

    def _listing(self) -> dict[str, int | None]:
        with reading(self._run, f"{TRAJECTORY}/"):
            found = asked_again(partial(self._store.list_artifacts, TRAJECTORY), broken_off)
        return {posixpath.basename(item.path): item.file_size for item in found if not item.is_dir}


@contextmanager
def reading(run: Run, what: str) -> Iterator[None]:
    """Turn any error of an artifact store into an :class:`InputError` that names run, file and store."""
    try:
        yield
    except Exception as error:  # Each store raises its own: of requests, botocore, a missing library …
        said = f"{type(error).__name__}: {error}".rstrip(".")
        raise InputError(
            f"cannot read {what} of {_described(run)}: {said}; check that the store can be reached "
            "from here, that its client library is installed, and that your credentials may read there"
        ) from cause(error)


def _described(run: Run) -> str:
    return f"run {run.info.run_id} ({run.info.run_name}) in {masked(_uri(run))}"


def _uri(run: Run) -> str:
    return str(run.info.artifact_uri)
