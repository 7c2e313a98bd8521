"""Which method finds wrong labels, and does ``detect`` find more than the best of those that it weighs?

``python benchmarks/detect.py --adult FOLDER --newsgroups ARCHIVE --to rows.csv`` damages a tenth of the labels of
each of :data:`BENCHES`, at random (``flip``) and where an annotator would err (``hard_flip``), trains, and takes the
AUROC of each method, for each seed (of data, damage and training). Cost is CPU time, in trainings.

The table is Markdown: the mean over seeds with its interval of 95 %, and last the mean over benches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dit_mlflow import load_workload, train
from dit_mlflow.evaluation import detection
from dit_mlflow.evaluation.figures import AUROC
from dit_mlflow.methods import method
from dit_mlflow.methods.detect import AMONG, Detect
from dit_mlflow.methods.removal import Removal

BENCHES = [
    (project, model, damage)
    for project in ("mnist", "digits", "adult", "newsgroups")
    for model in ("dnn", "logreg")
    for damage in ("flip", "hard_flip")
    if (project, model) not in (("digits", "logreg"), ("adult", "logreg"))
]
METHODS = {name: method(name) for name in (*AMONG, "dit", "expected")} | {"removal": Removal(), "detect": Detect()}


def measure(project: str, model: str, damage: str, seed: int, data: dict[str, str]) -> list[dict[str, object]]:
    """A row for each method."""
    seeds = {"data_seed": seed, "corrupt_seed": seed}
    settings = {"model": model, "corruption": damage, **seeds, **data}
    workload = load_workload(f"projects/{project}", **settings)
    with tempfile.TemporaryDirectory() as folder:
        # Timed when all that is loaded on first use is there.
        train(workload, Path(folder) / "first", init_seed=seed, order_seed=seed)
        begun = time.process_time()
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        training = time.process_time() - begun
        rows = []
        for name, by in METHODS.items():
            begun = time.process_time()
            found = by(trajectory, workload)
            cost = (time.process_time() - begun) / training
            auroc = detection(found.of(0), workload.corrupted).values[AUROC.leaf]
            told = found.metadata.get("planted", [{}])[0].get("found")
            bench = f"{project} {model}, {damage}"
            rows.append(
                {"bench": bench, "method": name, "seed": seed, AUROC.leaf: auroc, "trainings": cost, "said": told}
            )
    return rows


def summary(rows: pd.DataFrame) -> str:
    """Markdown: a line for each bench, a column for each method; the highest mean is bold."""
    names = [name for name in METHODS if name in set(rows["method"])]
    lines = [f"| bench (seeds) | {' | '.join(f'`{name}`' for name in names)} | `detect`, said of planted labels |"]
    lines.append("|" + "---|" * (len(names) + 2))
    for bench, part in rows.groupby("bench", sort=False):
        by = part.pivot(index="seed", columns="method", values=AUROC.leaf)[names]
        half = stats.t.ppf(0.975, len(by) - 1) * by.std() / np.sqrt(len(by))
        best = by.mean().idxmax()
        cells = [
            f"{'**' * (name == best)}{by[name].mean():.3f}{'**' * (name == best)} ± {half[name]:.3f}" for name in names
        ]
        lines.append(f"| {bench} ({len(by)}) | {' | '.join(cells)} | {part['said'].mean():.3f} |")
    means = rows.groupby(["bench", "method"])[AUROC.leaf].mean().unstack()[names].mean()
    lines.append(f"| mean over benches | {' | '.join(f'{mean:.3f}' for mean in means)} | |")
    costs = rows.groupby("method")["trainings"].median()[names]
    lines.append(f"| cost in trainings | {' | '.join(f'{cost:.1f}' for cost in costs)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adult", help="folder of UCI Adult; without it, adult is left out")
    parser.add_argument("--newsgroups", help="archive of 20 Newsgroups; without it, newsgroups is left out")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--to", type=Path, help="a file of rows, to go on from and to add to")
    options = parser.parse_args()
    rows = pd.read_csv(options.to) if options.to and options.to.exists() else pd.DataFrame()
    done = set() if rows.empty else set(zip(rows["bench"], rows["seed"], strict=True))
    folders = {"mnist": "", "digits": "", "adult": options.adult, "newsgroups": options.newsgroups}
    for seed in range(options.seeds):
        for project, model, damage in BENCHES:
            folder = folders[project]
            if folder is not None and (f"{project} {model}, {damage}", seed) not in done:
                data = {"data_dir": folder} if folder else {}
                rows = pd.concat([rows, pd.DataFrame(measure(project, model, damage, seed, data))], ignore_index=True)
                if options.to:
                    rows.to_csv(options.to, index=False)
    print(summary(rows))


if __name__ == "__main__":
    main()
