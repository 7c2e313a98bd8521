"""The paper's tables as runs: on a small case, with what they are made of held against plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import stores
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Run

from benchmarks.reproduction import job, scored
from benchmarks.reproduction.__main__ import main
from benchmarks.reproduction.authors import authors_scores
from benchmarks.reproduction.cases import CASES, Case, cases
from benchmarks.reproduction.document import write_document
from benchmarks.reproduction.final_query import final_query
from benchmarks.reproduction.job import TABLES, ReproductionRequest, reproduce
from benchmarks.reproduction.memory import ROOT
from benchmarks.reproduction.table import summary
from dit_mlflow import InputError, Window, parse_windows, track, train
from dit_mlflow.evaluation import correlations

SETTINGS = {"n_train": "64", "n_validation": "32", "n_test": "32", "epochs": "4", "batch_size": "16", "hidden": "6"}
SMALL = Case("digits", "dnn", tuple(SETTINGS.items()))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stores.sqlite(tmp_path) as fresh:
        mlflow.set_tracking_uri(fresh.uri)
        mlflow.create_experiment("reproduction", artifact_location=fresh.artifacts)
        mlflow.set_experiment("reproduction")
        # The document of quick reproductions, where no other process writes.
        monkeypatch.setattr("benchmarks.reproduction.document.ROOT", tmp_path)
        yield
        mlflow.set_tracking_uri(None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "cases", lambda *_: [SMALL])


def runs(kind: str) -> list[Run]:
    return MlflowClient().search_runs(
        [mlflow.get_experiment_by_name("reproduction").experiment_id], f"tags.`dit.kind` = '{kind}'"
    )  # type: ignore[union-attr]


def test_the_published_method_is_the_final_query_in_our_sweep(tmp_path: Path) -> None:
    """Its loops over samples and bounds on one side, one sweep with a linear query on the other."""
    workload = SMALL.workload(0)
    trajectory = train(workload, tmp_path / "t")
    windows = [*parse_windows("epochs", trajectory), Window(2, 7)]
    expected = authors_scores(trajectory, workload, windows)
    found = track(trajectory, workload, windows, "cumulative", [final_query(trajectory, workload)])
    np.testing.assert_allclose(found.scores[:, 0], expected, rtol=2e-3, atol=1e-5 * np.abs(expected).max())
    # On all of training, where the final model's query is the right one, it is DIT.
    whole = [Window(0, trajectory.num_steps)]
    exact = track(trajectory, workload, whole, "final").of(0)
    np.testing.assert_allclose(authors_scores(trajectory, workload, whole)[0], exact, rtol=2e-3, atol=1e-5)
    own = track(trajectory, workload, windows, "cumulative").of(0)
    assert not np.allclose(own, expected[0], rtol=0.05, atol=0), "the wrong query makes a difference"


@pytest.mark.parametrize(
    "table", [pytest.param(table, marks=() if table == "correlation" else pytest.mark.slow) for table in TABLES]
)
def test_each_table_is_a_parent_with_a_child_for_each_method_and_seed(table: str, small: None, tmp_path: Path) -> None:
    said = reproduce(ReproductionRequest(table, seeds=2, quick=True, jobs=1))
    assert "0 failed" in said
    (parent,) = runs("reproduction")
    assert parent.info.status == "FINISHED" and parent.data.params["resolved.seeds"] == "2"
    children = runs("reproduced")
    by_seed = mlflow.load_table("by_seed.json", run_ids=[parent.info.run_id])
    asked = set(zip(by_seed["method"], by_seed["seed"].astype(str), strict=True))
    assert {(run.data.params["method"], run.data.params["seed"]) for run in children} == asked
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert all(run.data.metrics for run in children if run.data.params["method"] != "no cleaning")
    results = mlflow.load_table("results.json", run_ids=[parent.info.run_id])
    first = results.iloc[0]
    same = by_seed
    for key in ["method", *TABLES[table].facets]:
        same = same[same[key] == first[key]]
    assert len(same) == first["seeds"] == 2
    assert first["mean"] == pytest.approx(same[first["figure"]].mean(), rel=1e-6)
    document = (tmp_path / "build" / "reproduction.md").read_text(encoding="utf-8")
    assert TABLES[table].title in document and "**C" in document
    assert (tmp_path / "build" / "reproduction" / f"{table}.png").stat().st_size > 5000


def test_the_document_in_docs_has_every_table_and_all_its_seeds(tmp_path: Path) -> None:
    def finished(table: str, seeds: int, all_datasets: bool = True, failed: int = 0) -> mlflow.ActiveRun:
        with mlflow.start_run(tags={"dit.kind": "reproduction", "dit.table": table}) as run:
            params = {"resolved.seeds": seeds, "resolved.datasets": "digits", "resolved.quick": False}
            mlflow.log_params({**params, "resolved.all_datasets": all_datasets})
            mlflow.log_metric("failed", failed)
            mlflow.log_text("**Claim.** It held.\n\n## Figures", "section.md")
            mlflow.log_text("a picture", "figure.png")
        return run

    titles = {"correlation": "Agreement", "cost": "What it costs"}
    kept = Path("docs") / "reproduction.md"
    with_one = write_document(titles, finished("correlation", 8), quick=False)
    with_few_seeds = write_document(titles, finished("cost", 7), quick=False)
    of_some_data = write_document(titles, finished("cost", 8, all_datasets=False), quick=False)
    with_failures = write_document(titles, finished("cost", 8, failed=1), quick=False)
    in_part = {with_one, with_few_seeds, of_some_data, with_failures}
    assert in_part == {str(Path("build") / "reproduction.md")} and not (tmp_path / kept).exists()
    assert write_document(titles, finished("cost", 8), quick=False) == str(kept)
    text = (tmp_path / kept).read_text(encoding="utf-8")
    assert all(title in text for title in titles.values()) and text.count("It held.") == 2


def test_the_figures_are_those_of_the_scores(small: None) -> None:
    reproduce(ReproductionRequest("correlation", seeds=1, quick=True, jobs=1))
    (run,) = [run for run in runs("reproduced") if run.data.params["method"] == "dit"]
    found = scored.scores(SMALL, 0)
    expected = correlations(found.of("dit", "final", "whole"), found.of("leave_one_out", "final", "whole")).values
    assert run.data.metrics["ground_truth/spearman"] == pytest.approx(expected["spearman"])
    assert run.data.metrics["sweep_error"] < 1e-4
    history = MlflowClient().get_metric_history(run.info.run_id, "by_window/cumulative/ground_truth/pearson")
    assert [point.step for point in history] == [0, 1, 2, 3]
    second = correlations(found.of("dit", "cumulative", "1"), found.of("leave_one_out", "cumulative", "1")).values
    assert history[1].value == pytest.approx(second["pearson"])


def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "cases", lambda *_: [replace(SMALL, settings=(*SMALL.settings, ("lr", "0.2")))])
    reproduce(ReproductionRequest("patterns", seeds=1, quick=True, jobs=1))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no training was needed")

    monkeypatch.setattr(scored, "train", broken)
    # The seed that is new fails, and stops nothing.
    said = reproduce(ReproductionRequest("patterns", seeds=2, quick=True, jobs=1))
    assert "2 units, 1 failed" in said
    latest = runs("reproduction")[0]
    assert latest.info.status == "FINISHED" and latest.data.metrics["failed"] == 1
    (failed,) = [run for run in runs("reproduced") if run.info.status == "FAILED"]
    assert failed.data.params["seed"] == "1" and "no training was needed" in failed.data.tags["dit.error"]
    section = mlflow.artifacts.load_text(f"runs:/{latest.info.run_id}/section.md")
    assert "digits dnn, seed 1: RuntimeError: no training was needed" in section


def test_a_table_of_which_everything_fails_is_failed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "fingerprint", lambda: "code that was never run")
    monkeypatch.setattr(scored, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"every unit of table=early_late failed.*ZeroDivisionError"):
        reproduce(ReproductionRequest("early_late", seeds=1, quick=True, jobs=1))
    assert [run.info.status for run in runs("reproduction")] == ["FAILED"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "correlations"], "table='correlations'; expected all, or some of correlation"),
        (["--datasets", "mnist,imagenet"], "expected all, or some of mnist, adult, newsgroups, digits"),
        (["--datasets", "adult", "--data", "."], "has no adult, which datasets=adult needs; see projects/adult"),
        (["--seeds", "0"], "seeds=0, jobs=0; expected 1 seed or more"),
    ],
)
def test_requests_that_cannot_be_answered(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and message in result.output
    assert not runs("reproduction")


def test_the_cases_are_the_papers() -> None:
    chosen = cases("mnist,adult")
    assert [case.name for case in chosen] == ["mnist logreg", "mnist dnn", "mnist cnn", "adult logreg", "adult dnn"]
    assert all(dict(case.settings)["preset"] == "paper" for case in chosen)
    assert {case.data for case in CASES} == {path.name for path in (ROOT / "projects").iterdir() if path.is_dir()} & {
        "mnist",
        "adult",
        "newsgroups",
        "digits",
    }
    one, other = (case.workload(seed).train_set[0][0] for case, seed in ((SMALL, 0), (SMALL, 1)))
    assert not bool((one == other).all()), "every seed has a split of its own"


def test_summary_has_the_mean_and_its_interval() -> None:
    rows = pd.DataFrame({"method": ["a"] * 3 + ["b"], "x": [1.0, 2.0, 6.0, 5.0]})
    found = summary(rows, ["method"], ["x"]).set_index("method")
    # Student's t with 2 degrees of freedom: 4.302653 times 2.645751 / sqrt(3).
    assert found.loc["a", ["mean", "low", "high", "min", "max", "seeds"]].to_list() == pytest.approx(
        [3, 3 - 6.572, 3 + 6.572, 1, 6, 3], abs=1e-3
    )
    assert found.loc["b", "mean"] == 5 and np.isnan(found.loc["b", "low"])
