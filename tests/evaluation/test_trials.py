"""Cleaning trains what it says on what it says, chooses by validation alone, and judges by test alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again
from scipy import stats
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from workloads import SAMPLES, datasets, digits_model, digits_workload

from dit_mlflow import InputError, Workload, WorkloadError, train
from dit_mlflow.evaluation import mean_scores
from dit_mlflow.evaluation.trials import (
    NO_CLEANING,
    RANDOM,
    Cleansing,
    Outcome,
    Trial,
    check_classes_stay,
    lowered,
    random_scores,
    trials,
    tried_out,
    untouched,
)
from dit_mlflow.recording.loop import train_unrecorded
from dit_mlflow.retraining.changed_data import subset


def accuracy(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    return {"accuracy": (model(batch[0]).argmax(dim=1) == batch[1]).float()}


def workload(**changes: Any) -> Workload:
    return digits_workload(test_set=datasets()[1], metrics=accuracy, **changes)


def trial(flagged: list[int]) -> Trial:
    return Trial("influence", len(flagged) / SAMPLES, np.array([flagged], dtype=np.int64), np.zeros((1, SAMPLES)))


def dropped(flagged: np.ndarray) -> Workload:
    return subset(workload(), np.delete(np.arange(SAMPLES), flagged))


def outcome(strategy: str, count: int, **figures: Any) -> Outcome:
    """``validation_loss=[...]``: by repeat, or by draw and repeat."""
    found = {name.replace("_", "/"): np.atleast_2d(np.array(values, dtype=float)) for name, values in figures.items()}
    flagged = np.tile(np.arange(count), (len(next(iter(found.values()))), 1))
    by_sample = {name: np.full(100, values.mean()) for name, values in found.items()}
    return Outcome(Trial(strategy, count / 100, flagged, np.zeros((len(flagged), 100))), found, by_sample)


def test_dropping_nothing_is_the_recorded_training_bit_for_bit(tmp_path: Path) -> None:
    trajectory = train(workload(), tmp_path / "trajectory", init_seed=4, order_seed=5)
    model = digits_model()
    trajectory.checkpoint(trajectory.num_steps).load_into(model)
    found = tried_out(untouched(SAMPLES), dropped, [(4, 5)]).figures
    for split, dataset in (("validation", workload().validation_set), ("test", workload().test_set)):
        assert dataset is not None
        for name, value in mean_scores(workload(), model.eval(), dataset).values.items():
            assert found[f"{split}/{name}"].item() == value


def test_figures_are_those_of_a_plain_loop_on_what_is_left() -> None:
    flagged = [0, 5, 9, 10, 22]
    found = tried_out(trial(flagged), dropped, [(1, 2), (3, 4)]).figures
    inputs, targets = datasets()[0].tensors
    kept = [index for index in range(SAMPLES) if index not in flagged]
    left = TensorDataset(inputs[kept], targets[kept])
    x, y = datasets()[1].tensors
    for repeat, (init, order) in enumerate([(1, 2), (3, 4)]):
        torch.manual_seed(init)
        model = digits_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loader = DataLoader(left, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(order))
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
        with torch.no_grad():
            loss = cross_entropy(model(x), y).item()
            right = (model(x).argmax(dim=1) == y).double().mean().item()
        assert found["test/loss"][0, repeat] == pytest.approx(loss, rel=1e-5)
        assert found["test/accuracy"][0, repeat] == pytest.approx(right)


def test_the_lowest_scores_are_flagged_and_scores_that_are_not_known_last() -> None:
    scores = np.array([[0.5, np.nan, -2.0, 0.5, -1.0]])
    (two, four) = trials({"influence": scores}, {0.4: 2, 0.8: 4})
    assert two.flagged.tolist() == [[2, 4]]
    assert four.flagged.tolist() == [[2, 4, 0, 3]]
    assert two.found([4, 1]).values == {"precision": 0.5, "recall": 0.5}
    assert "not known" in two.found([]).undefined["precision"]
    assert "no sample is flagged" in untouched(5).found([1]).undefined["recall"]


def test_random_draws_are_other_samples_and_larger_fractions_hold_smaller_ones() -> None:
    small, large = trials({RANDOM: random_scores(200, 50)}, {0.1: 5, 0.4: 20})
    assert all(set(a) < set(b) for a, b in zip(small.flagged.tolist(), large.flagged.tolist(), strict=True))
    assert all(len(set(draw)) == 5 for draw in small.flagged.tolist())
    # All samples are equally likely: 200 draws of a tenth hold each 20 times, with a standard deviation of 4.2.
    drawn = np.bincount(small.flagged.ravel(), minlength=50)
    assert drawn.min() > 5
    assert drawn.max() < 40


def test_validation_chooses_even_where_test_would_choose_otherwise() -> None:
    before = outcome(NO_CLEANING, 0, validation_accuracy=[0.8], validation_loss=[0.5], test_accuracy=[0.8])
    liked = outcome("influence", 5, validation_accuracy=[0.9], validation_loss=[0.4], test_accuracy=[0.7])
    better = outcome("loss", 5, validation_accuracy=[0.85], validation_loss=[0.1], test_accuracy=[0.99])
    lucky = outcome(RANDOM, 5, validation_accuracy=[0.95], validation_loss=[0.1], test_accuracy=[0.95])
    found = Cleansing((before, liked, better, lucky), "accuracy", "drop")
    assert found.chosen is liked
    assert found.helped == "no"


def test_ties_go_to_the_lower_validation_loss_then_to_fewer_samples() -> None:
    same: dict[str, Any] = {"validation_accuracy": [0.9]}
    before = outcome(NO_CLEANING, 0, validation_loss=[0.5], **same)
    many = outcome("influence", 9, validation_loss=[0.3], **same)
    few = outcome("influence", 4, validation_loss=[0.3], **same)
    broken = outcome("loss", 4, validation_loss=[0.1], validation_accuracy=[np.nan])
    assert Cleansing((before, many, few, broken), "accuracy", "drop").chosen is few
    assert Cleansing((before, many, few), "loss", "drop").chosen is few


def test_leaving_the_data_alone_can_be_chosen() -> None:
    before = outcome(NO_CLEANING, 0, validation_loss=[0.2], test_loss=[0.9])
    worse = outcome("influence", 5, validation_loss=[0.3], test_loss=[0.1])
    found = Cleansing((before, worse), "loss", "drop")
    assert found.chosen is before
    assert found.helped == "no"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([0.30, 0.31, 0.29], "yes"), ([0.2, 0.6, 0.3], "unclear"), ([0.6, 0.5, 0.6], "no"), ([0.3], "unclear")],
)
def test_help_is_what_seeds_alone_do_not_explain(losses: list[float], expected: str) -> None:
    count = len(losses)
    before = outcome(NO_CLEANING, 0, validation_loss=[0.9] * count, test_loss=[0.5, 0.51, 0.49][:count])
    after = outcome("influence", 5, validation_loss=[0.1] * count, test_loss=losses)
    assert Cleansing((before, after), "loss", "drop").helped == expected


def test_help_is_what_test_samples_alone_do_not_explain() -> None:
    """The same gain with every seed, but from one sample of a hundred."""
    loss: dict[str, Any] = {"validation_loss": [0.5] * 3}
    before = outcome(NO_CLEANING, 0, validation_accuracy=[0.8] * 3, test_accuracy=[0.90] * 3, **loss)
    after = outcome("influence", 5, validation_accuracy=[0.9] * 3, test_accuracy=[0.91] * 3, **loss)
    after.by_sample["test/accuracy"][:] = before.by_sample["test/accuracy"] + np.eye(100)[0]  # type: ignore[index]
    assert Cleansing((before, after), "accuracy", "drop").helped == "unclear"
    gain = after.gain(before).values
    low, high = stats.t.interval(0.95, 99, loc=0.01, scale=stats.sem(np.eye(100)[0]))
    assert (gain["test/accuracy_low"], gain["test/accuracy_high"]) == pytest.approx((low, high))


def test_weights_are_lowered_in_proportion_to_harm_and_random_samples_get_those_of_the_first_strategy() -> None:
    scores = {"influence": np.array([[-4.0, 1.0, -1.0, 2.0, 3.0]]), RANDOM: np.array([[4.0, 3.0, 2.0, 1.0, 0.0]] * 2)}
    ours, random = lowered(trials(scores, {0.6: 3}))
    assert ours.weights is not None and random.weights is not None
    np.testing.assert_array_equal(ours.weights, [[0, 1, 0.75, 1, 1]])
    np.testing.assert_array_equal(random.weights, [[1, 1, 1, 0.75, 0]] * 2)
    turned = lowered(trials(dict(reversed(scores.items())), {0.6: 3}))
    np.testing.assert_array_equal(turned[0].weights, random.weights)
    (harmless,) = lowered(trials({"influence": np.array([[1.0, 2.0]])}, {0.5: 1}))
    np.testing.assert_array_equal(harmless.weights, [[1, 1]])


def test_training_with_weights_is_that_of_a_plain_loop_with_them(tmp_path: Path) -> None:
    workload = digits_workload(accumulate=2)
    trajectory = train(workload, tmp_path / "t")
    weights = np.random.default_rng(0).random(workload.num_samples)
    model = train_again(workload, trajectory, lambda t, i: weights[i], trajectory.num_steps)
    found = train_unrecorded(workload, weights=weights)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].to(value), value, rtol=1e-4, atol=1e-5)
    ones = train_unrecorded(workload, weights=np.ones(workload.num_samples)).state_dict()
    for name, value in train_unrecorded(workload).state_dict().items():
        torch.testing.assert_close(ones[name], value, rtol=0, atol=0)


def test_summary_and_gain_against_their_formulas() -> None:
    generator = np.random.default_rng(0)
    values, others = generator.random((4, 3)), generator.random((1, 3))
    random, before = outcome(RANDOM, 5, test_loss=values), outcome(NO_CLEANING, 0, test_loss=others)
    found = random.summary().values
    assert found["test/loss"] == pytest.approx(values.mean())
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values.mean(axis=0)))
    assert (found["test/loss_low"], found["test/loss_high"]) == pytest.approx((low, high))
    draws = values.mean(axis=1)
    assert (found["test/loss_lowest_draw"], found["test/loss_highest_draw"]) == (draws.min(), draws.max())
    gain = random.gain(before).values
    paired = others[0] - values.mean(axis=0)
    low, high = stats.t.interval(0.95, 2, loc=paired.mean(), scale=stats.sem(paired))
    assert gain["test/loss"] == pytest.approx(others.mean() - values.mean())
    assert (gain["test/loss_low"], gain["test/loss_high"]) == pytest.approx((low, high))
    assert "test/loss_low" in outcome("loss", 5, test_loss=[0.5]).summary().undefined


def test_a_fraction_that_leaves_a_class_without_samples_is_refused() -> None:
    classes = np.array([0, 0, 1, 1, 2])
    (harmless,) = trials({"loss": np.array([[0, 4, 1, 5, 6.0]])}, {0.4: 2})
    check_classes_stay([harmless], classes)
    (harmful,) = trials({"loss": np.array([[3, 4, 0, 1, 6.0]])}, {0.4: 2})
    with pytest.raises(InputError, match=r"dropping 2 of 5 samples \(40 %\) by loss leaves no sample of class 1"):
        check_classes_stay([harmless, harmful], classes)


def test_an_empty_test_set_cannot_judge() -> None:
    """Nor be trained beside: whoever gives one expects figures of it."""
    nothing = TensorDataset(*(tensor[:0] for tensor in datasets()[1].tensors))
    with pytest.raises(WorkloadError, match=r"Workload\.test_set is empty; expected at least one sample, or None"):
        digits_workload(test_set=nothing)
