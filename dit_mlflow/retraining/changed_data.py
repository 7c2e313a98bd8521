"""The same workload on other training data: with samples taken out, or labelled otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.query import CHUNK
from dit_mlflow.workload import Workload, floating_one, to_like
from dit_mlflow.workload.appearance import LABELS
from dit_mlflow.workload.random_state import preserved_random_state


def subset(workload: Workload, kept: Sequence[int] | np.ndarray) -> Workload:
    """``workload`` with only the training samples ``kept``, in that order; the others are not there at all.

    This is not removal as influence means it (weight 0, all else as recorded), but what training again without the
    samples does in practice: batches hold other samples for the same seed, each is divided by its own size, and an
    epoch has fewer steps, which changes schedules by step.

    Sample ``j`` of the new workload is sample ``kept[j]`` of the old one, in ``describe``, ``show``, ``label`` and
    ``corrupted`` too. It has no ``reference``, since none could build it again.

    Raises:
        InputError: ``kept`` is empty, repeats a sample, or names one that is not there.
    """
    indices = np.asarray(kept, dtype=np.int64)
    if not len(indices) or len(np.unique(indices)) < len(indices) or not _inside(indices, workload):
        raise InputError(
            f"kept names {len(indices)} samples; expected one or more of 0 … {workload.num_samples - 1}, each once"
        )
    original: list[int] = indices.tolist()
    describe, show, label = workload.describe, workload.show, workload.label
    damaged = np.isin(indices, np.asarray(workload.corrupted, dtype=np.int64))
    return replace(
        workload,
        train_set=_taken(workload.train_set, original),
        corrupted=tuple(np.flatnonzero(damaged).tolist()),
        describe=None if describe is None else lambda index: describe(original[index]),
        show=None if show is None else lambda index: show(original[index]),
        label=None if label is None else lambda index: label(original[index]),
        reference=None,
        settings={},
    )


def relabelled(
    workload: Workload, indices: Sequence[int] | np.ndarray, classes: Sequence[int] | np.ndarray
) -> Workload:
    """``workload`` with the training samples ``indices`` labelled ``classes``, and nothing else changed.

    A label is the second part of a sample, or its entry ``label``, ``labels``, ``target`` or ``y``. ``describe`` still
    describes the old sample; ``label`` gives the new class, in the words used for its other samples. There is no
    ``reference``.

    Raises:
        InputError: not one class for each of ``indices``, or an index out of range.
        UnsupportedError: the labels cannot be read as classes, or ``collate_fn`` does not return them as they were set.
    """
    changed = np.asarray(indices, dtype=np.int64)
    new = np.asarray(classes, dtype=np.int64)
    if changed.shape != new.shape or not _inside(changed, workload):
        raise InputError(
            f"{new.size} classes for {changed.size} samples of 0 … {workload.num_samples - 1}; expected one for each"
        )
    before = sample_classes(workload)
    texts = class_names(workload, before)
    given = dict(zip(changed.tolist(), new.tolist(), strict=True))
    label = workload.label

    def told(index: int) -> str:
        if index in given:
            return texts.get(given[index], str(given[index]))
        return str(workload.label_of(index))

    found = replace(
        workload,
        train_set=_labelled(workload.train_set, given),
        label=None if label is None else told,
        reference=None,
        settings={},
    )
    before[changed] = new
    if not np.array_equal(sample_classes(found), before):
        raise UnsupportedError(
            "labels that were set on samples do not come out of Workload.collate_fn as they were set; give samples "
            "(input, label), or drop samples instead of relabelling them"
        )
    return found


def sample_classes(workload: Workload, dataset: Dataset[Any] | None = None) -> np.ndarray:
    """The class of each sample's label, ``[n]``, numbered from 0; ``dataset``: default the training set.

    Raises:
        UnsupportedError: labels, or outputs, are not those of a classification.

    Cost: reads the set once, and calls the model on one sample.
    """
    samples = workload.train_set if dataset is None else dataset
    size = len(samples)  # type: ignore[arg-type]
    with preserved_random_state(), torch.no_grad():
        model = workload.build_model().eval()
        first = to_like(workload.batch([0]), floating_one(model.parameters()).device, None)
        try:
            count = workload.class_logits(model, first, 1).shape[1]
            parts = np.array_split(np.arange(size), -(-size // CHUNK))
            return np.concatenate(
                [workload.class_labels(workload.unvarying(samples, part), count).cpu().numpy() for part in parts]
            )
        except Exception as error:  # Of whatever kind: data that is no classification can have any shape.
            raise UnsupportedError(f"the training samples have no classes: {error}") from error


def class_names(workload: Workload, classes: np.ndarray) -> dict[int, str]:
    """The name of each class that occurs: its first sample's label; ``classes``: from :func:`sample_classes`."""
    return {int(found): _class_name(workload, classes, int(found)) for found in np.unique(classes)}


def _class_name(workload: Workload, classes: np.ndarray, found: int) -> str:
    try:
        return str(workload.label_of(int(np.flatnonzero(classes == found)[0])) or found)
    except Exception:  # Of whatever kind: it is the user's code, and there is a number to show.
        return str(found)


def _inside(indices: np.ndarray, workload: Workload) -> bool:
    return bool(((indices >= 0) & (indices < workload.num_samples)).all())


def _taken(dataset: Dataset[Any], indices: list[int]) -> Dataset[Any]:
    if type(dataset) is TensorDataset:
        return TensorDataset(*(tensor[torch.as_tensor(indices, device=tensor.device)] for tensor in dataset.tensors))
    return Subset(dataset, indices)


def _labelled(dataset: Dataset[Any], given: Mapping[int, int]) -> Dataset[Any]:
    if type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        labels = dataset.tensors[1].clone()
        for index, label in given.items():
            labels[index] = label
        return TensorDataset(dataset.tensors[0], labels, *dataset.tensors[2:])
    return _Relabelled(dataset, given)


class _Relabelled(Dataset[Any]):
    """A data set, some of whose samples have another label."""

    def __init__(self, dataset: Dataset[Any], given: Mapping[int, int]) -> None:
        self._dataset, self._given = dataset, given

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self._dataset[index]
        return sample if index not in self._given else _with_label(sample, self._given[index])


def _with_label(sample: Any, label: int) -> Any:
    if isinstance(sample, Mapping):
        name = next((name for name in LABELS if name in sample), None)
        if name is not None:
            return {**sample, name: _like(sample[name], label)}
    elif isinstance(sample, (tuple, list)) and len(sample) > 1:
        parts = [sample[0], _like(sample[1], label), *sample[2:]]
        return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)
    raise UnsupportedError(
        f"a training sample is a {type(sample).__name__} without a label to change; expected (input, label), or a "
        f"mapping with {', '.join(LABELS)}"
    )


def _like(old: Any, label: int) -> Any:
    if isinstance(old, Tensor):
        return torch.full_like(old, label)
    if isinstance(old, np.ndarray):
        return np.full_like(old, label)
    return type(old)(label)
