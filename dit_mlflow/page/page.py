"""The page of an influence run: one file that shows which samples mattered, and when."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from dit_mlflow.evaluation import Metrics
from dit_mlflow.explanation.explanation import Explanation
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.markdown import one_line
from dit_mlflow.explanation.numbers import figure, share
from dit_mlflow.explanation.ranking import extremes
from dit_mlflow.influence import Influence, Window
from dit_mlflow.influence.query import is_loss
from dit_mlflow.page.columns import Columns
from dit_mlflow.page.embedding import json_in_html
from dit_mlflow.page.page_data import cut_in_tie, flag_count, page_data, readable

SCRIPTS = ("data.js", "chart.js", "charts.js", "detail.js", "table.js", "page.js")
"""Joined into one script, in this order: later ones use earlier ones."""

COUNTERFACTUALS = {
    "local": "were left out of one window of training, measured at the end of that window",
    "final": "were left out of one window of training, measured at the end of training",
    "cumulative": "were left out from the start of training, measured as the change over a window",
}

CAUTION = '\n<span class="quiet">Helpful and harmful as for a loss, which should be low.</span>'

UNKNOWN = "How far this can be trusted is not known: no sample was left out exactly."

ALL_SCORES = "to_frame() and to_csv() of the explanation have them all"

SENTENCES = 20
"""Most sentences of the answer."""

FALLBACK_ROWS = 5
"""Samples on each side in the table for readers without scripts."""


def influence_page(
    estimate: Influence,
    truth: Influence | None = None,
    gallery: Gallery | None = None,
    windows: Sequence[Window] | None = None,
    metrics: Mapping[Window, Metrics] | None = None,
    training: str = "",
    sentences: Sequence[str] = (),
    next_steps: Sequence[tuple[str, str]] = (),
    rest: str = ALL_SCORES,
) -> str:
    """One HTML page, complete in itself, for the scores of an influence run.

    It shows the answer in words, influence over the windows, and a table of all samples to sort and filter, with each
    sample's picture, text or table row. It needs no network, no storage and no server; its scripts run in a sandboxed
    frame. Without scripts, the words and a short table remain. Data reaches the page as JSON and as text nodes only,
    and a content security policy lets no other script run and nothing be loaded.

    Everything on it is of one ranking: where an exact score is known and answers the same question, it stands in the
    place of the estimate, in answer, table, flags and chart. Exact scores of one sample do not replace those of
    removals of many; they stand beside them.

    Args:
        estimate: scores. The whole run ``[0, T)``, if it is among the windows, ranks and flags the samples; else the
            mean over the windows does.
        truth: exact scores to show beside them, for some or all windows and samples.
        gallery: labels, pictures, and which samples are damaged.
        windows: those to show; default: all of the estimate's.
        metrics: by window, with names as on the runs (``ground_truth/spearman``, ``trust/…``, ``detection/…``).
        training: a few words that name what was trained.
        sentences: the answer, as plain text; default: sentences on the metrics of the whole run.
        next_steps: what can be done now: for each, what it tells and the command.
        rest: where the scores are that have no room on the page.

    The page takes less than 5 MB, whatever it is given: the samples that come nearest to the ends of any column, 10,000
    at the most, 2,500 where they are images, each then with its picture; histograms of the others; of 500 windows or
    less, each; queries as far as there is room; texts, descriptions and labels cut so that all have room. It says what
    is left out. 256 digits make a page of about 0.2 MB.
    """
    shown = tuple(estimate.windows if windows is None else windows)
    columns = Columns.of(estimate, truth, shown)
    gallery = gallery or Gallery()
    data = page_data(estimate, columns, gallery, metrics or {})
    told = (sentences or data["columns"][0]["trust"] or [UNKNOWN])[:SENTENCES]
    script = "\n".join(_asset(name) for name in SCRIPTS)
    question = _question(estimate, columns, training)
    return Template(_asset("report.html")).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=_asset("report.css"),
        script=script,
        data=json_in_html(data),
        question=_text(question),
        query=_text(_named(estimate.queries[0]) if len(estimate.queries) == 1 else "the query"),
        caution="" if all(map(is_loss, estimate.queries)) else CAUTION,
        sentences="".join(f"<li>{_text(sentence)}</li>" for sentence in told),
        steps=_steps(next_steps),
        left_out=_left_out(data, columns, rest),
        exact=_text(_exact_rule(data)),
        flagged=_text(_flag_rule(columns, data)),
        rows=_rows(columns, estimate.samples, gallery),
    )


def explanation_page(found: Explanation, next_steps: Sequence[tuple[str, str]] = (), rest: str = ALL_SCORES) -> str:
    """:func:`influence_page` of an explanation."""
    return influence_page(
        found.scores,
        found.exact,
        found.gallery,
        found.windows,
        found.measured,
        found.title,
        found.sentences,
        next_steps,
        rest,
    )


def _steps(steps: Sequence[tuple[str, str]]) -> str:
    """The section of what to do now; nothing where there is nothing to do."""
    if not steps:
        return ""
    # A word to an element, so that no line ends within one.
    items = "".join(
        f'<li>{_text(what)} <span class="step"><code>'
        f"{' '.join(f'<span>{_text(word)}</span>' for word in command.split(' '))}</code>"
        f'<button type="button" class="copy" aria-label="Copy: {_text(what)}" hidden>Copy</button></span></li>'
        for what, command in steps
    )
    return (
        '<section aria-labelledby="next-heading" class="steps"><h2 id="next-heading">What to do now</h2>'
        f'<ul>{items}</ul><p class="quiet" id="copied" role="status"></p></section>'
    )


def _left_out(data: Mapping[str, Any], columns: Columns, rest: str) -> str:
    """What the page has no room for, and where it is; nothing where all is there."""
    total, kept, left_out = data["total"], len(data["samples"]), data["left_out"]
    told = []
    if kept < total:
        told.append(f"{kept:,} of {total:,} samples, those nearest to the ends of any column")
    if left_out["windows"]:
        told.append(f"{len(columns.windows):,} of {len(columns.windows) + left_out['windows']:,} windows")
    if left_out["queries"]:
        told.append(f"{len(data['queries']):,} of {len(data['queries']) + left_out['queries']:,} queries")
    if not told:
        return ""
    return f'<p class="left-out">This page has room for {"; ".join(told)}. {_text(rest)}.</p>'


def _exact_rule(data: Mapping[str, Any]) -> str:
    if data["known"] is None:
        return ""
    if data["exact_ranks"]:
        return (
            "◇: exact, by training again without the sample; it stands in the place of the estimate everywhere on this "
            "page but for patterns, which are of estimates."
        )
    if data["removed"] is not None:
        return (
            "Alone, exact: what training again without this one sample does; the influence is what its removal does "
            f"among {share(data['removed'])} of the samples, and ranks. The two may differ in sign."
        )
    return (
        "Exact: by training again without the sample; scores of this method are in other units, and rank as they are."
    )


def _question(estimate: Influence, columns: Columns, training: str) -> str:
    several = len(estimate.queries)
    query = _named(estimate.queries[0]) if several == 1 else f"each of {several} queries"
    change = COUNTERFACTUALS.get(estimate.kind)
    others = "" if estimate.removed is None else f", among {share(estimate.removed)} of the samples"
    asked = f"How would {query} change if a training sample {change}{others}?"
    if change is None:
        asked = f"Which training samples stand out by {query}?"
    kind = f" (kind {estimate.kind})" if change else ""
    count = len(columns.windows)
    spans = "1 window" if count < 2 else f"{count} windows"
    steps = f"{spans} of training steps {columns.whole.start}–{columns.whole.end}"
    of = f" of {training}" if training else ""
    return f"{asked} Estimated by {estimate.method}{kind} for {len(estimate.samples):,} samples in {steps}{of}."


def _named(query: str) -> str:
    return f"the {readable(query)}" if query.isidentifier() else query


def _flag_rule(columns: Columns, data: Mapping[str, Any]) -> str:
    damaged = data["damaged_total"]
    k = flag_count(data["total"], damaged)
    why = "as many as are known to be damaged" if damaged else "10 % of the samples"
    order = "; of equal scores, those of lower index" if cut_in_tie(columns.ranked[0, 0], k) else ""
    unclear = ""
    if columns.unclear.any():
        unclear = " Unclear: the score’s 95 % interval contains 0; answer and chart pass over it."
    return f"Flagged: among the {k:,} lowest scores ({why}) by {columns.names[0]}, and negative{order}.{unclear}"


def _rows(columns: Columns, samples: np.ndarray, gallery: Gallery) -> str:
    """Rows for readers without scripts: the most harmful samples and the most helpful ones."""
    harmful, helpful = extremes(columns.clear(0), FALLBACK_ROWS)
    cells = (
        (str(samples[at]), gallery.label_of(int(samples[at])) or "–", figure(columns.ranked[0, 0, at], 3))
        for at in [*harmful, *helpful[::-1]]
    )
    return "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in cells)


def _text(text: str) -> str:
    """``text`` escaped for HTML, on one line, without characters that change its direction."""
    return html.escape(one_line(text, 2000))


def _asset(name: str) -> str:
    return (files("dit_mlflow.page") / "assets" / name).read_text(encoding="utf-8")
