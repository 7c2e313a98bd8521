"""What a session of tests leaves behind: nothing in the clone, beside it or at home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

REPOSITORY = Path(__file__).parents[1]
OF_TOOLS = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".mypy_cache", "__pycache__"}
"""Beside other work in the same clone; .gitignore has them."""
OF_STORES = {"mlflow.db", "mlruns", "mlartifacts", "artifacts", "trajectory", "influence", "dit-mlflow"}
OF_PROGRAMS = (".config/mlflow", ".config/chromium", ".cache/dit-mlflow", ".cache/dconf")
"""Below the home folder, of what the tests start."""


def there() -> set[Path]:
    """All in the clone's root; of its parent and the home folder, where other programs write, what tests could make."""
    found = {path for path in REPOSITORY.iterdir() if path.name not in OF_TOOLS and path not in _asked_for()}
    for folder in {REPOSITORY.parent, Path.home()} - {REPOSITORY}:
        found |= {path for path in folder.iterdir() if _of_a_store(path)}
    return found | {path for path in map(Path.home().joinpath, OF_PROGRAMS) if path.exists()}


def _asked_for() -> set[Path]:
    """Where pictures are to be kept."""
    folder = os.environ.get("DIT_SCREENSHOTS")
    return {*Path(folder).absolute().parents, Path(folder).absolute()} if folder else set()


def _of_a_store(path: Path) -> bool:
    """Whether it has a name that MLflow or we give, holds one, or was a URL that has been taken for a path."""
    if (path / ".git").exists():
        return False
    return unquote(path.name) != path.name or not OF_STORES.isdisjoint(_names(path))


def _names(path: Path) -> Iterator[str]:
    yield path.name
    with suppress(OSError):  # A file, or somebody else's.
        yield from (below.name for below in path.iterdir())
