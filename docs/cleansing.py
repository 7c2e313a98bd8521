"""Write the section "Five splits" of docs/acting.md and docs/cleansing.png: ``python docs/cleansing.py`` (ten minutes).

Runs the cleansing job on five splits of projects/mnist, in a store of its own; with ``MLFLOW_TRACKING_URI`` set, it
takes the runs that are in that store, oldest first.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run

from dit_mlflow.evaluation import mean_interval
from dit_mlflow.tracking.jobs.cleanse import CleansingRequest, cleanse_job

HERE = Path(__file__).parent
PAGE = HERE / "acting.md"
SECTION, NEXT = "### Five splits\n", "### What is kept\n"
SPLITS = range(5)
STRATEGIES = ("no cleaning", "influence", "loss", "random")
ACCURACY, LOSS = "test/accuracy", "test/loss"

HEAD = """
Written by `python docs/cleansing.py`: `python3 run.py cleanse`, and the same with `-P data_seed=1 -P
corrupt_seed=1` and so on, on five splits of the digits (784-8-1, 256 training samples, 26 labels flipped, 3 pairs
of seeds each). The table has test accuracy in % and test loss of what validation chooses of each strategy; *at
random* drops as many as validation chooses by influence, in 5 draws:

| split | no cleaning | influence | loss | at random |
|---|---|---|---|---|
"""


def main() -> None:
    with TemporaryDirectory() as folder:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            mlflow.create_experiment("cleansing", artifact_location=(Path(folder) / "artifacts").as_uri())
            mlflow.set_experiment("cleansing")
            for split in SPLITS:
                cleanse_job(CleansingRequest(settings={"data_seed": str(split), "corrupt_seed": str(split)}))
        found = of_kind("cleansing", order_by=["attributes.start_time"])
        assert len(found) == len(SPLITS), f"{len(found)} cleansing runs in the store; expected {len(SPLITS)}"
        picture = download_artifacts(run_id=found[0].info.run_id, artifact_path="cleansing.png")
        (HERE / "cleansing.png").write_bytes(Path(picture).read_bytes())
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(SECTION)
        after = rest[rest.index(NEXT) :]
        PAGE.write_text(before + SECTION + section([children(run) for run in found]) + "\n" + after, encoding="utf-8")


def of_kind(kind: str, parent: str = "", **how: object) -> list[Run]:
    filters = [f"tags.`dit.kind` = '{kind}'", *([f"tags.`mlflow.parentRunId` = '{parent}'"] if parent else [])]
    return mlflow.search_runs(filter_string=" and ".join(filters), output_format="list", **how)  # type: ignore[arg-type]


def children(parent: Run) -> dict[str, dict[str, Run]]:
    """The trial of each strategy that validation chooses, and all trials by strategy and share."""
    trials: dict[str, dict[str, Run]] = {}
    for run in of_kind("cleansed", parent.info.run_id):
        trials.setdefault(run.data.params["strategy"], {})[run.data.params["fraction"]] = run
    for strategy in of_kind("strategy", parent.info.run_id):
        name = strategy.data.params["strategy"]
        trials[name]["chosen"] = trials[name][strategy.data.params["chosen.fraction"]]
    trials["no cleaning"]["chosen"] = trials["no cleaning"]["0.0"]
    trials["random"]["chosen"] = trials["random"][trials["influence"]["chosen"].data.params["fraction"]]
    return trials


def section(splits: list[dict[str, dict[str, Run]]]) -> str:
    chosen = {name: [trials[name]["chosen"] for trials in splits] for name in STRATEGIES}
    values = {
        name: np.array([(100 * run.data.metrics[ACCURACY], run.data.metrics[LOSS]) for run in runs])
        for name, runs in chosen.items()
    }
    rows = []
    for split in SPLITS:
        cells = []
        for name in STRATEGIES:
            accuracy, loss = values[name][split]
            share = f" ({float(chosen[name][split].data.params['fraction']):.0%})".replace("%", " %")
            cells.append(f"{accuracy:.1f}, {loss:.3f}" + (share if name in ("influence", "loss") else ""))
        rows.append(f"| {split} | " + " | ".join(cells) + " |")
    means = [f"{accuracy:.1f}, {loss:.3f}" for accuracy, loss in (values[name].mean(axis=0) for name in STRATEGIES)]
    rows.append("| mean | " + " | ".join(means) + " |")
    most = {
        name: np.mean([100 * trials[name]["0.3"].data.metrics[ACCURACY] for trials in splits])
        for name in ("influence", "loss")
    }
    gains = {name: gain(values, name, "no cleaning") for name in STRATEGIES[1:]}
    falls = {name: gain(values, "no cleaning", name, place=1, digits=3) for name in STRATEGIES[1:]}
    told = [
        f"Over the splits, the gain in accuracy is {gains['influence']} points by influence, {gains['loss']} by loss",
        f"and {gains['random']} at random (means, 95 % intervals over the splits); by influence against by loss:",
        f"{gain(values, 'influence', 'loss')}. The test loss falls by {falls['influence']} by influence,",
        f"{falls['loss']} by loss and {falls['random']} at random. Where 30 % are dropped,",
        f"influence has {most['influence']:.1f} %, loss {most['loss']:.1f} %.",
    ]
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(told) + "\n"


def gain(values: dict[str, np.ndarray], of: str, over: str, place: int = 0, digits: int = 1) -> str:
    difference = values[of][:, place] - values[over][:, place]
    low, high = mean_interval(difference)
    return f"{difference.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
