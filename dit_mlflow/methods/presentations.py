"""Methods that look at the model's margin of a sample whenever it was trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.replay.dynamics import Dynamics, MicroBatch, replaying
from dit_mlflow.replay.not_finite import named, refuse_diverged
from dit_mlflow.trajectory import State, StepRecord
from dit_mlflow.workload.without_graph import without_graph


@dataclass(frozen=True)
class Aum(Method):
    """Area under the margin: a sample's mean margin when it was trained on (Pleiss et al. 2020, arXiv 2001.10528).

    Margin: the logit of its own label minus the largest other one. Low = suspicious: the rest of the data pulls
    against its label. NaN for samples that the window never met. Cost: a replay and a forward pass of each step.
    """

    name = "aum"
    per_window = True
    measures = "suspicion"
    skips = True

    def estimate(self, question: Question) -> Estimate:
        sums = np.zeros((len(question.windows), question.workload.num_samples))
        counts = np.zeros_like(sums)
        for t, samples, margins in presentations(question):
            for k, window in enumerate(question.windows):
                if t in window:
                    np.add.at(sums[k], samples, margins)
                    np.add.at(counts[k], samples, 1)
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return Estimate(np.broadcast_to(means[:, None], question.shape).copy())


@dataclass(frozen=True)
class ForgettingEvents(Method):
    """Minus the times that a sample was wrong after it had been right (Toneva et al. 2019, arXiv 1812.05159).

    Counted when the sample is trained on, in the window; right means a positive margin. A sample that was never right
    until the window's end counts one more than its presentations until then. Low = suspicious. NaN for samples that
    the window never met. Cost: a replay and a forward pass of each step. Few presentations make many ties.
    """

    name = "forgetting_events"
    per_window = True
    measures = "suspicion"
    skips = True

    def estimate(self, question: Question) -> Estimate:
        scores = np.full((len(question.windows), question.workload.num_samples), np.nan)
        right = np.zeros(question.workload.num_samples, dtype=bool)
        learned = np.zeros_like(right)
        met = np.zeros(question.workload.num_samples)
        for t, samples, margins in presentations(question):
            for sample, margin in zip(samples, margins, strict=True):
                forgotten = right[sample] and margin <= 0
                right[sample] = margin > 0
                learned[sample] |= margin > 0
                met[sample] += 1
                for k, window in enumerate(question.windows):
                    if t in window:
                        scores[k, sample] = np.nan_to_num(scores[k, sample]) - forgotten
            for k, window in enumerate(question.windows):
                if t == window.end - 1:
                    never = ~learned & np.isfinite(scores[k])
                    scores[k, never] = -(met[never] + 1)
        return Estimate(np.broadcast_to(scores[:, None], question.shape).copy())


def presentations(question: Question) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each step ``t`` until the last window's end, its samples ``[B]``, and their margins ``[B]`` when it was made.

    Raises:
        TrajectoryError: training diverged before.
        UnsupportedError: a margin is not finite.
    """
    replay = question.trajectory.replay(question.workload)
    for t, state in enumerate(replay.forward(0, max(window.end for window in question.windows) - 1)):
        step = question.trajectory.step(t)
        margins = np.concatenate(
            [_margins(replay.dynamics, step, state, micro) for micro in replay.dynamics.load(step)]
        )
        if not np.isfinite(margins).all():
            refuse_diverged(state, t, question.trajectory)
            raise UnsupportedError(
                f"step {t}: the logits of {named(step.samples[~np.isfinite(margins)])} are not finite, so that they "
                "have no margin. Look for NaN and infinity in their data, or ask for windows that end before"
            )
        yield t, step.samples, margins


def _margins(dynamics: Dynamics, step: StepRecord, state: State, micro: MicroBatch) -> np.ndarray:
    dynamics.set_modes(step)
    buffers = {name: value.clone() for name, value in state.buffers.items()}

    def logits_of() -> Tensor:
        with replaying(micro.random_state):
            return dynamics.call(
                state.parameters, buffers, lambda model: dynamics.workload.class_logits(model, micro.batch, micro.size)
            )

    logits = without_graph(logits_of)
    own = dynamics.workload.class_labels(micro.batch, logits.shape[1]).to(logits.device)
    others = logits.scatter(1, own[:, None], -torch.inf).amax(dim=1)
    return (logits.gather(1, own[:, None])[:, 0] - others).double().cpu().numpy()
