"""Results and samples to make pages of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from dit_mlflow import Influence, Window
from dit_mlflow.explanation import Gallery

Opener = Callable[..., Any]
"""Opens HTML in a sandboxed frame; settings: ``scheme`` (light, dark), ``width``."""

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "'><svg onload=alert(4)>",
    "<!--<script>",
    "]]> --> </style></title><b>bold</b>",
    "**bold** [link](javascript:alert(5)) `code`",
    "long " * 2000,
    "\u202egnirts desrever\u2066",
    "👩‍🔬 naïve 数据",
    "line\u2028break\u2029\x00\x07 and a half \ud83d pair",
    "${style} {{data}} $data",
    "&lt;b&gt; &amp; \\u003cb\\u003e",
)


class Samples(Gallery):
    """What a workload would tell."""

    def __init__(
        self,
        looks: Sequence[Any],
        labels: Sequence[Any],
        notes: Sequence[Any] | None = None,
        corrupted: Sequence[int] = (),
    ) -> None:
        tell = None if notes is None else notes.__getitem__
        told = {"appearance": looks.__getitem__, "label_of": labels.__getitem__, "describe": tell}
        super().__init__(SimpleNamespace(**told, corrupted=corrupted))


def result(
    scores: np.ndarray, whole: bool = True, queries: Sequence[str] = ("loss",), method: str = "dit"
) -> Influence:
    """Scores ``[windows, queries, samples]`` of windows of ten steps; with ``whole``, the last is all of training."""
    count = len(scores) - whole
    windows = [Window(10 * k, 10 * k + 10) for k in range(count)] + [Window(0, 10 * count)] * whole
    return Influence(scores, tuple(windows), tuple(queries), np.arange(scores.shape[2]), "local", method)


def random_scores(windows: int, samples: int, queries: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((windows, queries, samples)) * 1e-3
