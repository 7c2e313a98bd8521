"""Writes ``docs/reproduction.md`` from the latest finished run of every table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mlflow import ActiveRun, MlflowClient
from mlflow.artifacts import download_artifacts, load_text
from mlflow.entities import Run

from .memory import ROOT

FIGURE, SECTION = "figure.png", "section.md"

REPRODUCTION, TABLE = "reproduction", "dit.table"
"""Value of ``dit.kind``, and tag, of the parent runs."""

SEEDS = 8
"""Of the document that the repository keeps."""

HEAD = """# The paper, reproduced

Written by `mlflow run . -e reproduce`; do not edit. Xu and Wu, "Dynamic Influence Tracker: Measuring Time-Varying
Sample Influence During Training" (arXiv 2502.10793): its data, models and settings (the preset `paper` of the
projects; digits, which the paper does not have, with the project's defaults). Every seed has its own data split, flips,
weights and batch order.

    mlflow run . -e reproduce --env-manager local -P seeds={seeds} -P data=<folder with adult/ and 20news-bydate.tar.gz>

Numbers are means over seeds with 95 % intervals (Student's t) in brackets, and all seeds where it says so. Truth is
exact leave-one-out, in float64 for correlations, of all samples; but for the CNNs of random ones: 24 (and two seeds)
on MNIST, 32 on digits, with three windows, the first, the middle and the last epoch, as has the kind `final` on
newsgroups. With flipped labels, the CNNs have two shares of flips, and no part in cleansing. "Published code" is what
the authors' code gave (Adult, seeds 0 to 2, a split of its own). EMNIST and CIFAR-10 need files that were not at hand:
`projects/emnist`, `projects/cifar10`.

# What held
"""

QUICK = """# The paper, reproduced in small

Written by `mlflow run . -e reproduce -P quick=true`: 96 samples and 6 epochs. That everything works, not what is true.

# What held
"""


def write_document(titles: Mapping[str, str], run: ActiveRun, quick: bool) -> str:
    """Write the document and its figures, from the latest finished run of each table; returns where it is.

    What the sections say before their first heading stands together at the top. It goes to ``docs/`` if it has every
    table, each of all data sets, from :data:`SEEDS` seeds or more, without a failure; else to ``build/``, as does a
    quick reproduction, which holds quick runs only.

    Args:
        titles: of the tables, by name, in order; those without a run in the experiment are left out.
        run: any of that experiment.
        quick: of which sort.
    """
    latest = {table: _latest(run.info.experiment_id, table, quick) for table in titles}
    runs = {table: found for table, found in latest.items() if found}
    seeds = min(int(found.data.params["resolved.seeds"]) for found in runs.values())
    whole = len(runs) == len(titles) and seeds >= SEEDS and not quick and all(map(_is_whole, runs.values()))
    folder = ROOT / "docs" if whole else ROOT / "build"
    pictures = folder / "reproduction"
    pictures.mkdir(parents=True, exist_ok=True)
    claims, parts = [], []
    for table, found in runs.items():
        title = titles[table]
        _fetch(found, pictures / f"{table}.png")
        said, _, tables = load_text(f"runs:/{found.info.run_id}/{SECTION}").partition("\n## ")
        claims += [f"- {line}" for line in said.split("\n\n") if line.startswith("**")]
        notes = [f"{line}\n" for line in said.split("\n\n") if line.strip() and not line.startswith("**")]
        own_seeds, datasets = (found.data.params[f"resolved.{name}"] for name in ("seeds", "datasets"))
        command = f"`-P table={table} -P seeds={own_seeds}` on {datasets}\n"
        parts += [f"# {title}\n", f"![{title}](reproduction/{table}.png)\n", command, *notes]
        parts += ["### " + tables.replace("\n## ", "\n### ") + "\n"]
    text = "\n".join([QUICK if quick else HEAD.format(seeds=seeds), *claims, "", *parts]).strip() + "\n"
    path = folder / "reproduction.md"
    path.write_text(re.sub(r"\n{3,}", "\n\n", text.replace("\n# ", "\n## ")), encoding="utf-8")
    return str(path.relative_to(ROOT))


def _is_whole(run: Run) -> bool:
    return run.data.params.get("resolved.all_datasets") == "True" and run.data.metrics.get("failed") == 0


def _latest(experiment_id: str, table: str, quick: bool) -> Run | None:
    found = MlflowClient().search_runs(
        [experiment_id],
        f"tags.`{TABLE}` = '{table}' and tags.`dit.kind` = '{REPRODUCTION}' and attributes.status = 'FINISHED'"
        f" and params.`resolved.quick` = '{quick}'",
        max_results=1,
    )
    return found[0] if found else None


def _fetch(run: Run, path: Path) -> None:
    path.write_bytes(Path(download_artifacts(run_id=run.info.run_id, artifact_path=FIGURE)).read_bytes())
