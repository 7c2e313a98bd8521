"""The notes of influence runs and of their windows: Markdown, shown at the top of a run's page in MLflow's UI.

The UI shows about four lines until the reader asks for more, so the answer comes first. It breaks lines where the text
does, and puts no space between the columns of a table, nor below one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dit_mlflow.evaluation.figures import BY_WINDOW, FIDELITY, RECALL_AT_K
from dit_mlflow.explanation.explanation import Explanation
from dit_mlflow.explanation.markdown import GAP, NOTE_CHARACTERS, escaped, markdown_table
from dit_mlflow.explanation.numbers import cell, share
from dit_mlflow.explanation.ranking import window_extremes
from dit_mlflow.explanation.sentences import answer_sentences, window_sentences

WINDOWS_LISTED = 20
"""Most windows in the table; of more, every n-th."""

SENTENCE = 600
"""Most characters of a sentence that names samples."""

KINDS = {
    "local": "the sample is absent from the steps of the window, and the effect is measured at the window's end",
    "final": "the sample is absent from the steps of the window, and the effect is measured at the end of training",
    "cumulative": "the sample is absent from all steps up to the window's end, and the effect is the change over the "
    "window",
}
"""What a window's score means, by kind."""

WHERE = (
    ("report.html", "every sample to sort, filter and look at"),
    ("influence_over_windows.png", "the samples that mattered most, with their pictures"),
    ("heat_map.png", "the samples that matter most in each window"),
    ("patterns.png", "early, late, stable and fluctuating samples"),
    ("window_correlations.png", "whether the same samples matter early and late"),
    ("against_leave_one_out.png", "the estimates against exact retraining"),
    ("recall_curve.png", "how fast the damaged samples are found"),
    ("whole_run.json", "the most harmful and most helpful samples of the whole run, as a table"),
    ("top_samples.json", "the most harmful and most helpful samples of each window, as a table"),
    ("windows.json", "all figures of each window, as a table"),
)
"""Artifacts below ``influence/`` and what they show, the most useful first."""


@dataclass(frozen=True)
class Links:
    """Pages of the UI that a note links to, as Markdown targets; without a target, the name stands alone.

    Attributes:
        training: name and target of the training run.
        windows: target of each window's run.
        artifacts: target by artifact name.
        charts: target of the run's metrics.
        compare: target of each comparing view, by what it compares.
    """

    training: tuple[str, str] = ("", "")
    windows: Sequence[str] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    charts: str = ""
    compare: Mapping[str, str] = field(default_factory=dict)


def influence_note(found: Explanation, links: Links) -> str:
    """The three sentences, the question, a table of the windows, and where to look next."""
    name, target = links.training
    count = len(found.influence.windows)
    sentences = " ".join(escaped(sentence, SENTENCE) for sentence in answer_sentences(found))
    removed = found.influence.removed
    others = "" if removed is None else f" among {share(removed)} of the samples"
    asked = (
        f"**Asked:** how {escaped(found.query)} changes if a training sample is removed{others}, "
        f"in {count} window{'s' * (count > 1)} of the training run {_link(name, target)}. "
        f"Kind `{found.influence.kind}`: {KINDS.get(found.influence.kind, 'one score for the whole run')}. "
        "Removing sets the weight of the sample's loss to 0. Positive = helpful (removal raises it), negative = "
        "harmful."
    )
    parts = [sentences, asked, _windows(found, links), _next(links)]
    while len("\n\n".join(parts)) > NOTE_CHARACTERS and parts[2]:
        # Descriptions may be long; the whole table is an artifact.
        parts[2] = parts[2].rpartition("\n")[0] if "\n" in parts[2] else ""
    return "\n\n".join(part for part in parts if part)[:NOTE_CHARACTERS]


def window_note(found: Explanation, position: int, parent: tuple[str, str]) -> str:
    """Two sentences on one window, and where to find its pictures.

    Args:
        found: the explanation of the whole influence run.
        position: of the window.
        parent: name and target of the influence run.
    """
    sentences = " ".join(escaped(sentence, SENTENCE) for sentence in window_sentences(found, position))
    kind = KINDS.get(found.influence.kind)
    meaning = f" (`{found.influence.kind}`: {kind})" if kind else ""
    more = (
        f"Pictures of its samples are in the artifact `top_samples.png`. One window of {_link(*parent)}{meaning}; "
        "positive = helpful, negative = harmful."
    )
    return f"{sentences}\n\n{more}"


def _windows(found: Explanation, links: Links) -> str:
    influence, gallery = found.influence, found.gallery
    shown = [
        figures
        for figures in (FIDELITY, (RECALL_AT_K,))
        if any(figure.name in metrics.values for metrics in found.per_window for figure in figures)
    ]
    extremes = window_extremes(influence)
    rows = []
    every = -(-len(influence.windows) // WINDOWS_LISTED)
    for position in range(0, len(influence.windows), every):
        row = [_link(str(influence.windows[position]), links.windows[position] if links.windows else "")]
        for index in extremes[position]:
            row.append("none" if index is None else f"{index} {escaped(gallery.line(index), 50)}".strip())
        values = found.per_window[position].values
        for figures in shown:
            told = (cell(figure, values[figure.name]) for figure in figures if figure.name in values)
            row.append(next(told, "undefined"))
        rows.append(row)
    known = {name for metrics in found.per_window for name in metrics.values}
    headings = [escaped(next(f.heading for f in figures if f.name in known)) for figures in shown]
    steps = "steps" if every == 1 else f"steps (1 of {every} windows)"
    return markdown_table([steps, "most harmful", "most helpful", *headings], rows, GAP)


def _next(links: Links) -> str:
    lines = [f"- {compare_line(links.compare)}"] if links.compare else []
    known = [(name, what) for name, what in WHERE if name in links.artifacts]
    lines += [f"- {_link(f'influence/{name}', links.artifacts[name])}: {what}" for name, what in known]
    if links.charts:
        lines.append(f"- {_link('Model metrics', links.charts)}: the charts `{BY_WINDOW}…`")
    if links.windows:
        lines.append("- each window is a child run; its link is in the table")
    return "\n".join(["<br>**Where to look next**", "", *lines]) if lines else ""


def compare_line(targets: Mapping[str, str]) -> str:
    """One line of links to the comparing views: ``targets`` by what they compare."""
    return f"Compare in charts: {', '.join(_link(name, target) for name, target in targets.items())}"


def _link(name: str, target: str) -> str:
    return f"[{escaped(name)}]({target})" if target else escaped(name)
