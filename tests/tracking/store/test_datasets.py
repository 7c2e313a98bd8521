"""What runs say of the data they were made with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from workloads import digits_workload

from dit_mlflow.tracking.store.datasets import SampleSet, workload_source


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
