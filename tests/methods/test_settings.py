"""Settings that cannot be used are refused when they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dit_mlflow import InputError
from dit_mlflow.methods.data_shapley import DataShapley
from dit_mlflow.methods.datamodel import Datamodel
from dit_mlflow.methods.dit import Expected
from dit_mlflow.methods.exact import DitConfirmed
from dit_mlflow.methods.fisher import InfluenceFunctionDatainf, InfluenceFunctionEkfac
from dit_mlflow.methods.newton_step import InfluenceFunction, InfluenceFunctionArnoldi, InfluenceFunctionLissa
from dit_mlflow.methods.source import Source
from dit_mlflow.methods.trak import Trak
from dit_mlflow.retraining import Effort
from dit_mlflow.retraining.subsets import random_subsets

NAN = float("nan")
NEWTON_STEP: dict[str, list[Any]] = {"damping": [0, -0.1, NAN, np.inf], "attempts": [0]}
REFUSED: list[tuple[Any, dict[str, list[Any]]]] = [
    (InfluenceFunction, {**NEWTON_STEP, "tolerance": [0, NAN], "max_iterations": [0]}),
    (
        InfluenceFunctionLissa,
        {
            **NEWTON_STEP,
            **{name: [0] for name in ("depth", "batch_size", "repeats")},
            **{name: [0, -1.0, NAN] for name in ("tolerance", "noise", "scale")},
            "seed": [-1],
        },
    ),
    (InfluenceFunctionArnoldi, {**NEWTON_STEP, "iterations": [0], "rank": [0, -1], "seed": [-1]}),
    (Source, {"segments": [0], "states": [0], "iterations": [0], "tolerance": [0, NAN]}),
    (InfluenceFunctionEkfac, {"damping": [0, -0.1, NAN]}),
    (InfluenceFunctionDatainf, {"damping": [0, NAN]}),
    (Trak, {"dim": [0], "checkpoints": [0], "projections": [0], "damping": [-0.1, NAN]}),
    (DitConfirmed, {"share": [0, -0.1, 1.5, NAN]}),
    (DataShapley, {"tolerance": [-0.1, NAN], "patience": [0], "seed": [-1]}),
    (Expected, {"draws": [0, 3, 2.0], "seed": [-1]}),
    (Datamodel, {"penalty": [0, NAN], "subsets": [7], "regression": ["huber"]}),
    (Effort, {"memory_budget": [0, -1], "jobs": [0]}),
]
CASES = [(cls, name, value) for cls, fields in REFUSED for name, values in fields.items() for value in values]


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_a_setting_that_cannot_be_used_is_named(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}={value!r}.*; expected"):
        cls(**{name: value})


def test_settings_at_their_bounds_are_taken() -> None:
    DitConfirmed(share=1)
    InfluenceFunctionLissa(scale=None, depth=1, batch_size=1, repeats=1)
    InfluenceFunctionArnoldi(iterations=1, rank=1, attempts=1)
    DataShapley(tolerance=0, patience=1)


@pytest.mark.parametrize(("subsets", "share", "seed"), [(1, 0.5, 0), (8, 0, 0), (8, 1, 0), (8, NAN, 0), (8, 0.5, -1)])
def test_random_subsets_that_cannot_be_drawn_are_refused(subsets: int, share: float, seed: int) -> None:
    with pytest.raises(InputError, match=f"{subsets} subsets, share={share}, seed={seed}; expected"):
        random_subsets(10, subsets, share, seed)
