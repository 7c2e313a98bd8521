"""Methods compared through the doors that users take."""

from __future__ import annotations

import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from building import LOSS_DROP, wheel_of
from click.testing import CliRunner
from scipy import stats
from test_influence_job import SMALL, artifact_names, check_figures, children, entry_point, runs

from dit_mlflow import methods
from dit_mlflow.cli import cli
from dit_mlflow.explanation.over_seeds import summarised
from dit_mlflow.methods import NAMES
from dit_mlflow.methods.at_window_end import Loss
from dit_mlflow.tracking import load_influence
from dit_mlflow.tracking.jobs.compare import ComparisonRequest


def compare(**options: str) -> Any:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **options}.items()]
    return CliRunner().invoke(cli, ["compare", *arguments])


@pytest.mark.slow
def test_all_methods_from_its_entry_point(store: str) -> None:
    finished = entry_point("compare", **SMALL, corrupt="0.2", windows="2", all_figures="true")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("comparison")
    (training,) = runs("training")
    found = {child.data.tags["dit.method"]: child for child in children(parent)}
    assert set(found) == set(NAMES)
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert artifact_names(parent, "") == {
        "comparison.json",
        "by_seed.json",
        "fidelity_against_cost.png",
        "recall_curve.png",
    }
    truth = load_influence(found["leave_one_out"].info.run_id)
    for name, child in found.items():
        assert child.data.tags["dit.training_run_id"] == training.info.run_id
        assert {
            "ground_truth/spearman",
            "ground_truth/lds",
            "detection/auroc",
            "cost/influence_seconds",
        } <= child.data.metrics.keys()
        estimate = load_influence(child.info.run_id)
        expected = stats.spearmanr(estimate.scores[-1, 0], truth.scores[-1, 0]).statistic
        assert child.data.metrics["ground_truth/spearman"] == pytest.approx(expected, abs=0.02)
        series = mlflow.MlflowClient().get_metric_history(child.info.run_id, "by_window/detection/auroc")
        assert len(series) == (2 if len(estimate.windows) > 1 else 0), name
    table = mlflow.load_table("comparison.json", run_ids=[parent.info.run_id])
    assert list(table["method"]) == list(NAMES)
    assert "Spearman" in finished.stdout
    judged = table[table["method"] != "leave_one_out"].set_index("method")
    answer, _, rest = parent.data.tags["mlflow.note.content"].partition("They answer different questions")
    first, _, second = answer.partition("without a random share")
    for figure, part in (("spearman", first), ("lds", second)):
        assert re.search(rf"nearest come {judged[figure].idxmax()} [01]\.", part), answer
    assert "the removal of many samples at once (expected, removal, downsampling, datamodel and 1 more)" in rest
    assert len(parent.data.tags["mlflow.note.content"]) < 8000
    assert rest.count("\n| ") == len(NAMES) + 2
    check_figures("ground_truth/lds_low", "cost/cpu_seconds", "by_window/ground_truth/jaccard_bottom_30")
    assert "workflowType=machine_learning" in finished.stdout


def test_a_method_that_fails_is_reported_and_stops_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no luck today: \udcff.bin")  # As Python has names of files that are no UTF-8.

    monkeypatch.setattr(Loss, "scores", fail)
    finished = compare(methods="sgd_influence,loss,tracin", optimizer="adam", windows="2")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("comparison")
    status = {child.data.tags["dit.method"]: child.info.status for child in children(parent)}
    assert status == {"sgd_influence": "FAILED", "loss": "FAILED", "tracin": "FINISHED"}
    assert parent.info.status == "FINISHED"
    reasons = mlflow.load_table("comparison.json", run_ids=[parent.info.run_id]).set_index("method")["error"]
    assert "plain SGD; the training used Adam" in reasons["sgd_influence"]
    assert reasons["loss"] == "RuntimeError: no luck today: \\udcff.bin"
    failed = compare(methods="loss", windows="2")
    assert failed.exit_code == 1
    assert "every method failed; the first: RuntimeError: no luck today" in failed.output
    assert "RUNNING" not in {run.info.status for run in runs()}


@pytest.mark.slow
def test_seeds_of_weights_and_order_are_separate(store: str) -> None:
    finished = compare(methods="dit", seeds="4", windows="2", ground_truth="12")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("comparison")
    names = [child.info.run_name for child in children(parent)]
    assert names == [f"dit init {a} order {b}" for a in (0, 1) for b in (0, 1)]
    chosen = [
        (run.data.params["resolved.init_seed"], run.data.params["resolved.order_seed"]) for run in runs("training")
    ]
    assert sorted(chosen) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    (row,) = mlflow.load_table("comparison.json", run_ids=[parent.info.run_id]).to_dict("records")
    values = [child.data.metrics["ground_truth/spearman"] for child in children(parent)]
    assert row["spearman"] == pytest.approx(np.mean(values))
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (row["spearman_low"], row["spearman_high"]) == pytest.approx((low, high))
    assert 0 < parent.data.metrics["ground_truth/attainable_spearman"] <= 1
    stability = mlflow.load_table("stability.json", run_ids=[parent.info.run_id]).set_index("of")
    pairs = combinations([load_influence(child.info.run_id).scores[-1, 0] for child in children(parent)], 2)
    agreement = np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
    assert stability.loc["scores", "mean"] == pytest.approx(agreement)
    assert stability.loc["spearman", "mean"] == pytest.approx(np.mean(values))
    shares = stability.loc[["scores", "spearman"], ["share_init", "share_order", "share_rest"]]
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "dit,lucky"}, "no method 'lucky'; there are dit"),
        ({"methods": ","}, "expected 'all' or some of dit"),
        ({"subsets": "2"}, "subsets=2; expected 0, or 3 or more"),
        ({"seeds": "2", "order_seed": str(2**64 - 1)}, f"order_seed={2**64}; expected a whole number of 64 bits"),
        ({"seeds": "0"}, "seeds=0; expected 1 or more"),
        ({"backend": "cluster"}, "backend='cluster'; expected loky, dask or ray"),
        ({"kind": "global"}, "kind='global'"),
        ({"scores": "not_there.csv"}, "scores='not_there.csv' cannot be read"),
        ({"removed": "0.999"}, r"removed=0.999 of"),
        ({"windows": "0:99"}, "ends past training"),
    ],
)
def test_bad_input_ends_before_any_training(options: dict[str, str], message: str, store: str) -> None:
    finished = compare(**options)
    assert finished.exit_code == 1
    assert message in finished.output
    assert not runs()


def test_methods_of_other_distributions_are_compared(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(wheel_of(LOSS_DROP, tmp_path / "built"))
    assert list(ComparisonRequest().estimators) == list(methods.NAMES) and methods.NAMES[-1] == "loss_drop"
    finished = compare(methods="loss_drop,loss", windows="2")
    assert finished.exit_code == 0, finished.output
    loss, drop = (load_influence(child.info.run_id) for child in children(runs("comparison")[0]))
    assert (drop.method, loss.method) == ("loss_drop", "loss")
    # The windows' drops add up to that of the whole run; the second's is what the loss falls by between their ends.
    np.testing.assert_allclose(drop.of(0) + drop.of(1), drop.of(2), rtol=1e-6)
    np.testing.assert_allclose(drop.of(1), loss.of(1) - loss.of(0), rtol=1e-5)
    monkeypatch.delitem(sys.modules, "dit_loss_drop")


def test_scores_computed_elsewhere_are_compared(store: str, tmp_path: Path) -> None:
    finished = compare(methods="leave_one_out,loss", windows="1", subsets="12", removed="0.25")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("comparison")
    by_name = {child.data.tags["dit.method"]: child for child in children(parent)}
    exact = load_influence(by_name["leave_one_out"].info.run_id)
    file = tmp_path / "elsewhere.csv"
    pd.DataFrame({"score": exact.of(-1), "sample_index": exact.samples})[::-1].to_csv(file, index=False)
    training = parent.data.tags["dit.training_run_id"]
    again = compare(training_run=training, methods="loss", scores=str(file), windows="1", subsets="12", removed="0.25")
    assert again.exit_code == 0, again.output
    latest = max(runs("comparison"), key=lambda run: run.info.start_time)
    given = {child.data.tags["dit.method"]: child for child in children(latest)}["elsewhere"].data.metrics
    theirs = by_name["leave_one_out"].data.metrics
    for figure in ("ground_truth/lds", "ground_truth/spearman"):
        assert given[figure] == pytest.approx(theirs[figure], abs=0.02)
    # The same without our methods.
    arguments = [f"--training-run={training}", f"--scores={file}", "--windows=1", "--subsets=12", "--removed=0.25"]
    assert CliRunner().invoke(cli, ["evaluate", *arguments]).exit_code == 0
    latest = max(runs("comparison"), key=lambda run: run.info.start_time)
    assert latest.info.run_name == "elsewhere local · compare mnist logreg"
    (alone,) = children(latest)
    assert alone.data.metrics["ground_truth/lds"] == pytest.approx(given["ground_truth/lds"])
    refused = CliRunner().invoke(cli, ["evaluate", arguments[0]])
    assert refused.exit_code == 1 and "evaluate needs scores: CSV files" in refused.output
    file.write_text("sample_index,score\n0,1\n1,inf\n")
    said = compare(training_run=training, methods="loss", scores=str(file)).output
    assert "has finite scores of 1 training samples in 2 lines" in said
    file.write_text("sample_index,score\n0,1,5\n1,0,25\n")
    said = compare(training_run=training, methods="loss", scores=str(file)).output
    assert "lines have more fields than the header" in said
    file.write_text("sample_index;score\n0;1\n")
    said = compare(training_run=training, methods="loss", scores=str(file)).output
    assert "has the columns sample_index;score; expected sample_index and score among them, with commas" in said
    file.write_text("sample_index,score\n0,1\n0,2\n")
    assert "names a sample twice" in compare(training_run=training, methods="loss", scores=str(file)).output


def test_grid_of_seeds_is_the_squarest() -> None:
    assert ComparisonRequest(seeds=6, init_seed=3).grid == [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2)]
    assert ComparisonRequest(seeds=5).grid == [(0, k) for k in range(5)]


def test_a_method_that_failed_on_one_seed_keeps_its_others() -> None:
    rows = pd.DataFrame(
        [
            {"method": "a", "measures": "query", "failed": False, "spearman": 0.5},
            {"method": "a", "measures": "query", "failed": True, "error": "late"},
        ]
    )
    (row,) = summarised(rows).to_dict("records")
    assert (row["spearman"], row["trainings"], row["failed"], row["error"]) == (0.5, 1, False, "late")
