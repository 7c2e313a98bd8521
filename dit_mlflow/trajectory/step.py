"""One row of the record: what was done at a step, besides the parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.trajectory.random_state import RandomState

Hyperparameters = Mapping[str, Any]

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("indices", pa.list_(pa.list_(pa.int64())), nullable=False),
        pa.field("coefficients", pa.list_(pa.list_(pa.float64()))),
        pa.field("hyperparameters", pa.string(), nullable=False),
        pa.field("loss", pa.float64()),
        pa.field(
            "random_state",
            pa.list_(pa.struct([pa.field(name, pa.binary()) for name in RandomState._fields])),
        ),
        pa.field("evaluation_mode", pa.list_(pa.string()), nullable=False),
        pa.field("no_gradient", pa.list_(pa.string()), nullable=False),
        pa.field("zero_gradient", pa.list_(pa.string())),
    ]
)
"""Columns of ``steps-NNNNN.parquet``; ``hyperparameters`` is JSON, one object per parameter group."""


class StepFields(TypedDict):
    """The fields of a :class:`Step`, as plain as they come: building values takes time from every training step."""

    index: int
    epoch: int
    indices: list[Sequence[int] | np.ndarray]
    coefficients: list[np.ndarray] | None
    hyperparameters: tuple[Hyperparameters, ...]
    loss: float | None
    random_states: list[RandomState | None]
    evaluation_mode: list[str]
    no_gradient: list[str]
    zero_gradient: list[str]


@dataclass(frozen=True, eq=False)
class Step:
    """Step ``t`` of a trajectory.

    Attributes:
        index: ``t``.
        epoch: pass over the data that the step's last batch belongs to, from 0.
        indices: training sample indices, one array per micro-batch.
        coefficients: ``c_i`` per micro-batch; ``None`` = the workload's.
        hyperparameters: per parameter group, everything but ``params``.
        loss: what the loop logged, if anything.
        random_states: per micro-batch, the generators that moved until the next batch was drawn, as they were before
            this one was; ``None`` where none moved.
        evaluation_mode: names of the modules that were in evaluation mode (``""`` is the whole model).
        no_gradient: names of the parameters whose gradient was ``None``: the optimizer leaves them alone.
        zero_gradient: names of the frozen parameters (``requires_grad=False``) whose gradient was there, and counts as
            0: the optimizer steps them by momentum and weight decay.
    """

    index: int
    epoch: int
    indices: tuple[np.ndarray, ...]
    coefficients: tuple[np.ndarray, ...] | None
    hyperparameters: tuple[Hyperparameters, ...]
    loss: float | None
    random_states: tuple[RandomState | None, ...]
    evaluation_mode: frozenset[str]
    no_gradient: frozenset[str]
    zero_gradient: frozenset[str] = frozenset()

    @property
    def samples(self) -> np.ndarray:
        """All sample indices of the step, repeated ones included, in batch order."""
        return np.concatenate(self.indices)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Step:
        """Read a row; raises :class:`TrajectoryError` if its parts contradict each other."""
        indices = tuple(np.asarray(part, dtype=np.int64) for part in row["indices"])
        coefficients = _arrays(row["coefficients"])
        if coefficients is not None and [len(part) for part in coefficients] != [len(p) for p in indices]:
            raise TrajectoryError(f"step {row['step']}: as many coefficients as sample indices are expected")
        states = row["random_state"]
        if states is not None and len(states) != len(indices):
            raise TrajectoryError(f"step {row['step']}: one random state per micro-batch is expected")
        return cls(
            index=row["step"],
            epoch=row["epoch"],
            indices=indices,
            coefficients=coefficients,
            hyperparameters=tuple(_revive(group) for group in json.loads(row["hyperparameters"])),
            loss=row["loss"],
            random_states=(None,) * len(indices) if states is None else tuple(map(_random_state, states)),
            evaluation_mode=frozenset(row["evaluation_mode"]),
            no_gradient=frozenset(row["no_gradient"]),
            zero_gradient=frozenset(row["zero_gradient"] or ()),
        )


def to_table(steps: Iterable[StepFields]) -> pa.Table:
    """The steps as rows of :data:`SCHEMA`, in order."""
    rows: list[dict[str, Any]] = []
    settings: tuple[Hyperparameters, ...] | None = None
    encoded = ""
    for step in steps:
        if step["hyperparameters"] is not settings:
            settings = step["hyperparameters"]
            encoded = json.dumps(settings)
        states = [{} if state is None else state.encode() for state in step["random_states"]]
        rows.append(
            {
                "step": step["index"],
                "epoch": step["epoch"],
                "indices": step["indices"],
                "coefficients": step["coefficients"],
                "hyperparameters": encoded,
                "loss": step["loss"],
                "random_state": states if any(states) else None,
                "evaluation_mode": step["evaluation_mode"],
                "no_gradient": step["no_gradient"],
                "zero_gradient": step["zero_gradient"] or None,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _arrays(parts: Sequence[Sequence[float]] | None) -> tuple[np.ndarray, ...] | None:
    return None if parts is None else tuple(np.asarray(part, dtype=np.float64) for part in parts)


def _random_state(state: Mapping[str, bytes | None]) -> RandomState | None:
    return RandomState.decode(state) if any(value is not None for value in state.values()) else None


def _revive(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; optimizers expect them (``betas``)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
