"""The main job through the doors that users take: ``mlflow run`` and the command line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import processes
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.projects.utils import load_project
from scipy import stats
from workloads import digits_workload

import dit_mlflow
from dit_mlflow import Checks, Influence, Window, explain
from dit_mlflow.cli import cli
from dit_mlflow.evaluation.figures import figure_of
from dit_mlflow.tracking import load_influence, load_trajectory, log_explanation, run_influence, run_training
from dit_mlflow.tracking.store.explanations import window_run_name

REPOSITORY = Path(dit_mlflow.__file__).parents[1]
SMALL = {"model": "logreg", "n_train": "40", "n_validation": "30", "n_test": "20", "epochs": "4", "batch_size": "16"}


def mlflow_run(entry_point: str, **parameters: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlflow", "run", str(REPOSITORY), "-e", entry_point, "--env-manager", "local"]
    for name, value in parameters.items():
        command += ["-P", f"{name}={value}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def entry_point(name: str, **parameters: str) -> Result:
    """What ``mlflow run`` does for an entry point of the MLproject, in this process: a run, and the command in it.

    A process of its own, and that of ``mlflow run``, take ten seconds to import what is imported here.
    """
    command = load_project(REPOSITORY).get_entry_point(name).compute_command(parameters, None)
    start, arguments = shlex.split(command)[:3], shlex.split(command)[3:]
    assert start == ["python", "-m", "dit_mlflow.cli"]
    experiment = mlflow.get_experiment_by_name("test").experiment_id
    run_id = MlflowClient().create_run(experiment).info.run_id
    return CliRunner().invoke(cli, arguments, env={"MLFLOW_RUN_ID": run_id})


def inputs(run: Run) -> dict[str, str]:
    """Digests of the data sets that a run was on, by their context."""
    return {item.tags[0].value: item.dataset.digest for item in run.inputs.dataset_inputs}


def runs(kind: str | None = None, **tags: str) -> list[Run]:
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    wanted = tags | ({"dit.kind": kind} if kind else {})
    return [run for run in found if all(run.data.tags.get(key) == value for key, value in wanted.items())]


def children(run: Run) -> list[Run]:
    found = runs(**{"mlflow.parentRunId": run.info.run_id})
    return sorted(found, key=lambda child: child.info.run_name)


def check_figures(*more: str) -> None:
    """All that the runs of the store log is written down in the registry, under names that hold the figure's; so are
    ``more`` of them.
    """
    logged = {name for run in runs() for name in run.data.metrics}
    assert set(more) <= logged
    for name in logged:
        assert figure_of(name).leaf in name


def artifact_names(run: Run, folder: str) -> set[str]:
    return {Path(item.path).name for item in MlflowClient().list_artifacts(run.info.run_id, folder)}


def test_main_job_from_mlflow_run_then_again_on_its_trajectory(store: str) -> None:
    finished = mlflow_run("influence", **SMALL, removed="0")
    assert finished.returncode == 0, finished.stderr
    (parent,) = runs("influence")
    (training,) = runs("training")
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert "mlflow.parentRunId" not in training.data.tags
    assert parent.data.tags["dit.training_run_id"] == training.info.run_id
    assert parent.data.tags["dit.version"] == dit_mlflow.__version__
    assert parent.info.run_name == "local 5 windows · influence mnist logreg"
    check_windows(parent, kind="local", bounds=[(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)])
    assert "workflowType=machine_learning" in finished.stdout
    assert artifact_names(parent, "influence") == {
        "scores.parquet",
        "metadata.json",
        "whole_run",
        "whole_run.json",
        "windows.json",
        "top_samples.json",
        "influence_over_windows.png",
        "heat_map.png",
        "patterns.png",
        "window_correlations.png",
        "window_correlations.json",
        "recall_curve.png",
        "against_leave_one_out.png",
        "report.html",
    }
    table = mlflow.load_table("influence/top_samples.json", run_ids=[parent.info.run_id])
    corrupted = set(table.loc[table["corrupted"], "sample"])
    assert corrupted
    assert all("(flipped)" in text for text in corrupted)
    check_notes(parent, training)

    again = entry_point("main", training_run=training.info.run_id, kind="cumulative", windows="epochs", removed="0")
    assert again.exit_code == 0, again.output
    assert len(runs("training")) == 1
    (second,) = (run for run in runs("influence") if run.info.run_id != parent.info.run_id)
    check_windows(second, kind="cumulative", bounds=[(0, 3), (3, 6), (6, 9), (9, 12)])
    # On [0, T) the kinds coincide, so the parents' own figures do too.
    for name, value in parent.data.metrics.items():
        if name.startswith(("detection/", "ground_truth/")):
            assert second.data.metrics[name] == pytest.approx(value)
    check_figures("patterns/early", "ground_truth/attainable_spearman", "by_window/detection/auroc")
    # About 25 figures of the whole run, and fewer of each window.
    assert "ground_truth/kendall" not in parent.data.metrics and len(parent.data.metrics) <= 30
    assert all(len(child.data.metrics) <= 18 for child in children(parent))
    assert "detection/accuracy" in mlflow.load_table("influence/windows.json", run_ids=[parent.info.run_id])


def check_notes(parent: Run, training: Run) -> None:
    """Every run has a note; that of the answer names what the stored scores say, and leads to what there is."""
    note = parent.data.tags["mlflow.note.content"]
    estimate, exact = (
        load_influence(parent.info.run_id, f"{part}/whole_run") for part in ("influence", "ground_truth")
    )
    assert estimate.windows == exact.windows == (Window(0, 12),)
    assert (estimate.method, exact.method) == ("dit", "leave_one_out")
    scores = exact.scores[0, 0]
    assert note.startswith(f"Sample {scores.argmin()} ")
    assert f"sample {scores.argmax()} " in note.split("\n")[0] and "over the whole run" in note.split("\n")[0]
    assert "over all 40 samples" in note.split("\n")[0]
    targets = re.findall(r"\]\(#/experiments/(\d+)/runs/(\w+)([^?]*)\?workflowType=machine_learning\)", note)
    ids = {run.info.run_id for run in (parent, training, *children(parent))}
    assert {run_id for _, run_id, _ in targets} == ids
    assert {experiment for experiment, _, _ in targets} == {parent.info.experiment_id}
    linked = {tab.rpartition("/")[2] for _, _, tab in targets if tab.startswith("/artifacts/influence/")}
    missing = artifact_names(parent, "influence") - linked
    assert missing == {"scores.parquet", "metadata.json", "whole_run", "window_correlations.json"}
    command = f"mlflow run {REPOSITORY} -e influence --env-manager local -P training_run={training.info.run_id}\n"
    assert command in training.data.tags["mlflow.note.content"]
    for child in children(parent):
        steps = child.info.run_name.split()[1]
        assert child.data.tags["mlflow.note.content"].startswith(f"In steps {steps}, sample ")
        assert artifact_names(child, "") == {"against_leave_one_out.png", "top_samples.png", "top_samples.json"}
        table = mlflow.load_table("top_samples.json", run_ids=[child.info.run_id])
        assert set(table["window"]) == {steps}


def check_windows(parent: Run, kind: str, bounds: list[tuple[int, int]]) -> None:
    """Children carry their windows, and the figures that the stored scores give."""
    estimate = load_influence(parent.info.run_id)
    truth: Influence = load_influence(parent.info.run_id, "ground_truth")
    assert [(window.start, window.end) for window in estimate.windows] == bounds
    found = children(parent)
    assert [child.info.run_name for child in found] == [f"w{i:02d} {a}-{b}" for i, (a, b) in enumerate(bounds)]
    # By name, and in the UI's own order: newest first.
    assert found == sorted(found, key=lambda child: -child.info.start_time)
    for index, child in enumerate(found):
        start, end = bounds[index]
        assert child.data.tags["dit.kind"] == "window"
        assert child.data.params == {
            "method": "dit",
            "kind": kind,
            "window_index": str(index),
            "window_start": str(start),
            "window_end": str(end),
        }
        assert (child.data.metrics["window_start"], child.data.metrics["window_end"]) == (start, end)
        spearman = stats.spearmanr(estimate.of(index), truth.of(index)).statistic
        assert child.data.metrics["ground_truth/spearman"] == pytest.approx(spearman)
        assert spearman > 0.8
        series = MlflowClient().get_metric_history(parent.info.run_id, "by_window/ground_truth/spearman")
        assert {metric.step: metric.value for metric in series}[index] == pytest.approx(spearman)
        assert 0 <= child.data.metrics["detection/recall_at_k"] <= 1
    assert parent.data.metrics["replay/max_drift"] == 0
    expected = {"ground_truth/pearson", "detection/auroc", "cost/influence_seconds", "cost/training_seconds"}
    assert expected | {"cost/peak_memory_mb"} <= set(parent.data.metrics)


def test_trust_and_confirmed_samples_without_ground_truth(store: str) -> None:
    options = ["--removed=0", "--ground-truth=none", "--trust=12", "--confirm=3", "--windows=2", "--all-figures"]
    finished = invoke("influence", *options)
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("influence")
    found = parent.data.metrics
    assert found["trust/samples"] == 12
    assert found["trust/spearman_low"] <= found["trust/spearman"] <= found["trust/spearman_high"]
    assert 0 < found["trust/smoothness"] <= 1
    assert not any(name.startswith("ground_truth/") for name in found)
    assert "over 12 samples left out exactly, Spearman" in finished.output
    for child in children(parent):
        assert {"trust/spearman", "trust/smoothness", "trust/spread_ratio"} <= child.data.metrics.keys()
    (training,) = runs("training")
    assert inputs(mlflow.get_run(parent.info.run_id)) == inputs(mlflow.get_run(training.info.run_id))
    assert set(inputs(training)) == {"training", "validation", "test"}
    estimate, confirmed = (load_influence(parent.info.run_id, folder) for folder in ("influence", "confirmed"))
    assert np.isfinite(confirmed.scores).sum(axis=2).tolist() == [[3], [3]]
    table = mlflow.load_table("influence/top_samples.json", run_ids=[parent.info.run_id])
    rows = table.dropna(subset=["leave_one_out"])
    assert len(rows) == 6
    for row in rows.to_dict("records"):
        place = row["window_index"], 0, row["sample_index"]
        assert row["leave_one_out"] == pytest.approx(confirmed.scores[place], rel=1e-3)
        assert row["score"] == pytest.approx(estimate.scores[place], rel=1e-3)
    assert "As far as 12 random samples tell" in parent.data.tags["mlflow.note.content"]
    check_figures("trust/slope_ratio", "by_window/trust/pearson", "window_start")
    legend = "smoothness: 1 if training is linear in the samples' weights, as the estimate assumes"
    assert legend in finished.output.splitlines()


def test_a_users_own_note_stays(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project_run = MlflowClient().create_run("1", tags={"mlflow.note.content": "mine"})
    monkeypatch.setenv("MLFLOW_RUN_ID", project_run.info.run_id)
    assert invoke("influence", "--ground-truth=none", "--trust=0", "--windows=2").exit_code == 0
    (parent,) = runs("influence")
    assert parent.data.tags["mlflow.note.content"] == "mine"


def test_names_of_window_runs_sort_as_the_windows_do() -> None:
    names = [window_run_name(Window(t, t + 1), t, 1234) for t in range(1234)]
    assert names == sorted(names)
    assert names[7] == "w0007 7-8"


@pytest.mark.slow
def test_output_is_the_answer_alone_when_piped(store: str) -> None:
    command = [sys.executable, "-m", "dit_mlflow.cli", "influence", "--trust=6", "--ground-truth=none"]
    command += [f"--{name}={value}" for name, value in SMALL.items()]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300)
    assert finished.stderr == ""
    first, *lines = finished.stdout.strip().splitlines()
    assert first.startswith("Influence (local) on mean_validation_loss")
    (opened,) = (line for line in lines if line.startswith("then open"))
    assert opened.startswith("then open      http://127.0.0.1:5000/#/experiments/")
    assert opened.endswith("?workflowType=machine_learning")
    # By default, the answer is about removals, and judged by them.
    (parent,) = runs("influence")
    assert (parent.data.params["method"], parent.data.params["resolved.removed"]) == ("removal", "0.1")
    assert "removal/lds" in parent.data.metrics and "LDS of removals" in finished.stdout
    estimate, exact = (
        load_influence(parent.info.run_id, f"{part}/whole_run") for part in ("influence", "ground_truth")
    )
    # Four on each side stand out, and are left out exactly.
    order = np.argsort(estimate.scores[0, 0])
    assert set(np.flatnonzero(np.isfinite(exact.scores[0, 0]))) == {*order[:4], *order[-4:]}
    ranking = np.where(np.isfinite(exact.scores[0, 0]), exact.scores[0, 0], estimate.scores[0, 0])
    assert f"\nSample {ranking.argmin()} (" in finished.stdout


def test_long_leave_one_out_is_told_before_it_starts(store: str) -> None:
    invoke("train")
    (training,) = runs("training")
    told = invoke("influence", f"--training-run={training.info.run_id}", "--windows=1")
    assert "leaves it out" not in told.output
    (command,) = re.findall(r"drop what harms: (.+)$", told.output, re.M)
    assert command == f"dit-mlflow cleanse --training-run {training.info.run_id}"
    MlflowClient().log_metric(training.info.run_id, "cost/training_seconds", 90.0)
    told = invoke("influence", f"--training-run={training.info.run_id}", "--windows=1", "--removed=0")
    assert "up to 40 trainings of 90 s, 60 minutes" in told.output
    assert told.output.index("leaves it out") < told.output.index("Influence (local)")


def test_train_entry_point_uses_the_project_run(store: str) -> None:
    finished = entry_point("train", **SMALL, order_seed="2")
    assert finished.exit_code == 0, finished.output
    (run,) = runs()
    assert (run.info.status, run.data.tags["dit.kind"]) == ("FINISHED", "training")
    assert run.info.run_id in finished.stdout
    assert load_trajectory(run.info.run_id).complete
    assert run.data.params["workload.lr"] == "0.03"


def invoke(*arguments: str) -> Result:
    small = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    return CliRunner().invoke(cli, [*arguments, *small])


BAD: dict[str, tuple[list[str], str]] = {
    "workload": (["--workload", "projects/none"], "workload 'projects/none' not found"),
    "run id": (["--training-run", "beef"], "no run 'beef'"),
    "window past the end": (["--windows", "0:13"], "window 0:13 ends past training, which has 12 steps"),
    "windows": (["--windows", "abc"], "windows='abc' cannot be read"),
    "trust": (["--trust", "2"], "trust=2; expected 3 random samples or more"),
    "confirm": (["--confirm", "41"], "confirm=41; expected a number of samples, 0 … 40"),
    "kind": (["--kind", "foo"], "kind='foo'; expected 'local'"),
    "ground truth": (["--ground-truth", "41"], "ground_truth='41'; expected 'all', 'none' or a number"),
    "dtype": (["--dtype", "int8"], "dtype='int8'"),
    "memory": (["--memory-mb", "-1"], "memory_mb=-1; expected MiB"),
    "setting": (["--modell", "dnn"], "no setting 'modell'"),
    "stray word": (["dnn"], "cannot read 'dnn'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_any_work(name: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project_run = MlflowClient().create_run("1")
    monkeypatch.setenv("MLFLOW_RUN_ID", project_run.info.run_id)
    arguments, message = BAD[name]
    result = invoke("influence", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    (run,) = runs()
    assert run.info.status == "FAILED"
    assert message in run.data.tags["dit.error"]
    assert run.data.tags["dit.kind"] == "influence"


def test_loss_that_is_not_a_number_fails_both_runs_and_keeps_the_record(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_run = MlflowClient().create_run("1")
    monkeypatch.setenv("MLFLOW_RUN_ID", project_run.info.run_id)
    result = invoke("influence", "--lr", "1e38", "--optimizer", "sgd", "--momentum", "0.9")
    assert result.exit_code == 1
    assert "the loss is" in result.output
    assert {run.info.status for run in runs()} == {"FAILED"}
    (training,) = runs("training")
    assert load_trajectory(training.info.run_id).num_steps > 0


def test_seeds_that_torch_does_not_take_are_refused_before_a_run_is_made(store: str) -> None:
    for command in ("train", "influence"):
        result = invoke(command, "--order-seed", str(10**20))
        assert result.exit_code == 1
        assert f"order_seed={10**20}; expected a whole number of 64 bits" in result.output
    assert runs() == []


def test_existing_trajectory_that_cannot_be_used(store: str, tmp_path: Path) -> None:
    assert invoke("train").exit_code == 0
    (training,) = runs("training")
    run_id = training.info.run_id

    def influence(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["influence", "--training-run", run_id, *arguments])
        assert result.exit_code == 1
        return str(result.output)

    assert "was trained with model=logreg; model=dnn needs a new training" in influence("--model", "dnn")
    assert "init_seed=1 belongs to training" in influence("--init-seed", "1")
    assert "trained projects/mnist, not other:one" in influence("--workload", "other:one")
    shard = next(load_trajectory(run_id).directory.glob("checkpoints*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "is damaged: SHA-256" in influence()
    shard.unlink()
    assert "is missing" in influence()
    assert not [run for run in runs() if run.info.status == "RUNNING"]
    with mlflow.start_run() as empty:
        pass
    result = CliRunner().invoke(cli, ["influence", "--training-run", empty.info.run_id])
    assert "has no artifact trajectory/" in result.output


@pytest.mark.slow
def test_undefined_metrics_are_absent_with_a_reason(store: str) -> None:
    assert invoke("influence", "--corrupt", "0", "--ground-truth", "12").exit_code == 0
    (parent,) = runs("influence")
    assert "ground_truth/pearson" in parent.data.metrics
    assert "detection/auroc" not in parent.data.metrics
    assert parent.data.tags["dit.undefined.detection/auroc"] == "0 of 40 samples are corrupted"
    truth = load_influence(parent.info.run_id, "ground_truth")
    assert np.isfinite(truth.of(0)).sum() == 12
    # Of the whole run, those that stand out are known too.
    folders = ("influence/whole_run", "ground_truth/whole_run")
    estimate, exact = (load_influence(parent.info.run_id, folder).of(0) for folder in folders)
    order = np.argsort(estimate)
    standing_out = [*(i for i in order[:4] if estimate[i] < 0), *(i for i in order[-4:] if estimate[i] > 0)]
    assert len(standing_out) > 4
    assert set(np.flatnonzero(np.isfinite(exact))) == {*np.flatnonzero(np.isfinite(truth.of(0))), *standing_out}


def influence_until_it_ends(ready: Callable[[], None], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    ready()
    cli(["influence", "--model", "dnn", "--epochs", "5000"])


def test_termination_leaves_no_run_running(store: str) -> None:
    environment = {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "DIT_MLFLOW_CACHE")}
    with processes.running(influence_until_it_ends, environment) as process:
        deadline = time.monotonic() + 240
        while not runs("training") and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        process.terminate()
        process.join(60)
        assert process.exitcode == 143
    assert {run.info.status for run in runs()} == {"FAILED"}
    (training,) = runs("training")
    trajectory = load_trajectory(training.info.run_id)
    assert trajectory.num_steps > 0
    assert not trajectory.complete


def test_halves_of_surrogate_pairs_cost_no_answer(store: str) -> None:
    def told(index: int) -> str:
        return f"half \ud83d of {index}"

    workload = digits_workload(show=told, describe=told, label=told, corrupted=(1,))
    training_run = run_training(workload)
    trajectory = load_trajectory(training_run)
    answer = run_influence(training_run, trajectory, workload, [Window(0, 4), Window(4, 9)], "local", Checks())
    ended = mlflow.get_run(answer.run.info.run_id)
    assert ended.info.status == "FINISHED"
    assert "half ? of" in ended.data.tags["mlflow.note.content"]


def test_a_workload_that_cannot_tell_of_its_samples_costs_no_answer(store: str) -> None:
    def fail(index: int) -> str:
        raise KeyError(index)

    workload = digits_workload(show=fail, describe=fail, label=fail, corrupted=(1,))
    training_run = run_training(workload)
    trajectory = load_trajectory(training_run)
    windows = [Window(0, 4), Window(4, 9)]
    answer = run_influence(training_run, trajectory, workload, windows, "local", Checks())
    assert mlflow.get_run(answer.run.info.run_id).info.status == "FINISHED"
    assert "report.html" in artifact_names(answer.run, "influence")  # type: ignore[arg-type]


def test_an_explanation_from_python_is_logged_as_the_job_logs_it(store: str, tmp_path: Path) -> None:
    workload = digits_workload(corrupted=(1,))
    training_run = run_training(workload)
    trajectory = load_trajectory(training_run)
    windows = [Window(0, 4), Window(4, 9)]
    by_job = run_influence(training_run, trajectory, workload, windows, "local", Checks(trust=4))
    found = explain(trajectory, workload, windows, method="dit", checks=Checks(trust=4))
    with mlflow.start_run() as run:
        log_explanation(found, training_run)
    np.testing.assert_allclose(load_influence(run.info.run_id).scores, found.influence.scores)
    for folder in ("influence", "ground_truth"):
        assert artifact_names(run, folder) == artifact_names(by_job.run, folder)  # type: ignore[arg-type]
    logged, expected = (mlflow.get_run(r.info.run_id).data for r in (run, by_job.run))
    assert logged.metrics.keys() == expected.metrics.keys() | {"cost/peak_memory_mb"}
    assert logged.tags["dit.kind"] == "influence"
    assert [child.data.params["window_start"] for child in children(run)] == ["0", "4"]  # type: ignore[arg-type]


def test_a_query_in_a_word_is_recorded_and_a_bad_one_fails_before_a_run_exists(store: str) -> None:
    finished = invoke("explain", "--query=class:7", "--removed=0", "--ground-truth=12", "--trust=0", "--windows=2")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("influence")
    assert parent.data.params["resolved.query"] == "mean_validation_loss of class 7"
    assert parent.info.run_name == "class 7 · local 2 windows · influence mnist logreg"
    assert load_influence(parent.info.run_id).queries == ("mean_validation_loss of class 7",)
    before = len(runs())
    for option, value in (("query", "class:3"), ("kind", "lokal"), ("windows", "x"), ("groups", "none.csv")):
        failed = invoke("explain", f"--{option}={value}", "--ground-truth=12")
        assert failed.exit_code == 1 and f"{value}" in failed.output, failed.output
    assert len(runs()) == before


def test_runs_go_to_the_experiment_chosen_or_to_that_of_the_training_or_to_one_of_their_own(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a process of its own begins, that has chosen nothing.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)

    def experiments(kind: str) -> list[str]:
        return [mlflow.get_experiment(run.info.experiment_id).name for run in runs(kind)]

    quick = ("--removed=0", "--ground-truth=none", "--trust=0", "--windows=1")
    assert invoke("influence", *quick).exit_code == 0
    assert experiments("training") == experiments("influence") == experiments("window") == ["dit-mlflow"]
    mine = mlflow.create_experiment("mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mine)
    assert invoke("train").exit_code == 0
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    (training,) = (run for run in runs("training") if run.info.experiment_id == mine)
    assert CliRunner().invoke(cli, ["influence", *quick, "--training-run", training.info.run_id]).exit_code == 0
    assert sorted(experiments("influence")) == ["dit-mlflow", "mine"]
    assert not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys()
