"""Rows as callers hold them in memory, and values that a training set's type cannot hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from workloads import digits_workload

from dit_mlflow import InputError, Workload
from dit_mlflow.influence import row_losses


def test_rows_may_lie_in_memory_as_they_like() -> None:
    workload = digits_workload()
    inputs = workload.validation_set.tensors[0].numpy().reshape(16, -1)[:2]  # type: ignore[attr-defined]
    targets = workload.validation_set.tensors[1].numpy()[:2]  # type: ignore[attr-defined]
    model = workload.build_model()
    backwards = np.ascontiguousarray(inputs[:, ::-1])[:, ::-1]
    expected = [query(model).item() for query in row_losses(workload, inputs, targets)]
    for rows in (backwards, pd.DataFrame(backwards), inputs.astype(">f4"), np.asfortranarray(inputs)):
        assert [query(model).item() for query in row_losses(workload, rows, targets.astype(">i4"))] == expected


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.uint8, 256.0), (torch.uint8, -1), (torch.bool, 2), (torch.int16, 1e9)]
)
def test_values_that_would_wrap_around_are_refused(dtype: torch.dtype, value: float) -> None:
    """As 256 becomes 0 in a byte."""
    data = TensorDataset(torch.ones(4, 2).to(dtype), torch.zeros(4))
    workload = Workload(nn.Linear(2, 1), lambda model, batch: model(batch[0].float())[:, 0], data, data)
    row_losses(workload, np.ones((1, 2)), np.zeros(1))
    with pytest.raises(InputError, match=r"row 0: .* cannot be used"):
        row_losses(workload, np.array([[1, value]]), np.zeros(1))
