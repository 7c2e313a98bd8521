"""Exact retrainings to compare an estimate with: which are asked for, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation import attainable
from dit_mlflow.evaluation.figures import SPEARMAN, TRUTH
from dit_mlflow.influence import Influence, Kind, Query, Window
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort, Subsets, leave_one_out, train_on_subsets
from dit_mlflow.workload import Workload

NAMED = 4
"""Samples on each side of the whole run's ranking that are named and drawn."""


def parse_ground_truth(text: str, num_samples: int) -> int | None:
    """Samples to retrain without, from ``all`` (``None``), ``none`` (0) or a number; raises :class:`InputError`."""
    if text in ("all", "none"):
        return None if text == "all" else 0
    if text.isdecimal() and 0 < int(text) <= num_samples:
        return int(text)
    raise InputError(f"ground_truth={text!r}; expected 'all', 'none' or a number of samples, 1 … {num_samples}")


@dataclass(frozen=True)
class Checks:
    """Which exact retrainings to compare an estimate with.

    Attributes:
        ground_truth: samples to retrain without: ``None`` = all, 0 = none.
        trust: random samples to retrain without if there is no ground truth; also, unless retrained already, the
            :data:`NAMED` largest on each side over the whole run; 0 = neither.
        confirm: samples of largest score to retrain without in each window, if there is no ground truth.
        subsets: trainings on random parts of the data, for the linear datamodeling score; 0 = none.
        removed: the share of the samples that each of them leaves out.
    """

    ground_truth: int | None = 0
    trust: int = 0
    confirm: int = 0
    subsets: int = 0
    removed: float = 0.5

    @classmethod
    def parse(
        cls,
        ground_truth: str,
        num_samples: int,
        trust: int = 0,
        confirm: int = 0,
        subsets: int = 0,
        removed: float = 0.5,
    ) -> Checks:
        """Raises :class:`InputError` for a value that cannot be used."""
        if trust < 0 or trust in (1, 2):
            raise InputError(f"trust={trust}; expected 3 random samples or more, or 0 for none")
        if not 0 <= confirm <= num_samples:
            raise InputError(f"confirm={confirm}; expected a number of samples, 0 … {num_samples}")
        if subsets < 0 or subsets in (1, 2):
            raise InputError(f"subsets={subsets}; expected 0, or 3 or more")
        if subsets and not (0 < removed < 1 and 0 < round(removed * num_samples) < num_samples):
            raise InputError(f"removed={removed} of {num_samples} samples; expected a share that leaves some of them")
        return cls(parse_ground_truth(ground_truth, num_samples), trust, confirm, subsets, removed)


@dataclass(frozen=True, eq=False)
class Truth:
    """Exact retrainings of one training, made once and compared with any number of methods.

    Attributes:
        leave_one_out: exact scores, NaN for samples that were not left out; ``None`` = no sample was.
        subsets: trainings on random parts of the data, of the whole run; ``None`` = none.
    """

    leave_one_out: Influence | None = None
    subsets: Subsets | None = None

    @property
    def checked(self) -> int:
        """Samples with an exact score for the last window, which is the whole run."""
        return 0 if self.leave_one_out is None else int(np.isfinite(self.leave_one_out.of(-1)).sum())


def find_truth(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind,
    checks: Checks,
    queries: Sequence[Query] | None = None,
    effort: Effort | None = None,
) -> Truth:
    """The exact retrainings that ``checks`` asks for, of ``windows`` and the whole run.

    Cost: one training for each subset and each sample left out, see :func:`dit_mlflow.leave_one_out`.
    """
    whole = Window(0, trajectory.num_steps)
    subsets = exact = None
    if checks.subsets:
        share = 1 - checks.removed
        subsets = train_on_subsets(
            trajectory, workload, [whole], queries=queries, subsets=checks.subsets, share=share, effort=effort
        )
    if checks.ground_truth != 0:
        asked = [*(window for window in windows if window != whole), whole]
        exact = leave_one_out(trajectory, workload, asked, kind, queries, checks.ground_truth, effort=effort)
    return Truth(exact, subsets)


def noise_floor(
    truth: Truth, trajectory: Trajectory, workload: Workload, queries: Sequence[Query] | None = None
) -> float | None:
    """How well leave-one-out in the recorded precision agrees with the truth over the whole run (Spearman).

    See :func:`dit_mlflow.evaluation.attainable`; ``None`` = there is no truth, or the correlation is undefined.
    """
    if truth.leave_one_out is None:
        return None
    whole = truth.leave_one_out.windows[-1]
    (floor,) = attainable(truth.leave_one_out.select([whole]), trajectory, workload, queries=queries)
    return floor.prefixed(TRUTH).values.get(SPEARMAN.attainable)


def joined(*parts: Influence | None) -> Influence | None:
    """Exact scores of all windows of ``parts``, for the first query; of several known values, the last counts."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    windows = list(dict.fromkeys(window for part in known for window in part.windows))
    scores = np.full((len(windows), 1, len(known[0].samples)), np.nan)
    for part in known:
        for window in part.windows:
            row = scores[windows.index(window), 0]
            np.copyto(row, part.of(window), where=np.isfinite(part.of(window)))
    return replace(known[0], scores=scores, windows=tuple(windows), queries=known[0].queries[:1])
