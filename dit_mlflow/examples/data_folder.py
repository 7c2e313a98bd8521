"""Where the files of a data set are: a folder that the user names, or one to download into."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from dit_mlflow.errors import WorkloadError


def folder_of(data_dir: str, expected: str) -> Path:
    """``data_dir`` as an absolute path that exists.

    Raises:
        WorkloadError: there is nothing of that name; the message says what was ``expected`` there.
    """
    path = Path(data_dir).expanduser().resolve()
    if not path.exists():
        raise WorkloadError(f"data_dir={data_dir!r}: there is no {path}; expected {expected}")
    return path


def download_folder() -> Path:
    """Where downloads are kept: ``dit-mlflow-data`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-mlflow-data"


def torchvision(expected: str) -> ModuleType:
    """``torchvision.datasets``, which downloads.

    Raises:
        WorkloadError: it is not installed; the message says what is ``expected`` in ``data_dir`` instead.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise WorkloadError(
            f"without data_dir, the data is downloaded through torchvision, which cannot be imported ({error}); "
            f"give data_dir: {expected}"
        ) from error
