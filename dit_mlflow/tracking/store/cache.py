"""A cache of downloaded files, shared by a user's processes; a file's name is its SHA-256."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.tensor_file import sha256 as digest_of

FOLDER = "DIT_MLFLOW_CACHE"
"""Environment variable: the folder that holds the cache, ``dit-mlflow``. Default: the user's cache folder."""
LIMIT = "DIT_MLFLOW_CACHE_GB"
"""Environment variable: the size to which the cache is cut after a download, in GB (10^9 bytes)."""
DEFAULT_GB = 10.0

IN_USE_SECONDS = 60.0
"""A file used more recently is not removed: another process may be about to open it."""
ABANDONED_SECONDS = 24 * 3600.0
"""The process of a download older than this is taken to be gone."""
_PART = "part-"
_SHA256 = re.compile("[0-9a-f]{64}")

_logger = logger_of(__name__)


class FileCache:
    """Downloaded files by checksum; the least recently used are removed first.

    Safe for several processes: a file appears under its name in one step, complete. Two processes that need the same
    file at the same moment both download it.

    Attributes:
        folder: of the files; made when needed, open to this user only, and refused if it is another user's.
        limit: bytes to which the cache is cut after a download. Files used within the last minute are kept anyway.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def of_user(cls) -> FileCache:
        """The cache that the environment variables :data:`FOLDER` and :data:`LIMIT` describe.

        Raises:
            InputError: the size is not a number of GB, 0 or more.
        """
        text = os.environ.get(LIMIT, "") or str(DEFAULT_GB)
        try:
            size = float(text)
        except ValueError:
            size = -1.0
        if not size >= 0:
            raise InputError(f"{LIMIT}={text!r}; expected a number of GB, 0 or more, such as {DEFAULT_GB:g}")
        parent = Path(os.environ.get(FOLDER, "") or _user_cache())
        return cls(parent.absolute() / "dit-mlflow", size * 1e9)

    def get(self, sha256: str, size: int, download: Callable[[Path], Path]) -> Path:
        """A file with this checksum, downloaded if it is not here or is damaged.

        Args:
            sha256: 64 lower-case hexadecimal digits.
            size: bytes.
            download: puts the file below the given empty folder and returns its path.

        Raises:
            InputError: the cache folder cannot be used (no permission, no space, another user's).
            TrajectoryError: the download has another size or checksum, or ``sha256`` is not a SHA-256.

        Cost: beside the download, one read of the file to check it.
        """
        # It becomes a file name, and comes from a manifest that anyone may have written.
        if not _SHA256.fullmatch(sha256):
            raise TrajectoryError(f"{sha256[:80]!r} is not a SHA-256; record again")
        path = self.folder / sha256
        try:
            self._make_folder()
            if self.touch(path) and _is_whole(path, sha256, size):
                return path
            with TemporaryDirectory(dir=self.folder, prefix=_PART) as temporary:
                arrived = download(Path(temporary))
                _check(arrived, sha256, size)
                arrived.replace(path)
            _logger.info("downloaded %d bytes as %s", size, path)
            self._cut_back()
        except OSError as error:
            raise InputError(
                f"the cache folder {self.folder} cannot take {size} bytes: {error}; set {FOLDER} to a folder that can "
                f"be written to and has space, or {LIMIT} to a smaller size"
            ) from error
        return path

    def touch(self, path: Path) -> bool:
        """Mark a file of the cache as used; returns whether it is still there."""
        try:
            os.utime(path, follow_symlinks=os.utime not in os.supports_follow_symlinks)
        except FileNotFoundError:
            return False
        return True

    def _make_folder(self) -> None:
        """The folder, closed to others: who can write to it may swap a file between its check and its use."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform == "win32":  # Its modes say nothing; the user's folders have access lists.
            return
        found = self.folder.stat()
        owners = {found.st_uid, self.folder.lstat().st_uid}
        if owners != {os.geteuid()}:
            raise InputError(
                f"the cache folder {self.folder} belongs to another user (number {min(owners - {os.geteuid()})}); set "
                f"{FOLDER} to a folder of your own"
            )
        if found.st_mode & 0o077:
            self.folder.chmod(0o700)

    def _cut_back(self) -> None:
        """Remove the least recently used files until the rest fits, and abandoned downloads."""
        now = time.time()
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # Another process was faster.
            if _SHA256.fullmatch(path.name):
                kept.append((found.st_mtime, found.st_size, path))
            elif path.name.startswith(_PART) and now - found.st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        total = sum(size for _, size, _ in kept)
        for used, size, path in sorted(kept):
            if total <= self.limit or now - used < IN_USE_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= size


def _is_whole(path: Path, sha256: str, size: int) -> bool:
    try:
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_size == size and digest_of(path) == sha256
    except FileNotFoundError:
        return False  # Another process removed it just now.


def _check(path: Path, sha256: str, size: int) -> None:
    if path.stat().st_size != size:
        raise TrajectoryError(f"{path.stat().st_size} bytes arrived, recorded {size}; log the trajectory again")
    if (found := digest_of(path)) != sha256:
        raise TrajectoryError(f"SHA-256 {found[:12]}… arrived, recorded {sha256[:12]}…; log the trajectory again")


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
