"""The census table: UCI's two files, or the same rows from OpenML."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import fetch_openml

from dit_mlflow import WorkloadError
from dit_mlflow.examples import Labelled, folder_of, no_larger

from .encoding import CATEGORIES, COLUMNS, MISSING, NUMBERS

LABELS = {"<=50K": 0, ">50K": 1}
FILES = "a folder with adult.data and adult.test, as in the archive of the UCI Machine Learning Repository"

OPENML = 1590
"""OpenML's number of the data set, which holds the rows of adult.test, then those of adult.data."""
TEST_ROWS, TRAINING_ROWS = 16_281, 32_561
TEST_RICH, TRAINING_RICH = 3_846, 7_841
"""Rows with an income above 50,000 dollars, to check that the data are the same."""


def people(data_dir: str | None) -> tuple[Labelled, Labelled, str | None]:
    """Rows of 14 strings to train and validate with, rows to test with, and the folder they are from.

    Raises:
        WorkloadError: a file is missing or malformed (named with the line), or the download fails.
    """
    if data_dir is None:
        return *_downloaded(), None
    folder = folder_of(data_dir, FILES)
    for name in ("adult.data", "adult.test"):
        if not (folder / name).is_file():
            raise WorkloadError(f"data_dir: there is no {name} in {folder}; expected {FILES}")
    return _file(folder / "adult.data"), _file(folder / "adult.test"), str(folder)


LARGEST = 64 * 2**20
"""Most bytes of a file, sixteen times those of UCI's."""


def _file(path: Path) -> Labelled:
    try:
        with no_larger(path, LARGEST).open(encoding="utf-8", newline="") as lines:
            return _labelled(_records(csv.reader(lines, skipinitialspace=True)), str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error


def _records(reader: Any) -> Iterable[tuple[str, list[str]]]:
    """Lines with something in them; adult.test begins with one that is no record."""
    for fields in reader:
        if fields and not fields[0].startswith("|"):
            # A full stop ends the label in adult.test.
            yield f"line {reader.line_num}", [*fields[:-1], fields[-1].removesuffix(".")]


def _downloaded() -> tuple[Labelled, Labelled]:
    try:
        frame = fetch_openml(data_id=OPENML, as_frame=True).frame
    except Exception as error:
        raise WorkloadError(f"UCI Adult cannot be downloaded from OpenML: {error!r}; give data_dir: {FILES}") from error
    missing = [name for name in (*COLUMNS, "class") if name not in frame]
    if missing:
        raise WorkloadError(f"OpenML's data set {OPENML} has no column {missing[0]!r}; give data_dir: {FILES}")
    values = [_texts(frame[name].tolist(), name) for name in (*COLUMNS, "class")]
    records = [(f"row {number}", list(fields)) for number, fields in enumerate(zip(*values, strict=True))]
    test, pool = (_labelled(part, "OpenML") for part in (records[:TEST_ROWS], records[TEST_ROWS:]))
    found = [(len(part), int(part.labels.sum())) for part in (test, pool)]
    if found != [(TEST_ROWS, TEST_RICH), (TRAINING_ROWS, TRAINING_RICH)]:
        raise WorkloadError(f"OpenML's data set {OPENML} is not UCI's table in its order; give data_dir: {FILES}")
    return pool, test


def _texts(values: list[Any], name: str) -> list[str]:
    if name in NUMBERS:
        return [f"{value:.0f}" for value in values]
    return [value if isinstance(value, str) else MISSING for value in values]


def _labelled(records: Iterable[tuple[str, list[str]]], source: str) -> Labelled:
    rows, labels = [], []
    for place, fields in records:
        problem = _problem(fields)
        if problem:
            raise WorkloadError(f"{source}, {place}: {problem}")
        rows.append(fields[:-1])
        labels.append(LABELS[fields[-1]])
    if not rows:
        raise WorkloadError(f"{source} holds no rows")
    return Labelled(np.array(rows, dtype=object), np.array(labels))


def _problem(fields: list[str]) -> str | None:
    """The fault of a row of 14 values and a label; ``None`` if it has none."""
    if len(fields) != len(COLUMNS) + 1:
        return f"{len(fields)} fields; expected {len(COLUMNS)} and the label"
    for name, value in zip(COLUMNS, fields, strict=False):
        if name in CATEGORIES:
            if value not in CATEGORIES[name]:
                return f"{name} is {value[:40]!r}, which UCI's table does not know"
        elif not (value.isascii() and value.isdigit()):
            return f"{name} is {value[:40]!r}; expected a whole number"
    return None if fields[-1] in LABELS else f"the label is {fields[-1][:40]!r}; expected <=50K or >50K"
