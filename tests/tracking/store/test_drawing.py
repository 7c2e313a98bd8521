"""What was computed is kept, whatever happens when it is drawn."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from stores import Store
from workloads import digits_workload

from dit_mlflow import Query, WorkloadError, parse_windows
from dit_mlflow.evaluation.metrics import mean_scores
from dit_mlflow.explanation import Checks
from dit_mlflow.tracking import load_influence, load_trajectory, run_influence, run_training
from dit_mlflow.tracking.store import explanations


def asked(**changes: Any) -> tuple[Any, list[Any]]:
    """The influence run over two windows, with full ground truth, and the runs of its windows."""
    workload = digits_workload(epochs=2, **changes)
    training_run = run_training(workload)
    trajectory = load_trajectory(training_run)
    windows = parse_windows("2", trajectory)
    checks = Checks(ground_truth=workload.num_samples)
    run_id = run_influence(training_run, trajectory, workload, windows, "final", checks).run.info.run_id
    run = MlflowClient().get_run(run_id)
    parent = f"tags.`mlflow.parentRunId` = '{run_id}'"
    return run, MlflowClient().search_runs([run.info.experiment_id], parent)


def artifacts(run_id: str, folder: str | None = None) -> set[str]:
    return {item.path.rpartition("/")[2] for item in MlflowClient().list_artifacts(run_id, folder)}


def test_plots_and_pages_that_fail_cost_themselves_alone(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("Unable to allocate 931. GiB")

    drawn = [name for name in vars(explanations) if name.startswith("plot_")]
    assert len(drawn) == 7
    drawn += ["influence_note", "explanation_page", "window_note"]
    for name in drawn:
        monkeypatch.setattr(explanations, name, fails)
    run, children = asked(corrupted=(1, 5))
    assert (run.info.status, {child.info.status for child in children}) == ("FINISHED", {"FINISHED"})
    assert len(children) == 2
    assert load_influence(run.info.run_id, "ground_truth").scores.shape == (2, 1, 24)
    assert "ground_truth/spearman" in run.data.metrics
    assert all("ground_truth/spearman" in child.data.metrics for child in children)
    assert "top_samples.json" in artifacts(children[0].info.run_id)
    reasons = {name: value for name, value in run.data.tags.items() if name.startswith("dit.not_drawn.")}
    assert set(reasons.values()) == {"MemoryError: Unable to allocate 931. GiB"}
    assert {"dit.not_drawn.influence/report.html", "dit.not_drawn.influence/heat_map.png"} < set(reasons)
    assert "dit.not_drawn.top_samples.png" in children[0].data.tags


def test_all_is_logged_before_the_first_plot(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it draws has lost nothing else."""

    class Killed(BaseException):
        pass

    def killed(*args: Any, **kwargs: Any) -> Any:
        run = mlflow.active_run()
        assert run is not None
        assert load_influence(run.info.run_id, "ground_truth").scores.shape == (2, 1, 24)
        parent = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        children = MlflowClient().search_runs([run.info.experiment_id], parent)
        assert [child.info.status for child in children] == ["FINISHED"] * 2
        assert all("top_samples.json" in artifacts(child.info.run_id) for child in children)
        raise Killed

    monkeypatch.setattr(explanations, "log_plot", killed)
    with pytest.raises(Killed):
        asked()


ACTS = "\x1b[31mred\x1b]0;t\x07 \u202e\u2028\x00\ud83d\r\n![x](http://evil/x.png) " + "x" * 10**6
SECRET = "postgresql://me:S3cr3t@host/db"


def test_names_and_settings_that_databases_refuse_or_terminals_obey_are_kept_as_text(any_store: Store) -> None:
    """Of a workload, which may come from a record, of a setting, and of a query, which may be named by a label."""
    text = ACTS.replace("\ud83d", "")  # Which a record cannot hold.
    named = {"reference": f"some:{text}", "settings": {"model": text, "uri": SECRET, f"odd/{text[:99]}": text}}
    workload = digits_workload(epochs=1, label=lambda index: ACTS, **named)
    training_run = run_training(workload)
    trajectory = load_trajectory(training_run)
    queries = [Query(ACTS, lambda model: next(model.parameters()).sum())]
    asked = training_run, trajectory, workload, parse_windows("1", trajectory), "final"
    runs = [run_influence(*asked, Checks(), queries=queries).run, MlflowClient().get_run(training_run)]
    for run in (MlflowClient().get_run(run.info.run_id) for run in runs):
        assert run.info.status == "FINISHED"
        assert len(run.info.run_name) <= 200
        texts = {**run.data.tags, **run.data.params}
        shown = "".join([*texts, *texts.values()])
        assert not {"\x1b", "\x07", "\u202e", "\u2028", "\x00", "\ud83d", "\r"} & set(shown)
        assert "S3cr3t" not in shown
        assert run.data.params["workload.model"].startswith(r"\x1b[31mred")
        assert "![x]" not in run.data.tags["mlflow.note.content"]
    assert load_influence(runs[0].info.run_id).queries[0].startswith(r"\x1b[31mred")


def test_metrics_of_any_name_do_not_fail_a_run_after_its_training(store: str) -> None:
    names: list[Any] = ["top-5 %", "$x$\x1b[1m", "a//..", "m" * 300, 3, None]
    ones = torch.ones(16)
    workload = digits_workload(epochs=1, batch_size=24, metrics=lambda model, batch: dict.fromkeys(names, ones))
    run = MlflowClient().get_run(run_training(workload))
    assert run.info.status == "FINISHED"
    found = {"top-5 _", "_x___1m", "a/_/_", "3", "None", ("validation/" + "m" * 300)[11:200]}
    assert {f"validation/{name}" for name in found} < set(run.data.metrics)


@pytest.mark.parametrize(
    ("value", "got"), [(0.5, "a float"), (torch.tensor(0.5), r"shape \[\]"), (torch.ones(3), r"\[3\]")]
)
def test_metrics_that_are_not_one_value_per_sample_are_named(value: Any, got: str) -> None:
    workload = digits_workload(metrics=lambda model, batch: {"share": value})
    with pytest.raises(WorkloadError, match=rf"{got} for 'share' and a batch of 16"):
        mean_scores(workload, workload.build_model(), workload.validation_set)


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_samples_and_settings_that_cannot_be_shown_do_not_fail_the_run(store: str) -> None:
    bomb = np.broadcast_to(np.float32(1), (500_000, 500_000, 3))
    row = {"digits": 10**5000, "mute": Mute()}
    run, children = asked(
        show=lambda index: bomb if index % 2 else row,
        label=lambda index: "l" * 10**6,
        describe=lambda index: Mute(),
        settings={"long": "x" * 10**6},
        reference="some:where",
    )
    assert (run.info.status, len(children)) == ("FINISHED", 2)
    assert not [name for name in (*run.data.tags, *children[0].data.tags) if name.startswith("dit.not_drawn.")]
    assert {"report.html", "heat_map.png"} < artifacts(run.info.run_id, "influence")
    assert run.data.params["workload.long"].startswith("xxx")
    table = mlflow.load_table("influence/top_samples.json", [run.info.run_id])
    assert table["sample"].str.len().max() <= 1010
