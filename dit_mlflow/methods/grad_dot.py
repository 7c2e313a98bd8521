"""Similarity of gradients at one state of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.at_window_end import AtWindowEnd
from dit_mlflow.methods.snapshot import Snapshot


@dataclass(frozen=True)
class GradDot(AtWindowEnd):
    """``<grad l_j, grad q>`` at the window's end (Charpiat et al. 2019, arXiv 2102.05262).

    Sign: positive = a step on the sample lowers the query, so its removal raises it. Units are not the query's.
    Cost: three passes over the training set. Fails where what a sample did lies far back, and where few samples with
    large gradients outweigh all others.
    """

    name: ClassVar[str] = "grad_dot"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        return snapshot.products(snapshot.query_gradients(question.queries))
