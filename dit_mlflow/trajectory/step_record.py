"""One row of the record: what was done at a step, besides the parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from dit_mlflow.workload.random_state import RandomState

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
class StepRecord:
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
