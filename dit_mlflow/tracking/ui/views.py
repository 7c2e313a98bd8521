"""Saved views of MLflow's run list (runs, columns and charts), opened by a link or from the menu *Views*.

A view is a tag of the experiment, in the form in which the UI saves views. MLflow before 3.17 reads another form, which
the same tag holds too. Charts have their metrics' names for titles: the list of runs in the UI of 3.17 shows no chart's
``displayName``.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dit_mlflow.evaluation.figures import (
    ACCURACY,
    AUROC,
    BY_FRACTION,
    INFLUENCE_SECONDS,
    LDS,
    LOSS,
    PEARSON,
    RECALL_AT_K,
    REMOVAL_LDS,
    SPEARMAN,
    TEST,
    TRAINING_LOSS,
    TRUST_SPEARMAN,
    VALIDATION,
    VALIDATION_LOSS,
    WINDOW_END,
    WINDOW_START,
    Figure,
)
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.mlflow_internals import SAVED_VIEW
from dit_mlflow.tracking.store.names import INFLUENCE, KIND, PARENT_RUN

PREFIX = "dit-"
COLUMNS = 2
"""Of charts: in three, the UI's default, their titles do not fit on a screen of 1280 px."""
KEPT = 50
"""Most views of single runs that an experiment keeps: the UI reads all its tags for every page."""

Chart = dict[str, Any]

_log = logger_of(__name__)


@dataclass(frozen=True)
class View:
    """One view.

    Attributes:
        key: its name in a link.
        name: its title in the menu and above its charts.
        runs: filter of the runs, in MLflow's search language.
        charts: from :func:`bar_chart`, :func:`line_chart`, :func:`parallel`, :func:`scatter`; hidden without data.
        columns: metrics and parameters that the table shows, such as ``metrics.validation/loss``.
        order: the column to sort by. Sorted by start time, the UI would fold children under their parents.
        ascending: smallest first.
    """

    key: str
    name: str
    runs: str
    charts: tuple[Chart, ...]
    columns: tuple[str, ...]
    order: str = "attributes.start_time"
    ascending: bool = True

    @property
    def state(self) -> dict[str, Any]:
        """The state that the UI restores."""
        section = "dit"
        return {
            "searchFilter": self.runs,
            "orderByKey": _quoted(self.order),
            "orderByAsc": self.ascending,
            "selectedColumns": [_quoted(column) for column in self.columns],
            "runsHiddenMode": "SHOW_ALL",
            "compareRunCharts": [
                {"uuid": f"{section}-{place}", "metricSectionId": section, **chart}
                for place, chart in enumerate(self.charts)
            ],
            "compareRunSections": [
                {"uuid": section, "name": self.name, "display": True, "isReordered": True, "columns": COLUMNS}
            ],
            # Keeps the given order; the UI would sort our section in among its own.
            "isAccordionReordered": True,
        }

    def encoded(self, created: int) -> str:
        """The value of the tag; ``created``: milliseconds since 1970."""
        packed = base64.b64encode(zlib.compress(json.dumps(self.state).encode())).decode()
        return json.dumps({"name": self.name, "createdAt": created, "state": f"deflate;{packed}", **self.state})


def _quoted(column: str) -> str:
    kind, name = column.split(".", 1)
    return column if kind == "attributes" else f"{kind}.`{name}`"


def bar_chart(metric: str) -> Chart:
    """A bar for each run."""
    return _chart("BAR", metricKey=metric)


def line_chart(metric: str, x: str = "") -> Chart:
    """A line for each run, over the metric's steps, or over the metric ``x`` at the same steps."""
    axis = {"xAxisKey": "metric", "selectedXAxisMetricKey": x} if x else {"xAxisKey": "step"}
    return _chart("LINE", metricKey=metric, selectedMetricKeys=[metric], lineSmoothness=0, **axis)


def over_windows(figure: Figure) -> Chart:
    """A line for each run over the ends of its windows."""
    return line_chart(figure.by_window, WINDOW_END.by_window)


def scatter(x: str, y: str) -> Chart:
    """A point for each run, by two metrics."""
    axes = {name: {"key": key, "type": "METRIC", "dataAccessKey": key} for name, key in (("xaxis", x), ("yaxis", y))}
    return _chart("SCATTER", **axes)


def parallel(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    """Parallel coordinates: a line for each run, coloured by the last metric. More than three axis names overlap."""
    return _chart("PARALLEL", selectedParams=list(params), selectedMetrics=list(metrics), showAllRuns=False)


def _chart(kind: str, **settings: Any) -> Chart:
    return {"type": kind, "runsCountToCompare": 100, **settings}


def _children_view(run: Run, title: str, also: str = "", **shown: Any) -> View:
    """A view of a run's child runs; ``also``: a further condition on them."""
    parent = f"tags.`{PARENT_RUN}` = '{run.info.run_id}'"
    return View(PREFIX + run.info.run_id, f"{title} of {run.info.run_name}", parent + also, **shown)


def _metrics(*names: str) -> tuple[str, ...]:
    return tuple(f"metrics.{name}" for name in names)


def windows_view(run: Run) -> View:
    """The windows of an influence run side by side."""
    agreement = SPEARMAN if SPEARMAN.name in run.data.metrics else TRUST_SPEARMAN
    found = [figure.name for figure in (REMOVAL_LDS, agreement, AUROC, RECALL_AT_K) if figure.name in run.data.metrics]
    axes, bars = (agreement.name, AUROC.name), [bar_chart(name) for name in found]
    return _children_view(
        run,
        "Windows",
        charts=(*bars[:2], parallel([], [WINDOW_START.name, *(name for name in found if name in axes)]), *bars[2:]),
        columns=_metrics(WINDOW_START.name, WINDOW_END.name, *found),
        order=f"metrics.{WINDOW_START.name}",
    )


def methods_view(run: Run) -> View:
    """The methods of a comparison side by side, the best first: over windows, in two tests, and against cost."""
    whole = [figure.name for figure in (SPEARMAN, PEARSON, LDS, AUROC)]
    cost = INFLUENCE_SECONDS.name
    return _children_view(
        run,
        "Methods",
        charts=(
            over_windows(SPEARMAN),
            over_windows(AUROC),
            scatter(LDS.name, SPEARMAN.name),
            scatter(cost, SPEARMAN.name),
            parallel(["method"], [cost, SPEARMAN.name]),
            *map(bar_chart, whole),
        ),
        columns=("params.method", *_metrics(*whole, RECALL_AT_K.name, cost)),
        order=f"metrics.{SPEARMAN.name}",
        ascending=not SPEARMAN.higher_is_better,
    )


def strategies_view(run: Run) -> View:
    """The strategies of a cleansing side by side, over the number of samples cleaned."""
    measured = [data + metric for metric in (ACCURACY, LOSS) for data in (VALIDATION, TEST)]
    return _children_view(
        run,
        "Strategies",
        f" and tags.`{KIND}` = 'strategy'",
        charts=tuple(line_chart(BY_FRACTION + name) for name in measured),
        columns=("params.strategy", "params.chosen.fraction", *_metrics(*measured)),
        order="params.strategy",
    )


TRAININGS = View(
    key=PREFIX + "trainings",
    name="Trainings",
    runs=f"tags.`{KIND}` = 'training'",
    charts=(
        bar_chart(VALIDATION + ACCURACY),
        bar_chart(TEST + ACCURACY),
        bar_chart(VALIDATION_LOSS.name),
        line_chart(TRAINING_LOSS.name),
        parallel(["resolved.init_seed", "resolved.order_seed"], [VALIDATION_LOSS.name]),
    ),
    columns=(
        "params.resolved.init_seed",
        "params.resolved.order_seed",
        "params.workload.model",
        "params.workload.lr",
        *_metrics(VALIDATION_LOSS.name, VALIDATION + ACCURACY, TEST + ACCURACY),
    ),
)
"""All training runs of an experiment."""

INFLUENCES = View(
    key=PREFIX + "influences",
    name="Influence runs",
    runs=f"tags.`{KIND}` = '{INFLUENCE}'",
    charts=(
        *map(over_windows, (REMOVAL_LDS, SPEARMAN, AUROC, TRUST_SPEARMAN)),
        *(bar_chart(figure.name) for figure in (SPEARMAN, AUROC, INFLUENCE_SECONDS)),
    ),
    columns=(
        "params.resolved.kind",
        "params.resolved.windows",
        "params.resolved.training_run",
        *_metrics(SPEARMAN.name, TRUST_SPEARMAN.name, AUROC.name),
    ),
)
"""All influence runs of an experiment, window by window."""


def save_views(experiment_id: str, *views: View) -> list[View]:
    """Save ``views``, :data:`TRAININGS` and :data:`INFLUENCES` in an experiment, replacing views of the same keys.

    Of the views of single runs, only the newest :data:`KEPT` are kept.

    Returns:
        ``views``, or nothing if the store refuses, which is only logged.
    """
    client = MlflowClient()
    try:
        tags = dict(client.get_experiment(experiment_id).tags)
        for view in (TRAININGS, INFLUENCES, *views):
            there = _created(tags.get(SAVED_VIEW + view.key, ""))
            value = view.encoded(there or int(time.time() * 1000))
            if tags.get(SAVED_VIEW + view.key) != value:
                client.set_experiment_tag(experiment_id, SAVED_VIEW + view.key, value)
                tags[SAVED_VIEW + view.key] = value
        fixed = {SAVED_VIEW + TRAININGS.key, SAVED_VIEW + INFLUENCES.key}
        of_runs = [key for key in tags if key.startswith(SAVED_VIEW + PREFIX) and key not in fixed]
        for key in sorted(of_runs, key=lambda key: _created(tags[key]))[:-KEPT]:
            client.delete_experiment_tag(experiment_id, key)
    except MlflowException as error:
        _log.warning("no saved views in the UI: %s", error)
        return []
    return list(views)


def _created(value: str) -> int:
    try:
        return int(json.loads(value)["createdAt"])
    except (ValueError, KeyError, TypeError):
        return 0
