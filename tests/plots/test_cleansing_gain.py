"""Figure, table and description of a cleansing show the numbers they were given, and nothing of the data as markup."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from dit_mlflow.evaluation.trials import NO_CLEANING, RANDOM, Cleansing, Outcome, Trial
from dit_mlflow.explanation import cleansing_answer, cleansing_note, cleansing_table
from dit_mlflow.plots import plot_cleansing

GENERATOR = np.random.default_rng(0)


def outcome(strategy: str, count: int, metric: str, validation: float, test: float, draws: int = 1) -> Outcome:
    figures = {}
    for split, mean in (("validation", validation), ("test", test)):
        for name in dict.fromkeys((metric, "loss")):
            spread = GENERATOR.standard_normal((draws, 3)) * 0.001
            figures[f"{split}/{name}"] = mean + spread - spread.mean()
    flagged = np.tile(np.arange(count), (draws, 1))
    trial = Trial(strategy, count / 100, flagged, np.zeros((draws, 100)))
    return Outcome(trial, figures, {name: np.full(10, values.mean()) for name, values in figures.items()})


def cleansing(metric: str = "accuracy", action: str = "drop", gain: float = 0.1, **settings: Any) -> Cleansing:
    outcomes = (
        outcome(NO_CLEANING, 0, metric, 0.6, 0.6),
        outcome("influence", 5, metric, 0.6 + gain, 0.6 + gain),
        outcome("influence", 20, metric, 0.5, 0.65),
        outcome("loss", 5, metric, 0.55, 0.62),
        outcome("loss", 20, metric, 0.52, 0.64),
        outcome(RANDOM, 5, metric, 0.58, 0.58, draws=4),
        outcome(RANDOM, 20, metric, 0.55, 0.56, draws=4),
    )
    return Cleansing(outcomes, metric, action, **settings)


def test_lines_band_and_ring_are_where_the_figures_are() -> None:
    found = cleansing()
    (axes,) = plot_cleansing(found).axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    np.testing.assert_allclose(np.asarray(lines[NO_CLEANING].get_ydata()), 60)
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    for strategy in ("influence", "loss"):
        expected = [100 * o.mean("test/accuracy") for o in found.by(strategy)]
        np.testing.assert_allclose(drawn[strategy].get_ydata(), expected)
        np.testing.assert_allclose(drawn[strategy].get_xdata(), [5, 20], atol=0.5)
    (band,) = (part for part in axes.collections if isinstance(part, PolyCollection))
    ends = band.get_paths()[0].vertices
    for o in found.by(RANDOM):
        draws = 100 * o.figures["test/accuracy"].mean(axis=1)
        at = np.asarray(ends)[np.isclose(np.asarray(ends)[:, 0], 100 * o.trial.fraction), 1]
        assert (at.min(), at.max()) == pytest.approx((draws.min(), draws.max()))
    ring = lines["chosen on the validation split"]
    assert np.asarray(ring.get_ydata())[0] == pytest.approx(100 * found.chosen.mean("test/accuracy"))
    assert "higher is better" in axes.get_title()


def test_ring_on_the_line_where_nothing_is_to_be_cleaned() -> None:
    found = cleansing(gain=-0.1)
    assert found.chosen is found.before
    (axes,) = plot_cleansing(found).axes
    (ring,) = (line for line in axes.get_lines() if line.get_label() == "chosen on the validation split")
    assert ring.get_xydata()[0].tolist() == pytest.approx([0, 60])  # type: ignore[index]


def test_of_many_windows_those_are_drawn_that_are_best_on_validation() -> None:
    many = [outcome(f"influence w{w:02d}", 5, "accuracy", 0.30 + w / 100, 0.9 - w / 100) for w in range(20)]
    found = Cleansing((*cleansing().outcomes, *many), "accuracy", "drop")
    (axes,) = plot_cleansing(found).axes
    drawn = {container.get_label() for container in axes.containers}
    assert drawn == {"influence", "loss", *(f"influence w{w:02d}" for w in range(15, 20))}


def test_one_fraction_and_a_loss() -> None:
    both = cleansing("loss", "relabel", gain=-0.2)
    found = Cleansing(tuple(o for o in both.outcomes if o.trial.count in (0, 5)), "loss", "relabel")
    (axes,) = plot_cleansing(found).axes
    assert "lower is better" in axes.get_title()
    assert axes.get_xlabel() == "training samples given another label"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0 %", "5 %"]


def test_the_answer_says_what_was_chosen_what_came_of_it_and_what_else() -> None:
    text = cleansing_answer(cleansing(corrupted=(0, 1, 2, 50)))
    what, gains, others = text.split("\n")
    assert what == (
        "Cleaning helped: drop 5 samples (5 %) by influence, as the validation split chose; "
        "3 of the 5 are truly damaged, of 4 damaged ones in the training set."
    )
    assert gains.startswith("On test (3 pairs of seeds; gains, positive = better, with 95 % intervals): test/accuracy ")
    assert "test/accuracy 0.6000 to 0.7000, +0.1000 (+0.09" in gains
    assert ": better); test/loss 0.6000 to 0.7000, -0.1000 (-0.1" in gains and gains.endswith(": worse).")
    assert others.startswith("Against as many samples at random: test/accuracy +0.1200 (+0.1")
    assert "; by loss: test/accuracy +0.0800 (+0.0" in others


def test_the_answer_says_plainly_that_cleaning_did_not_help() -> None:
    text = cleansing_answer(cleansing(gain=-0.1))
    assert text.startswith("Cleaning did not help: drop nothing; on the validation split, nothing is better than to")
    # What validation likes best of each strategy; test would prefer others.
    assert "0.6500 by influence with 20" not in text
    assert "0.5000 by influence with 5 samples (5 %), 0.6200 by loss with 5 samples (5 %)" in text
    assert "which samples are truly damaged is not known." in text


def test_the_table_holds_every_trial() -> None:
    found = cleansing(corrupted=(0, 1, 2, 50))
    table = cleansing_table(found).set_index(["strategy", "samples"])
    assert len(table) == 7
    assert table["chosen"].sum() == 1
    row = table.loc[("influence", 5)]
    assert row["chosen"]
    assert row["test/accuracy"] == pytest.approx(0.7)
    assert row["gain/test/accuracy"] == pytest.approx(0.1)
    assert row["gain/test/loss"] == pytest.approx(-0.1)
    assert (row["detection/precision"], row["detection/recall"]) == (0.6, 0.75)


def test_the_description_holds_the_answer_and_escapes_what_comes_from_data() -> None:
    hostile = "the_loss <script>alert(1)</script> ![x](http://x)"
    note = cleansing_note(cleansing(), "abc", [hostile])
    assert note.startswith("**Cleaning helped**: drop 5 samples")
    assert "| **influence** | **5 (5 %)** | **0.7000** |" in note
    assert "mlflow.artifacts.load_dict('runs:/abc/dropped_indices.json')['indices']" in note
    assert "<script>" not in note
    assert "![x](" not in note
    named = cleansing_note(cleansing("<img src=x>"), "abc")
    assert "<img" not in named


def test_descriptions_of_many_windows_stay_below_what_mlflow_keeps() -> None:
    many = [outcome(f"influence w{w:03d} {w}-{w + 1}", k, "accuracy", 0.5, 0.5) for w in range(300) for k in (5, 20)]
    found = Cleansing((*cleansing().outcomes, *many), "accuracy", "drop", corrupted=range(90))
    note = cleansing_note(found, "a" * 32, ["x_" * 1000] * 100)
    assert len(note) < 8000
    assert "The other trials are in `cleansing.json`" in note


def test_no_sentence_on_other_strategies_where_all_of_them_failed() -> None:
    found = cleansing()
    alone = Cleansing(found.outcomes[:3], "accuracy", "drop")
    answer = cleansing_answer(alone)
    assert "otherwise" not in answer
    assert "  " not in answer


def test_a_gain_without_an_interval_says_how_many_trainings_it_is_of() -> None:
    """One test sample has no spread, however many pairs of seeds there are."""
    found = cleansing()
    one = [Outcome(o.trial, o.figures, {name: x[:1] for name, x in o.by_sample.items()}) for o in found.outcomes]
    assert "0.7000, +0.1000 (no interval); test/loss 0.6000 to 0.7000, -0.1000 (no interval)." in cleansing_answer(
        Cleansing(tuple(one), "accuracy", "drop")
    )


@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_a_note_of_very_many_trials_is_not_cut_by_mlflow(gain: float) -> None:
    """It cuts tags at 8,000 characters without a word."""
    found = cleansing(gain=gain, corrupted=(1, 2))
    names = [f"influence w{k:03d} {1000 * k}-{1000 * k + 1000}" for k in range(60)]
    windows = [outcome(name, count, "accuracy", 0.55, 0.6) for name in names for count in (5, 20)]
    remarks = [f"influence w{k:03d} failed: RuntimeError: " + "<x> " * 300 for k in range(9)]
    many = Cleansing((*found.outcomes, *windows), "accuracy", "drop", (1, 2))
    note = cleansing_note(many, "0" * 32, remarks)
    assert len(note) <= 8000
    assert "dropped_indices.json" in note
    assert "The validation split chose" in note


@pytest.mark.parametrize(("loss", "helped", "said"), [(0.3, "yes", "helped"), (0.9, "no", "did not help")])
def test_where_the_metric_cannot_tell_the_loss_does(loss: float, helped: str, said: str) -> None:
    """A gain whose interval is beside 0 never stands below an answer that leaves it open."""
    before, after = (
        outcome(name, count, "accuracy", 0.6 + count, 0.6) for name, count in ((NO_CLEANING, 0), ("loss", 5))
    )
    noisy = {
        **after.figures,
        "test/accuracy": np.array([[0.4, 0.6, 0.9]]),
        "test/loss": after.figures["test/loss"] - 0.6 + loss,
    }
    samples = {**after.by_sample, "test/loss": after.by_sample["test/loss"] - 0.6 + loss}
    found = Cleansing((before, Outcome(after.trial, noisy, samples)), "accuracy", "drop")
    assert found.helped == helped
    what, gains = cleansing_answer(found).split("\n")
    assert what.startswith(f"Cleaning {said}: ")
    assert f": within the noise); test/loss 0.6000 to {loss:.4f}" in gains
