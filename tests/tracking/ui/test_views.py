"""Saved views hold what MLflow's UI restores, under keys that links name, and do not pile up."""

from __future__ import annotations

import base64
import json
import zlib

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dit_mlflow.tracking.mlflow_internals import SAVED_VIEW
from dit_mlflow.tracking.ui import links, views
from dit_mlflow.tracking.ui.links import save_comparisons, where_to_look
from dit_mlflow.tracking.ui.views import INFLUENCES, TRAININGS, View, bar_chart, save_views


def view(key: str) -> View:
    runs = "tags.`mlflow.parentRunId` = 'r'"
    return View(key, f"name of {key}", runs, (bar_chart("a/b"),), ("metrics.a/b",), "metrics.a/b", False)


def tags(experiment: str) -> dict[str, str]:
    return dict(MlflowClient().get_experiment(experiment).tags)


def test_both_forms_that_the_ui_reads_say_the_same(store: str) -> None:
    assert [kept.key for kept in save_views("1", view("dit-x"))] == ["dit-x"]
    found = json.loads(tags("1")[SAVED_VIEW + "dit-x"])
    packed = found.pop("state")
    assert found.pop("name") == "name of dit-x"
    assert found.pop("createdAt") > 1.6e12
    assert packed.startswith("deflate;")
    assert json.loads(zlib.decompress(base64.b64decode(packed.removeprefix("deflate;")))) == found
    assert found["searchFilter"] == "tags.`mlflow.parentRunId` = 'r'"
    assert (found["orderByKey"], found["orderByAsc"]) == ("metrics.`a/b`", False)
    assert found["selectedColumns"] == ["metrics.`a/b`"]
    (chart,), (section,) = found["compareRunCharts"], found["compareRunSections"]
    assert (chart["type"], chart["metricKey"]) == ("BAR", "a/b")
    assert chart["metricSectionId"] == section["uuid"]


def test_the_newest_views_of_runs_stay_and_the_others_of_people_too(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "KEPT", 3)
    MlflowClient().set_experiment_tag("1", SAVED_VIEW + "theirs", "{}")
    times = iter(range(1_000, 100_000))
    monkeypatch.setattr(views.time, "time", lambda: float(next(times)))
    for number in range(5):
        save_views("1", view(f"dit-{number}"))
    kept = {key.removeprefix(SAVED_VIEW) for key in tags("1") if key.startswith(SAVED_VIEW)}
    assert kept == {"theirs", TRAININGS.key, INFLUENCES.key, "dit-2", "dit-3", "dit-4"}
    before = tags("1")
    save_views("1", view("dit-4"))
    assert tags("1") == before


def test_views_fit_into_the_tags_of_every_mlflow() -> None:
    run = mlflow.entities.Run(
        mlflow.entities.RunInfo("f" * 32, "1", "u", "FINISHED", 0, 1, "active", run_name="n" * 60),
        mlflow.entities.RunData([mlflow.entities.Metric("ground_truth/spearman", 1, 0, 0)], [], []),
    )
    for made in (TRAININGS, INFLUENCES, views.windows_view(run), views.methods_view(run), views.strategies_view(run)):
        assert len(made.encoded(1_790_000_000_000)) < 5000


@pytest.mark.parametrize("kind", ["training", "influence", "comparison", "cleansing"])
def test_links_name_the_run_and_the_views(store: str, kind: str) -> None:
    with mlflow.start_run(tags={"dit.kind": kind}) as run:
        mlflow.log_metric("ground_truth/spearman", 0.5)
    run_id = run.info.run_id
    found = save_comparisons(run_id)
    if kind == "training":
        assert found == {}
    else:
        first = {"influence": "windows", "comparison": "methods", "cleansing": "strategies"}[kind]
        assert list(found) == [first, "influence runs", "trainings"]
        assert f"viewStateShareKey=dit-{run_id}&" in found[first]
        assert SAVED_VIEW + f"dit-{run_id}" in tags("1")
        assert all("searchFilter" not in link for link in found.values())
    said = where_to_look(run)
    assert f"http://127.0.0.1:5000/#/experiments/1/runs/{run_id}?workflowType=machine_learning" in said
    assert said.count("compare ") == len(found)


def test_runs_apart_from_their_training_are_told(store: str) -> None:
    with mlflow.start_run(experiment_id=mlflow.create_experiment("digits of mine")) as training:
        pass
    tags = {"dit.kind": "influence", "dit.training_run_id": training.info.run_id}
    with mlflow.start_run(tags=tags) as run:
        pass
    expected = "its training in 'digits of mine'; together: set MLFLOW_EXPERIMENT_NAME='digits of mine'"
    assert expected in where_to_look(run)
    with mlflow.start_run(experiment_id=training.info.experiment_id, tags=tags) as run:
        pass
    assert "together" not in where_to_look(run)


def test_a_store_that_keeps_no_views_stops_nothing(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise MlflowException("may not edit the experiment")

    with mlflow.start_run(tags={"dit.kind": "influence"}) as run:
        pass
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    assert links.save_comparisons(run.info.run_id) == {}
    assert "may not edit" in caplog.text
    assert "compare" not in where_to_look(run)
