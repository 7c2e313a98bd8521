"""The shape of the package: imports point one way, and MLflow is touched in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import dit_mlflow

PACKAGE = Path(dit_mlflow.__file__).parent

ROOMS = (
    *("told", "errors", "progress", "torch_internals", "accelerate_internals", "command"),
    *("workload", "trajectory", "replay", "recording", "influence", "retraining", "methods", "evaluation"),
    *("explanation", "plots", "page", "quanda", "tracking", "cli"),
)
"""From the bottom up: each imports from those before it."""

SIDE_ROOMS = {"examples": {"told", "errors", "workload"}}
"""What stands beside them, and what it may import."""


@lru_cache(maxsize=1)
def imports() -> list[tuple[Path, str]]:
    """Every import in the package: where, and of which module."""
    return list(_imports())


def _imports() -> Iterator[tuple[Path, str]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield path.relative_to(PACKAGE), node.module
            elif isinstance(node, ast.Import):
                yield from ((path.relative_to(PACKAGE), alias.name) for alias in node.names)


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", sorted({room(path) for path, _ in imports()} - {"__init__"}))
def test_imports_point_one_way(name: str) -> None:
    allowed = SIDE_ROOMS.get(name) or set(ROOMS[: ROOMS.index(name)])
    found = {
        (str(path), module)
        for path, module in imports()
        if room(path) == name and module.startswith("dit_mlflow.") and module.split(".")[1] not in allowed | {name}
    }
    assert not found


def test_nothing_outside_of_tracking_imports_mlflow() -> None:
    assert {room(path) for path, module in imports() if module.split(".")[0] == "mlflow"} == {"tracking"}


def test_no_two_modules_share_a_name() -> None:
    names = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert len(names) == len(set(names))
