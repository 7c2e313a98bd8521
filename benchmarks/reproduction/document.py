"""``docs/reproduction.md``, from the latest finished run of every table."""

from __future__ import annotations

import re
from pathlib import Path

from mlflow import ActiveRun, MlflowClient
from mlflow.artifacts import download_artifacts, load_text
from mlflow.entities import Run

from .scored import ROOT

FIGURE, SECTION = "figure.png", "section.md"

TITLES = {
    "correlation": "Correlation with exact leave-one-out",
    "detection": "Flipped labels",
    "early_late": "Early and late influence",
    "patterns": "Patterns",
    "cleansing": "Training again without what is flagged",
    "cost": "Cost",
}

HEAD = """# The paper, reproduced

Written by `mlflow run . -e reproduce`; do not edit. Xu and Wu, "Dynamic Influence Tracker: Measuring Time-Varying Sample
Influence During Training" (arXiv 2502.10793): its data, models and settings (the preset `paper` of the projects; digits, which the
paper does not have, with the project's defaults), on data split, flips, weights and batch orders of their own for every seed.

    mlflow run . -e reproduce --env-manager local -P table=all -P seeds=8 -P data=<folder with adult/ and 20news-bydate.tar.gz>

Means are over seeds, with 95 % intervals (Student's t) in brackets. Truth is exact leave-one-out, in float64 for correlations: of all
samples, but for the CNNs (24 random samples and 2 seeds on MNIST, 32 random samples on digits) which have three windows (first, middle
and last epoch), as has the kind `final` on newsgroups. "Published code" is what the authors' code gave (Adult, seeds 0 to 2, with its
own split). EMNIST and CIFAR-10 need files that are not fetched here: `projects/emnist`, `projects/cifar10`.
"""


def write_document(run: ActiveRun, quick: bool) -> str:
    """Write the document and its figures; returns where it is.

    A quick reproduction goes to ``build/`` and holds quick runs only.
    """
    folder = ROOT / "build" if quick else ROOT / "docs"
    pictures = folder / "reproduction"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for table, title in TITLES.items():
        found = _latest(run.info.experiment_id, table, quick)
        if found is None:
            continue
        _fetch(found, pictures / f"{table}.png")
        section = load_text(f"runs:/{found.info.run_id}/{SECTION}").replace("\n## ", "\n### ")
        seconds, seeds = found.data.metrics["cost/reproduction_seconds"], found.data.params["resolved.seeds"]
        command = f"`-P table={table} -P seeds={seeds}{' -P quick=true' if quick else ''}`, {seconds / 60:.0f} minutes with what was known before"
        parts += [f"# {title}\n", f"{command}.\n", f"![{title}](reproduction/{table}.png)\n", section, ""]
    path = folder / "reproduction.md"
    path.write_text(re.sub(r"\n{3,}", "\n\n", "\n".join(parts).replace("\n# ", "\n## ")), encoding="utf-8")
    return str(path.relative_to(ROOT))


def _latest(experiment_id: str, table: str, quick: bool) -> Run | None:
    found = MlflowClient().search_runs(
        [experiment_id],
        f"tags.`dit.table` = '{table}' and tags.`dit.kind` = 'reproduction' and attributes.status = 'FINISHED'"
        f" and params.`resolved.quick` = '{quick}'",
        max_results=1,
    )
    return found[0] if found else None


def _fetch(run: Run, path: Path) -> None:
    path.write_bytes(Path(download_artifacts(run_id=run.info.run_id, artifact_path=FIGURE)).read_bytes())
