"""Influence kept with models: artifacts, metrics, versions, and what is refused."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import stores
import torch
from mlflow import MlflowClient
from stores import Store, tracking
from test_influence_job import entry_point, runs
from torch.optim import SGD
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import InputError, Workload, load_workload, parse_windows
from dit_mlflow.errors import UntrustedError
from dit_mlflow.explanation import Checks
from dit_mlflow.explanation.model_card import BEGIN, CARD_CHARACTERS
from dit_mlflow.tracking import (
    load_influence,
    load_trajectory,
    log_influence,
    record_trajectory,
    register_influence,
    run_influence,
    run_training,
)
from dit_mlflow.tracking.jobs.register import RegistrationRequest, register_job
from dit_mlflow.tracking.ui.card import _known_samples

HOSTILE = 'sample {} <script>alert(1)</script> | **bold** [x](http://a.b) `c` "><img onerror=x> 😀 \n# heading'


def described_workload() -> Workload:
    return digits_workload(describe=lambda index: HOSTILE.format(index), corrupted=(1, 5))


def asked(training_run: str, workload: Workload, windows: str = "3", kind: str = "local") -> str:
    """An influence run, checked against 12 samples left out."""
    trajectory = load_trajectory(training_run)
    answer = run_influence(
        training_run, trajectory, workload, parse_windows(windows, trajectory), kind, Checks(ground_truth=12)
    )
    return str(answer.run.info.run_id)


def trained_and_asked(windows: str = "3") -> tuple[str, str]:
    workload = described_workload()
    training_run = run_training(workload)
    return training_run, asked(training_run, workload, windows)


@dataclass(frozen=True)
class Answered:
    """A SQLite store in ``folder`` with :func:`trained_and_asked`, and what it was then in ``kept``."""

    folder: Path
    kept: Path
    pair: tuple[str, str]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    folder, kept, cache = map(tmp_path_factory.mktemp, ("answered", "kept", "cache"))
    with pytest.MonkeyPatch.context() as patch, stores.sqlite(folder) as store, tracking(store, folder, patch):
        patch.setenv("DIT_MLFLOW_CACHE", str(cache))
        pair = trained_and_asked()
    stores.copy(folder, kept)
    return Answered(folder, kept, pair)


@pytest.fixture
def pair(answered: Answered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A training run, and an influence run on it, in a store that holds nothing else."""
    stores.copy(answered.kept, answered.folder)
    with stores.sqlite(answered.folder) as store, tracking(store, tmp_path, monkeypatch):
        yield answered.pair


def model_of(training_run: str) -> str:
    (output,) = mlflow.get_run(training_run).outputs.model_outputs
    return str(output.model_id)


def log_model(model: torch.nn.Module, name: str):  # type: ignore[no-untyped-def]
    inputs = datasets()[0].tensors[0][:2].numpy()
    return mlflow.pytorch.log_model(model, name=name, input_example=inputs, pip_requirements=["torch"])


def files_below(list_artifacts, folder: str) -> set[str]:  # type: ignore[no-untyped-def]
    found = set()
    for item in list_artifacts(folder):
        found |= files_below(list_artifacts, item.path) if item.is_dir else {item.path}
    return found


def model_files(model_id: str) -> set[str]:
    return files_below(lambda path: MlflowClient().list_logged_model_artifacts(model_id, path), "influence")


def run_files(run_id: str) -> set[str]:
    return files_below(lambda path: MlflowClient().list_artifacts(run_id, path), "influence")


def model_metrics(model_id: str) -> list[tuple[str, int, float, str, str | None]]:
    found = mlflow.get_logged_model(model_id).metrics or []
    return sorted((m.key, m.step, m.value, m.run_id, m.dataset_digest) for m in found)


def test_registered_influence_comes_back_and_twice_is_once(any_store: Store) -> None:
    training_run, influence_run = trained_and_asked(windows="2")
    name = f"digits {influence_run}"
    done = register_influence(influence_run, name)
    model_id = model_of(training_run)
    assert (done.created, done.model_id, done.replaced) == (True, model_id, None)
    first = (model_files(model_id), model_metrics(model_id), done.version.description, done.version.tags)
    assert first[0] == run_files(influence_run) >= {"influence/scores.parquet", "influence/top_samples.json"}

    again = register_influence(influence_run, name)
    assert (again.created, again.replaced, again.version.version) == (False, None, done.version.version)
    assert (model_files(model_id), model_metrics(model_id), again.version.description, again.version.tags) == first
    assert len(MlflowClient().search_model_versions(f"run_id = '{training_run}'")) == 1

    MlflowClient().set_registered_model_alias(name, "champion", again.version.version)
    expected = load_influence(influence_run)
    for source in (
        f"models:/{name}/{again.version.version}",
        f"models:/{name}/latest",
        f"models:/{name}@champion",
        f"models:/{model_id}",
        f"runs:/{influence_run}",
        f"runs:/{influence_run}/influence",
        again.version.tags["dit.influence_uri"],
    ):
        found = load_influence(source)
        assert found.scores.tobytes() == expected.scores.tobytes()
        assert (found.windows, found.queries, found.kind) == (expected.windows, expected.queries, expected.kind)
    assert load_influence(f"runs:/{influence_run}/ground_truth").method == "leave_one_out"


def test_metrics_of_the_model_are_those_of_the_run_beside_their_data_set(pair: tuple[str, str]) -> None:
    training_run, influence_run = pair
    model_id = model_of(training_run)
    before = model_metrics(model_id)
    register_influence(influence_run, "digits")
    added = {row[0]: row for row in model_metrics(model_id) if row not in before}
    figures = mlflow.get_run(influence_run).data.metrics
    whole = {name for name in figures if name.startswith(("ground_truth/", "detection/", "trust/"))}
    assert {name for name in added if not name.startswith("mean_over_windows/")} == whole
    assert {"ground_truth/spearman", "detection/auroc"} <= whole
    digest = {item.tags[0].value: item.dataset.digest for item in mlflow.get_run(training_run).inputs.dataset_inputs}
    for name in whole:
        about = "training" if name.startswith("detection/") else "validation"
        assert added[name][2:] == (figures[name], influence_run, digest[about])
    history = MlflowClient().get_metric_history(influence_run, "by_window/detection/auroc")
    assert added["mean_over_windows/detection/auroc"][2] == pytest.approx(np.mean([m.value for m in history]))


def test_the_description_names_the_samples_and_shows_their_texts_as_they_are(pair: tuple[str, str]) -> None:
    _, influence_run = pair
    version = register_influence(influence_run, "digits").version
    text = version.description
    influence = load_influence(influence_run)
    estimate, exact = (load_influence(influence_run, f"{part}/whole_run") for part in ("influence", "ground_truth"))
    whole = np.where(np.isfinite(exact.scores[0, 0]), exact.scores[0, 0], estimate.scores[0, 0])
    assert np.isfinite(exact.scores).sum() == 12 and f"steps {exact.windows[0]}, of 12 samples by exact" in text
    order = np.argsort(whole)
    sections = dict(re.findall(r"^### (\w+)(.*?)(?=^###|\Z)", text, re.MULTILINE | re.DOTALL))
    harmful, helpful = (
        np.array([i for i in ends if sign * whole[i] > 0]) for sign, ends in ((-1, order[:5]), (1, order[:-6:-1]))
    )
    assert len(harmful) >= 4 and len(helpful) >= 4
    for side, expected in (("Harmful", harmful), ("Helpful", helpful)):
        listed = re.findall(r"^- sample \*\*(\d+)\*\*: ([+-][\d.e-]+)", sections[side], re.MULTILINE)
        assert [int(index) for index, _ in listed] == expected.tolist()
        assert [float(score) for _, score in listed] == pytest.approx(whole[expected], rel=5e-3)
    rows = [re.split(r" \| ", line.strip("| ").replace("&emsp;", "")) for line in sections["Windows"].splitlines()[4:7]]
    for row, window, scores in zip(rows, influence.windows, influence.scores[:, 0], strict=True):
        assert row[:3] == [str(window), str(scores.argmin()), str(scores.argmax())]
    # No markup of the data's is left; what is shown is what describe() says.
    line = next(line for line in text.splitlines() if line.startswith(f"- sample **{order[0]}**"))
    assert "<" not in line
    shown = html.unescape(re.sub(r"\\([^\w\s])", r"\1", line))
    assert HOSTILE.format(order[0]).replace("\n", "")[:60] in shown
    assert not re.search(r"(?<!\\)[`\[\]|]", line)
    assert not re.search(r"(?<!\\)\*", line.replace(f"**{order[0]}**", "", 1))
    assert version.tags["dit.kind"] == "local"
    assert version.tags["dit.method"] == "dit"
    spearman = mlflow.get_run(influence_run).data.metrics["ground_truth/spearman"]
    assert version.tags["dit.fidelity"] == f"Spearman {spearman:.3f} to exact leave-one-out"


@pytest.mark.slow
def test_another_run_of_the_model_replaces_the_influence_and_nothing_that_people_wrote(pair: tuple[str, str]) -> None:
    training_run, first_run = pair
    client = MlflowClient()
    client.log_text(first_run, "of the first run alone", "influence/notes/extra.txt")
    elsewhere = register_influence(first_run, "elsewhere")
    version = register_influence(first_run, "digits").version
    model_id = elsewhere.model_id
    assert "influence/notes/extra.txt" in model_files(model_id)
    written = f"Before.\n\n{version.description}\n\nAfter. {'x' * 2500}"
    client.update_model_version("digits", version.version, written)

    second_run = asked(training_run, described_workload(), windows="2", kind="cumulative")
    done = register_influence(second_run, "digits")
    assert (done.created, done.replaced, done.version.version) == (False, first_run, version.version)
    assert model_files(model_id) == run_files(second_run)
    assert load_influence("models:/digits/1").kind == "cumulative"
    for name in ("digits", "elsewhere"):
        found = client.get_model_version(name, "1")
        assert found.tags["dit.influence_run_id"] == second_run
        assert found.tags["dit.kind"] == "cumulative"
        assert found.description.count(BEGIN) == 1
        assert second_run in found.description
        assert first_run not in found.description
    text = done.version.description
    assert text.startswith("Before.\n")
    assert text.endswith("After. " + "x" * 2500)
    assert len(text) <= CARD_CHARACTERS
    assert "Harmful" in text


def test_the_model_of_a_loop_of_ones_own(store: str) -> None:
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with mlflow.start_run() as run:
        with record_trajectory(model, optimizer) as recorder:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()
        logged = [log_model(model, name).model_id for name in ("a", "b")]
    influence_run = asked(run.info.run_id, digits_workload(optimizer=None), windows="1")
    with pytest.raises(InputError, match=rf"logged 2 models: .*{logged[0]}.*say which") as refused:
        register_influence(influence_run, "own")
    assert logged[1] in str(refused.value)
    # Nor is anything registered if the second of the two models cannot be made.
    with pytest.raises(InputError, match=r"recorded without a workload.*log_influence_model"):
        register_job(RegistrationRequest(influence_run, "own", logged[1], influence_model="rows"))
    assert not MlflowClient().search_registered_models()
    done = register_influence(influence_run, "own", model=logged[1])
    assert (done.model_id, done.version.source) == (logged[1], f"models:/{logged[1]}")
    # A version of the name is attached to as it stands.
    again = register_influence(influence_run, "own", model="models:/own/1")
    assert (again.created, again.version.version) == (False, done.version.version)


def test_the_influence_model_of_a_loop_of_ones_own_asks_the_workload_of_the_influence_run(store: str) -> None:
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with mlflow.start_run() as run:
        with record_trajectory(model, optimizer) as recorder:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()
        log_model(model, "a")
    influence_run = asked(run.info.run_id, load_workload("workloads:digits_workload"), windows="1")
    request = RegistrationRequest(influence_run, "own", influence_model="rows")
    with pytest.raises(UntrustedError, match="--workload workloads:digits_workload"):
        register_job(request)
    assert not MlflowClient().search_registered_models()
    assert "rows" in register_job(replace(request, workload="workloads:digits_workload"))
    answered = mlflow.pyfunc.load_model("models:/rows/1")
    rows = pd.DataFrame(datasets()[1].tensors[0][:2].numpy()).assign(target=[0, 1])
    assert set(answered.predict(rows)["side"]) == {"harmful", "helpful"}


def test_deleted_runs_are_refused_at_the_beginning(pair: tuple[str, str]) -> None:
    training_run, influence_run = pair
    client = MlflowClient()
    for deleted in (influence_run, training_run):
        client.delete_run(deleted)
        with pytest.raises(InputError, match=f"is deleted; restore it: mlflow runs restore --run-id {deleted}"):
            register_influence(influence_run, "digits")
        with pytest.raises(InputError, match="is deleted; restore it"):
            load_trajectory(deleted)
        client.restore_run(deleted)
    assert not client.search_registered_models()


def test_what_is_refused_and_changes_nothing(pair: tuple[str, str]) -> None:
    training_run, influence_run = pair
    client = MlflowClient()
    other_training = run_training(digits_workload(epochs=2))
    other_model = model_of(other_training)
    mlflow.register_model(f"models:/{other_model}", "other")
    (window, *_) = runs("window")
    with mlflow.start_run() as untold:
        log_influence(load_influence(influence_run))
    with mlflow.start_run(tags={"dit.training_run_id": other_training}) as foreign:
        log_influence(load_influence(influence_run))
    with mlflow.start_run(tags={"dit.training_run_id": training_run}) as unfinished:
        log_influence(load_influence(influence_run))
    client.set_terminated(unfinished.info.run_id, "FAILED")
    running = client.create_run(unfinished.info.experiment_id, tags={"dit.training_run_id": training_run})
    log_influence(load_influence(influence_run), run_id=running.info.run_id)

    refusals = [
        ((training_run, "digits"), r"has no artifact influence/ .*; it is a training run"),
        ((window.info.run_id, "digits"), rf"it is a window run of {influence_run}"),
        (("0" * 32, "digits"), "no run"),
        ((untold.info.run_id, "digits"), r"set its tag dit.training_run_id"),
        ((foreign.info.run_id, "digits"), r"influence of another model"),
        ((unfinished.info.run_id, "digits"), r"is FAILED"),
        ((running.info.run_id, "digits"), r"is RUNNING"),
        ((influence_run, "a/b"), r"model_name='a/b'"),
        ((influence_run, ""), r"model_name=''"),
        ((influence_run, "digits", other_model), rf"not one that training run {training_run}"),
        ((influence_run, "other", "models:/other/1"), rf"it was logged by run {other_training}"),
        ((influence_run, "digits", "models:/digits/1"), "no model 'models:/digits/1'"),
        ((influence_run, "digits", "nonsense"), "cannot be read"),
    ]
    before = [model_metrics(model) for model in (model_of(training_run), other_model)]
    for arguments, message in refusals:
        with pytest.raises(InputError, match=message):
            register_influence(*arguments)
    assert [model.name for model in client.search_registered_models()] == ["other"]
    assert client.get_model_version("other", "1").tags == {}
    for model_id, metrics in zip((model_of(training_run), other_model), before, strict=True):
        assert model_files(model_id) == set()
        assert model_metrics(model_id) == metrics
    for source, message in (
        ("models:/other/1", r"model other, version 1 \(m-.* has no influence/"),
        ("models:/other/7", "no model"),
        ("models:/other@nobody", "no model"),
        ("models:/other/champion", "no version 'champion'"),
        (f"models:/{other_model}", "has no influence/"),
        ("runs:/" + training_run, "expected an influence run"),
    ):
        with pytest.raises(InputError, match=message):
            load_influence(source)


def test_a_training_without_a_model_is_told_how_to_log_one(store: str) -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits_model()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.net(inputs if inputs.sum().item() > 0 else -inputs)

    workload = digits_workload(model=Branching)
    training_run = run_training(workload)
    influence_run = asked(training_run, workload, windows="1")
    with pytest.raises(InputError, match=r"logged no model.*mlflow\.pytorch\.log_model"):
        register_influence(influence_run, "digits")
    # What the message says works.
    with mlflow.start_run(run_id=training_run):
        log_model(digits_model(), "model")
    assert register_influence(influence_run, "digits").created


def test_from_its_entry_point(pair: tuple[str, str]) -> None:
    training_run, influence_run = pair
    done = entry_point("register", influence_run=influence_run, model_name="it's digits")
    assert done.exit_code == 0, done.output
    assert "#/models/it%27s%20digits/versions/1?workflowType=machine_learning" in done.stdout
    (job,) = runs("registration")
    assert (job.info.status, job.info.run_name) == ("FINISHED", "register it's digits")
    assert job.data.tags["dit.influence_run_id"] == influence_run
    assert load_influence("models:/it's digits/1").scores.tobytes() == load_influence(influence_run).scores.tobytes()

    refused = entry_point("register", influence_run=training_run, model_name="digits")
    assert refused.exit_code == 1
    assert "has no artifact influence/" in refused.stderr
    assert {run.info.status for run in runs("registration")} == {"FINISHED", "FAILED"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "5",
        '{"columns": 5, "data": []}',
        '{"columns": ["sample_index"], "data": [[1e999]]}',
        "[]," * 10**6,
    ],
    ids=["deep", "number", "columns", "infinite", "many"],
)
def test_tables_of_a_run_that_are_none_cost_the_texts_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "whole_run.json").write_text(text)
    (tmp_path / "top_samples.json").symlink_to("/dev/zero")
    assert _known_samples(tmp_path) == {}
