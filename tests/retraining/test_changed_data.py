"""Workloads with samples taken out or labelled otherwise stay true to the original samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from workloads import SAMPLES, datasets, digits_workload

from dit_mlflow import InputError, UnsupportedError, Workload
from dit_mlflow.retraining.changed_data import class_names, relabelled, sample_classes, subset

KEPT = [20, 3, 7, 11]


class Named(Dataset[Any]):
    """Mappings with a plain integer label."""

    def __init__(self) -> None:
        self.inputs, self.targets = datasets()[0].tensors

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.inputs[index], "labels": int(self.targets[index])}


def named() -> Workload:
    return digits_workload(train_set=Named(), outputs=lambda model, batch: model(batch["x"]))


def test_samples_of_a_subset_are_the_kept_ones_in_all_that_tells_of_them() -> None:
    whole = digits_workload(
        corrupted=(3, 4, 20),
        describe=lambda index: f"sample {index}",
        show=lambda index: f"text {index}",
        label=lambda index: f"label {index}",
        reference="projects/one",
        settings={"lr": 1},
    )
    part = subset(whole, KEPT)
    assert [part.describe(j) for j in range(4)] == [f"sample {index}" for index in KEPT]  # type: ignore[misc]
    assert [part.appearance(j) for j in range(4)] == [f"text {index}" for index in KEPT]
    assert [part.label_of(j) for j in range(4)] == [f"label {index}" for index in KEPT]
    assert part.corrupted == (0, 1)
    for mine, original in zip(part.batch(np.arange(4)), whole.batch(KEPT), strict=True):
        assert torch.equal(mine, original)
    # A trajectory recorded on it must not claim that the whole workload's reference builds it again.
    assert (part.reference, part.settings) == (None, {})


def test_what_a_subset_shows_without_functions_of_its_own_comes_from_its_samples() -> None:
    part, whole = subset(named(), KEPT), named()
    assert [part.label_of(j) for j in range(4)] == [whole.label_of(index) for index in KEPT]
    assert torch.equal(part.batch([2])["x"], whole.batch([7])["x"])


@pytest.mark.parametrize("kept", [[], [1, 1], [SAMPLES], [-1]])
def test_a_subset_of_samples_that_are_not_there_is_refused(kept: list[int]) -> None:
    with pytest.raises(InputError, match="expected one or more of 0 … 23, each once"):
        subset(digits_workload(), kept)


@pytest.mark.parametrize("make", [digits_workload, named, lambda: digits_workload(label=lambda i: f"digit {i}")])
def test_labels_are_changed_where_asked_and_nothing_else(make: Any) -> None:
    before = make()
    classes = sample_classes(before)
    assert classes.tolist() == datasets()[0].tensors[1].tolist()
    new = (classes[KEPT] + 1) % 3
    after = relabelled(before, KEPT, new)
    expected = classes.copy()
    expected[KEPT] = new
    assert sample_classes(after).tolist() == expected.tolist()
    assert sample_classes(before).tolist() == classes.tolist()
    assert after.label_of(5) == before.label_of(5)
    # The text of the new class is that of the first sample that had it.
    assert after.label_of(20) == before.label_of(int(np.flatnonzero(classes == new[0])[0]))
    inputs = [workload.batch([20]) for workload in (before, after)]
    one, other = (batch["x"] if isinstance(batch, dict) else batch[0] for batch in inputs)
    assert torch.equal(one, other)


def test_labels_of_floating_point_keep_their_type() -> None:
    inputs, targets = datasets()[0].tensors
    binary = TensorDataset(inputs, (targets > 0).float())
    workload = digits_workload(train_set=binary, outputs=lambda model, batch: model(batch[0])[:, 0])
    found = relabelled(workload, [0], [1 - int(binary[0][1])]).train_set[0][1]
    assert (found.dtype, found.item()) == (torch.float32, 1 - binary[0][1].item())


def test_what_is_no_classification_cannot_be_relabelled() -> None:
    inputs, targets = datasets()[0].tensors
    regression = digits_workload(train_set=TensorDataset(inputs, targets + 0.5))
    with pytest.raises(UnsupportedError, match=r"have no classes: .*if it is a classification"):
        relabelled(regression, [0], [1])
    # The loss's label is made by collate_fn, from something else than the sample's second part.
    stubborn = replace(
        named(),
        train_set=datasets()[0],
        outputs=None,
        collate_fn=lambda samples: [torch.stack([x for x, _ in samples]), torch.zeros(len(samples), dtype=torch.long)],
    )
    with pytest.raises(UnsupportedError, match=r"do not come out of Workload\.collate_fn"):
        relabelled(stubborn, [0], [1])


def test_classes_whose_names_cannot_be_told_are_numbers() -> None:
    def fail(index: int) -> str:
        raise KeyError(index)

    workload = digits_workload(label=fail)
    assert class_names(workload, sample_classes(workload)) == {0: "0", 1: "1", 2: "2"}
