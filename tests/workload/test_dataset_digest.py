from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from dit_mlflow import TrajectoryError
from dit_mlflow.workload.dataset_digest import check_dataset, dataset_digest


class Items(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Picture:
    """An object that NumPy can read, as PIL's images are."""

    def __init__(self, *pixels: int) -> None:
        self.pixels = pixels

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.pixels, dtype=dtype)


DIFFERENT: list[tuple[Any, Any]] = [
    (Items(np.int64(0), np.int64(1)), Items(np.int64(1), np.int64(0))),
    (Items(torch.tensor(0.0)), Items(torch.tensor(1.0))),
    (Items(torch.zeros(2, 3)), Items(torch.zeros(3, 2))),
    (Items({"a": 1, "b": 2}), Items({"a": 2, "b": 1})),
    (Items(Picture(1, 2)), Items(Picture(2, 1))),
    (Items("x"), Items("x", "x")),
    (TensorDataset(torch.zeros(3)), TensorDataset(torch.zeros(3, dtype=torch.float64))),
    (TensorDataset(torch.tensor([True])), TensorDataset(torch.tensor([False]))),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_data_have_different_digests(first: Any, second: Any) -> None:
    assert dataset_digest(first) == dataset_digest(first)
    assert dataset_digest(first) != dataset_digest(second)
    with pytest.raises(TrajectoryError, match="train_set is not the recorded one"):
        check_dataset(second, dataset_digest(first))


def test_global_augmentation_is_digested_under_a_fixed_state_and_leaves_none_behind() -> None:
    class Augmented(Items):
        def __getitem__(self, index: int) -> Any:
            return self.items[index] + torch.rand(1) + float(np.random.rand())  # noqa: NPY002

    data = Augmented(torch.zeros(2), torch.ones(2))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    digest = dataset_digest(data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert digest is not None
    assert dataset_digest(data) == digest


def test_fields_that_a_trainer_removed_may_be_there() -> None:
    """Hugging Face's removes those that the model does not take."""
    whole = Items(*({"text": f"t{i}", "ids": torch.tensor([i, 1]), "note": i * 2, "labels": i % 2} for i in range(3)))
    for kept in (["ids", "labels"], ["ids", "note", "labels"], ["labels"]):
        recorded = dataset_digest(Items(*({name: item[name] for name in kept} for item in whole.items)))
        check_dataset(whole, recorded)
    changed = dataset_digest(Items(*({"ids": item["ids"], "labels": 1 - item["labels"]} for item in whole.items)))
    with pytest.raises(TrajectoryError, match="train_set is not the recorded one"):
        check_dataset(whole, changed)


def test_of_many_fields_texts_may_be_more() -> None:
    fields = {f"f{i}": i for i in range(30)}
    check_dataset(Items({**fields, "text": "a", "more": None}), dataset_digest(Items(fields)))
