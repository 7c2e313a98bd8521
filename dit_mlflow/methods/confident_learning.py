"""Confident learning, by cleanlab."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.last_layer import training_labels, training_logits
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.replay.replay import Replay
from dit_mlflow.replay.training_step import SampleWeights


@dataclass(frozen=True)
class ConfidentLearning(Method):
    """cleanlab's label quality from out-of-sample probabilities (Northcutt et al. 2021, arXiv 1911.00068).

    For each of ``folds`` parts, training is run again as recorded with weight 0 on the part, whose classes the model
    then predicts. Low = the label is likely wrong. Cost: ``folds`` trainings. Fails if a class is rare or the model is
    badly calibrated.

    Attributes:
        folds: parts, with the classes in equal shares.
        seed: of the parts.

    Raises:
        InputError: ``folds`` below 2, or cleanlab is missing.
        UnsupportedError: the workload is no classification, or no class has ``folds`` samples.
    """

    name = "confident_learning"
    measures = "suspicion"

    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        expected = "2 parts or more, each left out in turn, and a seed of 0 or more"
        self._expect(expected, self.folds >= 2 and self.seed >= 0, "folds", "seed")

    def estimate(self, question: Question) -> Estimate:
        try:
            from cleanlab.rank import get_label_quality_scores
        except ImportError as error:
            raise InputError("confident_learning needs cleanlab: pip install 'dit-mlflow[methods]'") from error
        replay = question.trajectory.replay(question.workload)
        labels, probabilities = out_of_sample(replay, self.folds, self.seed)
        quality = get_label_quality_scores(labels, probabilities, method="self_confidence")
        return Estimate(np.broadcast_to(quality, question.shape).copy(), details={"folds": self.folds})


def out_of_sample(replay: Replay, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``[n]``, and for each sample the class probabilities ``[n, classes]`` of a model that never saw it.

    Raises:
        UnsupportedError: the labels are no classes, or no class has ``folds`` samples.
    """
    num_steps, start = replay.trajectory.num_steps, replay.checkpoint(0)
    labels = training_labels(replay.dynamics, start).cpu().numpy()
    check_folds(labels, folds)
    parts, found = [], []
    for _, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels):
        kept = torch.ones(len(labels))
        kept[held_out] = 0
        records = map(replay.trajectory.step, range(num_steps))
        last = replay.training_step.run(start, records, SampleWeights(kept, 0, num_steps))
        logits = training_logits(replay.dynamics, last, held_out)
        parts.append(held_out)
        found.append(logits.softmax(dim=1).double().cpu().numpy())
    return labels, np.concatenate(found)[np.argsort(np.concatenate(parts))]


def check_folds(labels: np.ndarray, folds: int) -> None:
    """Raise :class:`UnsupportedError` if no class ``[n]`` has enough samples for one in each of ``folds`` parts."""
    most = int(np.unique(labels, return_counts=True)[1].max())
    if most < folds:
        raise UnsupportedError(
            f"the largest class has {most} samples; predictions for samples that a model has not seen come from "
            f"{folds} parts, each left out in turn, and need a class of {folds} or more"
        )
