"""Wrong labels, by what methods find of planted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from workloads import digits_workload, sample_losses

from dit_mlflow import (
    Influence,
    InputError,
    Trajectory,
    UnsupportedError,
    Workload,
    WorkloadError,
    explain,
    load_workload,
    train,
)
from dit_mlflow.evaluation import detection
from dit_mlflow.methods import method
from dit_mlflow.methods.detect import Detect, _auroc


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectory, Workload]:
    """Ten classes, labels wrong where an annotator errs."""
    workload = load_workload("projects/digits", corruption="hard_flip", epochs=10)
    return train(workload, tmp_path_factory.mktemp("damaged") / "t"), workload


def auroc(scores: np.ndarray, workload: Workload) -> float:
    return detection(scores, workload.corrupted).values["auroc"]


def test_it_finds_more_than_the_methods_that_it_weighs(damaged: tuple[Trajectory, Workload]) -> None:
    found = Detect()(*damaged)
    (told,) = found.metadata["planted"]
    alone = {name: auroc(method(name)(*damaged).scores[0, 0], damaged[1]) for name in told["weights"]}
    assert auroc(found.scores[0, 0], damaged[1]) > max(alone.values()) > 0.9
    assert min(told["interval"]) < told["found"] < max(told["interval"]) < 1
    assert told["found"] > 0.9
    # What finds planted labels well alone weighs more than what does not.
    best, worst = (choose(told["alone"], key=told["alone"].get) for choose in (max, min))
    assert told["weights"][best] > told["weights"][worst]
    assert found.metadata["left_out"] == {}


def test_an_explanation_says_how_well_planted_labels_are_found(damaged: tuple[Trajectory, Workload]) -> None:
    explained = explain(*damaged, method=Detect(methods=("loss", "aum")))
    low, high = (explained.figures[f"detection/planted_auroc_{end}"] for end in ("low", "high"))
    assert low < explained.figures["detection/planted_auroc"] < high
    assert "such scores find most: AUROC 0.9" in str(explained)


def test_methods_that_cannot_be_used_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workload = load_workload("projects/digits", n_train=60, optimizer="adamw", epochs=2)
    trajectory = train(workload, tmp_path / "t")
    found = Detect(methods=("loss", "source"))(trajectory, workload)
    assert list(found.metadata["left_out"]) == ["source"]
    assert "detect: source is left out: " in caplog.text
    with pytest.raises(UnsupportedError, match="detect has no method left: source: "):
        Detect(methods=("source",))(trajectory, workload)
    with pytest.raises(InputError, match="there is no method 'los'"):
        Detect(methods=("los",))(trajectory, workload)


def test_a_training_with_planted_labels_that_diverges_is_told_from_the_recorded_one(tmp_path: Path) -> None:
    workload = digits_workload()
    right = {tuple(inputs.tolist()): int(target) for inputs, target in workload.train_set}

    def broken_by_wrong_labels(model: nn.Module, batch: Any) -> torch.Tensor:
        wrong = [right.get(tuple(x.tolist()), int(y)) != y for x, y in zip(*batch, strict=True)]
        return torch.where(torch.tensor(wrong), torch.inf, sample_losses(model, batch))

    workload = replace(workload, loss=broken_by_wrong_labels)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match="detect trains with 10% of the labels made wrong, and that diverges"):
        Detect(methods=("loss",))(trajectory, workload)


def test_its_auroc_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    scores, planted = random.integers(5, size=40).astype(float), random.random(40) < 0.3
    assert _auroc(scores, planted) == pytest.approx(roc_auc_score(planted, scores))


def test_the_same_seed_gives_the_same(damaged: tuple[Trajectory, Workload]) -> None:
    one, again, other = (Detect(methods=("loss",), seed=seed)(*damaged) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.scores, again.scores)
    assert one.metadata["planted"] == again.metadata["planted"] != other.metadata["planted"]


@pytest.mark.parametrize(
    "settings",
    [
        {"plantings": 1},
        {"share": 0.0},
        {"share": 0.6},
        {"seed": -1},
        {"plantings": "2"},
        {"share": "a"},
        {"methods": ()},
        {"methods": ("detect",)},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(InputError, match=f"{name}=.*; expected"):
        Detect(**settings)


def test_what_cannot_train_again_or_has_no_classes_is_refused_before_any_work(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(WorkloadError, match=r"detect trains again, .*: Workload\.optimizer must be given"):
        Detect()(trajectory, replace(workload, optimizer=None))
    with pytest.raises(InputError, match=r"24 samples of 3 classes with share=0\.01; expected"):
        Detect(share=0.01)(trajectory, workload)


def test_a_number_of_plantings_of_numpys_is_saved(damaged: tuple[Trajectory, Workload], tmp_path: Path) -> None:
    found = Detect(methods=("loss",), plantings=np.int64(2))(*damaged)
    assert Influence.load(found.save(tmp_path)).metadata == found.metadata
