"""Print validation accuracy per standardisation and learning rate; the defaults follow from the table.

Run from the repository: ``python projects/mnist/choose_defaults.py``. Eight seeds (weights and batch order), with the
default label flips in training; validation labels are clean. The standardisation is the one whose best accuracy,
averaged over the models, is higher; the learning rate is the one of highest mean accuracy; among equals, lowest loss.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import torch

from dit_mlflow import load_workload, mean_validation_loss, train

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
STANDARDISATIONS = ("channel", "pixel")
SEEDS = range(8)


def validation_scores(model_name: str, standardise: str, lr: float, seed: int) -> tuple[float, float]:
    """Accuracy and loss on the validation split after training."""
    workload = load_workload("projects/mnist", model=model_name, standardise=standardise, lr=lr)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
    assert workload.metrics is not None
    with torch.no_grad():
        batch = workload.collate(workload.validation_set, range(len(workload.validation_set)))  # type: ignore[arg-type]
        accuracy = workload.metrics(model, batch)["accuracy"].mean().item()
        return accuracy, mean_validation_loss(workload)(model).item()


def main() -> None:
    rows = [
        (model, standardise, lr, seed, *validation_scores(model, standardise, lr, seed))
        for model in ("logreg", "dnn", "cnn")
        for standardise in STANDARDISATIONS
        for lr in RATES
        for seed in SEEDS
    ]
    table = pd.DataFrame(rows, columns=["model", "standardise", "lr", "seed", "accuracy", "loss"])
    keys = ["model", "standardise", "lr"]
    summary = table.groupby(keys, sort=False)[["accuracy", "loss"]].agg(["mean", "min", "max"])
    print(summary.to_string(float_format="%.4f"))
    means = table.groupby(keys, as_index=False, sort=False)[["accuracy", "loss"]].mean()
    ranked = means.sort_values(["accuracy", "loss"], ascending=[False, True])
    best = ranked.groupby(["model", "standardise"], sort=False).head(1)
    print("\nbest learning rate of each:")
    print(best.sort_values(["model", "standardise"]).to_string(index=False, float_format="%.4f"))
    print("\nbest accuracy, mean over models:")
    print(best.groupby("standardise")["accuracy"].mean().to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
