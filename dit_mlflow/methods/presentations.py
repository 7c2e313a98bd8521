"""What the model said of samples at the moment it was trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dit_mlflow.replay.dynamics import Dynamics, MicroBatch, replaying
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord


@dataclass(frozen=True, eq=False)
class Presentation:
    """Step ``t``: its samples ``[B]`` in batch order, and their margins ``[B]``: own logit minus the largest other."""

    step: int
    samples: np.ndarray
    margins: np.ndarray


def presentations(replay: Replay, until: int) -> Iterator[Presentation]:
    """The steps ``0 … until - 1``, with the recorded modes and random draws. Cost: a replay and a forward pass."""
    for t, state in enumerate(replay.forward(0, until - 1)):
        step = replay.trajectory.step(t)
        batches = replay.dynamics.load(step)
        margins = [_margins(replay.dynamics, step, state, micro) for micro in batches]
        yield Presentation(t, step.samples, np.concatenate(margins))


def _margins(dynamics: Dynamics, step: StepRecord, state: State, micro: MicroBatch) -> np.ndarray:
    dynamics.set_modes(step)
    buffers = {name: value.clone() for name, value in state.buffers.items()}
    with torch.no_grad(), replaying(micro.random_state):
        logits = dynamics.call(
            state.parameters, buffers, lambda model: dynamics.workload.class_logits(model, micro.batch, micro.size)
        )
    own = dynamics.workload.class_labels(micro.batch, logits.shape[1]).to(logits.device)
    others = logits.scatter(1, own[:, None], -torch.inf).amax(dim=1)
    return (logits.gather(1, own[:, None])[:, 0] - others).double().cpu().numpy()
