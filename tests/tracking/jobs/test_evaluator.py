"""MLflow's evaluation with model_type="dit": influence on each row of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import evaluator_registry
from mlflow.models.evaluation.base import resolve_evaluators_and_configs
from torch.utils.data import TensorDataset, default_collate
from workloads import datasets, digits_workload
from workloads import sample_losses as sample_losses_of

from dit_mlflow import InputError, Query, Window, Workload, parse_windows, sample_losses, track, train
from dit_mlflow.evaluation.figures import figure_of
from dit_mlflow.influence import row_losses
from dit_mlflow.tracking import load_influence, load_trajectory, run_training
from dit_mlflow.tracking.jobs.evaluate_rows import Settings
from dit_mlflow.tracking.jobs.row_influence import RowQuestion

CORRUPTED = (1, 5)


def workload_with(**changes: Any) -> Workload:
    return digits_workload(corrupted=CORRUPTED, describe=lambda index: f"digit {index}", **changes)


def frame() -> pd.DataFrame:
    """The validation set as a table."""
    inputs, targets = datasets()[1].tensors
    return pd.DataFrame(inputs.numpy(), columns=[f"p{i:02d}" for i in range(64)]).assign(label=targets.numpy())


def trained(workload: Workload) -> tuple[str, str]:
    """Training run and the URI of its model."""
    training_run = run_training(workload)
    (output,) = mlflow.get_run(training_run).outputs.model_outputs
    return training_run, f"models:/{output.model_id}"


def evaluated(model: str | None, workload: Workload, data: Any = None, targets: Any = "label", **config: Any) -> Any:
    return mlflow.models.evaluate(
        model,
        frame() if data is None else data,
        targets=targets,
        model_type="dit",
        evaluators="dit",
        evaluator_config={"workload": workload, **config},
    )


def expected_scores(training_run: str, workload: Workload, windows: str, kind: str = "local") -> Any:
    """The same samples asked about as what they are: those of the validation set."""
    trajectory = load_trajectory(training_run)
    return track(trajectory, workload, parse_windows(windows, trajectory), kind, queries=sample_losses(workload))


def test_rows_score_as_the_same_validation_samples_do(store: str) -> None:
    workload = workload_with()
    training_run, model = trained(workload)
    result = evaluated(model, workload, windows="3", top=4)
    expected = expected_scores(training_run, workload, "3")
    found = load_influence(result.run_id, "row_influence")
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.queries == tuple(f"loss of row {row}" for row in range(16))
    assert found.windows == expected.windows

    table = result.tables["influence_on_rows"]
    last = load_trajectory(training_run).checkpoint(9).load_into(workload.build_model()).eval()
    batch = workload.collate(workload.validation_set, range(16))
    losses = workload.loss(last, batch).detach().numpy()
    for row in range(16):
        for index, window in enumerate(expected.windows):
            scores = expected.scores[index, row]
            rows = table[(table["row"] == row) & (table["window_start"] == window.start)]
            np.testing.assert_allclose(rows["loss"], losses[row], rtol=1e-5)
            for side, order in (("harmful", np.argsort(scores)), ("helpful", np.argsort(-scores))):
                part = rows[rows["side"] == side]
                wanted = [at for at in order[:4] if (scores[at] < 0) == (side == "harmful") and scores[at] != 0]
                assert part["sample_index"].tolist() == wanted
                # MLflow writes ten decimals into tables.
                np.testing.assert_allclose(part["score"], scores[wanted], rtol=0, atol=1e-10)
                assert part["rank"].tolist() == list(range(1, len(wanted) + 1))
                assert part["sample"].tolist() == [f"digit {at}" for at in wanted]
                assert part["corrupted"].tolist() == [at in CORRUPTED for at in wanted]

    mean = result.tables["influence_on_mean"]
    over_rows = expected.scores.mean(axis=1)
    first = mean[(mean["window_start"] == 0) & (mean["side"] == "harmful")].iloc[0]
    assert first["sample_index"] == over_rows[0].argmin()
    assert first["score"] == pytest.approx(over_rows[0].min())
    assert first["rows_hurt"] == np.mean(expected.scores[0, :, over_rows[0].argmin()] < 0)


def test_the_mean_over_rows_is_influence_on_the_mean_loss(store: str) -> None:
    workload = workload_with()
    training_run, model = trained(workload)
    result = evaluated(model, workload, kind="final", windows="4")
    trajectory = load_trajectory(training_run)
    default = track(trajectory, workload, parse_windows("4", trajectory), "final")
    found = load_influence(result.run_id, "row_influence").scores.mean(axis=1)
    np.testing.assert_allclose(found, default.scores[:, 0], rtol=1e-4, atol=1e-7)


def test_metrics_are_of_the_whole_training_and_on_run_and_model(store: str) -> None:
    workload = workload_with()
    training_run, model = trained(workload)
    result = evaluated(model, workload, windows="2", top=3)
    scores = expected_scores(training_run, workload, "1").scores[0]
    mean, order = scores.mean(axis=0), np.argsort(scores.mean(axis=0))
    run = mlflow.get_run(result.run_id)
    assert result.metrics == pytest.approx(
        {
            "dit/mean_loss": mlflow.get_run(training_run).data.metrics["validation/loss"],
            "dit/harmful_share": np.mean(mean < 0),
            "dit/rows_hurt_by_worst": np.mean(scores[:, order[0]] < 0),
            "dit/corrupted_among_worst": np.mean(np.isin(order[:3], CORRUPTED)),
        }
    )
    assert run.data.metrics == pytest.approx(result.metrics)
    assert {figure_of(name).name for name in result.metrics} == set(result.metrics)
    on_model = {m.key: m.value for m in mlflow.get_logged_model(model.removeprefix("models:/")).metrics}
    assert result.metrics.items() <= on_model.items()
    assert run.data.tags["dit.kind"] == "evaluation"
    assert run.data.tags["dit.training_run_id"] == training_run
    assert len(mlflow.tracking.MlflowClient().get_metric_history(result.run_id, "dit/mean_loss")) == 1


def test_data_in_other_forms(store: str) -> None:
    workload = workload_with()
    training_run, model = trained(workload)
    inputs, targets = (tensor.numpy() for tensor in datasets()[1].tensors)
    expected = expected_scores(training_run, workload, "1").scores
    dataset = mlflow.data.from_pandas(frame(), targets="label")
    nested = pd.DataFrame({"image": list(inputs.reshape(-1, 8, 8)), "label": targets})
    pyfunc = mlflow.pyfunc.load_model(model)
    mlflow.register_model(model, "digits")
    for chosen, data, answers in (
        (model, inputs, targets),
        ("models:/digits/1", inputs, targets),
        (model, dataset, None),
        (pyfunc, nested, "label"),
        (None, inputs.astype(np.float64), targets.astype(np.float64)),
    ):
        mlflow.clear_active_model()
        config = {} if chosen else {"training_run": training_run}
        found = evaluated(chosen, workload, data, answers, **config)
        assert mlflow.get_run(found.run_id).data.metrics == pytest.approx(found.metrics)
        kept = {(m.key, m.run_id) for m in mlflow.get_logged_model(model.removeprefix("models:/")).metrics}
        assert (("dit/mean_loss", found.run_id) in kept) == (chosen is not None)
        np.testing.assert_array_equal(load_influence(found.run_id, "row_influence").scores, expected)


def test_rows_that_become_batches_by_a_function(store: str) -> None:
    """A workload with batches of its own kind, and rows that are not yet what the model sees."""
    inputs, targets = datasets()[0].tensors
    pairs = [{"x": x, "y": y} for x, y in zip(inputs, targets, strict=True)]
    held_out = [{"x": x, "y": y} for x, y in zip(*datasets()[1].tensors, strict=True)]

    def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    workload = workload_with(loss=losses, train_set=pairs, validation_set=held_out, collate_fn=default_collate)
    training_run, model = trained(workload)
    raw = frame()
    raw.iloc[:, :64] *= 16
    with pytest.raises(InputError, match=r"samples of the training set have type dict.*Give batch"):
        evaluated(model, workload, raw)

    def batch_of(features: pd.DataFrame, answers: np.ndarray) -> dict[str, torch.Tensor]:
        assert features.shape == (1, 64)
        return {"x": torch.tensor(features.to_numpy() / 16, dtype=torch.float32), "y": torch.tensor(answers)}

    result = evaluated(model, workload, raw, batch=batch_of)
    expected = expected_scores(training_run, workload, "1").scores
    np.testing.assert_allclose(load_influence(result.run_id, "row_influence").scores, expected, rtol=1e-4, atol=1e-8)
    with pytest.raises(InputError, match="failed on row 0: ZeroDivisionError"):
        evaluated(model, workload, raw, batch=lambda features, answers: 1 / 0)


def test_what_is_refused(store: str) -> None:
    workload = workload_with()
    training_run, model = trained(workload)
    other_run, _ = trained(workload_with(epochs=1))
    data = frame()
    with_gap = data.copy()
    with_gap.iloc[3, 7] = np.nan
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"training_run": other_run}, f"was logged by run {training_run}, not by training_run={other_run}"),
        ({"window": "3"}, "evaluator_config has 'window'; it takes: training_run, windows"),
        ({"windows": "99"}, "99 windows were asked over 9 steps"),
        ({"kind": "global"}, "global"),
        ({"top": 0}, "top=0"),
        ({"data": data.drop(columns="p00")}, r"63 values; the training set's input has shape \[64\]"),
        ({"data": with_gap}, "row 3: nan cannot be used"),
        ({"data": data.assign(p00="a")}, r"columns \['p00'\] do not hold numbers"),
        ({"data": data.assign(label=data["label"] + 0.5)}, "target, row 0: .*target is int64"),
        ({"data": data.assign(label=data["label"] + 7)}, r"row 0 has target .*; the training set's are 0, 1, 2"),
        ({"data": data.assign(label="one")}, "target is int64"),
        ({"targets": None, "data": data.drop(columns="label")}, "no targets were given"),
        ({"data": data.iloc[:0]}, "there are no rows"),
    ]
    for changes, message in refusals:
        with pytest.raises(InputError, match=message):
            evaluated(model, workload, **changes)
    mlflow.clear_active_model()
    with pytest.raises(InputError, match="names no training_run"):
        evaluated(None, workload)
    with pytest.raises(MlflowException, match="could not be evaluated"):
        mlflow.models.evaluate(model, data, targets="label", model_type="classifier", evaluators="dit")
    kinds = {run.data.tags.get("dit.kind") for run in mlflow.search_runs(output_format="list")}
    assert kinds == {"training", None}


def test_a_run_that_is_something_else_stays_that_and_tables_are_not_added_to(store: str) -> None:
    workload = workload_with()
    training_run, model = trained(workload)
    with mlflow.start_run(run_id=training_run):
        evaluated(model, workload, top=1)
        result = evaluated(model, workload, top=2)
    assert result.run_id == training_run
    assert mlflow.get_run(training_run).data.tags["dit.kind"] == "training"
    assert len(result.tables["influence_on_rows"]) == 16 * 4


@pytest.mark.parametrize("model_type", ["classifier", "regressor", "question-answering", None])
def test_evaluations_of_other_types_are_not_ours(model_type: str | None, store: str) -> None:
    assert "dit" in evaluator_registry._model_evaluation_registry._registry
    for evaluators in (None, "default"):
        bundles = resolve_evaluators_and_configs(evaluators, {}, model_type)
        assert bundles
        assert "dit" not in [bundle.name for bundle in bundles]


class _Numbered(torch.utils.data.Dataset[Any]):
    """Samples ``(NumPy image, Python int)``, as many data sets give them."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        inputs, targets = datasets()[0].tensors
        return inputs[index].reshape(1, 8, 8).numpy().astype(np.float64), int(targets[index])


def test_rows_take_the_types_of_the_training_set_s_samples() -> None:
    seen: list[Any] = []

    def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch)
        return batch[0].sum(dim=(1, 2, 3)) + next(model.parameters()).sum() * 0

    workload = digits_workload(train_set=_Numbered(), loss=losses)
    rows = datasets()[1].tensors[0][:2].numpy()
    query: Query
    for query in row_losses(workload, rows, np.array([2.0, 0.0])):
        query(workload.build_model())
    assert [query.name for query in row_losses(workload, rows, [2, 0])] == ["loss of row 0", "loss of row 1"]
    for row, (features, target) in enumerate(seen[:2]):
        assert features.shape == (1, 1, 8, 8)
        np.testing.assert_array_equal(features.numpy().reshape(-1), rows[row])
        assert (target.dtype, target.tolist()) == (torch.int64, [[2], [0]][row])


def test_large_whole_numbers_survive() -> None:
    """Token ids, from a column that pandas made floats of because of its neighbour."""
    tokens = torch.tensor([[3, 2**40, 7], [1, 2, 2**41]])
    data = TensorDataset(tokens, torch.tensor([0, 1]))
    seen: list[torch.Tensor] = []

    def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch[0])
        return batch[0].double().sum(dim=1) + next(model.parameters()).sum() * 0

    workload = digits_workload(train_set=data, validation_set=data, loss=losses)
    frame = pd.DataFrame(tokens.numpy(), columns=["a", "b", "c"]).astype({"a": float, "b": "Int64"})
    for query in row_losses(workload, frame, [0, 1]):
        query(workload.build_model())
    assert torch.cat(seen).equal(tokens)


@pytest.mark.parametrize(
    "setting",
    [
        {"windows": 2.5},
        {"windows": None},
        {"kind": 3},
        {"workload": 3},
        {"settings": 5},
        {"batch": "x"},
        {"training_run": 5},
    ],
)
def test_settings_of_another_type_are_refused(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"evaluator_config has {name}={value!r}; expected"):
        Settings.of({"training_run": "some", **setting}, None)


def test_rows_whose_loss_is_no_number_are_refused(tmp_path: Path) -> None:
    """Their scores would be NaN, and count as helpful."""

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return sample_losses_of(model, batch) * torch.where(batch[0].amax(dim=1) > 9, torch.inf, 1.0)

    workload = digits_workload(epochs=1, loss=loss)
    trajectory = train(workload, tmp_path / "t")
    question = RowQuestion("run", trajectory, workload, (Window(0, 3),), "local")
    inputs, targets = (tensor[:3].numpy().copy() for tensor in datasets()[1].tensors)
    inputs[1] = 10
    with pytest.raises(InputError, match="the loss of row 1 is inf, for which influence is undefined"):
        question.answer(inputs, targets)
