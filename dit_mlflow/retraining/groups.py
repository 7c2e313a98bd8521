"""Exact effects of removing groups of samples: a class, a source, the flagged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Kind, Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.counterfactuals import Removal, Reweighted, is_absent
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import retrain
from dit_mlflow.workload import Workload

Groups = Mapping[str, Sequence[int]]
"""Training set indices by the group's name; groups may overlap."""


def leave_groups_out(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    groups: Groups,
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    dtype: torch.dtype | None = torch.float64,
    effort: Effort | None = None,
    removal: Removal = "weight",
) -> pd.DataFrame:
    """The exact change of each query by removing each group: one retraining removes all samples of a group.

    A group's effect is not the sum of its members' effects. As with leave-one-out, the weights are 0 in the steps in
    which the kind has samples absent, and all else is as recorded: batches keep their size and denominators.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        groups: of training samples.
        dtype, effort, removal: as for :func:`dit_mlflow.leave_one_out`.

    Returns:
        Columns ``group``, ``samples`` (their number), ``window_start``, ``window_end``, ``query``, and ``change``, in
        units of the query. **Sign**: change caused by removing the group; for a loss, positive = the group helped.

    Raises:
        InputError: there is no group, or one is empty or holds other values than training set indices.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.

    Cost: one training from the window's start for each group.
    """
    check_groups(groups, workload.num_samples)
    question = Question.of(trajectory, workload, windows, kind, queries)
    weights = np.ones((len(groups), workload.num_samples))
    for row, indices in zip(weights, groups.values(), strict=True):
        row[list(indices)] = 0
    changes, _ = retrain(question, Reweighted(weights, is_absent(removal)), dtype, effort)
    rows = [
        {
            "group": name,
            "samples": len(set(indices)),
            "window_start": window.start,
            "window_end": window.end,
            "query": query.name,
            "change": changes[place, position, number],
        }
        for number, (name, indices) in enumerate(groups.items())
        for place, window in enumerate(question.windows)
        for position, query in enumerate(question.queries)
    ]
    return pd.DataFrame(rows)


def check_groups(groups: Groups, samples: int) -> None:
    """Raise :class:`InputError` unless each group holds training set indices."""
    if not groups:
        raise InputError("there are no groups to leave out; expected at least one, such as {'class 7': [3, 14]}")
    for name, indices in groups.items():
        given = np.asarray(list(indices))
        whole = given.ndim == 1 and given.size and given.dtype.kind in "iu"
        if not whole or given.min() < 0 or given.max() >= samples:
            shown = given[:5].tolist()
            raise InputError(f"group {name!r} holds {shown}; expected one or more indices within 0 … {samples - 1}")
