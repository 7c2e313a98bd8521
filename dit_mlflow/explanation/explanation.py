"""The whole answer as one value: estimated and exact scores, how far to trust them, figures, and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from dit_mlflow.evaluation import Metrics, correlations_by_pattern, pattern_counts, patterns
from dit_mlflow.evaluation.figures import PATTERN, TRUST
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.ranking import best_known
from dit_mlflow.explanation.sentences import answer_sentences
from dit_mlflow.explanation.tables import top_samples_table, whole_run_table
from dit_mlflow.explanation.truth import Truth, joined
from dit_mlflow.influence import Influence, Window
from dit_mlflow.told import no_formula

NOTEBOOK_SAMPLES = 5
"""Samples on each side that a notebook shows."""

NOTEBOOK_COLUMNS = ("side", "window", "sample_index", "sample", "score", "estimate", "standard_error", "leave_one_out")
"""Columns that a notebook shows, of those that there are."""

Part = Literal["influence", "whole_run", "truth", "confirmed", "named"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Explanation:
    """The result of :func:`dit_mlflow.explain`; its words and figures are about the first query.

    Attributes:
        influence: estimated scores of the windows that were asked for.
        whole: figures of the whole run ``[0, T)``, by their names in :mod:`dit_mlflow.evaluation.figures`.
        per_window: figures of each window.
        gallery: descriptions and pictures of the samples.
        whole_run: estimated scores of the whole run, one window; ``None`` = not known.
        truth: exact retraining that the estimate was compared with.
        confirmed: exact scores of the samples of largest score in each window; ``None`` = not asked for.
        named: exact whole-run scores of all samples, some, or those that stand out; ``None`` = of none.
        cost: seconds and drift, by metric name.
        title: a few words that name what was trained.
        groups: what leaving out each group that was asked for does, in each window and over the whole run: ``group``,
            ``samples``, ``window``, ``predicted`` (the sum of the scores), ``exact`` (by retraining); ``None`` = none.
    """

    influence: Influence
    whole: Metrics
    per_window: tuple[Metrics, ...]
    gallery: Gallery = field(default_factory=Gallery)
    whole_run: Influence | None = None
    truth: Truth = field(default_factory=Truth)
    confirmed: Influence | None = None
    named: Influence | None = None
    cost: Metrics = field(default_factory=Metrics)
    title: str = ""
    groups: pd.DataFrame | None = None

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that were asked for."""
        return self.influence.windows

    @property
    def query(self) -> str:
        """The first query's name, in words."""
        return self.influence.queries[0].replace("_", " ")

    @property
    def estimates(self) -> Mapping[str, Influence]:
        """Scores of the windows, and of the whole run, by the method that made them."""
        return {self.influence.method: self.scores}

    @property
    def parts(self) -> Mapping[Part, Influence]:
        """All known scores by name, in the order in which they were computed."""
        exact = self.truth.leave_one_out
        apart = self.whole_run is not None and self.whole_run.windows != self.windows
        parts: dict[Part, Influence | None] = {
            "influence": self.influence,
            "whole_run": self.whole_run if apart else None,
            "truth": None if exact is None else exact.select(list(self.windows)),
            "confirmed": self.confirmed,
            "named": self.named,
        }
        return {part: found for part, found in parts.items() if found is not None}

    @property
    def scores(self) -> Influence:
        """The estimate for the windows that were asked for and for the whole run."""
        return joined_windows(self.influence, self.whole_run)

    @property
    def exact(self) -> Influence | None:
        """Exact scores of the first query, for some samples and windows; they replace estimates."""
        return joined(self.named, self.truth.leave_one_out or self.confirmed)

    @property
    def checked(self) -> int:
        """Samples with an exact ground truth over the whole run."""
        return self.truth.checked

    @cached_property
    def best(self) -> Influence:
        """Scores of the windows, exact where they are known and answer the same question."""
        return best_known(self.influence, self.exact)

    @property
    def ranking(self) -> Influence | None:
        """Scores of the whole run, exact where known, that rank the samples; ``None``: the mean over windows does."""
        return None if self.whole_run is None else best_known(self.whole_run, self.exact)

    @property
    def trust(self) -> Mapping[str, float]:
        """How far the scores of the whole run can be trusted, see :func:`dit_mlflow.evaluation.trust`."""
        return {name.removeprefix(TRUST): v for name, v in self.whole.values.items() if name.startswith(TRUST)}

    @property
    def figures(self) -> Mapping[str, float]:
        """Figures of the whole run, and what it cost."""
        return {**self.whole.values, **self.pattern_figures.values, **self.cost.values}

    @property
    def measured(self) -> dict[Window, Metrics]:
        """Figures of each window and of the whole run."""
        found = dict(zip(self.windows, self.per_window, strict=True))
        if self.whole_run is not None:
            found[self.whole_run.windows[0]] = self.whole
        return found

    @cached_property
    def patterns(self) -> np.ndarray | None:
        """The pattern of each sample over the windows, ``[samples]``; ``None`` for one window."""
        return patterns(self.influence) if len(self.windows) > 1 else None

    @property
    def pattern_figures(self) -> Metrics:
        """How many samples have each pattern, and how well estimate and truth agree on them."""
        if self.patterns is None:
            return Metrics()
        counts = pattern_counts(self.patterns)
        exact = self.truth.leave_one_out
        if exact is not None and self.whole_run is not None:
            counts = counts.and_(correlations_by_pattern(self.whole_run.of(0), exact.of(-1), self.patterns))
        return counts.prefixed(PATTERN)

    @property
    def sentences(self) -> tuple[str, str, str]:
        """Three: which samples hurt and helped most, and when; how sure that is; damaged samples and patterns."""
        return answer_sentences(self)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` most harmful and helpful samples of the whole run (if not known: of each window).

        Exact scores, where known, rank before estimates.
        """
        if self.whole_run is None:
            return top_samples_table(self.influence, self.exact, self.gallery, k)
        return whole_run_table(self.whole_run, self.exact, self.gallery, k)

    def to_frame(self) -> pd.DataFrame:
        """All scores in long form, see :meth:`dit_mlflow.Influence.to_frame`; ``exact`` where it is known."""
        table = self.scores.to_frame()
        if self.exact is None:
            return table
        keys = ["sample_index", "window_start", "window_end", "query"]
        known = self.exact.to_frame()[[*keys, "score"]].rename(columns={"score": "exact"})
        return table.merge(known, on=keys, how="left")

    def to_csv(self, path: str | Path) -> Path:
        """Write :meth:`to_frame`; a text that a spreadsheet would run (``=…``) has an apostrophe before it."""
        table = self.to_frame()
        texts = {str(name): table[name].map(no_formula) for name in table.select_dtypes(exclude="number")}
        table.assign(**texts).to_csv(path, index=False)
        return Path(path)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page: the answer, influence over the windows, all samples to sort."""
        Path(path).write_text(_from_above("page").explanation_page(self), encoding="utf-8", errors="replace")
        return Path(path)

    def plot(self) -> Figure:
        """The samples that harm and help most, window by window, with pictures or texts, as a matplotlib figure."""
        found: Figure = _from_above("plots").plot_top_samples(self.best, self.gallery, whole=self.ranking)
        return found

    def _repr_html_(self) -> str:
        """For notebooks: the answer in words, and the samples that harm and help most."""
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences)
        known = self.top(NOTEBOOK_SAMPLES)
        shown = [name for name in NOTEBOOK_COLUMNS if name in known]
        return f"<ul>{said}</ul>{known[shown].to_html(index=False, escape=True, na_rep='', border=0)}"

    def __repr__(self) -> str:
        return f"<Explanation of {self.title or 'a training'}: {self.influence!r}>"

    def __str__(self) -> str:
        return " ".join(self.sentences)


def _from_above(room: str) -> ModuleType:
    """A room that knows explanations, loaded where one of them is asked to show itself."""
    return import_module(f"dit_mlflow.{room}")


def joined_windows(one: Influence, other: Influence | None) -> Influence:
    """The scores of both; windows that both have are those of ``one``."""
    if other is None or set(other.windows) <= set(one.windows):
        return one
    more = [window for window in other.windows if window not in one.windows]
    further = other.select(more)

    def both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        return None if a is None or b is None else np.concatenate([a, b])

    return replace(
        one,
        scores=np.concatenate([one.scores, further.scores]),
        windows=(*one.windows, *more),
        standard_error=both(one.standard_error, further.standard_error),
        degrees_of_freedom=both(one.degrees_of_freedom, further.degrees_of_freedom),
    )
