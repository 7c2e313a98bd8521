"""Private names of other libraries stand in the modules made for them, ``*_internals.py``, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_mlflow

PACKAGE = Path(dit_mlflow.__file__).parent
OF_NAMEDTUPLES = {"_asdict", "_fields", "_replace"}
"""Documented, for all their underscore."""
UNDOCUMENTED = ("mlflow.store", "mlflow.utils", "torch.utils.data._utils")
"""Modules without a page of their own in their library's documentation."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in OF_NAMEDTUPLES


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to something of its own."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_own(node)}
    return found | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def foreign(tree: ast.Module) -> Iterator[str]:
    """Private attributes that the file does not define, and imports of what is private or has no documentation."""
    own = defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            parts = [*module.split("."), *names]
            if not module.startswith(("__future__", "dit_mlflow")) and (
                any(map(private, parts)) or f"{module}.".startswith(tuple(f"{one}." for one in UNDOCUMENTED))
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch.utils._pytree import tree_map",
        "from mlflow.utils.validation import _validate_model_name",
        "from mlflow.store.artifact import registry",
        "model._parameters['a'] = 1",
        "torch._weight_norm(v, g)",
    ],
)
def test_private_names_are_seen(line: str) -> None:
    assert list(foreign(ast.parse(line)))


@pytest.mark.parametrize("line", ["from collections import deque", "self._parameters = {}", "drawn._replace(batch=1)"])
def test_others_are_not(line: str) -> None:
    assert not list(foreign(ast.parse(line)))


def test_private_names_of_other_libraries_stand_in_one_module_each() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if not path.stem.endswith("_internals")]
    found = {str(path.relative_to(PACKAGE)): list(foreign(ast.parse(path.read_text()))) for path in paths}
    assert not {name: lines for name, lines in found.items() if lines}
