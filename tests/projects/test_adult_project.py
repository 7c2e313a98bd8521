"""UCI Adult: rows and encoding against pandas and by hand, no statistic of validation or test, clear errors."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from public_files import person, real, write_adult

from dit_mlflow import Workload, WorkloadError, load_workload
from dit_mlflow.workload.projects import find_factory

COLUMNS = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
]
MERGED = {
    "workclass": {"?": "none", "Never-worked": "none"},
    "education": dict.fromkeys(["1st-4th", "5th-6th", "7th-8th", "9th", "10th", "11th", "12th"], "school"),
    "marital-status": {"Married-AF-spouse": "Married-civ-spouse"},
    "occupation": {"?": "none", "Armed-Forces": "none"},
    "native-country": {
        **dict.fromkeys(["United-States", "Cuba", "?"], "a"),
        **dict.fromkeys(["England", "Germany", "Canada", "Italy", "France", "Greece", "Philippines"], "b"),
        **dict.fromkeys(["India", "Iran", "Cambodia", "Taiwan", "Japan", "Yugoslavia", "China", "Hong"], "c"),
        **dict.fromkeys(["South", "Poland", "Ireland", "Hungary", "Scotland", "Thailand", "Ecuador"], "d"),
    },
}


def inputs(workload: Workload, part: str = "train") -> torch.Tensor:
    found: torch.Tensor = getattr(workload, f"{part}_set").tensors[0]
    return found


def written(folder: Path, training: list[str], test: list[str], **settings: Any) -> Workload:
    write_adult(folder, training, test)
    sizes = {"n_train": len(training) - 2, "n_validation": 2, "n_test": len(test), "corrupt": 0}
    return load_workload("projects/adult", data_dir=str(folder), **(sizes | settings))


def test_real_rows_are_encoded_as_pandas_encodes_them() -> None:
    folder = real("adult")
    workload = load_workload("projects/adult", data_dir=folder, data_seed=3)
    table = pd.read_csv(f"{folder}/adult.data", names=COLUMNS, skipinitialspace=True)
    order = np.random.default_rng(3).permutation(len(table))
    for name, merged in MERGED.items():
        rest = "e" if name == "native-country" else None
        table[name] = table[name].map(lambda value, m=merged, r=rest: m.get(value, r or value))
    table["fnlwgt"] = np.log1p(table["fnlwgt"])
    labels = (table.pop("income") == ">50K").to_numpy()
    values = pd.get_dummies(table).to_numpy(dtype=float)
    training = values[order[:256]]
    scale = training.std(axis=0)
    scale[scale == 0] = 1
    for part, rows in (("train", order[:256]), ("validation", order[256:512])):
        expected, found = (values[rows] - training.mean(axis=0)) / scale, inputs(workload, part).numpy()
        assert found.shape == (256, 62)
        # In any order of the columns.
        np.testing.assert_allclose(_ordered(found), _ordered(expected.astype(np.float32)), atol=1e-5)
        given = getattr(workload, f"{part}_set").tensors[1].numpy() == 1
        flipped = np.flatnonzero(given != labels[rows])
        assert tuple(flipped) == (workload.corrupted if part == "train" else ())
    row = pd.read_csv(f"{folder}/adult.data", names=COLUMNS, skipinitialspace=True).iloc[order[5]]
    assert workload.appearance(5) == {name: str(row[name]) for name in COLUMNS[:-1]}


def _ordered(values: np.ndarray) -> np.ndarray:
    return values[:, np.lexsort(np.round(values, 3))]


def test_merged_categories_are_one_and_others_are_not(tmp_path: Path) -> None:
    same = [person(), person(native_country="?"), person(native_country="United-States")]
    other = [person(native_country="Peru"), person(education="9th"), person(education="12th")]
    workload = written(tmp_path, [f"{row}, <=50K" for row in [*same, *other]] * 3, [f"{person()}, >50K"], n_train=16)
    kinds = {}
    for index in range(16):
        row = workload.appearance(index)
        assert isinstance(row, dict)
        kinds[row["native-country"], row["education"]] = inputs(workload)[index]
    cuba = kinds["Cuba", "Bachelors"]
    assert torch.equal(cuba, kinds["?", "Bachelors"])
    assert torch.equal(cuba, kinds["United-States", "Bachelors"])
    assert (cuba != kinds["Peru", "Bachelors"]).sum() == 2
    assert torch.equal(kinds["Cuba", "9th"], kinds["Cuba", "12th"])
    assert (cuba != kinds["Cuba", "9th"]).sum() == 2


def test_statistics_are_those_of_the_training_rows(tmp_path: Path) -> None:
    """Age is a column whose every value can be worked out by hand."""
    training = [f"{person(age=str(age))}, {'>50K' if age % 3 else '<=50K'}" for age in range(20, 40)]
    first = written(tmp_path / "a", training, [f"{person(age='90')}, >50K"])
    second = written(tmp_path / "b", training, [f"{person(age='17', sex='Female', education='10th')}, <=50K"] * 3)
    assert torch.equal(inputs(first), inputs(second))
    assert torch.equal(inputs(first, "validation"), inputs(second, "validation"))
    ages = [int(first.appearance(index)["age"]) for index in range(18)]  # type: ignore[index, call-overload]
    mean, deviation = statistics.fmean(ages), statistics.pstdev(ages)
    column = next(
        c for c in range(62) if math.isclose(inputs(first, "test")[0, c], (90 - mean) / deviation, rel_tol=1e-5)
    )
    left = [round(float(value) * deviation + mean) for value in inputs(first, "validation")[:, column]]
    # All twenty people are there once: no one is in two splits.
    assert sorted(ages + left) == list(range(20, 40))
    assert first.test_set[0][1] == 1  # type: ignore[index]
    assert second.test_set[0][1] == 0  # type: ignore[index]


def test_labels_as_annotators_confuse_them() -> None:
    """Categories are no numbers for the model that says which rows look like the other class."""
    settings = {"data_dir": real("adult"), "n_train": 120, "corrupt": 0.1}
    damaged = load_workload("projects/adult", corruption="hard_flip", **settings)
    labels, given = (
        load.train_set.tensors[1].numpy()  # type: ignore[attr-defined]
        for load in (load_workload("projects/adult", **(settings | {"corrupt": 0})), damaged)
    )
    assert np.flatnonzero(labels != given).tolist() == list(damaged.corrupted)
    assert len(damaged.corrupted) == 12
    # Most people earn less; those who look as if they earned more are among the less usual.
    assert labels[list(damaged.corrupted)].mean() > labels.mean()


def test_what_reports_say(tmp_path: Path) -> None:
    rows = [f"{person(age=str(age))}, {'>50K' if age % 2 else '<=50K'}" for age in range(20, 40)]
    flipped = written(tmp_path, rows, rows, corrupt=0.5)
    for index in range(18):
        age = int(flipped.appearance(index)["age"])  # type: ignore[index, call-overload]
        was, other = (">50K", "<=50K") if age % 2 else ("<=50K", ">50K")
        now = other if index in flipped.corrupted else was
        note = " (flipped)" if index in flipped.corrupted else ""
        line = f"age {age}, Bachelors, Adm-clerical, 40 hours a week, earns {was}, labelled {now}{note}"
        assert flipped.describe is not None
        assert flipped.describe(index) == line
        assert flipped.label_of(index) == now
    assert len(flipped.corrupted) == 9


def test_openml_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame as OpenML has it: test rows first, numbers as numbers, missing values as such."""
    folder = real("adult")
    parts = [
        pd.read_csv(f"{folder}/{name}", names=COLUMNS, skipinitialspace=True, na_values="?", skiprows=skipped)
        for name, skipped in (("adult.test", 1), ("adult.data", 0))
    ]
    frame = pd.concat(parts, ignore_index=True).rename(columns={"income": "class"})
    frame["class"] = frame["class"].str.rstrip(".")
    frame["age"] = frame["age"].astype(float)
    answer(monkeypatch, frame)
    found, expected = load_workload("projects/adult"), load_workload("projects/adult", data_dir=folder)
    for part in ("train", "validation", "test"):
        for one, other in zip(
            getattr(found, f"{part}_set").tensors, getattr(expected, f"{part}_set").tensors, strict=True
        ):
            assert torch.equal(one, other)
    answer(monkeypatch, frame.iloc[::-1].reset_index(drop=True))
    with pytest.raises(WorkloadError, match="not UCI's table in its order; give data_dir"):
        load_workload("projects/adult")


def answer(monkeypatch: pytest.MonkeyPatch, frame: pd.DataFrame | None) -> None:
    """Let OpenML give ``frame``, or not be there."""

    def fetch_openml(**settings: Any) -> Any:
        if frame is None:
            raise OSError("no network")
        assert settings["data_id"] == 1590
        return type("Bunch", (), {"frame": frame})

    find_factory("projects/adult")
    monkeypatch.setattr(sys.modules["dit_mlflow_project_adult.table"], "fetch_openml", fetch_openml)


def test_without_a_network_the_message_names_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, None)
    with pytest.raises(WorkloadError, match=r"OpenML: OSError.*give data_dir: a folder with adult\.data"):
        load_workload("projects/adult")


GOOD = f"{person()}, <=50K"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("39, Private", r"adult\.data, line 2: 2 fields; expected 14 and the label"),
        (f"{person(age='old')}, <=50K", r"line 2: age is 'old'; expected a whole number"),
        (f"{person(age='')}, <=50K", "line 2: age is ''"),
        (f"{person(sex='<b>')}, <=50K", "line 2: sex is '<b>', which UCI's table does not know"),
        (f"{person()}, rich", "line 2: the label is 'rich'; expected <=50K or >50K"),
        (f"{GOOD}, 1", "line 2: 16 fields"),
    ],
)
def test_a_malformed_row_is_named(row: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=message):
        written(tmp_path, [GOOD, row, GOOD, GOOD], [GOOD])


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """A record may name the folder, and no consent is asked for the package's own workloads."""
    for name in ("adult.data", "adult.test"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(WorkloadError, match="has 1099511627776 bytes; expected 67108864 at most"):
        load_workload("projects/adult", data_dir=str(tmp_path))


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(WorkloadError, match=message):
            load_workload("projects/adult", **({"data_dir": str(tmp_path)} | settings))

    refused("there is no .*nowhere; expected a folder with adult.data", data_dir=str(tmp_path / "nowhere"))
    refused("there is no adult.data in")
    write_adult(tmp_path, [GOOD] * 9, [])
    refused("adult.test holds no rows")
    write_adult(tmp_path, [GOOD] * 9, [GOOD] * 3)
    refused("512 samples were asked; there are 9 people to train and validate with")
    refused("256 samples were asked; there are 3 people to test with", n_train=4, n_validation=4)
    refused("n_train is 0; expected 1 or more", n_train=0)
    refused("n_test is -1; expected 0 or more", n_train=4, n_validation=4, n_test=-1)
    refused("corrupt is 2.0", corrupt=2)
    refused("setting model='cnn'", model="cnn")
    refused("setting corruption='noise'", corruption="noise")
    refused("momentum=0.9 belongs to optimizer=sgd", optimizer="adam", momentum=0.9)
    refused("hidden is 0", hidden=0, n_train=4, n_validation=4, n_test=1)
    (tmp_path / "adult.data").write_bytes(b"\xff\xfe\x00")
    refused("adult.data cannot be read: 'utf-8'")


def test_no_test_samples_is_no_test_set(tmp_path: Path) -> None:
    assert written(tmp_path, [GOOD] * 9, [GOOD], n_test=0).test_set is None
