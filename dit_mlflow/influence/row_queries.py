"""Queries on new samples, given as rows of a table: their losses, computed as those of validation samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from dit_mlflow.errors import InputError
from dit_mlflow.influence.query import Query, loss_of_batch, sample_losses
from dit_mlflow.workload import Workload
from dit_mlflow.workload.batches import Batch
from dit_mlflow.workload.random_state import preserved_random_state

Features = pd.DataFrame | np.ndarray
BatchOfRow = Callable[[Any, np.ndarray], Batch]
"""``batch(features, targets) -> batch`` for one row: features as given (a frame or array of one row), targets
``[1, …]``; returns a batch of one sample, as the workload's loss takes it."""

MOST_CLASSES = 20
"""A training set with more different targets is not treated as a classification."""


def row_losses(
    workload: Workload, features: Features, targets: Sequence[Any] | np.ndarray, batch: BatchOfRow | None = None
) -> list[Query]:
    """The loss of new samples, one query each, named ``loss of row 3``.

    Without ``batch``, a row becomes a sample ``(input, target)`` like those of the training set: its values and its
    target are reshaped and cast to shape and dtype of the training set's, then collated as validation samples are.
    Rows therefore hold what ``train_set[i]`` returns, after its preprocessing.

    Args:
        workload: loss, and the training set whose samples the rows are like.
        features: a frame whose columns are the input's values in C order, or one column of arrays; or an array
            ``[rows, …]``.
        targets: ``[rows, …]``, as in the training set.
        batch: builds the batch of each row, in place of the above.

    Raises:
        InputError: there are no rows or targets, or values do not fit the training set's shape and dtype.
    """
    found = _checked_targets(features, targets)
    if batch is not None:
        return [
            loss_of_batch(workload, _batch_of_row(batch, features, found, row), f"loss of row {row}")
            for row in range(len(found))
        ]
    rows = _as_samples(workload, features, found)
    queries = sample_losses(replace(workload, test_set=rows), of="test")
    return [replace(query, name=f"loss of row {row}") for row, query in enumerate(queries)]


def sample_as_row(workload: Workload, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A training sample's input, flattened, and its target: a row as :func:`row_losses` takes them.

    Raises:
        InputError: the training set's samples are not pairs of an array and a target.
    """
    features, target = _pair(workload, index)
    return np.asarray(features).reshape(-1), np.asarray(target)


def _pair(workload: Workload, index: int) -> tuple[Any, Any]:
    with preserved_random_state():
        sample = workload.train_set[index]
    pair = isinstance(sample, (tuple, list)) and len(sample) == 2
    if pair and isinstance(sample[0], (Tensor, np.ndarray)) and sample[0].ndim > 0:
        return sample[0], sample[1]
    shown = f"{len(sample)} parts" if isinstance(sample, (tuple, list)) else f"type {type(sample).__name__}"
    raise InputError(
        f"samples of the training set have {shown}; without batch, rows can only become samples (array, target). Give "
        "batch, a function batch(features, targets) that returns the batch of one row"
    )


def _as_samples(workload: Workload, features: Features, targets: np.ndarray) -> Dataset[Any]:
    example, label = _pair(workload, 0)
    inputs = _like(example, _as_array(features), "the row's features", "input")
    labels = _like(label, targets, "the row's target", "target")
    _check_classes(workload.train_set, targets)
    if type(workload.train_set) is TensorDataset:
        return TensorDataset(torch.stack(inputs), torch.stack(labels))
    samples: Any = list(zip(inputs, labels, strict=True))
    return samples


def _like(example: Any, values: np.ndarray, what: str, part: str) -> list[Any]:
    """``values[row]`` of the example's shape and type, for every row."""
    array = isinstance(example, (Tensor, np.ndarray))
    shape = tuple(example.shape) if array else ()
    width, expected = int(np.prod(values.shape[1:])), int(np.prod(shape))
    if width != expected:
        raise InputError(
            f"{what}: {width} values; the training set's {part} has shape {list(shape)}, that is {expected}. Rows hold "
            "what train_set[i] returns, flattened; other forms need batch(features, targets)"
        )
    dtype = str(example.dtype if array else np.asarray(example).dtype).removeprefix("torch.")
    if not dtype.startswith(("bool", "int", "uint", "float", "bfloat")):
        raise InputError(f"the training set's {part} is a {type(example).__name__}; give batch(features, targets)")
    _check_values(values, dtype, what, f"{part} is {dtype}")
    # torch takes no steps backwards in memory, and no other machine's order of bytes.
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    shaped = values.reshape(len(values), *shape)
    if isinstance(example, Tensor):
        return list(torch.tensor(shaped).to(example.dtype))
    if isinstance(example, np.ndarray):
        return list(shaped.astype(example.dtype))
    return [type(example)(value) for value in shaped.tolist()]


def _check_values(values: np.ndarray, dtype: str, what: str, expected: str) -> None:
    if values.dtype.kind not in "iubf":
        raise InputError(
            f"{what}: values of type {values.dtype}, such as {values.reshape(-1)[0]!r}; the training set's {expected}"
        )
    if dtype.startswith(("float", "bfloat")):
        unfit = ~np.isfinite(values)
    else:
        low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        unfit = (values != np.floor(values)) | (values < low) | (values > high)
    if unfit.any():
        row = int(np.argwhere(unfit.reshape(len(values), -1).any(axis=1))[0, 0])
        value = values[row].reshape(-1)[np.argmax(unfit[row].reshape(-1))]
        raise InputError(f"{what}, row {row}: {value} cannot be used; the training set's {expected}")


def _check_classes(train_set: Dataset[Any], targets: np.ndarray) -> None:
    """Refuse a target that no training sample has: it is more likely another coding of labels than a new class."""
    if type(train_set) is not TensorDataset or train_set.tensors[1].dim() != 1:
        return
    known = np.unique(train_set.tensors[1].cpu().double().numpy())
    strange = ~np.isin(targets.reshape(-1).astype(float), known)
    if len(known) <= MOST_CLASSES and len(known) < len(train_set) / 2 and strange.any():
        row = int(np.argmax(strange))
        raise InputError(
            f"row {row} has target {targets.reshape(-1)[row]}; the training set's are "
            f"{', '.join(f'{value:g}' for value in known)}. Give targets as the model was trained on them; for one "
            "that is new, batch(features, targets)"
        )


def _checked_targets(features: Features, targets: Sequence[Any] | np.ndarray | None) -> np.ndarray:
    if not isinstance(features, (pd.DataFrame, np.ndarray)):
        raise InputError(f"features are a {type(features).__name__}; expected a pandas DataFrame or a numpy array")
    if len(features) == 0:
        raise InputError("there are no rows; expected at least one")
    if targets is None:
        raise InputError("no targets were given; they are needed for the loss of each row")
    found = np.asarray(targets)
    if found.dtype == object:
        found = _stacked(list(found), "targets")
    if len(found) != len(features):
        raise InputError(f"{len(found)} targets for {len(features)} rows; expected one each")
    return found


def _as_array(features: Features) -> np.ndarray:
    if isinstance(features, pd.DataFrame):
        if features.shape[1] == 1 and features.iloc[:, 0].dtype.kind == "O":
            return _stacked(list(features.iloc[:, 0]), f"column {features.columns[0]!r}")
        words = [name for name, dtype in features.dtypes.items() if not pd.api.types.is_numeric_dtype(dtype)]
        if words:
            raise InputError(
                f"columns {words[:5]} do not hold numbers; leave them out, name the target's column as targets, or "
                "give batch(features, targets)"
            )
        # Of other dtypes than NumPy's (``Int64``, which may hold ``pd.NA``), pandas makes arrays of objects.
        plain = all(isinstance(dtype, np.dtype) for dtype in features.dtypes)
        return features.to_numpy(dtype=None if plain else float)
    return features


def _stacked(cells: list[Any], what: str) -> np.ndarray:
    try:
        return np.stack([np.asarray(cell) for cell in cells])
    except ValueError as error:
        raise InputError(f"{what}: cells cannot be joined to one array: {error}") from error


def _batch_of_row(batch: BatchOfRow, features: Features, targets: np.ndarray, row: int) -> Batch:
    one = features.iloc[row : row + 1] if isinstance(features, pd.DataFrame) else features[row : row + 1]
    try:
        return batch(one, targets[row : row + 1])
    except Exception as error:  # Any kind: it is the caller's function.
        raise InputError(f"batch(features, targets) failed on row {row}: {type(error).__name__}: {error}") from error
