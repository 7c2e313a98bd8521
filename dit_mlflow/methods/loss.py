"""How badly a sample is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.at_window_end import AtWindowEnd
from dit_mlflow.methods.snapshot import Snapshot


@dataclass(frozen=True)
class Loss(AtWindowEnd):
    """``-l_j`` at the window's end: low = badly fitted = suspicious, what most people look at first.

    Cost: a forward pass of the training set. Fails once wrong labels are memorised.
    """

    name: ClassVar[str] = "loss"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        return -snapshot.losses()
