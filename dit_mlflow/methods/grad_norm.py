"""How large a sample's gradient is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.at_window_end import AtWindowEnd
from dit_mlflow.methods.sample_gradients import norms
from dit_mlflow.methods.snapshot import Snapshot


@dataclass(frozen=True)
class GradNorm(AtWindowEnd):
    """``-|grad l_j|`` at the window's end (GraNd of Paul et al. 2021, arXiv 2107.07075, for one training).

    Low = suspicious: the model would have to change much for this sample. Cost: a backward pass for each sample. Hard
    samples look like wrong ones; memorised wrong ones look like easy ones.
    """

    name: ClassVar[str] = "grad_norm"
    measures: ClassVar[Literal["query", "ranking", "suspicion"]] = "suspicion"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        return -norms(snapshot)
