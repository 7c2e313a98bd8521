"""The note of a comparison: how near methods are to two kinds of retraining, why they differ, and which detect."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

import pandas as pd

from dit_mlflow.evaluation.figures import AUROC, BY_WINDOW, CHANCE, HIGH, LDS, LOW, RECALL_AT_K, SPEARMAN, Figure
from dit_mlflow.explanation.markdown import GAP, escaped, markdown_table
from dit_mlflow.explanation.numbers import cell, decimals
from dit_mlflow.explanation.numbers import figure as number
from dit_mlflow.explanation.over_seeds import COMPARED, SECONDS

TESTS = {
    SPEARMAN: f"without one sample (exact leave-one-out, {SPEARMAN.heading})",
    LDS: f"without a random share of the samples ({LDS.heading})",
}
"""The two tests of a comparison: the figure of each, and when it holds."""

QUESTIONS = {
    "one": "the removal of one sample",
    "many": "the removal of many samples at once",
    "suspicion": "which samples are suspicious, whatever the query",
}
"""What a method's scores are made to tell."""

NEAREST, NAMED = 3, 4
"""Methods named for each test, and for each question."""

FAR = 0.3
"""A method is told to be near in one test alone where the two figures differ by at least this."""

EXACT = "leave_one_out"

TIE = 0.005
"""Figures closer than this are called equal: with two digits they read nearly the same."""

CEILING = 0.995
"""Where leave-one-out in the recorded precision agrees with the truth at least this well, nothing is said of it."""


def comparison_sentences(
    table: pd.DataFrame, retraining: Collection[str], attainable: float | None = None
) -> tuple[str, ...]:
    """The table in plain text: how near methods are in two tests, why they differ, the cost, which detects best.

    Args:
        table: a row per method with the columns ``method``, ``failed``, and, where known, ``question`` (of
            :data:`QUESTIONS`), ``spearman`` (``_low``, ``_high``), ``lds``, ``recall_at_k`` (``_chance``), ``auroc``
            and ``seconds``.
        retraining: names of the methods that retrain without samples, as exact leave-one-out does.
        attainable: correlation of leave-one-out in the recorded precision with the truth.
    """
    worked = table[~table["failed"].astype(bool)]
    fidelity = _fidelity(worked, retraining, attainable)
    return tuple(filter(None, (fidelity, _why(worked), _cost(worked), _detection(worked), _failed(table))))


def comparison_note(
    table: pd.DataFrame,
    retraining: Collection[str],
    trainings: int,
    kind: str,
    query: str = "mean validation loss",
    attainable: float | None = None,
) -> str:
    """Markdown for the run: the sentences, what was compared, and the table."""
    sentences = " ".join(escaped(text, 900) for text in comparison_sentences(table, retraining, attainable))
    over = "one training" if trainings == 1 else f"{trainings} trainings with other seeds (figures are means)"
    known = [of for column, of in COMPARED.items() if _known(table, column)]
    legend = f" {'; '.join(f'{escaped(of.heading)}: {of.sentence}' for of in known)}." if known else ""
    counted = f"{len(table)} methods that say" if len(table) > 1 else "1 method that says"
    compared = (
        f"**Compared:** {counted} how {escaped(query)} would change without each training sample, "
        f"on {over}, for all steps; kind `{kind}`.{legend} Each method is a child run; windows are the steps of its "
        f"charts `{BY_WINDOW}…`."
    )
    return "\n\n".join(part for part in (sentences, compared, _table(table)) if part)


def _fidelity(worked: pd.DataFrame, retraining: Collection[str], attainable: float | None) -> str:
    """Which methods come nearest in each of the two tests; exact leave-one-out is the truth of the first."""
    judged = worked[worked["method"] != EXACT]
    tests = [(figure, asked) for figure, asked in TESTS.items() if _known(judged, figure.leaf)]
    if not tests:
        return "Agreement with exact retraining was not measured."
    told = []
    for figure, asked in tests:
        best = _best_first(judged.dropna(subset=[figure.leaf]), figure).head(NEAREST)
        names = _listed([_judged(row, figure, retraining) for row in best.to_dict("records")])
        told.append(f"{asked}, nearest come{'s' * (len(best) == 1)} {names}")
    text = _capitalised("; ".join(told))
    if attainable is not None and attainable < CEILING and tests[0][0] is SPEARMAN:
        text += f"; rounding lets no method get beyond {decimals(attainable)} in the first"
    if len(tests) == 1:
        other = next(asked for figure, asked in TESTS.items() if figure is not tests[0][0])
        return f"{text}. What holds {other}, was not measured: one figure alone says not which method is right."
    return f"{text}. {_apart(judged)}".strip()


def _judged(row: Mapping[Hashable, Any], figure: Figure, retraining: Collection[str]) -> str:
    """A method with its figure and its cost."""
    seconds = row.get(SECONDS)
    costs = ["retrains"] if row["method"] in retraining else []
    if seconds is not None and not pd.isna(seconds):
        costs.append(f"{number(seconds)} s")
    return f"{row['method']} {decimals(row[figure.leaf])}" + (f" ({', '.join(costs)})" if costs else "")


def _apart(judged: pd.DataFrame) -> str:
    """The method that is best in one test and loses most in the other, if it loses much."""
    both = judged.dropna(subset=[SPEARMAN.leaf, LDS.leaf])
    losses: list[tuple[float, str, Mapping[Hashable, Any]]] = []
    for first, second in ((SPEARMAN, LDS), (LDS, SPEARMAN)):
        for row in _best_first(both, first).head(NEAREST).to_dict("records"):
            losses.append((row[first.leaf] - row[second.leaf], str(row["method"]), row))
    lost, name, row = max(losses, key=lambda found: found[0], default=(0.0, "", {}))
    if lost < FAR:
        return ""
    return (
        f"To be near in one is not to be near in the other: {name} has {SPEARMAN.heading} "
        f"{decimals(row[SPEARMAN.leaf])} and {LDS.heading} {decimals(row[LDS.leaf])}."
    )


def _why(worked: pd.DataFrame) -> str:
    """The question that each method answers, which is why they differ."""
    if "question" not in worked:
        return ""
    told = []
    for question, asked in QUESTIONS.items():
        names = list(worked.loc[worked["question"] == question, "method"])
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            told.append(f"{asked} ({', '.join(names[:NAMED])}{more})")
    return f"They answer different questions: {'; '.join(told)}." if len(told) > 1 else ""


def _cost(worked: pd.DataFrame) -> str:
    exact = worked[worked["method"] == EXACT]
    if not len(exact) or not _known(exact, SECONDS):
        return ""
    return f"Exact leave-one-out took {number(exact[SECONDS].iloc[0])} s."


def _detection(worked: pd.DataFrame) -> str:
    if not _known(worked, RECALL_AT_K.leaf):
        return ""
    known = _best_first(worked.dropna(subset=[RECALL_AT_K.leaf]), RECALL_AT_K, AUROC)
    best = _equally_good(known, RECALL_AT_K)
    names, top = list(best["method"]), best.iloc[0]
    by_chance = RECALL_AT_K.leaf + CHANCE
    chance = f" (by chance {cell(RECALL_AT_K, top[by_chance])})" if by_chance in best else ""
    return (
        f"{_listed(names)} find{'s' if len(names) == 1 else ''} damaged samples best: of as many lowest scores as "
        f"samples are damaged, {cell(RECALL_AT_K, top[RECALL_AT_K.leaf])} are{chance}."
    )


def _failed(table: pd.DataFrame) -> str:
    names = list(table.loc[table["failed"].astype(bool), "method"])
    told = [f"Failed, with the reason in the table comparison.json: {', '.join(names)}."] if names else []
    if "asked" in table:
        in_part = table[~table["failed"].astype(bool) & (table["trainings"] < table["asked"])]
        told += [
            f"{row['method']} worked on {row['trainings']} of {row['asked']} trainings, whose figures alone are told."
            for row in in_part.to_dict("records")
        ]
    return " ".join(told)


def _table(table: pd.DataFrame) -> str:
    columns = {column: of for column, of in COMPARED.items() if _known(table, column)}
    if not columns:
        return ""
    agreed = SPEARMAN.leaf in columns
    ordered = _best_first(table, SPEARMAN) if agreed else table
    rows = []
    for row in ordered.to_dict("records"):
        if row["failed"]:
            reason = escaped(str(row.get("error", "")), 80)
            cells = [f"failed: {reason}", *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(of, row.get(column)) for column, of in columns.items()]
            if agreed:
                cells[0] += _bounds(pd.Series(row))
        part = row["trainings"] < row["asked"] if "asked" in row and not row["failed"] else False
        name = f"{row['method']} ({row['trainings']} of {row['asked']} trainings)" if part else str(row["method"])
        rows.append([escaped(name), *cells])
    headings = [escaped(of.heading) + " (95 % interval)" * (of is SPEARMAN) for of in columns.values()]
    return markdown_table(["method", *headings], rows, GAP)


def _cell(of: Figure, value: object) -> str:
    return escaped(cell(of, value)) if isinstance(value, float) and not pd.isna(value) else "–"


def _best_first(table: pd.DataFrame, *figures: Figure) -> pd.DataFrame:
    """Sorted by the first of ``figures``, ties by the next; rows that are equal in all keep their order."""
    known = [of for of in figures if of.leaf in table]
    by, ascending = [of.leaf for of in known], [not of.higher_is_better for of in known]
    return table.sort_values(by, ascending=ascending, kind="stable")


def _equally_good(ordered: pd.DataFrame, of: Figure) -> pd.DataFrame:
    """The first row, and those that are worse by less than :data:`TIE`."""
    return ordered[(ordered[of.leaf] - ordered[of.leaf].iloc[0]).abs() < TIE]


def _bounds(row: pd.Series) -> str:
    low, high = row.get(SPEARMAN.leaf + LOW), row.get(SPEARMAN.leaf + HIGH)
    return "" if low is None or pd.isna(low) or pd.isna(high) else f" ({decimals(low)} to {decimals(high)})"


def _known(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(table[name].notna().any())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
