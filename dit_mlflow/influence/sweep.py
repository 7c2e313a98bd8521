"""Dynamic influence tracking: one backward sweep over a recorded trajectory."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import InputError
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import Kind, courses, sweeps
from dit_mlflow.influence.query import Query, sample_losses
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.weighted_sweeps import WeightedSweeps
from dit_mlflow.influence.window import Window
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.compiled_step import Compile, check_compile
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state


def track(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    weights: Sequence[float] | np.ndarray | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    compile: Compile = "auto",
) -> Influence:
    r"""Influence of every training sample, for each window and query, by Dynamic Influence Tracking.

    First order in the sample's weight ``w_j``, at ``w = 1``, or at other ``weights``. The adjoint starts as the query's
    gradient, ``lambda = grad q``, and is pulled back through the optimizer step and the gradient of each recorded step,

    .. math::
        \lambda_g = U_t'^{\top} \lambda, \quad
        \text{weight gradient}_t[j] = -\partial_{w_j} \langle g_t, \lambda_g \rangle, \quad
        \lambda_\theta \mathrel{+}= \partial_\theta \langle g_t, \lambda_g \rangle.

    A score is the sum of the weight gradients of its window. For plain SGD this is the recursion of Xu and Wu 2025
    (arXiv 2502.10793); for other optimizers, ``U_t`` is differentiated through their own code.

    Args:
        trajectory: recorded; may be incomplete.
        workload: model, data and loss that were trained.
        windows: step ranges; they may overlap.
        kind: ``local`` (absent in the window, effect at its end), ``final`` (absent in the window, effect at the end of
            training) or ``cumulative`` (absent from step 0, change over the window).
        queries: default: the mean validation loss.
        weights: ``[training samples]``, finite: the derivative is taken at these, along the training under them.
            They hold in the steps in which the kind has a sample absent: ``local`` and ``final`` start from the
            recorded ``s_a`` and weigh the window's steps, ``cumulative`` starts from ``s_0`` and weighs all steps; all
            other weights are 1. Coefficients, such as a batch's denominator, stay as recorded. ``None`` = all 1.
        dtype: ``None`` = as recorded; ``torch.float64`` replays one float64 trajectory from ``s_0``.
        memory_budget: bytes for the states held at one time, and as many again for adjoints. A smaller budget takes
            more replays (binomial checkpointing, :meth:`Replay.backward`) and, for many queries, more sweeps; scores
            are the same up to the rounding of queries that are pulled back together. Default: about ``2 sqrt(T)``
            states or 1 GiB, whichever is more, and 1 GiB of adjoints.
        compile: whether ``torch.compile`` makes the sweep's steps: ``"auto"``, where a timed step says that it saves
            more than compiling takes (long trainings, small networks); ``"always"``, wherever it is right; ``"never"``.
            A step is compiled only if it is a loss, then an optimizer, without random draws in the forward pass, and
            gives what the eager step gives but for rounding (1e-12 of the largest entry in float64, 1e-4 in float32);
            else it stays eager. ``metadata["compile"]`` says what was chosen, and what the other would have cost. Since
            the choice depends on the clock, scores repeat bit for bit only with ``"never"``.

    Returns:
        Scores ``[windows, queries, training samples]`` in units of the query. **Sign**: change of the query caused by
        removing the sample; for a loss, positive = helpful, negative = harmful. Samples that are in no step of a
        window score exactly 0 (``local``, ``final``).

    Raises:
        InputError: a window, kind, query or ``compile`` that cannot be used.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
        UnsupportedError: a step or a query cannot be differentiated.

    Cost: a replay (one training) and a sweep (two to three more), however many disjoint ``local`` windows or ``final``
    windows; each ``cumulative`` window and each query adds an adjoint, that is one backward pass through each step's
    shared graph. With ``weights``, each overlapping ``local`` window and each ``final`` window needs a replay and a
    sweep of its own, from the window's start to the step at which the query is asked.
    """
    check_compile(compile)
    question = Question.of(trajectory, workload, windows, kind, queries)
    at = None if weights is None else _checked(weights, workload.num_samples)
    with preserved_random_state():
        engine = Engine(trajectory.replay(workload, dtype), memory_budget, compile=compile)
        return tracked(question, engine, str(dtype or "recorded"), at)


def tracked(question: Question, engine: Engine, dtype: str, weights: Tensor | None = None) -> Influence:
    """:func:`track` by an engine that may have walked before."""
    scores = np.concatenate([scores for _, scores in in_parts(engine, question, weights)], axis=1)
    details = engine.details if weights is None else {**engine.details, "weights": "given"}
    return question.answer(scores, "dit", dtype, asked=np.arange(question.workload.num_samples), **details)


def self_influence(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    compile: Compile = "auto",
) -> Influence:
    """Influence of every training sample on its own loss: how much the model memorised the sample.

    Args:
        trajectory, workload, windows, kind, dtype, memory_budget, compile: as for :func:`track`.

    Returns:
        Scores ``[windows, 1, training samples]`` for the query ``own loss``, each sample's in evaluation mode.
        Positive, as for most samples: without the sample, its loss would be higher.

    Raises:
        As :func:`track`.

    Cost: one adjoint per training sample and start of a sweep, as many at once as ``memory_budget`` allows.
    """
    check_compile(compile)
    with preserved_random_state():
        queries = sample_losses(workload, of="training")
    question = Question.of(trajectory, workload, windows, kind, queries)
    own = np.zeros((len(question.windows), 1, workload.num_samples))
    with preserved_random_state():
        engine = Engine(trajectory.replay(workload, dtype), memory_budget, compile=compile)
        for first, scores in in_parts(engine, question):
            samples = np.arange(first, first + scores.shape[1])
            own[:, 0, samples] = scores[:, samples - first, samples]
    return replace(question, queries=(Query("own loss", queries[0].function),)).answer(
        own, "dit", str(dtype or "recorded"), asked=np.arange(workload.num_samples), **engine.details
    )


def in_parts(engine: Engine, question: Question, weights: Tensor | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield position of the first query, and scores ``[windows, queries, samples]``, of as many as memory allows."""
    trainings = courses(question.kind, question.windows, question.trajectory.num_steps)
    num_windows = len(question.windows)
    for part in engine.parts(len(question.queries), sweeps(trainings), num_windows):
        queries = question.queries[part]
        if weights is None:
            yield part.start, engine.run(queries, sweeps(trainings), num_windows)
            continue
        # A window's scores come from one course; the others give zeros.
        swept = WeightedSweeps(engine)
        own = (next(swept(queries, course, num_windows, weights[None])) for course in trainings)
        yield part.start, reduce(operator.iadd, own)


def _checked(weights: Sequence[float] | np.ndarray | Tensor, samples: int) -> Tensor:
    given = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if given.shape != (samples,) or not given.isfinite().all():
        raise InputError(
            f"weights of shape {list(given.shape)}{'' if given.isfinite().all() else ', not all finite'}; expected one "
            f"finite number for each of the {samples} training samples"
        )
    return given
