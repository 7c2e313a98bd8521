"""Methods that look at the model at the end of a window, and at nothing before."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.sample_gradients import norms
from dit_mlflow.methods.snapshot import Snapshot, inner, snapshots


class AtWindowEnd(Method):
    """Scores of a window ``[a, b)`` are those of the model at ``s_b``, in evaluation mode."""

    per_window = True

    @abstractmethod
    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        """``[queries, n]``, or ``[n]`` if the queries make no difference."""

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        ends = [window.end for window in question.windows]
        found = {t: self.scores(snapshot, question) for t, snapshot in snapshots(replay, ends)}
        scores = np.stack([np.broadcast_to(found[end], question.shape[1:]) for end in ends])
        return Estimate(scores, details={"max_drift": replay.max_drift})


@dataclass(frozen=True)
class GradDot(AtWindowEnd):
    """``<grad l_j, grad q>`` at the window's end (Charpiat et al. 2019, arXiv 2102.05262).

    Sign: positive = a step on the sample lowers the query, so its removal raises it. Units are not the query's.
    Cost: three passes over the training set. Fails where a sample's effect lies far back, and where few samples with
    large gradients outweigh all others.
    """

    name = "grad_dot"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        return snapshot.products(snapshot.query_gradients(question.queries))


@dataclass(frozen=True)
class GradCos(AtWindowEnd):
    """``<grad l_j, grad q> / (|grad l_j| |grad q|)`` at the window's end (Charpiat et al. 2019, arXiv 2102.05262).

    Sign as ``grad_dot``; in [-1, 1]; 0 for a sample or a query without a gradient. Cost: ``grad_dot``, and a backward
    pass for each sample. It cannot tell a sample that matters little from one that matters much.
    """

    name = "grad_cos"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        gradients = snapshot.query_gradients(question.queries)
        lengths = np.sqrt(inner(gradients, gradients).double().cpu().numpy())[:, None] * norms(snapshot)
        products = snapshot.products(gradients)
        return np.divide(products, lengths, out=np.zeros_like(products), where=lengths != 0)


@dataclass(frozen=True)
class GradNorm(AtWindowEnd):
    """``-|grad l_j|`` at the window's end (GraNd of Paul et al. 2021, arXiv 2107.07075, for one training).

    Low = suspicious: the model would have to change much for this sample. Cost: a backward pass for each sample. Hard
    samples look like wrong ones; memorised wrong ones look like easy ones.
    """

    name = "grad_norm"
    measures = "suspicion"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        return -norms(snapshot)


@dataclass(frozen=True)
class Loss(AtWindowEnd):
    """``-l_j`` at the window's end: low = badly fitted = suspicious, what most people look at first.

    Cost: a forward pass of the training set. Fails once wrong labels are memorised.
    """

    name = "loss"
    measures = "suspicion"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        return -snapshot.losses()
