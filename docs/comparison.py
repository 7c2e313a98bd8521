"""Write docs/comparison.md and docs/fidelity_against_cost.png: ``python docs/comparison.py`` (about twenty minutes).

Runs the comparison job on projects/mnist, eight trainings with flipped labels and four with each other damage, in a
store of its own, and prints nothing that the runs do not hold.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run

from dit_mlflow.evaluation.figures import AUROC, HIGH, LDS, LOW, PEARSON, RECALL_AT_K, SPEARMAN
from dit_mlflow.evaluation.stability import SHARES
from dit_mlflow.explanation.over_seeds import COMPARED, SECONDS
from dit_mlflow.tracking.jobs.compare import ComparisonRequest, compare_job

HERE = Path(__file__).parent
SEEDS, SEEDS_OF_DAMAGE = 8, 4
DAMAGES = {
    "class_flip": "labels of one class flipped",
    "hard_flip": "labels confused",
    "noise": "noisy image",
    "duplicate": "image of another sample",
    "ood": "image of another digit",
}
FIGURES = {
    SPEARMAN.leaf: f"{SPEARMAN.heading} correlation with exact leave-one-out in float64",
    PEARSON.leaf: f"{PEARSON.heading} correlation with it",
    LDS.leaf: "Linear datamodeling score, 32 halves of the data",
    RECALL_AT_K.leaf: "Flipped labels among the k lowest scores, k = number flipped (chance 0.10)",
    AUROC.leaf: f"{AUROC.heading} of flipped labels (chance 0.5)",
    SECONDS: "Seconds, beside other work on the machine",
}


def main() -> None:
    with TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.create_experiment("comparison", artifact_location=(Path(folder) / "artifacts").as_uri())
        mlflow.set_experiment("comparison")
        run = compared(seeds=SEEDS)
        picture = download_artifacts(run_id=run.info.run_id, artifact_path="fidelity_against_cost.png")
        (HERE / "fidelity_against_cost.png").write_bytes(Path(picture).read_bytes())
        parts = [HEAD.format(seeds=SEEDS, attainable=run.data.metrics[SPEARMAN.attainable])]
        parts += in_the_mean(table(run, "comparison"))
        parts += by_training(table(run, "by_seed"))
        parts += by_seeds(table(run, "stability"))
        auroc = {"labels flipped": table(run, "comparison").set_index("method")[AUROC.leaf]}
        for damage, title in DAMAGES.items():
            found = compared(seeds=SEEDS_OF_DAMAGE, subsets=0, settings={"corruption": damage})
            auroc[title] = table(found, "comparison").set_index("method")[AUROC.leaf]
        parts += by_damage(pd.DataFrame(auroc))
        page = HERE / "comparison.md"
        _, heading, libraries = page.read_text(encoding="utf-8").partition("## Beside other libraries\n")
        page.write_text("\n".join([*parts, heading + libraries]), encoding="utf-8")  # that of docs/libraries.py


def compared(**request: object) -> Run:
    """The parent run of a comparison."""
    compare_job(ComparisonRequest(**request))  # type: ignore[arg-type]
    found = mlflow.search_runs(filter_string="tags.`dit.kind` = 'comparison'", max_results=1)
    return MlflowClient().get_run(str(found["run_id"].iloc[0]))


def table(run: Run, name: str) -> pd.DataFrame:
    """A table of the run."""
    return mlflow.load_table(f"{name}.json", run_ids=[run.info.run_id])


HEAD = """# Methods compared, training by training

Written by `python docs/comparison.py`, which runs

    python3 run.py compare -P seeds={seeds}

on projects/mnist (784-8-1, defaults, 10 % flipped labels) and again for other damage; scores of the whole run. Columns
are the trainings, `weights seed / order seed`. Leave-one-out in the recorded precision reaches a Spearman correlation
of {attainable:.3f} with that in float64: more cannot be asked of an estimate.
"""


def in_the_mean(means: pd.DataFrame) -> list[str]:
    """A row per method: means over the trainings."""
    means = means.set_index("method")
    agreement = SPEARMAN.leaf
    ends = zip(means[agreement], means[agreement + LOW], means[agreement + HIGH], strict=True)
    told = {agreement: [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in ends]}
    headings = {column: of.heading + " (95 % interval)" * (of is SPEARMAN) for column, of in COMPARED.items()}
    return ["## In the mean\n", markdown(means[list(COMPARED)].assign(**told).rename(columns=headings))]


def by_training(rows: pd.DataFrame) -> list[str]:
    """A table per figure: a row per method, a column per training."""
    runs = list(dict.fromkeys(rows["training_run"]))
    params = [MlflowClient().get_run(run).data.params for run in runs]
    names = [f"{p['resolved.init_seed']}/{p['resolved.order_seed']}" for p in params]
    parts = []
    for figure, title in FIGURES.items():
        wide = rows.pivot(index="method", columns="training_run", values=figure)[runs]
        wide = wide.loc[list(dict.fromkeys(rows["method"]))].set_axis(names, axis=1)
        parts += [f"## {title}\n", markdown(wide)]
    return parts


def by_seeds(stability: pd.DataFrame) -> list[str]:
    """How alike the trainings' scores are, and what their differences are due to."""
    columns = {"mean": f"{SPEARMAN.heading} between trainings", "low": "low", "high": "high"}
    shares = dict(zip(SHARES, ("due to weights", "due to batch order", "due to both together"), strict=True))
    text = """## Would another seed have told the same?

Mean Spearman correlation between the scores of two trainings with its 95 % interval, and the shares of the variance of
the samples' scores that go with the seed of the weights, the seed of the batch order, and both together (two-way
random effects, see `dit_mlflow.evaluation.stability`).
"""
    scores = stability[stability["of"] == "scores"].set_index("method")
    return [text, markdown(scores.rename(columns={**columns, **shares})[[*columns.values(), *shares.values()]])]


def by_damage(auroc: pd.DataFrame) -> list[str]:
    """Which damage each method finds."""
    text = f"""## Which damage is found?

Mean AUROC of 10 % damaged samples by the lowest scores (chance 0.5), over {SEEDS} trainings for flipped labels and
{SEEDS_OF_DAMAGE} for each other damage (`python3 run.py compare -P seeds={SEEDS_OF_DAMAGE} -P subsets=0
-P corruption=noise`, and so on).
"""
    return [text, markdown(auroc)]


def markdown(frame: pd.DataFrame) -> str:
    """A table with method names in front."""
    lines = ["| method | " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * (1 + len(frame.columns))]
    for name, values in frame.iterrows():
        lines.append(f"| `{name}` | " + " | ".join(_cell(v) for v in values) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return "–" if pd.isna(value) else f"{value:.3f}"


if __name__ == "__main__":
    main()
