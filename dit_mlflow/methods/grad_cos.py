"""Angle between gradients at one state of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.at_window_end import AtWindowEnd
from dit_mlflow.methods.sample_gradients import norms
from dit_mlflow.methods.snapshot import Snapshot, inner


@dataclass(frozen=True)
class GradCos(AtWindowEnd):
    """``<grad l_j, grad q> / (|grad l_j| |grad q|)`` at the window's end (Charpiat et al. 2019, arXiv 2102.05262).

    Sign as ``grad_dot``; in [-1, 1]; 0 for a sample or a query without a gradient. Cost: ``grad_dot``, and a backward
    pass for each sample. It cannot tell a sample that matters little from one that matters much.
    """

    name: ClassVar[str] = "grad_cos"

    def scores(self, snapshot: Snapshot, question: Question) -> np.ndarray:
        gradients = snapshot.query_gradients(question.queries)
        lengths = np.sqrt(inner(gradients, gradients).double().cpu().numpy())[:, None] * norms(snapshot)
        products = snapshot.products(gradients)
        return np.divide(products, lengths, out=np.zeros_like(products), where=lengths != 0)
