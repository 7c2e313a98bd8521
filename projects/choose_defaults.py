"""Print validation accuracy and loss per model and learning rate of a project; its defaults follow from the table.

Run from the repository, for example::

    python projects/choose_defaults.py projects/mnist --grid standardise=channel,pixel
    python projects/choose_defaults.py projects/adult --set data_dir=data/adult

Each training has its own seed (weights and batch order) and the project's label flips; validation labels are clean, and
the test split is not used. The chosen learning rate has the highest mean accuracy; among equals, and in a project
without accuracy, the lowest loss. A training that breaks off has accuracy 0. The chosen settings of ``--grid`` have the
highest best accuracy, averaged over the models. With ``--rates`` alone, the learning rate is the project's:
``--set preset=paper --rates`` shows what the paper's settings reach.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

import pandas as pd
import torch

from dit_mlflow import TrainingError, Workload, load_workload, mean_validation_loss, train
from dit_mlflow.workload.projects import find_factory

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


def validation_scores(workload: Workload, seed: int) -> tuple[float, float]:
    """Accuracy (NaN if there is none) and loss on validation after training; 0 and infinite if it breaks off."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        except TrainingError:
            return math.nan if workload.metrics is None else 0.0, math.inf
        model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
    with torch.no_grad():
        batch = workload.collate(workload.validation_set, range(len(workload.validation_set)))  # type: ignore[arg-type]
        accuracy = math.nan if workload.metrics is None else workload.metrics(model, batch)["accuracy"].mean().item()
        return accuracy, mean_validation_loss(workload)(model).item()


def measure(options: argparse.Namespace, grid: dict[str, list[str]]) -> pd.DataFrame:
    """A row for each model, place in the grid, learning rate and seed."""
    fixed = dict(option.split("=", 1) for option in options.set)
    models = options.models or get_args(get_type_hints(find_factory(options.project)).get("model")) or ["the only one"]
    rows = []
    for model, *place in itertools.product(models, *grid.values()):
        settable = {"model": model} if model != "the only one" else {}
        varied = {"model": model, **dict(zip(grid, place, strict=True))}
        for rate in options.rates or [None]:
            settings = fixed | settable | dict(zip(grid, place, strict=True)) | ({} if rate is None else {"lr": rate})
            workload = load_workload(options.project, **settings)
            for seed in range(options.seeds):
                accuracy, loss = validation_scores(workload, seed)
                rows.append({**varied, "lr": workload.settings["lr"], "seed": seed, "accuracy": accuracy, "loss": loss})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", help="folder, such as projects/mnist")
    parser.add_argument("--models", nargs="+", help="default: all that the project has")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=A,B", help="settings to choose along with it")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that are the same for all")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    grid = {name: values.split(",") for name, values in (option.split("=", 1) for option in options.grid)}

    table = measure(options, grid)
    places = ["model", *grid]
    keys = [*places, "lr"]
    summary = table.groupby(keys, sort=False)[["accuracy", "loss"]].agg(["mean", "min", "max"])
    print(summary.to_string(float_format="%.4f"))
    means = table.groupby(keys, as_index=False, sort=False)[["accuracy", "loss"]].mean()
    ranked = means.sort_values(["accuracy", "loss"], ascending=[False, True])
    best = ranked.groupby(places, sort=False).head(1)
    print("\nbest learning rate of each:")
    print(best.sort_values(places).to_string(index=False, float_format="%.4f"))
    if grid:
        print("\nbest accuracy, mean over models:")
        print(best.groupby(list(grid))["accuracy"].mean().to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
