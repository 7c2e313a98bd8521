"""What runs say of the data they were made with."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from stores import Start, tracking
from workloads import digits_workload

from dit_mlflow.tracking.store.datasets import SampleSet, log_dataset, workload_source


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no")


MLFLOW_TAKES = 65_535


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"long": "x" * 10**6}, {"long": "x" * 499 + "…"}),
        ({"digits": 10**5000}, {"digits": "(int, which cannot be shown: ValueError)"}),
        ({"mute": Mute()}, {"mute": "(Mute, which cannot be shown: RuntimeError)"}),
        ({"workload": "mine", "reference": 1}, {"workload.workload": "mine", "reference": "1"}),
        ({f"s{i}": "é" * 600 for i in range(100)}, {f"s{i}": "é" * 49 + "…" for i in range(100)}),
        ({f"s{i}": 1 for i in range(10_000)}, {"settings": "10000, too many to be listed"}),
    ],
)
def test_settings_of_any_size_fit(settings: dict[str, Any], expected: dict[str, str]) -> None:
    source = workload_source(digits_workload(reference="a:b", settings=settings))
    assert source == {"workload": "a:b", **expected}
    logged = SampleSet("train", None, 3, source).to_dict()["source"]
    assert len(logged) <= MLFLOW_TAKES
    assert json.loads(logged)["tags"]["workload"] == "a:b"


def inputs_of(run_id: str) -> list[str]:
    return [found.dataset.name for found in mlflow.get_run(run_id).inputs.dataset_inputs]


@pytest.mark.parametrize(
    "said",
    [
        '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "dataset_pk"',
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest",
        "(pymysql.err.IntegrityError) (1062, \"Duplicate entry '1-train' for key 'PRIMARY'\")",
    ],
)
def test_a_data_set_that_another_run_logs_at_once_is_logged(
    said: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = MlflowClient.log_inputs, [MlflowException(said)]

    def log_inputs(self: MlflowClient, *arguments: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_inputs", log_inputs)
    with mlflow.start_run() as run:
        log_dataset(run.info.run_id, SampleSet("train", None, 3, {}), "training")
    assert inputs_of(run.info.run_id) == ["train"]


@pytest.mark.slow
def test_many_runs_log_the_same_data_sets_at_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking(start("postgresql"), tmp_path, monkeypatch, tmp_path.name):
        client = MlflowClient()
        experiment = client.get_experiment_by_name(tmp_path.name).experiment_id
        runs = [client.create_run(experiment).info.run_id for _ in range(8)]
        together = Barrier(len(runs), timeout=60)

        def log(run_id: str) -> None:
            for number in range(10):
                together.wait()
                log_dataset(run_id, SampleSet(f"train {number}", None, 3, {}), "training")

        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(log, runs))
        assert [len(inputs_of(run_id)) for run_id in runs] == [10] * len(runs)
