"""The note of a comparison: which method agrees best, at what cost, and which finds damaged samples."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from dit_mlflow.explanation.markdown import GAP, escaped, markdown_table
from dit_mlflow.explanation.numbers import decimals, figure

TIE = 0.005
"""Figures closer than this are called equal: they read the same with two digits, or nearly so."""

CEILING = 0.995
"""What leave-one-out in the recorded precision agrees with itself by, from which on that is not worth a word."""

COLUMNS = {
    "spearman": "Spearman (95 % interval)",
    "pearson": "Pearson",
    "lds": "LDS",
    "recall_at_k": "damaged found",
    "auroc": "AUROC",
    "seconds": "seconds",
}


def comparison_sentences(
    table: pd.DataFrame, retraining: Collection[str], attainable: float | None = None
) -> tuple[str, ...]:
    """What the table says, in plain text: who agrees best with exact leave-one-out, at what cost, who detects best.

    Args:
        table: a row per method with columns ``method``, ``failed``, and of ``spearman`` (``_low``, ``_high``),
            ``recall_at_k`` (``_chance``), ``auroc``, ``seconds`` those that are known.
        retraining: names of the methods that retrain without samples, which exact leave-one-out does too.
        attainable: correlation of leave-one-out with itself in the recorded precision.
    """
    worked = table[~table["failed"].astype(bool)]
    return tuple(
        sentence
        for sentence in (
            _fidelity(worked, retraining, attainable),
            _cost(worked, retraining),
            _detection(worked),
            _failed(table),
        )
        if sentence
    )


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
    compared = (
        f"**Compared:** {_counted(table)} how {escaped(query)} would change without each training sample, "
        f"on {over}, for all steps; kind `{kind}`. Spearman, Pearson: agreement with exact retraining without each "
        "sample; LDS: with training on random halves; damaged found: share of the damaged samples among as many lowest "
        "scores. Each method is a child run; windows are the steps of its charts `by_window/…`."
    )
    return "\n\n".join(part for part in (sentences, compared, _table(table)) if part)


def _counted(table: pd.DataFrame) -> str:
    return f"{len(table)} methods that say" if len(table) > 1 else "1 method that says"


def _fidelity(worked: pd.DataFrame, retraining: Collection[str], attainable: float | None) -> str:
    if not _known(worked, "spearman"):
        return "Agreement with exact leave-one-out was not measured."
    known = worked.dropna(subset=["spearman"])
    cheap = known[~known["method"].isin(list(retraining))].sort_values("spearman", ascending=False, kind="stable")
    if cheap.empty:
        return "All methods compared retrain; their agreement with exact leave-one-out is in the table."
    best = cheap[cheap["spearman"] > cheap["spearman"].iloc[0] - TIE]
    names, top = list(best["method"]), best.iloc[0]
    alone = len(names) == 1
    text = (
        f"{_listed(names)} agree{'s' if alone else ''} best with exact leave-one-out among the methods that do not "
        f"retrain: Spearman {decimals(top['spearman'])}{_interval(top)}"
    )
    rest = cheap[~cheap["method"].isin(names)]
    if len(rest):
        text += f"; next is {rest['method'].iloc[0]} ({decimals(rest['spearman'].iloc[0])})"
    if attainable is not None and attainable < CEILING:
        text += f"; rounding lets nothing get beyond {decimals(attainable)}"
    return text + "."


def _cost(worked: pd.DataFrame, retraining: Collection[str]) -> str:
    if not (_known(worked, "spearman") and _known(worked, "seconds")):
        return ""
    known = worked.dropna(subset=["spearman", "seconds"])
    cheap = known[~known["method"].isin(list(retraining))].sort_values("spearman", ascending=False, kind="stable")
    if cheap.empty:
        return ""
    best = cheap.iloc[0]
    text = f"{best['method']} took {figure(best['seconds'])} s"
    exact = worked[worked["method"] == "leave_one_out"]
    if len(exact) and best["seconds"] > 0:
        seconds = float(exact["seconds"].iloc[0])
        text += f", exact leave-one-out {figure(seconds)} s ({figure(seconds / best['seconds'])} times as long)"
    return text + "."


def _detection(worked: pd.DataFrame) -> str:
    if not _known(worked, "recall_at_k"):
        return ""
    order = [name for name in ("recall_at_k", "auroc") if name in worked]
    known = worked.dropna(subset=["recall_at_k"]).sort_values(order, ascending=False, kind="stable")
    best = known[known["recall_at_k"] > known["recall_at_k"].iloc[0] - TIE]
    names, top = list(best["method"]), best.iloc[0]
    chance = f" (by chance {100 * top['recall_at_k_chance']:.0f} %)" if "recall_at_k_chance" in best else ""
    return (
        f"{_listed(names)} find{'s' if len(names) == 1 else ''} damaged samples best: of as many lowest scores as "
        f"samples are damaged, {100 * top['recall_at_k']:.0f} % are{chance}."
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
    columns = {name: heading for name, heading in COLUMNS.items() if _known(table, name)}
    if not columns:
        return ""
    ordered = table.sort_values("spearman", ascending=False, kind="stable") if "spearman" in columns else table
    rows = []
    for row in ordered.to_dict("records"):
        if row["failed"]:
            reason = escaped(str(row.get("error", "")), 80)
            cells = [f"failed: {reason}", *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(name, row.get(name)) for name in columns]
            if "spearman" in columns:
                cells[0] += _bounds(pd.Series(row))
        part = row["trainings"] < row["asked"] if "asked" in row and not row["failed"] else False
        name = f"{row['method']} ({row['trainings']} of {row['asked']} trainings)" if part else str(row["method"])
        rows.append([escaped(name), *cells])
    return markdown_table(["method", *columns.values()], rows, GAP)


def _cell(name: str, value: object) -> str:
    if not isinstance(value, float) or pd.isna(value):
        return "–"
    return f"{100 * value:.0f} %" if name == "recall_at_k" else escaped(decimals(value))


def _interval(row: pd.Series) -> str:
    return _bounds(row).replace("(", "(95 % interval ")


def _bounds(row: pd.Series) -> str:
    low, high = row.get("spearman_low"), row.get("spearman_high")
    return "" if low is None or pd.isna(low) or pd.isna(high) else f" ({decimals(low)} to {decimals(high)})"


def _known(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(table[name].notna().any())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
