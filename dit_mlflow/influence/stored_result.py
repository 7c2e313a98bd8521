"""Read an influence result, ``scores.parquet`` and ``metadata.json``, from an untrusted folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dit_mlflow.errors import InputError, first_line
from dit_mlflow.influence.window import Window
from dit_mlflow.trajectory.untrusted import first_fault, open_regular, parse_json

if TYPE_CHECKING:
    from dit_mlflow.influence.result import Influence

SCORES_FILE = "scores.parquet"
METADATA_FILE = "metadata.json"

SIGN_CONVENTION = (
    "influence = change in the query caused by removing the sample; for a loss, positive = helpful "
    "(removal raises the loss), negative = harmful (removal lowers it)"
)

RESULT_FILES = (SCORES_FILE, METADATA_FILE)

LARGEST_METADATA = 64 * 2**20
"""Largest size of ``metadata.json``, in bytes."""

ROWS_OF_ANY_FILE, ROWS_PER_BYTE = 4 * 2**20, 8
"""Largest number of rows of ``scores.parquet``, in any file and per byte of a larger file: scores hardly compress."""

ROWS_AT_ONCE = 2**16

WRITTEN = {"kind", "method", "queries", "windows", "num_samples", "sign_convention", "degrees_of_freedom"}
"""Keys that :meth:`Influence.save` adds to a result's own metadata."""


def read_result(folder: Path) -> dict[str, Any]:
    """The fields of the :class:`Influence` that was saved in a folder.

    Every row's window, query and sample are compared with its position, so that no score is given to another sample.

    Raises:
        InputError: there is no result, its two files are not what :meth:`Influence.save` writes, or they contradict
            each other; the message names the field.

    Memory: two to three times the scores, which are at most 64 bytes for each byte of the file (or 32 MiB).
    """
    path = folder / METADATA_FILE
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST_METADATA + 1)
        with open_regular(folder / SCORES_FILE):
            pass
    except OSError as error:
        raise InputError(f"no influence result in {folder}: {error}") from error
    if len(content) > LARGEST_METADATA:
        raise InputError(f"{path} is larger than {LARGEST_METADATA} bytes; it is no description of an influence result")
    try:
        description = parse_json(content)
    except ValueError as error:
        raise InputError(f"no influence result in {folder}: {path} is not JSON: {first_line(error)}") from error
    fields = _described(path, description)
    found = _scores(folder / SCORES_FILE, fields["windows"], fields["queries"], description["num_samples"])
    if fields["degrees_of_freedom"] is not None and found["standard_error"] is None:
        raise InputError(f"{path} has degrees_of_freedom of standard errors, and {SCORES_FILE} no standard_error")
    return fields | found


Natural = Annotated[int, Field(ge=0, lt=2**62)]


def _freedom(number: float) -> float:
    if number < 0:
        raise ValueError("expected 0 or more, or NaN where it is unknown")
    return number


class _Description(BaseModel):
    """The keys of ``metadata.json`` that are checked."""

    model_config = ConfigDict(strict=True)

    kind: Literal["local", "final", "cumulative", "none"]
    method: Annotated[str, Field(min_length=1, max_length=1000)]
    queries: list[str]
    windows: list[Annotated[list[Natural], Field(min_length=2, max_length=2)]]
    num_samples: Natural
    measures: Literal["query", "ranking", "suspicion"] = "query"
    removed: Annotated[float, Field(gt=0, lt=1)] | None = None
    removal: Literal["weight", "absent"] | None = None
    coupled: bool = False
    not_finite: list[Natural] = []
    sign_convention: Literal[SIGN_CONVENTION] = SIGN_CONVENTION  # type: ignore[valid-type]
    degrees_of_freedom: list[list[Annotated[float, AfterValidator(_freedom)]]] | None = None
    # Not the result's own, but read by what tells of it.
    seconds: float | None = None
    trajectory_digest: str | None = None
    versions: dict[str, str] | None = None
    draws_agree: dict[str, list[float | None]] | None = None
    bank: dict[str, list[dict[str, Any]]] | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for values that do not fit each other."""
        if len(set(self.queries)) < len(self.queries):
            raise ValueError(f"queries: {self.queries[:5]} are not all different")
        if any(start >= end for start, end in self.windows):
            raise ValueError(f"windows: expected start < end in each, got {self.windows[:5]}")
        rows = self.degrees_of_freedom
        if rows and [len(row) for row in rows] != [len(self.queries)] * len(self.windows):
            raise ValueError("degrees_of_freedom: expected a number for each window and query")


def description_of(result: Influence) -> bytes:
    """The content of ``metadata.json``.

    Raises:
        InputError: it, or the scores, would be refused by :func:`read_result`, or come back as others.
    """
    if given := sorted(WRITTEN & result.metadata.keys()):
        raise InputError(f"metadata has the keys {given}, which are the result's own fields; name them otherwise")
    freedom, errors, samples = result.degrees_of_freedom, result.standard_error, np.asarray(result.samples)
    if freedom is not None and errors is None:
        raise InputError("there are degrees_of_freedom of standard errors, and no standard_error")
    if errors is not None and np.isinf(errors).any():
        raise InputError("a standard_error is infinite; expected finite numbers, and NaN where it is unknown")
    if samples.size and (samples.dtype.kind not in "iu" or samples.min() < 0 or len(np.unique(samples)) < samples.size):
        raise InputError(f"samples begin with {samples[:5].tolist()}; expected different indices of 0 or more")
    description = {
        "kind": result.kind,
        "method": result.method,
        "queries": list(result.queries),
        "windows": [[window.start, window.end] for window in result.windows],
        "num_samples": samples.size,
        "sign_convention": SIGN_CONVENTION,
        **({} if freedom is None else {"degrees_of_freedom": freedom.tolist()}),
        **result.metadata,
    }
    try:
        "".join(result.queries).encode()
        content = json.dumps(description, indent=1).encode()
        if len(content) > LARGEST_METADATA:
            raise ValueError(f"{len(content)} bytes; expected {LARGEST_METADATA} at most")
        _Description.model_validate(parse_json(content)).check()
    except ValidationError as error:
        raise InputError(f"the result cannot be stored: {first_fault(error)}") from None
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the result cannot be stored: {first_line(error)}; expected JSON values in metadata"
        ) from error
    return content


def _described(path: Path, description: Any) -> dict[str, Any]:
    try:
        checked = _Description.model_validate(description)
        checked.check()
    except ValidationError as error:
        raise InputError(f"{path} is not what Influence.save writes: {first_fault(error)}") from None
    except ValueError as error:
        raise InputError(f"{path} is not what Influence.save writes: {error}") from error
    freedom = checked.degrees_of_freedom
    return {
        "windows": tuple(Window(*pair) for pair in checked.windows),
        "queries": tuple(checked.queries),
        "kind": checked.kind,
        "method": checked.method,
        "metadata": {key: value for key, value in description.items() if key not in WRITTEN},
        "degrees_of_freedom": np.array(freedom) if freedom else None,
    }


def _scores(
    path: Path, windows: tuple[Window, ...], queries: tuple[str, ...], num_samples: int
) -> dict[str, np.ndarray | None]:
    shape = len(windows), len(queries), num_samples
    try:
        with open_regular(path) as file:
            table = pq.ParquetFile(file, pre_buffer=False)
            columns = _columns(path, table, max(map(len, queries), default=0))
            _check_rows(path, table, shape, os.fstat(file.fileno()).st_size)
            reader = _Reader(path, windows, queries, num_samples)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                reader.add(batch)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"no influence result in {path.parent}: {path} is no Parquet: {first_line(error)}") from error
    if reader.read != int(np.prod(shape)):
        raise InputError(f"{path} holds {reader.read} rows; expected {int(np.prod(shape))}. It is damaged")
    if not reader.read:
        reader.values = {name: np.empty(0) for name in columns if name in {"score", "standard_error"}}
    errors = reader.values.get("standard_error")
    return {
        "samples": reader.samples,
        "scores": reader.values["score"].reshape(shape),
        "standard_error": None if errors is None else errors.reshape(shape),
    }


class _Reader:
    """Reads the rows in order, and checks window, query and sample of each by its position."""

    def __init__(self, path: Path, windows: tuple[Window, ...], queries: tuple[str, ...], num_samples: int) -> None:
        self._path = path
        self._queries, self._num_samples = queries, num_samples
        self._bounds = {
            "window_start": np.array([window.start for window in windows], dtype=np.int64),
            "window_end": np.array([window.end for window in windows], dtype=np.int64),
        }
        self._size = len(windows) * len(queries) * num_samples
        self.samples = np.zeros(num_samples, dtype=np.int64)
        self.values: dict[str, np.ndarray] = {}
        self.read = 0

    def add(self, batch: pa.RecordBatch) -> None:
        rows = np.arange(self.read, self.read + batch.num_rows)
        window, query = rows // (len(self._queries) * self._num_samples), rows // self._num_samples % len(self._queries)
        expected = {"window_index": window, **{name: at[window] for name, at in self._bounds.items()}, "query": query}
        for name, values in expected.items():
            self._expect(name, rows, self._whole(batch, name), values)
        sample, at = self._whole(batch, "sample_index"), rows % self._num_samples
        first = rows < self._num_samples
        self.samples[at[first]] = sample[first]
        self._expect("sample_index", rows, sample, self.samples[at])
        self.read += batch.num_rows
        if first.any() and self.read >= self._num_samples:
            if self.samples.min() < 0:
                raise InputError(f"{self._path}: sample_index {self.samples.min()}; expected indices of 0 or more")
            if len(np.unique(self.samples)) < self._num_samples:
                raise InputError(f"{self._path}: a sample_index occurs twice in one window and query")
        for name in ("score", "standard_error"):
            if name in batch.schema.names:
                self._take(name, rows, batch.column(name))

    def _take(self, name: str, rows: np.ndarray, column: pa.Array) -> None:
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        wrong = np.isinf(values) if name == "score" else np.isinf(values) | (values < 0)
        if wrong.any():
            place = int(np.argmax(wrong))
            expected = "a finite number, or NaN" + ("" if name == "score" else ", of 0 or more")
            raise self._wrong(name, int(rows[place]), float(values[place]), expected)
        self.values.setdefault(name, np.empty(self._size))[rows] = values

    def _whole(self, batch: pa.RecordBatch, name: str) -> np.ndarray:
        """A column of whole numbers, or the positions of the queries; -1 for any other query."""
        column = batch.column(name)
        if column.null_count:
            raise InputError(f"{self._path}: column {name!r} has rows without a value")
        if name != "query":
            return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
        column = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
        places = {query: place for place, query in enumerate(self._queries)}
        known = np.array([places.get(query, -1) for query in column.dictionary.to_pylist()], dtype=np.int64)
        return np.asarray(known[column.indices.to_numpy(zero_copy_only=False)])

    def _expect(self, name: str, rows: np.ndarray, found: np.ndarray, expected: np.ndarray) -> None:
        if (wrong := found != expected).any():
            place = int(np.argmax(wrong))
            got, right = str(found[place]), str(expected[place])
            if name == "query":
                got, right = "another", repr(self._queries[expected[place]])
            raise self._wrong(name, int(rows[place]), got, right)

    def _wrong(self, name: str, row: int, found: object, expected: str) -> InputError:
        return InputError(
            f"{self._path}: {name} of row {row} is {found}; expected {expected}, by {METADATA_FILE} and the order of "
            "rows (by window, then query, then sample). The files have been changed; download them from the run again"
        )


def _columns(path: Path, table: pq.ParquetFile, longest: int) -> list[str]:
    """The columns to read; their types and sizes are checked."""
    whole = {"sample_index", "window_index", "window_start", "window_end"}
    schema = table.schema_arrow
    columns = [*whole, "query", "score", *(["standard_error"] if "standard_error" in schema.names else [])]
    for name in columns:
        if schema.names.count(name) != 1:
            raise InputError(f"{path} has {schema.names.count(name)} columns {name!r}; expected one")
        of = schema.field(name).type
        if name == "query":
            text = of.value_type if pa.types.is_dictionary(of) else of
            right, expected = pa.types.is_string(text) or pa.types.is_large_string(text), "text"
        elif name in whole:
            right, expected = pa.types.is_integer(of), "whole numbers"
        else:
            right, expected = pa.types.is_floating(of) or pa.types.is_integer(of), "numbers"
        if not right and table.metadata.num_rows:
            raise InputError(f"{path}: column {name!r} holds {of}; expected {expected}")
    allowed = 2**24 + table.metadata.num_rows * (32 + 4 * longest)
    for group in map(table.metadata.row_group, range(table.metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.total_uncompressed_size > allowed:
                raise InputError(
                    f"{path}: column {column.path_in_schema!r} takes {column.total_uncompressed_size} bytes in "
                    f"{table.metadata.num_rows} rows; expected {allowed} at most"
                )
    return columns


def _check_rows(path: Path, table: pq.ParquetFile, shape: tuple[int, int, int], size: int) -> None:
    found, expected = table.metadata.num_rows, shape[0] * shape[1] * shape[2]
    if found != expected:
        raise InputError(f"{path} has {found} rows; expected {expected}, since {METADATA_FILE} has the shape {shape}")
    if found > max(ROWS_OF_ANY_FILE, ROWS_PER_BYTE * size):
        raise InputError(f"{path} claims {found} rows in {size} bytes, more scores than so few bytes can hold")
