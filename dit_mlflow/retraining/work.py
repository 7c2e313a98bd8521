"""What retrainings side by side cost, counted and not timed: what depends on it is the same on every machine."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_mlflow.influence import Query
from dit_mlflow.influence.kind import Course
from dit_mlflow.influence.question import Question
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.retraining.counterfactuals import Job, LeftOut, Retraining
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import baseline
from dit_mlflow.torch_internals import making
from dit_mlflow.trajectory import State, StepRecord
from dit_mlflow.workload.random_state import preserved_random_state

OF_A_STEP = 10e6
"""Bytes whose computation takes the time that Python takes for a step, about 1.5 ms on one core of 2024."""

OPERATIONS = 10
"""Floating-point operations of matrix products that take the time of a byte of results."""

TRIED = 2
"""Steps that show whether retrainings run side by side."""

TOGETHER = 16
"""Retrainings that show it."""


def time_of_one(question: Question, dtype: torch.dtype | None = None, effort: Effort | None = None) -> float:
    """The time of one retraining among many, in trainings; 1 where side by side they save less than half, or fail.

    Side by side, they share the time that Python takes for a step (where a step of all makes about as many tensors as a
    step of one), and not that of arithmetic and memory, for which the operations of the first step are counted. On one
    core that is within a factor of two or three of the time of networks of 1,000 to 6,000 parameters
    (``benchmarks/removal.py``); on an accelerator it is too much.
    """
    effort = effort or Effort()
    # The question's own queries may have no value so early.
    nothing = Query("nothing", lambda model: torch.zeros(()))
    with preserved_random_state():
        replay = question.trajectory.replay(question.workload, dtype)
        steps = [question.trajectory.step(t) for t in range(min(TRIED, question.trajectory.num_steps))]
        state = replay.checkpoint(0)
        work = _work(replay.training_step, state, steps[0])
        if work > OF_A_STEP:
            return 1.0
        retraining = Retraining(replay.training_step, [nothing], effort.memory_budget, timed=False)
        course = Course(0, len(steps), ((len(steps), 0, 1),))
        samples = np.arange(TOGETHER) % question.workload.num_samples
        retraining.run(Job(course, steps, baseline(replay, course, retraining), LeftOut(samples)))
        copies = retraining.copies
        if not copies:
            return 1.0
        together = min(TOGETHER, copies)
        many, one = (_tensors(replay.training_step, state, steps[0], count) for count in (together, 1))
    if many > together / 2 * one:
        return 1.0
    return (work + OF_A_STEP / copies) / (work + OF_A_STEP)


def _tensors(training_step: TrainingStep, state: State, step: StepRecord, copies: int) -> int:
    """How many a step of all copies makes: as many as one copy's, except where torch makes them one by one."""
    made = list[int]()
    with making(made.append), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        training_step(state.side_by_side(copies), step, torch.ones(copies, len(step.samples)))
    return len(made)


def _work(training_step: TrainingStep, state: State, step: StepRecord) -> float:
    """Of a step, in bytes of results; its batch is loaded once for all retrainings."""
    loaded, made = list[int](), list[int]()
    with making(loaded.append):
        training_step.dynamics.load(step)
    with FlopCounterMode(display=False) as counted, making(made.append):
        training_step(state, step)
    return sum(made) - sum(loaded) + counted.get_total_flops() / OPERATIONS
