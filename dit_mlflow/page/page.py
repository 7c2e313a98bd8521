"""The page of an influence run: one file that shows which samples mattered, and when."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from dit_mlflow.evaluation import Metrics
from dit_mlflow.explanation.explanation import Explanation
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.markdown import TURNING, encodable
from dit_mlflow.explanation.numbers import figure, share
from dit_mlflow.explanation.ranking import extremes
from dit_mlflow.influence import Influence, Window
from dit_mlflow.page.page_data import Columns, cut_in_tie, flag_count, json_in_html, page_data, readable

SCRIPTS = ("data.js", "chart.js", "charts.js", "detail.js", "table.js", "page.js")
"""Joined into one script, in this order: later ones use earlier ones."""

COUNTERFACTUALS = {
    "local": "were left out of one window of training, measured at the end of that window",
    "final": "were left out of one window of training, measured at the end of training",
    "cumulative": "were left out from the start of training, measured as the change over a window",
}

CAUTION = '\n<span class="quiet">Helpful and harmful as for a loss, which should be low.</span>'

UNKNOWN = "How far this can be trusted is not known: no sample was left out exactly."

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
) -> str:
    """One HTML page, complete in itself, for the scores of an influence run.

    It shows the answer in words, influence over the windows, and a table of all samples to sort and filter, with each
    sample's picture, text or table row. It needs no network, no storage and no server; its scripts run in a sandboxed
    frame. Without scripts, the words and a short table remain. Data reaches the page as JSON and as text nodes only,
    and a content security policy lets no other script run and nothing be loaded.

    Args:
        estimate: scores. The whole run ``[0, T)``, if it is among the windows, ranks and flags the samples; else the
            mean over the windows does.
        truth: exact scores to show beside them, for some or all windows and samples.
        gallery: labels, pictures, and which samples are damaged.
        windows: those to show; default: all of the estimate's.
        metrics: by window, with names as on the runs (``ground_truth/spearman``, ``trust/…``, ``detection/…``).
        training: a few words that name what was trained.
        sentences: the answer, as plain text; default: sentences on the metrics of the whole run.

    Scores are embedded as float32: those of the first query always, those of others as far as all fit into 2.5 MB; the
    page says what is left out. Pictures (of at most 600 samples, the most extreme of each window first) take up to
    1.6 MB, texts or table rows up to 1.5 million characters, labels and descriptions up to 0.6 million each: 10,000
    samples with exact scores over 21 windows make a page of less than 5 MB, 256 digits one of about 0.2 MB.
    """
    shown = tuple(estimate.windows if windows is None else windows)
    columns = Columns.of(estimate, truth, shown)
    data = page_data(estimate, columns, gallery or Gallery(), metrics or {})
    told = sentences or data["columns"][0]["trust"] or [UNKNOWN]
    script = "\n".join(_asset(name) for name in SCRIPTS)
    question = _question(estimate, columns, training)
    return Template(_asset("report.html")).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=_asset("report.css"),
        script=script,
        data=json_in_html(data),
        question=_text(question),
        query=_text(_named(estimate.queries[0]) if len(estimate.queries) == 1 else "the query"),
        caution="" if all("loss" in query for query in estimate.queries) else CAUTION,
        sentences="".join(f"<li>{_text(sentence)}</li>" for sentence in told),
        flagged=_text(_flag_rule(columns, data)),
        rows=_rows(columns, data),
    )


def explanation_page(found: Explanation) -> str:
    """:func:`influence_page` of an explanation."""
    return influence_page(
        found.scores, found.exact, found.gallery, found.windows, found.measured, found.title, found.sentences
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
    damaged = len(data["damaged"] or ())
    k = flag_count(len(data["samples"]), damaged)
    why = "as many as are known to be damaged" if damaged else "10 % of the samples"
    order = "; of equal scores, those of lower index" if cut_in_tie(columns.estimate[0, 0], k) else ""
    return f"Flagged: among the {k:,} lowest scores ({why}) by {columns.names[0]}, and negative{order}."


def _rows(columns: Columns, data: Mapping[str, Any]) -> str:
    """Rows for readers without scripts: the most harmful samples and the most helpful ones."""
    scores = columns.estimate[0, 0]
    harmful, helpful = extremes(scores, FALLBACK_ROWS)
    labels, codes = data["labels"], data["label"]
    cells = (
        (str(data["samples"][at]), labels[codes[at]] if labels and codes[at] >= 0 else "–", figure(scores[at], 3))
        for at in [*harmful, *helpful[::-1]]
    )
    return "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in cells)


def _text(text: str) -> str:
    """``text`` escaped for HTML, without characters that change its direction."""
    return html.escape(TURNING.sub("", encodable(text, 2000)))


def _asset(name: str) -> str:
    return (files("dit_mlflow.page") / "assets" / name).read_text(encoding="utf-8")
