"""The pyfunc model that answers influence queries."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient
from stores import Store
from workloads import datasets

from dit_mlflow import InputError, Workload, WorkloadError, load_workload, parse_windows, sample_losses, track
from dit_mlflow.cli import cli
from dit_mlflow.errors import UntrustedError
from dit_mlflow.explanation import Checks
from dit_mlflow.replay import Trajectory
from dit_mlflow.tracking import load_influence, load_trajectory, log_influence_model, run_influence, run_training

REFERENCE = "workloads:digits_workload"


def trained() -> tuple[str, Workload, Trajectory]:
    workload = load_workload(REFERENCE)
    training_run = run_training(workload)
    return training_run, workload, load_trajectory(training_run)


def rows(count: int = 3) -> pd.DataFrame:
    inputs, targets = datasets()[1].tensors
    frame = pd.DataFrame(inputs[:count].numpy(), columns=[f"p{i:02d}" for i in range(64)])
    return frame.assign(target=targets[:count].numpy())


def check(answer: pd.DataFrame, scores: np.ndarray, windows: list[tuple[int, int]], top: int) -> None:
    """The table holds exactly the extremes of ``scores`` ``[windows, rows, samples]``."""
    listed = {
        (row.window_start, row.window_end, row.row, row.side, row.rank): (row.sample_index, row.score)
        for row in answer.itertuples()
    }
    expected = {}
    for index, (start, end) in enumerate(windows):
        for row, values in enumerate(scores[index]):
            for side, order in (("harmful", np.argsort(values)), ("helpful", np.argsort(-values))):
                kept = [at for at in order[:top] if (values[at] < 0 if side == "harmful" else values[at] > 0)]
                for rank, at in enumerate(kept, start=1):
                    expected[start, end, row, side, rank] = (at, values[at])
    assert listed == expected


@pytest.mark.parametrize("kind", ["local", "final"])
def test_a_loaded_model_scores_rows_as_validation_samples(any_store: Store, kind: str) -> None:
    training_run, workload, trajectory = trained()
    name = f"answers {training_run}"
    logged = log_influence_model(training_run, windows="2", kind=kind, name=name, top=2, workload=REFERENCE)
    assert logged.version == "1"
    model = mlflow.pyfunc.load_model(f"models:/{name}/1")
    windows = parse_windows("2", trajectory)

    def expected(count: int) -> np.ndarray:
        return track(trajectory, workload, windows, kind, sample_losses(workload, samples=range(count))).scores

    check(model.predict(rows()), expected(3), [(0, 4), (4, 9)], top=2)
    # As often as one likes, and in another form.
    frame = rows(1)
    nested = pd.DataFrame({"image": [frame.drop(columns="target").to_numpy()[0]], "target": frame["target"]})
    check(model.predict(nested), expected(1), [(0, 4), (4, 9)], top=2)


def test_nothing_is_pickled_and_the_same_is_logged_once(store: str, tmp_path: Path) -> None:
    training_run, _, _ = trained()
    first = log_influence_model(training_run, windows="3", name="answers", workload=REFERENCE)
    assert log_influence_model(training_run, windows="3", name="answers", workload=REFERENCE) == first
    assert log_influence_model(training_run, windows="3:6", name="answers", workload=REFERENCE).version == "2"
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{first.model_id}", dst_path=str(tmp_path / "model")))
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert "influence_model_script.py" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    description = yaml.safe_load((folder / "MLmodel").read_text())
    config = description["flavors"]["python_function"]["config"]
    assert config["training_run"] == training_run
    assert config["windows"] == "0:3,3:6,6:9"
    # It is a model of its own, not one that the training made.
    influence_run = asked(training_run)
    done = CliRunner().invoke(cli, ["register", "--influence-run", influence_run, "--model-name", "digits"])
    assert done.exit_code == 0, done.output


def asked(training_run: str) -> str:
    trajectory = load_trajectory(training_run)
    windows = parse_windows("3", trajectory)
    return str(
        run_influence(training_run, trajectory, load_workload(REFERENCE), windows, "final", Checks()).run.info.run_id
    )


def test_from_the_command_line_beside_the_registered_model(store: str) -> None:
    training_run, _, _ = trained()
    influence_run = asked(training_run)
    options = ["--influence-run", influence_run, "--model-name", "digits", "--influence-model", "answers"]
    options += ["--workload", REFERENCE]
    for _ in range(2):
        done = CliRunner().invoke(cli, ["register", *options])
        assert done.exit_code == 0, done.output
        assert "models:/answers/1" in done.output
        assert "models:/digits/1" in done.output
    assert len(MlflowClient().search_model_versions("name = 'answers'")) == 1
    answer = mlflow.pyfunc.load_model("models:/answers/1").predict(rows(16))
    windows = load_influence(influence_run).windows
    assert {(a, b) for a, b in zip(answer["window_start"], answer["window_end"], strict=True)} == {
        (window.start, window.end) for window in windows
    }
    # Its mean over the validation set is the influence run's score, where all samples are listed for each row.
    whole = log_influence_model(training_run, windows="3", kind="final", name="all", top=24, trust_workload=True)
    every = mlflow.pyfunc.load_model(f"models:/{whole.model_id}").predict(rows(16))
    mean = every.pivot_table(index="sample_index", columns="window_start", values="score", aggfunc="sum") / 16
    expected = load_influence(influence_run).scores[:, 0]
    np.testing.assert_allclose(mean.fillna(0).to_numpy().T, expected, rtol=1e-4, atol=1e-7)


def test_what_is_refused(store: str) -> None:
    training_run, _, _ = trained()
    for changes, message in (
        ({"windows": "0:99"}, "ends past training"),
        ({"kind": "global"}, "global"),
        ({"name": "a/b"}, "model_name='a/b'"),
        ({"top": 0}, "top=0"),
        ({"workload": "projects/mnist"}, "not projects/mnist"),
    ):
        with pytest.raises((InputError, WorkloadError), match=message):
            log_influence_model(training_run, **{"workload": REFERENCE, **changes})
    with pytest.raises(UntrustedError, match=f"in Python workload='{REFERENCE}'"):
        log_influence_model(training_run)
    assert MlflowClient().search_registered_models() == []
    done = CliRunner().invoke(cli, ["register", "--influence-run", "x", "--model-name", "a", "--influence-model", "a"])
    assert (done.exit_code, "they are two models" in done.output) == (1, True)
    model = mlflow.pyfunc.load_model(f"models:/{log_influence_model(training_run, workload=REFERENCE).model_id}")
    with pytest.raises(InputError, match="expected a DataFrame with the column 'target'"):
        model.predict(rows().drop(columns="target"))
    with pytest.raises(InputError, match="63 values"):
        model.predict(rows().drop(columns="p00"))
