"""The part of a model version's description that tells the influence of its training samples, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_mlflow.evaluation.figures import FIDELITY, RECALL_AT_K, REMOVAL_LDS, SPEARMAN, TRUST_SAMPLES, TRUST_SPEARMAN
from dit_mlflow.explanation.markdown import GAP, escaped, markdown_table
from dit_mlflow.explanation.numbers import decimals
from dit_mlflow.explanation.ranking import extreme_samples, ranking_scores, window_extremes
from dit_mlflow.influence import Influence

BEGIN, END = "<!-- influence by dit-mlflow -->", "<!-- end of influence -->"
"""Comments around our part, so that it can be replaced while the rest of the description stays. Not shown."""

CARD_CHARACTERS = 5000
"""Most characters of a description that MLflow's databases take."""

CARD_COLUMNS = (*FIDELITY, RECALL_AT_K)
"""Metrics of windows in the table, the first of each heading that is known."""


@dataclass(frozen=True)
class CardFacts:
    """Facts beside the scores.

    Attributes:
        samples: index of a training sample -> its description, plain text.
        metrics: of the whole training, as on the influence run.
        by_window: name of a metric -> value of each window, ``None`` where undefined.
        whole: influence of the whole run, one window, that ranks the samples; ``None`` = the mean over windows does.
        exact: number of samples whose score in ``whole`` is from exact retraining.
        made: Markdown lines on how it was computed and where to look.
    """

    samples: Mapping[int, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_window: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    made: Sequence[str] = ()
    whole: Influence | None = None
    exact: int = 0


def with_card(description: str, influence: Influence, facts: CardFacts) -> str:
    """A version's description with our part in place of an earlier one, or at its end.

    It lists as many samples and windows as fit into :data:`CARD_CHARACTERS` beside the rest, which is kept whole.
    """
    before, after = _others_part(description)
    texts = [before, "", after]
    for size, windows in ((5, 12), (5, 6), (3, 6), (3, 3), (1, 1)):
        texts[1] = f"{BEGIN}\n{influence_card(influence, facts, size, windows)}\n{END}"
        whole = "\n\n".join(text for text in texts if text)
        if len(whole) <= CARD_CHARACTERS:
            return whole
    texts[1] = f"{BEGIN}\n{facts.made[-1] if facts.made else ''}\n{END}"
    whole = "\n\n".join(text for text in texts if text)
    return whole if len(whole) <= CARD_CHARACTERS else description


def influence_card(influence: Influence, facts: CardFacts, size: int = 5, most_windows: int = 12) -> str:
    """Our part, Markdown.

    Args:
        influence: scores; the first query is described.
        facts: the rest.
        size: samples on each side.
        most_windows: rows of the table; of more windows, so many are listed, evenly spread.
    """
    query = escaped(influence.queries[0], 80)
    count = len(influence.windows)
    if facts.whole is not None:
        over = f", of the whole run, steps {facts.whole.windows[0]}"
        if facts.exact:
            some = "" if facts.exact == len(influence.samples) else f", of {facts.exact} samples"
            over += f"{some or ','} by exact retraining"
    else:
        over = "" if count == 1 else f", mean over {count} windows"
    parts = [
        "## Influence of training samples",
        f"Change of {query} had a sample been left out ({escaped(influence.kind)}{over}).",
    ]
    headings = "Harmful (removal lowers it)", "Helpful (removal raises it)"
    for heading, side in zip(headings, extreme_samples(influence, size, facts.whole), strict=True):
        parts.append(f"### {heading}\n\n{_samples(influence, facts, side)}")
    parts += [_windows(influence, facts, most_windows), _fidelity(facts.metrics), *facts.made]
    return "\n\n".join(part for part in parts if part)


def _samples(influence: Influence, facts: CardFacts, side: Sequence[int]) -> str:
    scores = ranking_scores(influence, facts.whole)
    lines = []
    for at in side:
        index = int(influence.samples[at])
        known = facts.samples.get(index)
        lines.append(f"- sample **{index}**: {scores[at]:+.3g}" + (f", {escaped(known, 80)}" if known else ""))
    return "\n".join(lines) or "- none"


def _windows(influence: Influence, facts: CardFacts, most: int) -> str:
    count = len(influence.windows)
    shown = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    columns: dict[str, str] = {}
    for figure in CARD_COLUMNS:
        if any(value is not None for value in facts.by_window.get(figure.name, ())):
            columns.setdefault(figure.heading, figure.name)
    headings = ["steps", "most harmful", "most helpful", *columns]
    rows, extremes = [], window_extremes(influence)
    for at in shown:
        ends = ["–" if index is None else str(index) for index in extremes[at]]
        values = [facts.by_window[name][at] for name in columns.values()]
        figures = ["–" if value is None else decimals(value, 3) for value in values]
        rows.append([str(influence.windows[at]), *ends, *figures])
    table = markdown_table(headings, rows, GAP)
    left_out = f", {count - len(shown)} windows are left out here" if len(shown) < count else ""
    # A line below the table also keeps it clear of the next heading, to which MLflow leaves no space.
    return f"### Windows of training\n\n{table}\n\nSamples are numbered as in the training set{left_out}."


def _fidelity(metrics: Mapping[str, float]) -> str:
    figures = fidelity(metrics)
    said = f"{figures} over the whole training." if figures else "Not compared with exact retraining."
    found = metrics.get(RECALL_AT_K.name)
    chance = metrics.get(RECALL_AT_K.chance)
    if found is not None:
        said += f" The lowest scores find {found:.0%} of the samples known to be corrupted"
        said += f" (by chance {chance:.0%})." if chance is not None else "."
    return f"### How far to trust it\n\n{said}"


def fidelity(metrics: Mapping[str, float]) -> str:
    """Agreement with exact retraining in words; empty if it was not measured."""
    if (removals := metrics.get(REMOVAL_LDS.name)) is not None:
        ends = f"{decimals(metrics[REMOVAL_LDS.low], 3)} to {decimals(metrics[REMOVAL_LDS.high], 3)}"
        return f"{REMOVAL_LDS.heading} {decimals(removals, 3)} (95 % interval {ends})"
    if (exact := metrics.get(SPEARMAN.name)) is not None:
        return f"{SPEARMAN.heading} {decimals(exact, 3)} to exact leave-one-out"
    if (found := metrics.get(TRUST_SPEARMAN.name)) is None:
        return ""
    low, high = (metrics.get(name) for name in (TRUST_SPEARMAN.low, TRUST_SPEARMAN.high))
    interval = "" if low is None or high is None else f" (95 % interval {decimals(low, 3)} to {decimals(high, 3)})"
    count = metrics.get(TRUST_SAMPLES.name, 0)
    return f"{TRUST_SPEARMAN.heading} {decimals(found, 3)}{interval} to {count:.0f} exact leave-one-outs"


def _others_part(description: str) -> tuple[str, str]:
    """The texts before and after our part; without one, all of the description and nothing."""
    before, begun, rest = description.rpartition(BEGIN)
    _, ended, after = rest.partition(END)
    # Where the end mark is missing, people have written inside our part: repeat it rather than lose their text.
    return (before.strip(), after.strip()) if begun and ended else (description.strip(), "")
