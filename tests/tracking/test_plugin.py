"""What MLflow loads in every process, and what it then writes on runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import mlflow
import pytest

import dit_mlflow
from dit_mlflow.tracking.plugin import DitRunContext, tree_tags


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not {"torch", "mlflow", "numpy", "pandas"} & modules_after("import dit_mlflow")


def test_mlflow_finds_the_plugin_and_does_not_import_torch_for_it() -> None:
    (found,) = (p for p in entry_points(group="mlflow.run_context_provider") if p.name == "dit")
    assert found.load() is DitRunContext
    statement = (
        "from mlflow.tracking.context import registry\n"
        "providers = [type(p).__name__ for p in registry._run_context_provider_registry]\n"
        "assert 'DitRunContext' in providers, providers\n"
        "assert 'dit.version' not in registry.resolve_tags()"
    )
    assert "torch" not in modules_after(statement)


def test_mlflow_finds_the_evaluator_and_does_not_import_torch_for_it() -> None:
    (found,) = (p for p in entry_points(group="mlflow.model_evaluator") if p.name == "dit")
    assert found.load().__name__ == "DitEvaluator"
    statement = (
        "from mlflow.models.evaluation.evaluator_registry import _model_evaluation_registry as registry\n"
        "evaluator = registry.get_evaluator('dit')\n"
        "assert evaluator.can_evaluate(model_type='dit', evaluator_config={})\n"
        "for other in ('classifier', 'regressor', None):\n"
        "    assert not evaluator.can_evaluate(model_type=other, evaluator_config={})"
    )
    assert not {"torch", "dit_mlflow.trajectory"} & modules_after(statement)


def test_runs_of_a_process_that_uses_trajectories_are_tagged(store: str) -> None:
    importlib.import_module("dit_mlflow.trajectory")

    with mlflow.start_run() as run:
        pass
    tags = mlflow.get_run(run.info.run_id).data.tags
    assert tags["dit.version"] == dit_mlflow.__version__
    if (Path(dit_mlflow.__file__).parents[1] / ".git").exists():
        assert tags["dit.dirty"] in ("true", "false")
        assert len(tags["dit.commit"]) == 40


def test_dirty_says_whether_the_tree_differs_from_its_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert tree_tags(tmp_path) == {}
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    for content, dirty in (("one", "false"), ("two", "true")):
        tree_tags.cache_clear()
        (tmp_path / "file").write_text(content)
        assert tree_tags(tmp_path)["dit.dirty"] == dirty


def test_without_git_there_is_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree_tags.cache_clear()
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert tree_tags(tmp_path) == {}
