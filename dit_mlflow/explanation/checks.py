"""What an influence run's scores are held against, as people ask for it, and what is known by then."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Influence

NAMED = 4
"""Most harmful and most helpful samples of the whole run, each, that are named and drawn."""


def parse_ground_truth(text: str, num_samples: int) -> int | None:
    """Samples to retrain without, from ``all`` (``None``), ``none`` (0) or a number; raises :class:`InputError`."""
    if text in ("all", "none"):
        return None if text == "all" else 0
    if text.isdecimal() and 0 < int(text) <= num_samples:
        return int(text)
    raise InputError(f"ground_truth={text!r}; expected 'all', 'none' or a number of samples, 1 … {num_samples}")


@dataclass(frozen=True)
class Checks:
    """What an estimate is held against.

    Attributes:
        ground_truth: samples to retrain without: ``None`` = all, 0 = none.
        trust: random samples to retrain without where there is no ground truth, and on each side :data:`NAMED` that
            stand out over the whole run, if they are not among it; 0 = neither.
        confirm: samples of largest score to retrain without in each window, where there is no ground truth.
    """

    ground_truth: int | None = 0
    trust: int = 0
    confirm: int = 0

    @classmethod
    def parse(cls, ground_truth: str, trust: int, confirm: int, num_samples: int) -> Checks:
        """Raises :class:`InputError` for what cannot be used."""
        if trust < 0 or trust in (1, 2):
            raise InputError(f"trust={trust}; expected 3 random samples or more, or 0 for none")
        if not 0 <= confirm <= num_samples:
            raise InputError(f"confirm={confirm}; expected a number of samples, 0 … {num_samples}")
        return cls(parse_ground_truth(ground_truth, num_samples), trust, confirm)


def joined(*parts: Influence | None) -> Influence | None:
    """Exact scores of all the windows of ``parts``, of one query; where several know a score, the last counts."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    windows = list(dict.fromkeys(window for part in known for window in part.windows))
    scores = np.full((len(windows), 1, len(known[0].samples)), np.nan)
    for part in known:
        for window in part.windows:
            row = scores[windows.index(window), 0]
            np.copyto(row, part.of(window), where=np.isfinite(part.of(window)))
    return replace(known[0], scores=scores, windows=tuple(windows))
