"""Dynamic influence tracking: one backward sweep over a recorded trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import Kind, sweeps
from dit_mlflow.influence.query import Query, sample_losses
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.window import Window
from dit_mlflow.replay import Trajectory
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state


def track(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Influence:
    r"""Influence of every training sample, for each window and query, by Dynamic Influence Tracking.

    First order in the sample's weight ``w_j``, at ``w_j = 1``. The adjoint starts at the query's gradient,
    ``lambda = grad q``, and runs back through the optimizer step and the gradient of each recorded step,

    .. math::
        \lambda_g = U_t'^{\top} \lambda, \quad
        \text{weight gradient}_t[j] = -\partial_{w_j} \langle g_t, \lambda_g \rangle, \quad
        \lambda_\theta \mathrel{+}= \partial_\theta \langle g_t, \lambda_g \rangle;

    a score is the sum of the weight gradients of its window. For plain SGD this is the recursion of Xu and Wu 2025
    (arXiv 2502.10793); here it goes through PyTorch's own optimizer code.

    Args:
        trajectory: recorded; may be incomplete.
        workload: model, data and loss that were trained.
        windows: step ranges; they may overlap.
        kind: ``local`` (absent in the window, effect at its end), ``final`` (absent in the window, effect at the end of
            training) or ``cumulative`` (absent from step 0, change over the window).
        queries: default: the mean validation loss.
        dtype: ``None`` = as recorded; ``torch.float64`` replays one float64 trajectory from ``s_0``.
        memory_budget: bytes for the states held on the way, and as many again for adjoints. Less memory takes more
            replays (binomial checkpointing, :meth:`Replay.backward`) and, for many queries, more sweeps; scores are
            the same bit for bit but for the rounding of queries that are pulled back together. Default: about
            ``2 sqrt(T)`` states or 1 GiB, whichever is more, and 1 GiB of adjoints.

    Returns:
        Scores ``[windows, queries, training samples]`` in units of the query. **Sign**: change of the query caused by
        removing the sample; for a loss, positive = helpful, negative = harmful. Samples that a window never
        met score exactly 0 (``local``, ``final``).

    Raises:
        InputError: a window, kind or query that cannot be used.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
        UnsupportedError: the training does something that cannot be differentiated here.

    Cost: the replay (one training) and two to three more trainings for the sweep, whatever the number of disjoint
    ``local`` windows or of ``final`` windows; each ``cumulative`` window and each query adds an adjoint, that is one
    backward pass per step of the shared graph.
    """
    question = Question.of(trajectory, workload, windows, kind, queries)
    with preserved_random_state():
        engine = Engine(trajectory.replay(workload, dtype), memory_budget)
        parts = [scores for _, scores in in_parts(engine, question)]
    return question.answer(
        np.concatenate(parts, axis=1), "dit", str(dtype or "recorded"), max_drift=engine.replay.max_drift
    )


def self_influence(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Influence:
    """Influence of every training sample on its own loss: how much the model had to memorise it.

    Args:
        trajectory, workload, windows, kind, dtype, memory_budget: as for :func:`track`.

    Returns:
        Scores ``[windows, 1, training samples]`` for the query ``own loss``, each sample's in evaluation mode.
        Positive = the sample's loss would be higher had it been left out, which is the rule.

    Raises:
        As :func:`track`.

    Cost: one adjoint per training sample and start of a sweep, as many at once as ``memory_budget`` allows.
    """
    with preserved_random_state():
        queries = sample_losses(workload, of="training")
    question = Question.of(trajectory, workload, windows, kind, queries)
    own = np.zeros((len(question.windows), 1, workload.num_samples))
    with preserved_random_state():
        engine = Engine(trajectory.replay(workload, dtype), memory_budget)
        for first, scores in in_parts(engine, question):
            samples = np.arange(first, first + scores.shape[1])
            own[:, 0, samples] = scores[:, samples - first, samples]
    return replace(question, queries=(Query("own loss", queries[0].function),)).answer(
        own, "dit", str(dtype or "recorded"), max_drift=engine.replay.max_drift
    )


def in_parts(engine: Engine, question: Question) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first query, and scores ``[windows, some queries, samples]``: as many queries as memory allows."""
    planned = sweeps(question.kind, question.windows, question.trajectory.num_steps)
    size = len(question.queries)
    if size > 1:
        size = min(size, engine.queries_at_once(planned, len(question.windows)))
    for first in range(0, len(question.queries), size):
        yield first, engine.run(question.queries[first : first + size], planned, len(question.windows))
