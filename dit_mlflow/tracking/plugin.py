"""MLflow run-context provider: tags each run with the version and commit of dit_mlflow that made it.

MLflow loads this module in every process that has the package installed, so it imports nothing heavy.
"""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from mlflow.tracking.context.abstract_context import RunContextProvider

import dit_mlflow
from dit_mlflow.tracking.store.names import COMMIT, DIRTY, VERSION

WORKING_MODULE = "dit_mlflow.trajectory"
"""Loaded in exactly the processes that record or read trajectories."""


class DitRunContext(RunContextProvider):
    """Tags runs that a process which uses dit_mlflow starts.

    ``dit.version`` always; ``dit.commit`` and ``dit.dirty`` (``true`` if tracked or new files differ from the commit)
    when the package is used from a git checkout.
    """

    def in_context(self) -> bool:
        """Whether this process works with trajectories; ``import dit_mlflow`` alone does not count."""
        return WORKING_MODULE in sys.modules

    def tags(self) -> dict[str, str]:
        """The tags; empty values never occur."""
        return {VERSION: dit_mlflow.__version__, **tree_tags(Path(dit_mlflow.__file__).parents[1])}


@lru_cache(maxsize=4)
def tree_tags(tree: Path) -> dict[str, str]:
    """Commit and dirtiness of the checkout at ``tree``; empty if it is no checkout or git is missing."""
    if not (tree / ".git").exists():
        return {}
    try:
        commit = _git(tree, "rev-parse", "HEAD")
        changes = _git(tree, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {COMMIT: commit, DIRTY: "true" if changes else "false"}


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
