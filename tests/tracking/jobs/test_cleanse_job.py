"""Cleansing through the doors that users take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Run
from test_influence_job import SMALL, artifact_names, check_figures, children, entry_point, inputs, runs
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from workloads import datasets, digits_workload

from dit_mlflow import InputError, UnsupportedError, load_workload
from dit_mlflow.cli import cli
from dit_mlflow.evaluation import mean_scores
from dit_mlflow.explanation import cleansing
from dit_mlflow.explanation.cleansing import CleansingTask
from dit_mlflow.recording.loop import train_unrecorded
from dit_mlflow.tracking import load_influence, load_trajectory, record_trajectory
from dit_mlflow.tracking.jobs import cleanse_runs
from dit_mlflow.tracking.jobs import request as job
from dit_mlflow.workload import Workload

QUICK = {**SMALL, "repeats": "2", "draws": "2", "drop": "0.1,0.2"}


def cleanse(**options: str) -> Any:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return CliRunner().invoke(cli, ["cleanse", *arguments])


def table(run: Run, name: str) -> Any:
    return mlflow.load_table(name, run_ids=[run.info.run_id])


def strategies(kind: str = "cleansed") -> dict[str, Run]:
    (parent,) = runs("cleansing")
    return {run.info.run_name: run for run in children(parent) if run.data.tags["dit.kind"] == kind}


def test_drop_from_its_entry_point(store: str) -> None:
    finished = entry_point("cleanse", **QUICK, corrupt="0.2", order_seed="3")
    assert finished.exit_code == 0, finished.output
    (parent,), (training,) = runs("cleansing"), runs("training")
    assert {run.info.status for run in runs()} == {"FINISHED"}
    tried = strategies()
    names = [f"{way} {share} %" for way in ("influence", "loss", "random") for share in (10, 20)]
    assert list(tried) == sorted([*names, "no cleaning"])

    # Without cleaning, the first repeat is the recorded training (tables keep ten digits).
    repeats = table(tried["no cleaning"], "repeats.json")
    assert repeats[["init_seed", "order_seed"]].to_numpy().tolist() == [[0, 3], [1, 4]]
    for name in ("validation/loss", "validation/accuracy", "test/loss", "test/accuracy"):
        assert repeats[name][0] == pytest.approx(training.data.metrics[name], abs=1e-9)
        assert tried["no cleaning"].data.metrics[name] == pytest.approx(repeats[name].mean())
        assert parent.data.metrics[f"before/{name}"] == pytest.approx(repeats[name].mean())

    # Dropped are the samples of lowest score; what comes of it is what training on the others gives.
    workload = load_workload("projects/mnist", **SMALL, corrupt="0.2")
    scores = load_influence(parent.info.run_id, folder="influence/drop_0.2").of(0)
    assert load_influence(parent.info.run_id).removed == 0.1
    child = tried["influence 20 %"]
    assert child.data.params == {"strategy": "influence", "fraction": "0.2", "dropped": "8", "action": "drop"}
    samples = table(child, "dropped.json")
    lowest = np.argsort(scores, kind="stable")[:8]
    assert samples["sample_index"].tolist() == lowest.tolist()
    assert samples["score"].tolist() == pytest.approx(scores[lowest].tolist(), abs=1e-9)
    assert samples["corrupted"].tolist() == [index in workload.corrupted for index in lowest]
    assert all("(flipped)" in text for text in samples.loc[samples["corrupted"], "sample"])
    assert child.data.metrics["detection/precision"] == samples["corrupted"].mean()
    inputs, targets = workload.train_set.tensors  # type: ignore[attr-defined]
    kept = np.delete(np.arange(40), lowest)
    left = load_workload("projects/mnist", **SMALL, corrupt="0.2")
    object.__setattr__(left, "train_set", TensorDataset(inputs[kept], targets[kept]))
    model = train_unrecorded(left, 0, 3).eval()
    assert left.test_set is not None
    expected = mean_scores(left, model, left.test_set).values["loss"]
    assert table(child, "repeats.json")["test/loss"][0] == pytest.approx(expected, abs=1e-9)

    # Random draws are of as many samples.
    drawn = table(tried["random 10 %"], "dropped.json")
    assert drawn.groupby("draw")["sample_index"].nunique().tolist() == [4, 4]

    check_choice(parent, tried)
    check_series(tried)
    check_figures("gain/test/accuracy_low", "before/validation/loss", "by_fraction/detection/recall", "flagged/helpful")
    assert "workflowType=machine_learning" in finished.stdout
    assert artifact_names(parent, "") == {
        *("influence", "cleansing.json", "cleansing.png", "dropped.json", "dropped_indices.json")
    }


def test_without_cleaning_the_recorded_training_comes_out_bit_for_bit(store: str) -> None:
    finished = cleanse(**{**QUICK, "repeats": "1", "draws": "0"}, init_seed="2")
    assert finished.exit_code == 0, finished.output
    (training,) = runs("training")
    again = strategies()["no cleaning"].data.metrics
    assert {name: again[name] for name in again} == {name: training.data.metrics[name] for name in again}
    assert {"validation/loss", "validation/accuracy", "test/loss", "test/accuracy"} == set(again)
    (parent,) = runs("cleansing")
    assert inputs(parent) == inputs(training) != {}
    assert "Training again on all samples" not in parent.data.tags["mlflow.note.content"]
    # On another machine it may not, which is then said.
    MlflowClient().log_metric(training.info.run_id, "validation/loss", 9.0)
    options = {"drop": "0.1", "repeats": "1", "draws": "0", "training_run": training.info.run_id}
    assert "the recorded training 9: machine, versions" in cleanse(**options).output


def check_choice(parent: Run, tried: dict[str, Run]) -> None:
    """The parent's is the child that is best on validation."""
    ways = [run for run in tried.values() if not run.info.run_name.startswith("random")]

    def rank(run: Run) -> tuple[float, float]:
        return -run.data.metrics["validation/accuracy"], run.data.metrics["validation/loss"]

    best = min(ways, key=rank)
    assert parent.data.params["chosen.strategy"] == best.data.params["strategy"]
    assert parent.data.params["chosen.fraction"] == best.data.params["fraction"]
    for name in ("test/accuracy", "test/loss"):
        assert parent.data.metrics[name] == best.data.metrics[name]
    taken = mlflow.artifacts.load_dict(f"runs:/{parent.info.run_id}/dropped_indices.json")["indices"]
    assert taken == (table(best, "dropped.json")["sample_index"].tolist() if best.data.params["dropped"] != "0" else [])
    note = parent.data.tags["mlflow.note.content"]
    said = {"yes": "**Cleaning helped**", "no": "**Cleaning did not help**", "unclear": "**Whether cleaning helped"}
    assert note.startswith(said[parent.data.tags["dit.helped"]])


def check_series(tried: dict[str, Run]) -> None:
    """A chart of the runs of kind ``strategy`` overlays the strategies."""
    for strategy, run in strategies("strategy").items():
        series = MlflowClient().get_metric_history(run.info.run_id, "by_fraction/test/accuracy")
        steps = {0: tried["no cleaning"], 4: tried[f"{strategy} 10 %"], 8: tried[f"{strategy} 20 %"]}
        expected = {step: child.data.metrics["test/accuracy"] for step, child in steps.items()}
        assert {metric.step: metric.value for metric in series} == pytest.approx(expected)
    assert list(strategies("strategy")) == ["influence", "loss", "random"]


def test_relabelling_looks_at_no_true_label(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether damage is known makes no difference; new labels are predictions of models that did not see the sample."""
    known = cleanse(**QUICK, corrupt="0.2", action="relabel", metric="loss")
    assert known.exit_code == 0, known.output
    (training,), (first,) = runs("training"), runs("cleansing")

    def forgetful(*arguments: Any) -> Workload:
        workload = load_workload("projects/mnist", **SMALL, corrupt="0.2")
        for name, value in (("corrupted", ()), ("describe", None)):
            object.__setattr__(workload, name, value)
        return workload

    monkeypatch.setattr(job, "recorded_workload", forgetful)
    options = {name: QUICK[name] for name in ("repeats", "draws", "drop")}
    blind = cleanse(**options, action="relabel", metric="loss", training_run=training.info.run_id)
    assert blind.exit_code == 0, blind.output
    (second,) = (run for run in runs("cleansing") if run.info.run_id != first.info.run_id)
    for mine, other in zip(children(first), children(second), strict=True):
        names = [name for name in mine.data.metrics if name.startswith(("validation/", "test/", "gain/"))]
        assert names
        assert [mine.data.metrics[name] for name in names] == [other.data.metrics[name] for name in names]
    assert "detection/precision" not in second.data.metrics
    assert "truly damaged is not known" in second.data.tags["mlflow.note.content"]

    # Predictions are classes as people read them, and some of the flagged are given another label.
    (child,) = (run for run in children(first) if run.info.run_name == "influence 20 %")
    samples = table(child, "relabelled.json").astype({"label": str, "new_label": str})
    assert set(samples["new_label"]) <= {"1", "7"}
    changed = samples["new_label"] != samples["label"]
    assert changed.any()
    assert child.data.metrics["relabelled/changed"] == changed.sum()
    check_figures("gain/test/loss_low")
    taken = mlflow.artifacts.load_dict(f"runs:/{first.info.run_id}/relabelled_indices.json")
    assert len(taken["classes"]) == len(taken["indices"])


def test_windows_are_candidates_of_their_own(store: str) -> None:
    finished = cleanse(**{**QUICK, "draws": "0"}, windows="2")
    assert finished.exit_code == 0, finished.output
    tried = strategies()
    ways = ("influence w00 0-6", "influence w01 6-12", "loss")
    assert list(tried) == sorted([*(f"{way} {share} %" for way in ways for share in (10, 20)), "no cleaning"])
    (parent,) = runs("cleansing")
    influence = load_influence(parent.info.run_id)
    assert influence.kind == "final"
    for index, way in enumerate(ways[:2]):
        lowest = np.argsort(influence.of(index), kind="stable")[:4]
        assert table(tried[f"{way} 10 %"], "dropped.json")["sample_index"].tolist() == lowest.tolist()
    check_choice(parent, tried)


def test_reweighting_lowers_the_losses_of_what_harms(store: str) -> None:
    finished = cleanse(**QUICK, action="reweight", corrupt="0.2")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("cleansing")
    assert parent.info.run_name == "reweight 10 20 % · cleanse mnist logreg"
    tried = strategies()
    ours, random = (table(tried[f"{way} 20 %"], "reweighted.json") for way in ("influence", "random"))
    harm = (-ours["score"]).clip(lower=0)
    np.testing.assert_allclose(ours["weight"], 1 - harm / harm.max(), atol=1e-6)
    assert ours["weight"].min() == 0 and (ours["weight"] > 0).any()
    for _, draw in random.groupby("draw"):
        np.testing.assert_allclose(draw["weight"], ours["weight"], atol=1e-6)
    figures = {name: run.data.metrics["test/loss"] for name, run in tried.items()}
    assert len(set(figures.values())) == len(figures)
    if parent.data.params["chosen.strategy"] != "no cleaning":
        taken = mlflow.artifacts.load_dict(f"runs:/{parent.info.run_id}/reweighted_indices.json")
        assert len(taken["weights"]) == len(taken["indices"]) and min(taken["weights"]) == 0
    assert "multiplied by weights below 1" in parent.data.tags["mlflow.note.content"]


def test_a_trial_that_fails_stops_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_for_loss(trial: Any, *arguments: Any) -> Any:
        if trial.strategy == "loss":
            raise RuntimeError("no <b>luck</b> today \udcff")
        return tried_out(trial, *arguments)

    tried_out = cleansing.tried_out
    monkeypatch.setattr(cleansing, "tried_out", fails_for_loss)
    finished = cleanse(**QUICK)
    assert finished.exit_code == 0, finished.output
    status = {name: run.info.status for name, run in strategies().items()}
    assert {name for name, value in status.items() if value == "FAILED"} == {"loss 10 %", "loss 20 %"}
    assert "no <b>luck</b> today \\udcff" in strategies()["loss 10 %"].data.tags["dit.error"]
    (parent,) = runs("cleansing")
    assert parent.info.status == "FINISHED"
    assert "loss 10 % failed: RuntimeError" in finished.output
    assert "<b>" not in parent.data.tags["mlflow.note.content"]
    monkeypatch.setattr(cleansing, "tried_out", lambda *arguments: 1 / 0)
    assert cleanse(**QUICK).exit_code == 1
    assert not [run for run in runs() if run.info.status == "RUNNING"]


BAD: dict[str, tuple[dict[str, str], str]] = {
    "one": ({"drop": "1"}, "drop='1'; expected shares of the training samples between 0 and 1"),
    "zero": ({"drop": "0,0.1"}, "drop='0,0.1'; expected shares"),
    "words": ({"drop": "some"}, "drop='some' cannot be read"),
    "not a number": ({"drop": "nan"}, "drop='nan'; expected shares"),
    "none": ({"drop": "0.001"}, "drop=0.001 of 40 samples is none of them"),
    "all": ({"drop": "0.999"}, "drop=0.999 of 40 samples is all 40 of them"),
    "twice": ({"drop": "0.1,0.101"}, "asks for the same number of 40 samples twice"),
    "class": ({"drop": "0.97"}, "dropping 39 of 40 samples leaves fewer than the 2 classes"),
    "action": ({"action": "repair"}, "action='repair'; expected one of drop, relabel"),
    "memory": ({"memory_mb": "-1"}, "memory_mb=-1; expected MiB"),
    "repeats": ({"repeats": "0"}, "repeats=0; expected 1 or more"),
    "seeds": ({"init_seed": str(2**64 - 1), "repeats": "2"}, f"init_seed={2**64}; expected a whole number of 64 bits"),
    "draws": ({"draws": "-1"}, "draws=-1; expected 0 or more"),
    "metric": ({"metric": "f1"}, "metric='f1'; the workload has loss, accuracy"),
    "window": ({"windows": "0:13"}, "window 0:13 ends past training, which has 12 steps"),
    "kind": ({"kind": "foo"}, "kind='foo'"),
    "setting": ({"modell": "dnn"}, "no setting 'modell'"),
}


def test_a_note_that_fails_costs_itself_alone(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> str:
        raise MemoryError("931 GiB")

    monkeypatch.setattr(cleanse_runs, "cleansing_note", fails)
    done = cleanse(**QUICK)
    assert done.exit_code == 0, done.output
    (parent,) = runs("cleansing")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["dit.not_drawn.note"] == "MemoryError: 931 GiB"
    assert {"cleansing.json", "dropped.json", "cleansing.png"} <= artifact_names(parent, "")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_any_work(name: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project_run = MlflowClient().create_run("1")
    monkeypatch.setenv("MLFLOW_RUN_ID", project_run.info.run_id)
    options, message = BAD[name]
    finished = cleanse(**{**SMALL, **options})
    assert finished.exit_code == 1
    assert message in finished.output
    (run,) = runs()
    assert (run.info.status, run.data.tags["dit.kind"]) == ("FAILED", "cleansing")


def test_a_class_that_would_be_left_without_samples_is_told_before_training_again(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleansing, "tried_out", lambda *arguments: pytest.fail("trained"))
    finished = cleanse(**{**QUICK, "drop": "0.9"}, corrupt="0.4", corruption="class_flip")
    assert finished.exit_code == 1
    assert "leaves no sample of class" in finished.output
    assert {run.info.status for run in runs("cleansing")} == {"FAILED"}
    assert not runs("cleansed")


HALVES = r"""
from workloads import datasets, digits_workload

def told(index):
    return f"half \ud83d of {index}"

def workload():
    return digits_workload(describe=told, label=told, show=told, corrupted=(1, 5), test_set=datasets()[1])
"""


@pytest.mark.parametrize(("action", "done"), [("drop", "dropped"), ("relabel", "relabelled")])
def test_texts_that_cannot_be_stored_cost_no_answer(
    action: str, done: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halves.py").write_text(HALVES)
    monkeypatch.syspath_prepend(str(tmp_path))
    finished = cleanse(workload="halves:workload", action=action, drop="0.1", repeats="1", draws="1", windows="2")
    assert finished.exit_code == 0, finished.output
    assert {run.info.status for run in runs()} == {"FINISHED"}
    samples = table(strategies()["loss 10 %"], f"{done}.json")
    for name in ("sample", "label", *(["new_label"] if action == "relabel" else [])):
        assert samples[name].str.startswith("half ? of ").all()


OWN_LOOP = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from dit_mlflow import Workload

def data(seed, size=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())

def build():
    return nn.Linear(4, 2)

def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")

def bare() -> Workload:
    return Workload(build, loss, data(0), data(1))

def trainable() -> Workload:
    return Workload(build, loss, data(0), data(1), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
                    batch_size=8, epochs=2, test_set=data(2))

def untested() -> Workload:
    return Workload(build, loss, data(0), data(1), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
                    batch_size=8, epochs=2)
"""


@pytest.fixture
def own_loop(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run of a user's own loop."""
    (tmp_path / "my_job.py").write_text(OWN_LOOP)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_job", raising=False)
    import my_job  # type: ignore[import-not-found]

    model: nn.Module = my_job.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mlflow.start_run() as run, record_trajectory(model, optimizer) as recorder:
        for x, y in recorder.watch(DataLoader(my_job.data(0), batch_size=8, shuffle=True)):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    assert load_trajectory(run.info.run_id).num_steps == 3
    return str(run.info.run_id)


def test_a_loop_of_ones_own_needs_a_workload_that_can_be_trained(own_loop: str) -> None:
    before = len(runs())
    for workload, message in (
        ("bare", "Workload.optimizer, Workload.batch_size, Workload.epochs must be given to train (and scheduler, if"),
        ("untested", "Workload.test_set must be given to cleanse"),
    ):
        finished = cleanse(training_run=own_loop, workload=f"my_job:{workload}", drop="0.1")
        assert finished.exit_code == 1
        assert message in finished.output
    assert len(runs()) == before
    finished = cleanse(training_run=own_loop, workload="my_job:trainable", drop="0.1", repeats="1", draws="1")
    assert finished.exit_code == 0, finished.output
    (parent,) = runs("cleansing")
    assert parent.data.params["resolved.metric"] == "loss"
    assert "seeds of the recorded training are not known" in parent.data.tags["mlflow.note.content"]
    assert "need" in parent.data.tags["dit.undefined.gain/test/loss_low"]


def planned(workload: Workload, **asked: Any) -> CleansingTask:
    return CleansingTask.of(workload, "0.2", asked.get("action", "drop"), asked.get("metric", ""))


def test_relabelling_needs_a_class_of_five_samples() -> None:
    few = TensorDataset(torch.randn(9, 64), torch.arange(9) % 3)
    workload = digits_workload(train_set=few, test_set=datasets()[1])
    assert planned(workload).metric == "loss"
    with pytest.raises(UnsupportedError, match=r"the largest class has 3 samples; .* 5 parts"):
        planned(workload, action="relabel")


def test_a_metric_that_is_no_number_is_not_judged_by() -> None:
    def metrics(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"accuracy": torch.full((len(batch[1]),), torch.nan), "f1": torch.ones(len(batch[1]))}

    workload = digits_workload(test_set=datasets()[1], metrics=metrics)
    assert planned(workload).metric == "loss"
    assert planned(workload, metric="f1").metric == "f1"
    with pytest.raises(InputError, match="metric='accuracy' is nan on the validation split"):
        planned(workload, metric="accuracy")
