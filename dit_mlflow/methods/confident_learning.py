"""Confident learning, by cleanlab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.presentations import class_labels
from dit_mlflow.trajectory import to_like
from dit_mlflow.trajectory.replay import Replay
from dit_mlflow.trajectory.rollout import Rollout


@dataclass(frozen=True)
class ConfidentLearning(Method):
    """cleanlab's label quality from out-of-sample probabilities (Northcutt et al. 2021, arXiv 1911.00068).

    For each of ``folds`` parts, training is run again as recorded with weight 0 on the part, and the model is asked for
    it. Low = the label is likely wrong. Cost: ``folds`` trainings. Fails where a class is rare or the model is badly
    calibrated.

    Attributes:
        folds: parts, with the classes in equal shares.
        seed: of the parts.
    """

    name: ClassVar[str] = "confident_learning"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    folds: int = 5
    seed: int = 0

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
        UnsupportedError: no class has ``folds`` samples.
    """
    trajectory, workload = replay.trajectory, replay.dynamics.workload
    start = next(replay.forward(0, 0))
    everything = workload.batch(np.arange(workload.num_samples))
    batch = to_like(everything, replay.dynamics.device, next(iter(start.parameters.values())).dtype)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        return workload.class_logits(model, batch, workload.num_samples)

    with torch.no_grad():
        classes = replay.dynamics.evaluate(start.parameters, start.buffers, logits).shape[1]
    labels = class_labels(batch, classes).cpu().numpy()
    check_folds(labels, folds)
    probabilities = np.zeros((len(labels), classes))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    for _, held_out in split:
        rollout = Rollout(replay.dynamics, trajectory.manifest.optimizer, start)
        for t in range(trajectory.num_steps):
            step = trajectory.step(t)
            weights = torch.from_numpy(~np.isin(step.samples, held_out)).to(next(iter(rollout.parameters.values())))
            rollout.advance(step, replay.dynamics.load(step), weights)
        with torch.no_grad():
            found = replay.dynamics.evaluate(rollout.parameters, rollout.buffers, logits).softmax(dim=1)
        probabilities[held_out] = found.double().cpu().numpy()[held_out]
    return labels, probabilities


def check_folds(labels: np.ndarray, folds: int) -> None:
    """Raise :class:`UnsupportedError` if no class ``[n]`` has enough samples for one in each of ``folds`` parts."""
    most = int(np.unique(labels, return_counts=True)[1].max())
    if most < folds:
        raise UnsupportedError(
            f"the largest class has {most} samples; predictions for samples that a model has not seen come from "
            f"{folds} parts, each left out in turn, and need a class of {folds} or more"
        )
