from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from dit_mlflow import InputError
from dit_mlflow.examples import corrupt
from dit_mlflow.examples.corruption import Damage

N, CLASSES = 3000, 3
LABELS = np.random.default_rng(1).integers(CLASSES, size=N)
INPUTS = np.random.default_rng(2).normal(scale=5, size=(N, 2, 4))
FOREIGN = np.arange(N * 8.0).reshape(N, 2, 4) + 1000


def damaged(kind: Any, share: float = 0.1, **settings: Any) -> Any:
    return corrupt(INPUTS, LABELS, kind, share, **{"seed": 0, "classes": CLASSES, "foreign": FOREIGN, **settings})


@pytest.mark.parametrize("kind", get_args(Damage))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_exactly_the_stated_samples_change(kind: Damage, share: float) -> None:
    before = INPUTS.copy(), LABELS.copy()
    found = damaged(kind, share)
    changed = (found.inputs != INPUTS).any(axis=(1, 2)) | (found.labels != LABELS)
    assert np.flatnonzero(changed).tolist() == found.indices.tolist()
    assert len(found.indices) == round(share * N)
    assert (found.labels == LABELS).all() == (share == 0 or kind not in ("flip", "class_flip", "hard_flip"))
    np.testing.assert_array_equal(found.inputs, damaged(kind, share).inputs)
    assert share == 0 or damaged(kind, share, seed=1).indices.tolist() != found.indices.tolist()
    assert (before[0] == INPUTS).all() and (before[1] == LABELS).all()


def test_flips_go_to_each_other_class_alike() -> None:
    found = damaged("flip", 1.0)
    shifts = np.bincount((found.labels - LABELS) % CLASSES, minlength=CLASSES)
    assert shifts[0] == 0
    assert shifts[1] == pytest.approx(N / 2, abs=4 * np.sqrt(N / 4))


def test_class_flips_empty_one_class_before_the_next() -> None:
    sizes = np.bincount(LABELS)
    few, many = damaged("class_flip", 0.1), damaged("class_flip", 0.5)
    for found in (few, many):
        assert ((found.labels - LABELS)[found.indices] % CLASSES == 1).all()
    first = np.unique(LABELS[few.indices])
    assert len(first) == 1
    assert (LABELS[many.indices] == first[0]).sum() == sizes[first[0]]
    assert len(np.unique(LABELS[many.indices])) == 2


def test_hard_flips_are_of_samples_that_look_like_the_other_class() -> None:
    labels = np.arange(600) % 3
    inputs = np.random.default_rng(0).normal(size=(600, 2)) + 2 * labels[:, None]
    found = corrupt(inputs, labels, "hard_flip", 0.1, seed=0, classes=3)
    assert {*zip(labels[found.indices], found.labels[found.indices], strict=True)} <= {(0, 1), (1, 0), (1, 2), (2, 1)}
    to_border = np.minimum(abs(inputs.mean(axis=1) - 1), abs(inputs.mean(axis=1) - 3))
    assert np.median(to_border[found.indices]) < 0.6 * np.median(to_border)


def test_hard_flips_need_samples_of_each_class() -> None:
    with pytest.raises(InputError, match="2 classes, the smallest of 1 samples; expected two or more, of 5"):
        corrupt(np.zeros((9, 2)), np.array([1] + [0] * 8), "hard_flip", 0.3, seed=0, classes=2)


def test_noise_has_the_stated_size() -> None:
    found = damaged("noise", noise=0.5)
    assert (found.inputs - INPUTS)[found.indices].std() == pytest.approx(0.5 * INPUTS.std(), rel=0.05)


def test_duplicates_are_of_intact_samples_of_another_class() -> None:
    found = damaged("duplicate")
    for index in found.indices:
        sources = np.flatnonzero((found.inputs[index] == INPUTS).all(axis=(1, 2)))
        assert len(sources) == 1 and sources[0] not in found.indices
        assert LABELS[sources[0]] != found.labels[index]


def test_foreign_inputs_are_used_once() -> None:
    found = damaged("ood")
    firsts = found.inputs[found.indices, 0, 0]
    assert len(set(firsts.tolist())) == len(firsts) and np.isin(firsts, FOREIGN[:, 0, 0]).all()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("smudge", {}, "expected one of flip"),
        ("flip", {"share": 1.5}, "between 0 and 1"),
        ("flip", {"classes": 1}, "no other class"),
        ("duplicate", {"share": 1.0}, "lower the share"),
        ("ood", {"foreign": None}, "got none"),
        ("ood", {"foreign": FOREIGN[:5]}, "300 or more"),
    ],
)
def test_what_cannot_be_done_is_refused(kind: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        damaged(kind, **settings)
    with pytest.raises(InputError, match="floating point"):
        corrupt(LABELS[:, None], LABELS, "noise", 0.1, 0, CLASSES)
