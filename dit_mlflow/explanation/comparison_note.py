"""The note of a comparison: which method agrees best, at what cost, and which finds damaged samples."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from dit_mlflow.evaluation.figures import AUROC, BY_WINDOW, CHANCE, HIGH, LOW, RECALL_AT_K, SPEARMAN, Figure
from dit_mlflow.explanation.markdown import GAP, escaped, markdown_table
from dit_mlflow.explanation.numbers import cell, decimals, figure
from dit_mlflow.explanation.over_seeds import COMPARED, SECONDS

TIE = 0.005
"""Figures closer than this are called equal: with two digits they read nearly the same."""

CEILING = 0.995
"""Where leave-one-out in the recorded precision agrees with the truth at least this well, nothing is said of it."""


def comparison_sentences(
    table: pd.DataFrame, retraining: Collection[str], attainable: float | None = None
) -> tuple[str, ...]:
    """The table in plain text: which method agrees best with exact leave-one-out, at what cost, and which detects best.

    Args:
        table: a row per method with the columns ``method``, ``failed``, and, where known, ``spearman`` (``_low``,
            ``_high``), ``recall_at_k`` (``_chance``), ``auroc`` and ``seconds``.
        retraining: names of the methods that retrain without samples, as exact leave-one-out does.
        attainable: correlation of leave-one-out in the recorded precision with the truth.
    """
    worked = table[~table["failed"].astype(bool)]
    fidelity = _fidelity(worked, retraining, attainable)
    return tuple(filter(None, (fidelity, _cost(worked, retraining), _detection(worked), _failed(table))))


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
    if not _known(worked, SPEARMAN.leaf):
        return "Agreement with exact leave-one-out was not measured."
    known = worked.dropna(subset=[SPEARMAN.leaf])
    cheap = _best_first(known[~known["method"].isin(list(retraining))], SPEARMAN)
    if cheap.empty:
        return "All methods compared retrain; their agreement with exact leave-one-out is in the table."
    best = _equally_good(cheap, SPEARMAN)
    names, top = list(best["method"]), best.iloc[0]
    alone, interval = len(names) == 1, _bounds(top).replace("(", "(95 % interval ")
    text = (
        f"{_listed(names)} agree{'s' if alone else ''} best with exact leave-one-out among the methods that do not "
        f"retrain: {SPEARMAN.heading} {decimals(top[SPEARMAN.leaf])}{interval}"
    )
    rest = cheap[~cheap["method"].isin(names)]
    if len(rest):
        text += f"; next is {rest['method'].iloc[0]} ({decimals(rest[SPEARMAN.leaf].iloc[0])})"
    if attainable is not None and attainable < CEILING:
        text += f"; rounding lets nothing get beyond {decimals(attainable)}"
    return text + "."


def _cost(worked: pd.DataFrame, retraining: Collection[str]) -> str:
    if not (_known(worked, SPEARMAN.leaf) and _known(worked, SECONDS)):
        return ""
    known = worked.dropna(subset=[SPEARMAN.leaf, SECONDS])
    cheap = _best_first(known[~known["method"].isin(list(retraining))], SPEARMAN)
    if cheap.empty:
        return ""
    best = cheap.iloc[0]
    text = f"{best['method']} took {figure(best[SECONDS])} s"
    exact = worked[worked["method"] == "leave_one_out"]
    if len(exact) and best[SECONDS] > 0:
        seconds = float(exact[SECONDS].iloc[0])
        text += f", exact leave-one-out {figure(seconds)} s ({figure(seconds / best[SECONDS])} times as long)"
    return text + "."


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
