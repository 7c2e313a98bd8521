"""What an influence run found, in three sentences of plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import (
    HIGH,
    LOW,
    PLANTED_AUROC,
    RECALL_AT_K,
    REMOVAL_LDS,
    REMOVAL_SLOPE,
    SPEARMAN,
    TRUST_SAMPLES,
    TRUST_SPEARMAN,
)
from dit_mlflow.evaluation.patterns import PATTERNS, patterns
from dit_mlflow.explanation.numbers import decimals, figure, share, span
from dit_mlflow.explanation.ranking import extreme_samples, ranking_scores
from dit_mlflow.influence import Influence, Window
from dit_mlflow.influence.draws import kinked
from dit_mlflow.influence.query import is_loss

if TYPE_CHECKING:
    from dit_mlflow.explanation.explanation import Explanation

AGREEMENT = ((0.9, "very high"), (0.7, "high"), (0.5, "moderate"), (0.3, "low"))
"""The least Spearman correlation with exact leave-one-out for each word; below the last it is very low."""

FORETOLD = 0.7
"""The least LDS of removals, which is called high, from which kinks are not mentioned."""

SIZE_RIGHT = (2 / 3, 3 / 2)
"""Slopes of real on foretold changes between which agreement may be called high."""

TURNED = 0.5
"""A second window is mentioned if the sample's effect there has the other sign and at least this share of the size."""

MEANING = {
    "early": "most of their influence falls in the first half of training",
    "late": "most of their influence falls in the second half of training",
    "stable": "their influence is spread over training and mostly of one sign",
    "fluctuating": "their influence changes its sign during training",
}


COUPLED = (
    "The loss couples the samples of a batch, so removal takes a sample's own loss away, while the sample stays in its "
    "batches (the samples' absence: leave_one_out(removal='absent'))."
)
ABSENT = "The loss couples the samples of a batch; removed samples are not in their batches either."


def answer_sentences(found: Explanation) -> tuple[str, str, str]:
    """Which samples hurt and helped most, and when; how sure that is; damaged samples and patterns."""
    coupled = "" if not found.influence.coupled else f" {ABSENT if found.influence.absence else COUPLED}"
    return _who(found, found.best) + coupled, _how_sure(found) + _kinks(found), _what_kind(found)


def window_sentences(found: Explanation, position: int) -> tuple[str, str]:
    """The first two of :func:`answer_sentences`, for one window."""
    window = found.influence.windows[position]
    metrics = found.per_window[position]
    alone = replace(
        found, influence=found.influence.select([window]), whole=metrics, per_window=(metrics,), whole_run=None
    )
    who = _who(alone, alone.influence)
    return f"In steps {window}, {who[0].lower()}{who[1:]}", _how_sure(alone) + _kinks(alone)


def agreement_word(spearman: float) -> str:
    """The word of :data:`AGREEMENT` for a correlation."""
    return next((word for least, word in AGREEMENT if spearman >= least), "very low")


def _who(found: Explanation, scores: Influence) -> str:
    """``scores`` of the windows: those that the pictures beside the sentence show."""
    ranking = found.ranking
    if found.influence.measures == "suspicion":
        return _suspicious(found)
    harmful, helpful = extreme_samples(scores, 1, ranking)
    over = "on average" if ranking is None else "over the whole run"
    parts: list[str] = []
    hurt, helped = _verbs(found)
    for samples, sign, verb, change in ((harmful, -1, hurt, "lowers"), (helpful, 1, helped, "raises")):
        if samples:
            parts.append(_one(found, scores, samples[0], sign, verb, change, first=not parts))
    if not parts:
        return f"No sample changed the {found.query} {over}."
    if not harmful:
        parts.append(f"no sample {hurt} {over}")
    elif not helpful:
        parts.append(f"no sample {helped} {over}")
    return _capitalised("; ".join(parts)) + "."


def _verbs(found: Explanation) -> tuple[str, str]:
    """What samples do whose removal lowers the query, and raises it; only of a loss, a lower one is better."""
    return ("hurt", "helped") if is_loss(found.query) else ("raised", "lowered")


def _suspicious(found: Explanation) -> str:
    """For methods that ignore the query: low scores are suspicious, whatever their sign."""
    scores = ranking_scores(found.influence, found.ranking)
    if not np.isfinite(scores).any():
        return f"No sample has a score by {found.influence.method}."
    name = found.gallery.name(int(found.influence.samples[np.nanargmin(scores)]))
    return _capitalised(f"{name} is the most suspicious by {found.influence.method}, which does not look at the query.")


def _one(found: Explanation, by_window: Influence, sample: int, sign: int, verb: str, change: str, first: bool) -> str:
    ranking, windows = found.ranking, by_window.windows
    scores = by_window.scores[:, 0, sample]
    place = int(np.nanargmax(sign * scores))
    object_, quantity = (" the model", f"the {found.query}") if first else ("", "it")
    if "loss" not in found.query:
        object_, quantity = f" the {found.query}" if first else " it", "it"
    text = f"{found.gallery.name(int(found.influence.samples[sample]))} {verb}{object_} most"
    if ranking is None:
        told, over = by_window.select([windows[place]]), ""
        exact = by_window is not found.influence and np.isfinite(_exactly(found, windows[place])[sample])
        removal, doubt = "exact removal" if exact else "removal", _doubt(found, told, sample)
    else:
        told, over = ranking, " over the whole run" if ranking.windows != windows else ""
        exactly = _exactly(found, told.windows[0])
        removal = "exact removal" if np.isfinite(exactly[sample]) else "removal"
        doubt = " by the estimate" if np.isfinite(exactly).any() and removal == "removal" else ""
    said = f"{removal} {change} {quantity} by {figure(abs(told.scores[0, 0, sample]))}{over}{doubt}"
    if told.removed is not None:
        said = _one_of_many(found, told, sample, change, quantity, over)
    if found.influence.measures == "ranking":
        said = f"as {found.influence.method} ranks them{over}"
    if len(windows) == 1 or not sign * scores[place] > 0:
        return f"{text}: {said}"
    text += f", above all in steps {windows[place]} ({said})"
    other = int(np.nanargmin(sign * scores))
    if sign * scores[other] < -TURNED * sign * scores[place]:
        text += f", but {next(word for word in _verbs(found) if word != verb)} in steps {windows[other]}"
    return text


def _one_of_many(found: Explanation, told: Influence, sample: int, change: str, quantity: str, over: str) -> str:
    """What the removal of one sample does when others go too, with its interval; and alone, where that is known."""
    assert told.removed is not None
    low, high = (end[0, 0, sample] for end in told.interval())
    ends = " to ".join(figure(abs(end)) for end in sorted((low, high), key=abs))
    interval = f", 95 % interval {ends}" if np.isfinite(low) else ""
    said = (
        f"where {share(told.removed)} of the samples go, its removal {change} {quantity} by "
        f"{figure(abs(told.scores[0, 0, sample]))}{over}{interval}"
    )
    exact = _exactly(found, told.windows[0])[sample]
    if not np.isfinite(exact):
        return said
    return f"{said}; alone, by exact retraining, it {'raises' if exact > 0 else 'lowers'} it by {figure(abs(exact))}"


def _doubt(found: Explanation, told: Influence, sample: int) -> str:
    """A warning, if exact retraining is known and has the other sign."""
    turned = _exactly(found, told.windows[0])[sample] * told.scores[0, 0, sample] < 0
    return " by the estimate; left out exactly, it does the opposite" if turned else ""


def _exactly(found: Explanation, window: Window) -> np.ndarray:
    """Scores ``[samples]`` of exact retraining, NaN where there is none."""
    if found.exact is None or window not in found.exact.windows:
        return np.full(len(found.influence.samples), np.nan)
    return found.exact.of(window)


def _how_sure(found: Explanation) -> str:
    key = SPEARMAN.name
    every = (found.whole, *found.per_window)
    total = len(found.influence.samples)
    count = found.checked
    if found.influence.removed is not None:
        return _how_sure_of_removals(found)
    if (planted := found.whole.values.get(PLANTED_AUROC.name)) is not None:
        low, high = (found.whole.values[name] for name in (PLANTED_AUROC.low, PLANTED_AUROC.high))
        return (
            f"Of labels that were made wrong on purpose, in trainings of their own, such scores find most: AUROC "
            f"{decimals(planted, 2)} (95 % interval {span(low, high)}; by chance 0.5)."
        )
    if not any(key in metrics.values for metrics in every):
        reason = next((metrics.undefined[key] for metrics in every if key in metrics.undefined), None)
        if any(TRUST_SPEARMAN.name in metrics.values for metrics in every):
            key = TRUST_SPEARMAN.name
            count = int(max(metrics.values.get(TRUST_SAMPLES.name, 0) for metrics in every))
        elif reason or (reason := found.whole.undefined.get(TRUST_SPEARMAN.name)):
            return f"Agreement with exact retraining cannot be told: {reason}."
        else:
            return "How far this can be trusted was not checked: ask for trust=24, or ground_truth=all."
    over = f" over all {total} samples" if count >= total else ""
    by_window = [metrics for metrics in found.per_window if key in metrics.values]
    told = []
    if by_window and (len(found.per_window) > 1 or key not in found.whole.values):
        told.append(_agreement(by_window, key, over, " in the windows" if len(found.per_window) > 1 else ""))
    if key in found.whole.values:
        told.append(_agreement([found.whole], key, over, " over the whole run" if told else ""))
    agreement = f"agreement with exact retraining is {', and '.join(told)}."
    return _capitalised(agreement) if over else f"As far as {count} random samples tell, {agreement}"


def _kinks(found: Explanation) -> str:
    """A warning where opposite draws of sample weights disagree, and retrainings do not make up for it."""
    foretold = found.scores.metadata.get("bank", {})
    orders = {window: foretold[str(window)][0]["order"] or 0 for window in kinked(found.scores) if foretold}
    windows = [window for window in kinked(found.scores) if orders.get(window, 0) < FORETOLD]
    if not windows:
        return ""
    every = len(windows) == len(found.scores.windows)
    where = "" if every else f" over steps {', '.join(map(str, windows))}"
    return (
        f" Training is too kinked{where} to foretell removals well: its derivatives at opposite random weights of the "
        "samples are unlike. Long windows fail first; ask for shorter local ones."
    )


def _how_sure_of_removals(found: Explanation) -> str:
    """Rank and size of removals, foretold and real."""
    removed = found.influence.removed
    assert removed is not None
    rank, size = REMOVAL_LDS.name, REMOVAL_SLOPE.name
    by_window = [metrics for metrics in found.per_window if rank in metrics.values]
    groups = [(by_window, " in the windows" if len(found.per_window) > 1 else "")] if by_window else []
    if rank in found.whole.values and (len(found.per_window) > 1 or not by_window):
        groups.append(([found.whole], " over the whole run" if groups else ""))
    if not groups:
        return f"Retrainings without {share(removed)} of the samples all end the same: removal changes nothing."
    told = []
    for metrics, where in groups:
        slopes = [values.values[size] for values in metrics]
        told.append(
            f"{_agreement(metrics, rank, '', where)}, real changes being {span(min(slopes), max(slopes))} times the "
            "foretold ones"
        )
    return (
        f"Held against retrainings without a random {share(removed)} of the samples, agreement of foretold and real "
        f"changes is {', and '.join(told)}."
    )


def _agreement(metrics: Sequence[Metrics], key: str, over: str, where: str) -> str:
    """``high in the windows (Spearman 0.72 to 0.88 over …)``; if not over all samples, with an interval.

    The words are for the estimated correlations; if an interval reaches into a lower word, that word is added.
    """
    points = [found.values[key] for found in metrics]
    figures = f"{SPEARMAN.heading} {span(min(points), max(points))}"
    if over:
        return f"{_words(min(points), max(points))}{where} ({figures}{over})"
    if any(key + LOW not in found.values for found in metrics):
        return f"{_words(min(points), max(points))}{where} ({figures}, too few samples for an interval)"
    low = min(found.values[key + LOW] for found in metrics)
    high = max(found.values[key + HIGH] for found in metrics)
    words = _words(*_judged(metrics, key))
    interval = f"95 % interval{'s' * (len(metrics) > 1)} {span(low, high)}"
    doubt = "" if (least := agreement_word(low)) == agreement_word(min(points)) else f", so it may be {least}"
    return f"{words}{where} ({figures}, {interval}{doubt})"


def _judged(metrics: Sequence[Metrics], key: str) -> tuple[float, float]:
    """Least and largest agreement, for the words: at most moderate where the size of the changes is not right."""
    moderate = 0.69
    capped = [
        found.values[key]
        if SIZE_RIGHT[0] <= found.values.get(REMOVAL_SLOPE.name, 1.0) <= SIZE_RIGHT[1]
        else min(found.values[key], moderate)
        for found in metrics
    ]
    return min(capped), max(capped)


def _words(low: float, high: float) -> str:
    first, last = agreement_word(low), agreement_word(high)
    return first if first == last else f"{first} to {last}"


def _what_kind(found: Explanation) -> str:
    parts = [part for part in (_damaged(found), _pattern(found)) if part]
    if not parts:
        return "No training sample is known to be damaged, and one window alone does not tell when samples matter."
    return _capitalised("; ".join(parts)) + "."


def _damaged(found: Explanation) -> str | None:
    key, k = RECALL_AT_K.name, len(found.gallery.corrupted)
    if key not in found.whole.values or not k:
        return None
    recall, chance = found.whole.values[key], found.whole.values[RECALL_AT_K.chance]
    by_window = [metrics.values.get(key, -1.0) for metrics in found.per_window]
    best = int(np.argmax(by_window))
    where = f"steps {found.influence.windows[best]}" if by_window[best] > recall else ""
    expected = chance * k
    # Detection figures are of the estimate, while the sentence on samples prefers exact scores.
    estimated = "" if found.ranking is found.whole_run else " by the estimate"
    by_chance = f"(by chance {decimals(expected, 1) if expected >= 0.05 else figure(expected, 1)})"
    if k == 1:
        is_ = "is" if recall == 1 else "is not" if recall == 0 else "ties with others as"
        text = f"the one damaged sample {is_} the most harmful of the whole run{estimated}"
        return f"{text}{f', but is that of {where}' if where and by_window[best] == 1 else ''} {by_chance}"
    hits = _hits(recall, k)
    text = (
        f"of {k} damaged samples, {hits} {'is' if hits == '1' else 'are'} among the {k} most harmful of the whole run"
        f"{estimated}"
    )
    if where:
        text += f", {_hits(by_window[best], k)} among those of {where}"
    return f"{text} {by_chance}"


def _hits(recall: float, k: int) -> str:
    """Samples found; with a decimal where ties at the cut make the expected number a fraction."""
    hits = recall * k
    return f"{hits:.0f}" if abs(hits - round(hits)) < 0.05 else f"{hits:.1f}"


def _pattern(found: Explanation) -> str | None:
    if len(found.influence.windows) < 2:
        return None
    counts = Counter(name for name in patterns(found.influence).tolist() if name in PATTERNS)
    if not counts:
        return None
    ((name, count),) = counts.most_common(1)
    total = len(found.influence.samples)
    many = count > total / 2
    who = "most samples" if 3 * count >= 2 * total else "more than half of the samples" if many else "the largest group"
    return f"{who} ({count} of {total}) {'are' if many else 'is'} {name}: {MEANING[name]}"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
