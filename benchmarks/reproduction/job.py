"""A reproduction in MLflow: a parent for each table, a child for each data set, model, method and seed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import joblib
import mlflow
import pandas as pd

from dit_mlflow import InputError
from dit_mlflow.progress import progress_bar
from dit_mlflow.tracking.store.names import ERROR, KIND, METHOD
from dit_mlflow.tracking.store.run_log import drawing, log_plot, log_points, project_run
from dit_mlflow.tracking.ui.links import where_to_look
from dit_mlflow.tracking.ui.notes import set_note

from .cases import Case, cases
from .cleansing import Cleansing
from .correlation import Correlation
from .cost import Cost
from .detection import Detection
from .document import FIGURE, REPRODUCTION, SECTION, TABLE, write_document
from .early_late import EarlyLate
from .patterns import Patterns
from .table import KEYS, Table, Unit, summary

TABLES: dict[str, Table] = {
    table.name: table for table in (Correlation(), Detection(), EarlyLate(), Patterns(), Cleansing(), Cost())
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReproductionRequest:
    """What to reproduce.

    Attributes:
        table: names with commas between, or ``all``.
        seeds: of data, weights and batch order, for every case.
        datasets: names with commas between, or ``all``.
        data: a folder with what :data:`FILES` names; empty = each project's own source.
        quick: fewer, smaller and shorter trainings: that everything works, not what is true.
        jobs: processes, one thread each; 0 = one for every core.
    """

    table: str = "all"
    seeds: int = 8
    datasets: str = "all"
    data: str = ""
    quick: bool = False
    jobs: int = 0

    @property
    def tables(self) -> list[Table]:
        """The tables asked for; raises :class:`InputError` for an unknown one."""
        names = list(TABLES) if self.table.strip() == "all" else [name.strip() for name in self.table.split(",")]
        unknown = [name for name in names if name not in TABLES]
        if unknown:
            raise InputError(f"table={self.table!r}; expected all, or some of {', '.join(TABLES)}")
        return [TABLES[name] for name in names]


def reproduce(request: ReproductionRequest, project_run_id: str | None = None) -> str:
    """Reproduce tables one after the other; returns text for the terminal.

    What was measured before, by the same code, is taken from ``build/reproduction``. A unit that fails has a FAILED run
    with the reason, which the document names too, and stops nothing else.

    Raises:
        InputError: some part of the request cannot be used, or a whole table failed.
        WorkloadError: a data set cannot be had.
    """
    if request.seeds < 1 or request.jobs < 0:
        raise InputError(f"seeds={request.seeds}, jobs={request.jobs}; expected 1 seed or more, and 0 jobs or more")
    tables = request.tables
    if TABLES["detection"] in tables and find_spec("cleanlab") is None:
        raise InputError("table=detection compares with cleanlab: pip install -e '.[methods]'")
    chosen = cases(request.datasets, request.quick, request.data)
    for data in dict.fromkeys(case.data for case in chosen):
        # Data that cannot be had are found out now, not in an hour.
        next(case for case in chosen if case.data == data).workload(0)
    units = {table.name: table.units(chosen, request.seeds, request.quick) for table in tables}
    empty = [name for name, found in units.items() if not found]
    if empty:
        raise InputError(
            f"table={empty[0]} has nothing to do on datasets={request.datasets}; add mnist, digits or adult"
        )
    lines = []
    for table in tables:
        lines += _table(table, units[table.name], chosen, request, project_run_id)
        project_run_id = None
    return "\n".join(["", *lines])


def _table(
    table: Table, units: list[Unit], chosen: list[Case], request: ReproductionRequest, project_run_id: str | None
) -> list[str]:
    begun = time.perf_counter()
    name = f"reproduce {table.name}{' (quick)' if request.quick else ''}"
    with project_run(project_run_id, name, {KIND: REPRODUCTION, TABLE: table.name}) as run:
        mlflow.log_params(
            {
                "resolved.table": table.name,
                "resolved.seeds": request.seeds,
                "resolved.datasets": ",".join(dict.fromkeys(unit.case.data for unit in units)),
                "resolved.quick": request.quick,
                "resolved.all_datasets": {case.data for case in cases()} == {case.data for case in chosen},
            }
        )
        parts, failures = [], []
        for unit, found in _measured(table, units, request.jobs):
            if isinstance(found, str):
                failures.append(f"{unit.case.name}, seed {unit.seed}: {found}")
                _failed_child(table, unit, found)
                _log.warning("%s: %s", table.name, failures[-1])
            else:
                parts.append(found)
        if not parts:
            raise InputError(f"every unit of table={table.name} failed; the first: {failures[0]}")
        rows = pd.concat(parts, ignore_index=True)
        order = list(dict.fromkeys(unit.case.name for unit in units))
        places = (rows["data"] + " " + rows["model"]).map(order.index)
        rows = (
            rows.assign(place=places)
            .sort_values(["place", "seed"], kind="stable", ignore_index=True)
            .drop(columns="place")
        )
        _children(table, rows)
        condensed = table.condensed(rows)
        mlflow.log_table(summary(condensed, [*KEYS, *table.facets], table.figures), "results.json")
        mlflow.log_table(condensed, "by_seed.json")
        section = table.section(condensed)
        if failures:
            section += "\n\n**Failed:** " + "; ".join(failures)
        mlflow.log_text(section, SECTION)
        mlflow.log_metrics({"cost/reproduction_seconds": time.perf_counter() - begun, "failed": len(failures)})
        with drawing(FIGURE, run.info.run_id):
            log_plot(table.figure(rows), FIGURE, run.info.run_id)
        set_note(run.info.run_id, f"{table.title}\n\n{section.split('##')[0].strip()}\n\nAll tables: `{SECTION}`.")
    where = write_document({known.name: known.title for known in TABLES.values()}, run, request.quick)
    return [
        f"{table.name:12} {time.perf_counter() - begun:.0f} s, {len(units)} units, {len(failures)} failed; {where}",
        where_to_look(run),
    ]


def _measured(table: Table, units: list[Unit], jobs: int) -> Iterator[tuple[Unit, pd.DataFrame | str]]:
    """Each unit with its rows, or why there are none, as they are found."""
    jobs = jobs or os.cpu_count() or 1
    with (
        progress_bar(len(units), table.name, "unit") as progress,
        joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1),
    ):
        pool = joblib.Parallel(return_as="generator_unordered")
        for number, found in pool(joblib.delayed(_one)(table, number, unit) for number, unit in enumerate(units)):
            progress.update(1)
            yield units[number], found


def _one(table: Table, number: int, unit: Unit) -> tuple[int, pd.DataFrame | str]:
    try:
        return number, table.measure(unit)
    except Exception as error:  # Of whatever kind: the other units go on.
        return number, f"{type(error).__name__}: {error}"


def _children(table: Table, rows: pd.DataFrame) -> None:
    """A run for each data set, model, method and seed."""
    for (data, model, method, seed), group in rows.groupby([*KEYS, "seed"], sort=False):
        tags = {KIND: "reproduced", METHOD: str(method), TABLE: table.name}
        with mlflow.start_run(run_name=f"{data} {model} {method} {seed}", nested=True, tags=tags):
            mlflow.log_params({"data": data, "model": model, "method": method, "seed": seed})
            log_points(table.series(group))


def _failed_child(table: Table, unit: Unit, reason: str) -> None:
    """A run that tells why there are none of a case and seed."""
    tags = {KIND: "reproduced", TABLE: table.name, ERROR: reason[:5000]}
    with mlflow.start_run(run_name=f"{unit.case.name} {unit.seed}", nested=True, tags=tags):
        mlflow.log_params({"data": unit.case.data, "model": unit.case.model, "seed": unit.seed})
        mlflow.end_run("FAILED")
