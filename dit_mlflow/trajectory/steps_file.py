"""Read ``steps-NNNNN.parquet``: all of a file is checked before any of its steps is handed out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.trajectory.manifest import Manifest, StepsFile
from dit_mlflow.trajectory.parquet_size import count_rows
from dit_mlflow.trajectory.step_record import SCHEMA, Hyperparameters, StepRecord
from dit_mlflow.workload.random_state import RandomState

Value = TypeVar("Value")
_Parts = tuple[np.ndarray, ...]


def read_steps(path: Path, part: StepsFile, manifest: Manifest) -> list[StepRecord]:
    """The steps ``part.start … part.stop - 1``. What the file holds after them is not looked at.

    Args:
        path: of the file.
        part: which of its rows belong to the trajectory: the first ones.
        manifest: sample indices, parameter names, parameter groups and their settings must be possible by it.

    Raises:
        TrajectoryError: it is not a record of these steps.

    Cost: about 10 microseconds a step. Memory: that of the steps; a file that unpacks to more than a record of its size
    can need is refused.
    """
    try:
        count = part.stop - part.start
        if (rows := count_rows(path)) < count:
            raise ValueError(f"it has {rows} steps; expected {count} or more")
        table = _table(path).slice(0, count)
        return _Rows(table.to_batches()[0], manifest, part.start).steps()
    except MemoryError:
        raise
    except (TrajectoryError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise TrajectoryError(f"{path} is not a usable record of steps: {error}") from error


def _table(path: Path) -> pa.Table:
    """The whole file; its columns are those of :data:`SCHEMA`."""
    names = pq.read_schema(path).names
    if unknown := [name for name in names if name not in SCHEMA.names]:
        raise ValueError(f"unknown columns {unknown}")
    strings = [column for column in _STRINGS if column.partition(".")[0] in names]
    with pq.ParquetFile(path, read_dictionary=strings, pre_buffer=False) as file:
        found = file.schema_arrow
        for field in SCHEMA:
            indices = found.get_all_field_indices(field.name)
            # Columns may be missing where they may be empty.
            alike = len(indices) == 1 and found.field(indices[0]).type == _as_read(field.type)
            if not alike and (indices or not field.nullable):
                raise ValueError(f"column {field.name!r} is missing, there twice, or not of type {field.type}")
        table = file.read().combine_chunks()
    table.validate(full=True)
    return table


def _as_read(kind: pa.DataType) -> pa.DataType:
    """The type with references in place of strings: written out, one that is repeated could take any memory."""
    if pa.types.is_list(kind):
        return pa.list_(_as_read(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _as_read(field.type)) for field in kind])
    return pa.dictionary(pa.int32(), kind) if kind in (pa.string(), pa.binary()) else kind


def _string_columns() -> list[str]:
    """Paths of the columns of :data:`SCHEMA` that hold strings, as Parquet names them."""
    names: list[str] = []

    def visit(path: str, kind: pa.DataType) -> None:
        if pa.types.is_list(kind):
            visit(f"{path}.list.element", kind.value_type)
        elif pa.types.is_struct(kind):
            for field in kind:
                visit(f"{path}.{field.name}", field.type)
        elif kind in (pa.string(), pa.binary()):
            names.append(path)

    for field in SCHEMA:
        visit(field.name, field.type)
    return names


_STRINGS = _string_columns()


class _Rows:
    """The rows of one batch, taken apart column by column."""

    def __init__(self, batch: pa.RecordBatch, manifest: Manifest, start: int) -> None:
        self._batch = batch
        self._manifest = manifest
        self._start = start
        self._parameters = frozenset(manifest.model.parameters)

    def steps(self) -> list[StepRecord]:
        length = len(self._batch)
        numbers = range(self._start, self._start + length)
        if not np.array_equal(_numbers(self._column("step")), np.arange(self._start, self._start + length)):
            raise ValueError(f"its steps are not numbered {numbers.start} … {numbers.stop - 1}")
        epochs = _numbers(self._column("epoch"))
        self._need(epochs.min() >= 0, "an epoch is negative")
        indices = self._indices()
        absent = self._names("no_gradient", known=self._parameters)
        zero = self._names("zero_gradient", known=self._parameters)
        self._need(all(a.isdisjoint(b) for a, b in zip(absent, zero, strict=True)), "a gradient is None and 0 at once")
        columns = (
            numbers,
            epochs.tolist(),
            indices,
            self._coefficients(indices),
            self._hyperparameters(),
            self._losses(),
            self._random_states(indices),
            self._names("evaluation_mode"),
            absent,
            zero,
        )
        return [StepRecord(*row) for row in zip(*columns, strict=True)]

    def _need(self, condition: bool | np.bool_, problem: str) -> None:
        if not condition:
            raise ValueError(f"in steps {self._start} … {self._start + len(self._batch) - 1}, {problem}")

    def _column(self, name: str) -> pa.Array | None:
        """The column, ``None`` if it is missing or empty throughout."""
        if name not in self._batch.schema.names:
            return None
        column = self._batch.column(name)
        return None if column.null_count == len(column) else column

    def _indices(self) -> list[_Parts]:
        """Sample indices by step and micro-batch."""
        column = self._column("indices")
        if column is None or column.null_count:
            raise ValueError("a step has no sample indices")
        outer, micro_batches = _unnested(column)
        inner, values = _unnested(micro_batches)
        self._need(outer.min() > 0 and inner.min(initial=1) > 0, "a batch has no samples")
        samples = _numbers(values)
        known = self._manifest.num_samples or 0
        outside = samples[(samples < 0) | (samples >= known)]
        self._need(not len(outside), f"there is sample {outside[:1]}; the manifest has 0 … {known - 1}")
        return _nested(_nested(samples, inner), outer)

    def _coefficients(self, indices: Sequence[_Parts]) -> list[_Parts | None]:
        column = self._column("coefficients")
        if column is None:
            return [None] * len(indices)
        outer, micro_batches = _unnested(column)
        inner, values = _unnested(micro_batches)
        factors = _numbers(values)
        self._need(bool(np.isfinite(factors).all()), "a coefficient is not finite")
        given = column.is_valid().to_pylist()
        parts = _nested(_nested(factors, inner), outer)
        for step, samples in enumerate(indices):
            if given[step] and [len(part) for part in parts[step]] != [len(part) for part in samples]:
                raise ValueError(f"step {self._start + step}: as many coefficients as sample indices are expected")
        return [part if present else None for part, present in zip(parts, given, strict=True)]

    def _hyperparameters(self) -> list[tuple[Hyperparameters, ...]]:
        return _each(self._column("hyperparameters"), self._groups)

    def _groups(self, text: str) -> tuple[Hyperparameters, ...]:
        """One object per parameter group, with all that the optimizer knows, and no more than numbers and the like."""
        try:
            groups = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"hyperparameters are not JSON: {error}") from error
        layout = self._manifest.optimizer
        self._need(
            isinstance(groups, list) and len(groups) == len(layout.groups) and all(isinstance(g, dict) for g in groups),
            f"hyperparameters are not those of {len(layout.groups)} parameter groups",
        )
        for group in groups:
            lacking = [name for name in layout.defaults if name not in group]
            self._need(not lacking and "params" not in group, f"hyperparameters lack {lacking}, or hold 'params'")
            for name, default in layout.defaults.items():
                value = group[name]
                alike = _is_scalar(value) and _is_scalar(default)
                alike |= _is_vector(value) and _is_vector(default) and len(value) == len(default)
                self._need(alike, f"hyperparameter {name!r} is not of the kind of its default {default!r}")
        return tuple(
            # JSON has no tuples; optimizers expect them (betas).
            {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
            for group in groups
        )

    def _losses(self) -> list[float | None]:
        column = self._column("loss")
        return [None] * len(self._batch) if column is None else column.to_pylist()

    def _random_states(self, indices: Sequence[_Parts]) -> list[tuple[RandomState | None, ...]]:
        column = self._column("random_state")
        if column is None:
            return [(None,) * len(parts) for parts in indices]
        outer, states = _unnested(column)
        fields = [
            _each(part, partial(RandomState.decode_field, name), optional=True)
            for name, part in zip(RandomState._fields, states.flatten(), strict=True)
        ]
        found = [
            RandomState(*values) if any(v is not None for v in values) else None for values in zip(*fields, strict=True)
        ]
        rows: list[tuple[RandomState | None, ...]] = []
        given, at = column.is_valid().to_pylist(), 0
        for step, parts in enumerate(indices):
            if given[step] and outer[step] != len(parts):
                raise ValueError(f"step {self._start + step}: one random state per micro-batch is expected")
            rows.append(tuple(found[at : at + len(parts)]) if given[step] else (None,) * len(parts))
            at += int(outer[step])
        return rows

    def _names(self, name: str, known: frozenset[str] | None = None) -> list[frozenset[str]]:
        """Sets of names by step; only those in ``known``, if that is given."""
        column = self._column(name)
        if column is None:
            return [frozenset()] * len(self._batch)

        def named(codes: tuple[int, ...]) -> frozenset[str]:
            found = frozenset(words[code] for code in codes)
            if known is not None and not found <= known:
                raise ValueError(f"{name} names {sorted(found - known)[0]!r}, which is no parameter of the model")
            return found

        lengths, flat = _unnested(column)
        self._need(not flat.null_count, f"{name} holds an empty name")
        words = flat.dictionary.to_pylist()
        distinct = lru_cache(maxsize=None)(named)
        codes, at = flat.indices.to_pylist(), 0
        rows = []
        for length in lengths.tolist():
            rows.append(distinct(tuple(codes[at : at + length])))
            at += length
        return rows


def _unnested(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Length of each list (0 for none), and the elements of all."""
    return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False), lists.flatten()


def _nested(flat: Any, lengths: np.ndarray) -> list[Any]:
    """The inverse of :func:`_unnested`: parts of ``flat``, tuples of it if it is a list."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    parts = [flat[a:b] for a, b in pairwise(bounds)]
    return [tuple(part) for part in parts] if isinstance(flat, list) else parts


def _numbers(column: pa.Array | None) -> np.ndarray:
    """A copy, which can be written to: torch takes no other."""
    if column is None or column.null_count:
        raise ValueError("a number is missing")
    return column.to_numpy(zero_copy_only=False).copy()


def _each(column: pa.Array | None, decode: Callable[[Any], Value], optional: bool = False) -> list[Value]:
    """``decode`` of every string, made once for each that is different; ``None`` stays, if ``optional``."""
    if column is None or (column.null_count and not optional):
        raise ValueError("a text is missing")
    distinct: list[Any] = [None] * len(column.dictionary)
    for code in pc.unique(column.indices).to_pylist():
        if code is not None:
            distinct[code] = decode(column.dictionary[code].as_py())
    return [None if code is None else distinct[code] for code in column.indices.to_pylist()]  # type: ignore[misc]


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_vector(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_scalar, value))
