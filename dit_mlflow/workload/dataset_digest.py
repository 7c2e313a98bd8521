"""A digest by which the recorded training set is recognised, without storing it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.workload.random_state import preserved_random_state

SEARCHED_FIELDS = 5
"""Most fields of a sample of which every part is held against a recorded digest."""

DIGEST_SAMPLES = 256
"""Number of evenly spaced samples in the digest of a dataset that is not a TensorDataset."""


def dataset_digest(dataset: Dataset[Any]) -> str | None:
    """SHA-256 over a dataset's length and contents.

    It covers all of a ``TensorDataset``; of any other, :data:`DIGEST_SAMPLES` drawn under a fixed random state.
    ``None`` if a sample differs when it is drawn twice: such a dataset has a generator of its own.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if is_inert(dataset):
        digest = hashlib.sha256(str(size).encode())
        _update(digest, dataset.tensors)  # type: ignore[attr-defined]
        return digest.hexdigest()
    indices = np.unique(np.linspace(0, size - 1, min(size, DIGEST_SAMPLES)).astype(int))
    if _drawn_digest(dataset, indices[:1]) != _drawn_digest(dataset, indices[:1]):
        return None
    return _drawn_digest(dataset, indices)


def is_inert(dataset: Dataset[Any]) -> bool:
    """Whether reading samples is certain to have no side effect, so that they may be read during training."""
    return type(dataset) is TensorDataset


def _drawn_digest(dataset: Dataset[Any], indices: np.ndarray) -> str:
    digest = hashlib.sha256(str(len(dataset)).encode())  # type: ignore[arg-type]
    with preserved_random_state():
        random.seed(0)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        for index in indices:
            _update(digest, dataset[int(index)])
    return digest.hexdigest()


def check_dataset(dataset: Dataset[Any], recorded: str | None) -> None:
    """Raise :class:`TrajectoryError` if ``dataset`` is not the recorded one; ``None`` = unknown."""
    if recorded is None:
        return
    found = dataset_digest(dataset)
    if found is not None and found != recorded and not _holds_more(dataset, recorded):
        raise TrajectoryError(
            f"the workload's train_set is not the recorded one: digest {found[:12]}…, recorded "
            f"{recorded[:12]}…; influence belongs to the data that was trained on"
        )


class _Columns(Dataset[Any]):
    """Of a data set whose samples are mappings, some fields."""

    def __init__(self, dataset: Dataset[Any], names: Sequence[str]) -> None:
        self._dataset, self._names = dataset, names

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._dataset[index]
        return {name: sample[name] for name in self._names if name in sample}


def _holds_more(dataset: Dataset[Any], recorded: str) -> bool:
    """Whether it is the recorded data set with further fields, which a trainer may have removed before training."""
    with preserved_random_state():
        sample = dataset[0]
    if not isinstance(sample, Mapping):
        return False
    names = list(sample)
    numeric = [name for name in names if not isinstance(sample[name], (str, bytes, type(None)))]
    parts: list[Sequence[str]] = [numeric] if len(numeric) < len(names) else []
    if len(names) <= SEARCHED_FIELDS:
        parts += [part for size in range(len(names) - 1, 0, -1) for part in combinations(names, size)]
    return any(dataset_digest(_Columns(dataset, part)) == recorded for part in parts)


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() and value.dim() else b"")
        digest.update(str(value.item()).encode() if value.dim() == 0 else b"")
    elif isinstance(value, (np.ndarray, np.generic)):
        value = np.asarray(value)
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            _update(digest, part)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
        # PIL images, for example, convert to arrays.
        array = np.asarray(value)
        if array.dtype != object:
            _update(digest, array)
