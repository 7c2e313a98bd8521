"""Tables and figures of influence on single rows and on their mean."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pandas as pd

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import CORRUPTED_AMONG_WORST, HARMFUL_SHARE, MEAN_LOSS, ROWS_HURT_BY_WORST
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.influence import Influence, Window

MEAN = "mean loss of the rows"
FIRST = ("row", "loss", "window_start", "window_end", "side", "rank", "sample_index", "sample", "corrupted", "score")


def rows_table(influence: Influence, losses: np.ndarray, top: int, gallery: Gallery | None = None) -> pd.DataFrame:
    """The ``top`` most harmful and most helpful training samples of each row and window, one line each.

    Columns: ``row``, its ``loss`` at the end of training, ``window_start``, ``window_end``, ``side`` (``harmful``:
    removal lowers the row's loss), ``rank`` from 1, ``sample_index``, ``sample`` and ``corrupted`` if known, ``score``.

    Args:
        influence: its queries are the rows, in order.
        losses: of the rows, ``[rows]``.
        top: samples per row, window and side.
        gallery: what is known of the training samples.
    """
    table = influence.top(top)
    row_of = {name: row for row, name in enumerate(influence.queries)}
    table["row"] = table["query"].map(row_of).astype(int)
    table["loss"] = losses[table["row"].to_numpy()]
    return _described(table, gallery or Gallery(), ["row", "window_index", "side", "rank"])


def mean_table(influence: Influence, top: int, gallery: Gallery | None = None) -> pd.DataFrame:
    """The ``top`` training samples that hurt and helped most on the mean over all rows, per window.

    Columns as of :func:`rows_table`, and ``rows_hurt``: the share of rows whose loss the sample's removal lowers.
    """
    table = mean_over_rows(influence).top(top)
    hurt = (influence.scores < 0).mean(axis=1)
    place = {int(index): at for at, index in enumerate(influence.samples)}
    table["rows_hurt"] = hurt[table["window_index"], table["sample_index"].map(place)]
    return _described(table, gallery or Gallery(), ["window_index", "side", "rank"])


def mean_over_rows(influence: Influence) -> Influence:
    """Influence on the mean loss of all rows: the mean of the scores, since influence is linear in the query."""
    scores = influence.scores.mean(axis=1, keepdims=True)
    return replace(influence, scores=scores, queries=(MEAN,), standard_error=None, degrees_of_freedom=None)


def rows_metrics(
    influence: Influence, losses: np.ndarray, whole: Window, top: int, corrupted: Collection[int] = ()
) -> Metrics:
    """Four figures of the whole training.

    ``mean_loss`` of the rows; ``harmful_share``, the share of training samples whose removal would lower it;
    ``rows_hurt_by_worst``, the share of rows that the most harmful sample hurts; ``corrupted_among_worst``, the share
    of the ``top`` most harmful samples that is known to be corrupted (undefined if no training sample is).
    """
    scores = influence.scores[influence.windows.index(whole)]
    mean = scores.mean(axis=0)
    order = np.argsort(mean, kind="stable")
    values = {
        MEAN_LOSS.leaf: float(losses.mean()),
        HARMFUL_SHARE.leaf: float((mean < 0).mean()),
        ROWS_HURT_BY_WORST.leaf: float((scores[:, order[0]] < 0).mean()),
    }
    if not corrupted:
        return Metrics(values, {CORRUPTED_AMONG_WORST.leaf: "no training sample is known to be corrupted"})
    worst = influence.samples[order[:top]]
    return Metrics(values | {CORRUPTED_AMONG_WORST.leaf: float(np.isin(worst, list(corrupted)).mean())})


def _described(table: pd.DataFrame, gallery: Gallery, order: list[str]) -> pd.DataFrame:
    if gallery.corrupted:
        table["corrupted"] = table["sample_index"].isin(gallery.corrupted)
    if gallery.describe is not None:
        table["sample"] = table["sample_index"].map(gallery.describe)
    table = table.sort_values(order, kind="stable", ignore_index=True)
    more = ["rows_hurt"] if "rows_hurt" in table else []
    return table[[name for name in (*FIRST, *more) if name in table]]


def check_top(top: object) -> int:
    """A number of samples to list; raises :class:`InputError` for anything else."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InputError(f"top={top!r}; expected a number of samples per row and side, 1 or more")
    return top
