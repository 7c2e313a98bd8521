"""The sentences say what the numbers say, and claim nothing where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dit_mlflow import Influence, Window
from dit_mlflow.evaluation import Metrics
from dit_mlflow.explanation import Explanation, Gallery, Truth, answer_sentences, comparison_note, comparison_sentences
from dit_mlflow.explanation.over_seeds import summarised
from dit_mlflow.explanation.sentences import agreement_word, window_sentences

WINDOWS = (Window(0, 4), Window(4, 8), Window(8, 12))


class Known(Gallery):
    """Lines by index, and damaged samples."""

    def __init__(self, lines: dict[int, str] | None = None, corrupted: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.corrupted = frozenset(corrupted)
        self.line = lambda index: (lines or {}).get(index, "")  # type: ignore[method-assign,assignment]


def findings(
    scores: list[list[float]],
    whole: Metrics | None = None,
    per_window: tuple[Metrics, ...] = (),
    gallery: Gallery | None = None,
    checked: int = 0,
    windows: tuple[Window, ...] = WINDOWS,
) -> Explanation:
    values = np.array(scores)[:, None]
    found = Influence(values, windows, ("mean_validation_loss",), np.arange(10, 10 + values.shape[2]), "local", "dit")
    exact = replace(found, scores=np.where(np.arange(values.shape[2]) < checked, values, np.nan))
    truth = Truth(exact if checked else None)
    return Explanation(
        found, whole or Metrics(), per_window or (Metrics(),) * len(windows), gallery or Known(), truth=truth
    )


SCORES = [[-1.0, 2.0, 0.5, 0.25], [-3.0, 1.0, 0.5, 0.25], [-0.5, -1.75, 0.5, 0.25]]
"""Sample 10 harms most, most of all in the second window; 11 and 12 help, by 1.25 and 1.5 in all."""


def test_first_sentence_names_the_samples_their_window_and_the_amount() -> None:
    who, _, _ = answer_sentences(findings(SCORES, gallery=Known({10: "digit 7", 12: "digit 1"})))
    assert who == (
        "Sample 10 (digit 7) hurt the model most, above all in steps 4-8 (removal lowers the mean validation loss by "
        "3); sample 12 (digit 1) helped most, above all in steps 0-4 (removal raises it by 0.5)."
    )


def test_first_sentence_says_if_a_sample_turns() -> None:
    turning = [[-1.0, 2.0], [-3.0, 1.0], [-0.5, -1.5]]
    assert answer_sentences(findings(turning))[0].endswith("(removal raises it by 2), but hurt in steps 8-12.")
    barely = [[-1.0, 2.0], [-3.0, 1.0], [-0.5, -0.9]]
    assert answer_sentences(findings(barely))[0].endswith("(removal raises it by 2).")


def test_samples_are_ranked_by_the_whole_run_where_it_is_known() -> None:
    """As the page ranks them; sample 13 matters little in every window, and most in all."""
    scores = np.array([[-1.0, 2.0, 0.5, -0.25], [-3.0, 1.0, 0.5, -0.5], [-0.5, -1.75, 0.5, -0.25]])[:, None]
    settings = (("mean_validation_loss",), np.arange(10, 14), "local", "dit")
    found = Influence(scores, WINDOWS, *settings)
    whole = Influence(np.array([[[-2.0, 0.1, 1.5, -4.0]]]), (Window(0, 12),), *settings)
    metrics = (Metrics(),) * 3
    told = Explanation(found, Metrics(), metrics, Known(), whole_run=whole)
    assert answer_sentences(told)[0] == (
        "Sample 13 hurt the model most, above all in steps 4-8 (removal lowers the mean validation loss by 4 over the "
        "whole run); sample 12 helped most, above all in steps 0-4 (removal raises it by 1.5 over the whole run)."
    )
    turned = Influence(-whole.scores, whole.windows, *settings)
    said = answer_sentences(replace(told, whole_run=turned))[0]
    assert said.startswith(
        "Sample 12 hurt the model most: removal lowers the mean validation loss by 1.5 over the whole"
    )
    flat = Influence(0 * whole.scores, whole.windows, *settings)
    assert (
        answer_sentences(replace(told, whole_run=flat))[0]
        == "No sample changed the mean validation loss over the whole run."
    )


def test_exact_scores_of_the_whole_run_rank_before_estimates() -> None:
    """Sample 13, which the estimate holds for the most harmful, helps; 12 was not left out exactly."""
    settings = (("mean_validation_loss",), np.arange(10, 14), "local", "dit")
    found = findings(SCORES).influence
    estimate = Influence(np.array([[[-2.0, 0.1, 1.5, -4.0]]]), (Window(0, 12),), *settings)
    exact = Influence(np.array([[[-0.5, 0.2, np.nan, 1.0]]]), (Window(0, 12),), *settings)
    told = Explanation(found, Metrics(), (Metrics(),) * 3, Known(), named=exact, whole_run=estimate)
    assert answer_sentences(told)[0] == (
        "Sample 10 hurt the model most, above all in steps 4-8 (exact removal lowers the mean validation loss by 0.5 "
        "over the whole run); sample 12 helped most, above all in steps 0-4 (removal raises it by 1.5 over the whole "
        "run by the estimate)."
    )
    damaged = replace(told, whole=detected(0.5), gallery=Known(corrupted=(10, 11)))
    assert "1 is among the 2 most harmful of the whole run by the estimate (by" in answer_sentences(damaged)[2]


def test_first_sentence_goes_by_exact_retraining_where_it_went_the_other_way() -> None:
    """Without the whole run too; a window speaks of its estimates, as its pictures do, and says so."""
    found = findings(SCORES)
    exact = found.influence.scores.copy()
    exact[0, 0, 1] *= -0.1
    exact[1, 0, 0] = np.nan
    told = replace(found, truth=Truth(replace(found.influence, scores=exact)))
    assert answer_sentences(told)[0] == (
        "Sample 10 hurt the model most, above all in steps 4-8 (removal lowers the mean validation loss by 3); "
        "sample 12 helped most, above all in steps 0-4 (exact removal raises it by 0.5)."
    )
    assert window_sentences(told, 0)[0].endswith(
        "sample 11 helped most: removal raises it by 2 by the estimate; left out exactly, it does the opposite."
    )


def test_first_sentence_claims_nothing_without_scores() -> None:
    assert answer_sentences(findings([[0.0, 0.0]] * 3))[0] == "No sample changed the mean validation loss on average."
    assert answer_sentences(findings([[1.0, 2.0]] * 3))[0].endswith("; no sample hurt on average.")
    assert answer_sentences(findings([[-1.0, -2.0]] * 3))[0].endswith("; no sample helped on average.")


@pytest.mark.parametrize(
    ("spearman", "word"),
    [
        *((1, "very high"), (0.9, "very high"), (0.89, "high"), (0.7, "high"), (0.69, "moderate")),
        *((0.5, "moderate"), (0.49, "low"), (0.3, "low"), (0.29, "very low"), (-1, "very low")),
    ],
)
def test_words_for_agreement(spearman: float, word: str) -> None:
    assert agreement_word(spearman) == word


def truth(value: float, low: float = 0.0, high: float = 0.0) -> Metrics:
    key = "ground_truth/spearman"
    return Metrics({key: value, f"{key}_low": low, f"{key}_high": high})


def test_second_sentence_over_all_samples() -> None:
    windows = (truth(0.72), truth(0.979), truth(0.8))
    assert answer_sentences(findings(SCORES, truth(0.61), windows, checked=4))[1] == (
        "Agreement with exact retraining is high to very high in the windows (Spearman 0.72 to 0.98 over all 4 "
        "samples), and moderate over the whole run (Spearman 0.61 over all 4 samples)."
    )
    one = findings(SCORES[:1], truth(0.87), (truth(0.87),), checked=4, windows=WINDOWS[:1])
    assert answer_sentences(one)[1] == "Agreement with exact retraining is high (Spearman 0.87 over all 4 samples)."


def test_second_sentence_over_some_samples_speaks_of_the_interval() -> None:
    """Neither the words nor the figures are of the estimate alone: 0.72 may be anything from low to very high."""
    key = "trust/spearman"
    trusted = Metrics({key: 0.72, f"{key}_low": 0.4, f"{key}_high": 0.91, "trust/samples": 3.0})
    one = findings(SCORES[:1], trusted, (trusted,), windows=WINDOWS[:1])
    assert answer_sentences(one)[1] == (
        "As far as 3 random samples tell, agreement with exact retraining is high (Spearman 0.72, 95 % interval "
        "0.40 to 0.91, so it may be low)."
    )
    some = findings(SCORES[:1], truth(0.72, 0.71, 0.8), (truth(0.72),), checked=2, windows=WINDOWS[:1])
    assert "As far as 2 random samples tell, agreement with exact retraining is high (" in answer_sentences(some)[1]


def test_second_sentence_claims_nothing_without_a_figure() -> None:
    assert answer_sentences(findings(SCORES))[1] == (
        "How far this can be trusted was not checked: ask for trust=24, or ground_truth=all."
    )
    undefined = Metrics(undefined={"ground_truth/spearman": "all 4 estimated scores are equal"})
    assert answer_sentences(findings(SCORES, undefined, (undefined,) * 3, checked=4))[1] == (
        "Agreement with exact retraining cannot be told: all 4 estimated scores are equal."
    )
    trusted = Metrics(undefined={"trust/spearman": "1 samples have both"})
    assert "cannot be told: 1 samples have both" in answer_sentences(findings(SCORES, trusted, (trusted,) * 3))[1]


def detected(recall: float) -> Metrics:
    return Metrics({"detection/recall_at_k": recall, "detection/recall_at_k_chance": 0.5})


def test_damaged_samples_found_by_half_are_told_as_such() -> None:
    """Where scores tie at the cut, what is expected is no whole number."""
    found = findings(SCORES, detected(0.25), (detected(0.75),) * 3, Known(corrupted=(10, 11)))
    assert "0.5 are among the 2 most harmful of the whole run, 1.5 among those" in answer_sentences(found)[2]


@pytest.mark.parametrize(
    ("recall", "in_window", "said"),
    [
        (1.0, 1.0, "The one damaged sample is the most harmful of the whole run (by chance 0.004)"),
        (0.0, 1.0, "is not the most harmful of the whole run, but is that of steps 0-4 (by chance 0.004)"),
        (0.0, 0.0, "is not the most harmful of the whole run (by chance 0.004)"),
        (0.5, 0.5, "ties with others as the most harmful of the whole run (by chance 0.004)"),
    ],
)
def test_one_damaged_sample_is_told_as_one(recall: float, in_window: float, said: str) -> None:
    def metrics(found: float) -> Metrics:
        return Metrics({"detection/recall_at_k": found, "detection/recall_at_k_chance": 1 / 256})

    found = findings(SCORES, metrics(recall), (metrics(in_window),) * 3, Known(corrupted=(10,)))
    assert said in answer_sentences(found)[2]


def test_third_sentence_counts_damaged_samples_and_names_the_pattern() -> None:
    scores = [[4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    found = findings(scores, detected(0.5), (detected(0.5), detected(1.0), detected(0)), Known(corrupted=(10, 11)))
    assert answer_sentences(found)[2] == (
        "Of 2 damaged samples, 1 is among the 2 most harmful of the whole run, 2 among those of steps 4-8 (by chance "
        "1.0); most samples (4 of 4) are stable: their influence is spread over training and mostly of one sign."
    )
    assert answer_sentences(findings(scores))[2].startswith("Most samples (4 of 4) are stable: ")


def test_third_sentence_claims_nothing_of_one_window_without_damage() -> None:
    alone = findings(SCORES[:1], windows=WINDOWS[:1])
    assert answer_sentences(alone)[2].startswith("No training sample is known to be damaged")


def test_a_window_speaks_of_itself() -> None:
    who, sure = window_sentences(findings(SCORES, truth(0.1), (truth(0.2), truth(0.6), truth(0.95)), checked=4), 2)
    assert who == (
        "In steps 8-12, sample 11 hurt the model most: removal lowers the mean validation loss by 1.8; sample 12 "
        "helped most: removal raises it by 0.5."
    )
    assert sure == "Agreement with exact retraining is very high (Spearman 0.95 over all 4 samples)."


def comparison(**columns: list[object]) -> pd.DataFrame:
    names = ["dit", "tracin", "leave_one_out", "loss"]
    return pd.DataFrame({"method": names, "failed": False, "seconds": [0.5, 1.0, 5.0, 0.1]} | columns)


def test_long_times_and_large_amounts_are_written_out() -> None:
    table = comparison(spearman=[0.8, 0.1, 1.0, 0.0], seconds=[134.2, 1.0, 14762.0, 1.0])
    near, cost = comparison_sentences(table, ["leave_one_out"])
    assert "dit 0.80 (134 s)" in near and cost == "Exact leave-one-out took 14762 s."
    assert (
        "raises the mean validation loss by 1234;"
        in answer_sentences(findings([[1234.0, 1.0, 1.0]], windows=WINDOWS[:1]))[0]
    )


def test_comparison_names_the_best_from_the_table_alone() -> None:
    table = comparison(
        spearman=[0.7, 0.8, 1.0, 0.1],
        spearman_low=[0.6, 0.7, 1.0, 0.0],
        spearman_high=[0.8, 0.9, 1.0, 0.2],
        recall_at_k=[0.5, 0.6, 0.7, 0.9],
        recall_at_k_chance=[0.1] * 4,
        auroc=[0.9] * 4,
    )
    assert comparison_sentences(table, ["leave_one_out"], attainable=0.9) == (
        "Without one sample (exact leave-one-out, Spearman), nearest come tracin 0.80 (1 s), dit 0.70 (0.5 s) and loss "
        "0.10 (0.1 s); rounding lets no method get beyond 0.90 in the first. What holds without a random share of the "
        "samples (LDS), was not measured: one figure alone says not which method is right.",
        "Exact leave-one-out took 5 s.",
        "loss finds damaged samples best: of as many lowest scores as samples are damaged, 90 % are (by chance 10 %).",
    )
    swapped = table.assign(spearman=[0.1, 0.2, 1.0, 0.3])
    assert "nearest come loss 0.30 (0.1 s), tracin" in comparison_sentences(swapped, [])[0]


def test_two_tests_stand_side_by_side_and_the_questions_say_why() -> None:
    table = comparison(
        spearman=[0.9, 0.5, 1.0, 0.1], lds=[0.1, 0.8, 0.7, 0.2], question=["one", "many", "one", "suspicion"]
    )
    near, why, _ = comparison_sentences(table, ["leave_one_out", "tracin"])
    assert near == (
        "Without one sample (exact leave-one-out, Spearman), nearest come dit 0.90 (0.5 s), tracin 0.50 (retrains, 1 "
        "s) and loss 0.10 (0.1 s); without a random share of the samples (LDS), nearest come tracin 0.80 (retrains, "
        "1 s), loss 0.20 (0.1 s) and dit 0.10 (0.5 s). To be near in one is not to be near in the other: dit has "
        "Spearman 0.90 and LDS 0.10."
    )
    assert why == (
        "They answer different questions: the removal of one sample (dit, leave_one_out); the removal of many samples "
        "at once (tracin); which samples are suspicious, whatever the query (loss)."
    )
    same = table.assign(lds=table["spearman"])
    assert "To be near" not in comparison_sentences(same, [])[0]
    alone = comparison_sentences(table.drop(columns="spearman"), [])[0]
    assert alone.startswith("Without a random share") and "What holds without one sample (exact" in alone


def test_comparison_names_all_that_are_equal_and_all_that_failed() -> None:
    table = comparison(spearman=[0.7, 0.699, 1.0, None], failed=[False, False, False, True])
    first, *_, last = comparison_sentences(table, ["leave_one_out"])
    assert "nearest come dit 0.70 (0.5 s) and tracin 0.70 (1 s)" in first
    assert last == "Failed, with the reason in the table comparison.json: loss."


def test_comparison_without_ground_truth_claims_nothing_of_agreement() -> None:
    sentences = comparison_sentences(comparison(recall_at_k=[None] * 4), [])
    assert sentences == ("Agreement with exact retraining was not measured.", "Exact leave-one-out took 5 s.")


def test_few_samples_are_said_to_be_few() -> None:
    few = Metrics({"trust/spearman": 1.0, "trust/samples": 3.0})
    *_, agreement = answer_sentences(findings([SCORES[0]], few, (few,), windows=WINDOWS[:1]))[:2]
    assert agreement == (
        "As far as 3 random samples tell, agreement with exact retraining is very high (Spearman 1.00, too few samples "
        "for an interval)."
    )


def test_methods_that_failed_on_some_trainings_are_told_as_such() -> None:
    worked = {"measures": "x", "seconds": 1.0, "failed": False}
    rows = [
        {"method": "dit", "spearman": 0.9, "spearman_low": 0.85, "spearman_high": 0.95, **worked},
        *[{"method": "dit", "measures": "x", "failed": True, "error": "RuntimeError: boom"}] * 2,
        *[
            {"method": "tracin", "spearman": s, "spearman_low": s - 0.1, "spearman_high": s, **worked}
            for s in (0.7, 0.8, 0.6)
        ],
    ]
    table = summarised(pd.DataFrame(rows))
    note = comparison_note(table, [], 3, "local")
    assert "dit worked on 1 of 3 trainings, whose figures alone are told." in note.replace("\\", "")
    assert "| dit (1 of 3 trainings)" in note and "| tracin" in note and "| tracin (" not in note
    low = table.set_index("method").loc["dit", "spearman_low"]
    assert np.isnan(low), "the interval of one training is over samples"
    alone = summarised(pd.DataFrame(rows[:3]))
    assert np.isnan(alone["spearman_low"][0]), "not None, which the terminal would show"
    assert "1 method that says how" in comparison_note(table[:1], [], 3, "local")


def test_coupled_samples_are_said() -> None:
    found = findings(SCORES)
    coupled = replace(found, influence=replace(found.influence, metadata={"coupled": True}))
    assert answer_sentences(coupled)[0] == (
        f"{answer_sentences(found)[0]} The loss couples the samples of a batch, so removal takes a sample's own loss "
        "away, while the sample stays in its batches (the samples' absence: leave_one_out(removal='absent'))."
    )
    absent = replace(found, influence=replace(found.influence, metadata={"coupled": True, "removal": "absent"}))
    assert answer_sentences(absent)[0] == (
        f"{answer_sentences(found)[0]} The loss couples the samples of a batch; removed samples are not in their "
        "batches either."
    )


@pytest.mark.parametrize(
    ("agree", "where"),
    [([0.9, 0.9, 0.9], None), ([0.9, 0.49, None], " over steps 4-8"), ([0.1, 0.2, -0.3], "")],
)
def test_a_training_that_is_too_kinked_is_told(agree: list[float | None], where: str | None) -> None:
    plain = findings(SCORES)
    cosines = {str(window): [cosine] for window, cosine in zip(WINDOWS, agree, strict=True)}
    found = replace(plain, influence=replace(plain.influence, metadata={"draws_agree": cosines}))
    said = answer_sentences(found)[1]
    if where is None:
        assert said == answer_sentences(plain)[1]
    else:
        assert f" Training is too kinked{where} to foretell removals well: its derivatives at opposite" in said
        assert said.endswith("Long windows fail first; ask for shorter local ones.")
    # Where retrainings foretell all the same, in the second window, nothing is said.
    banks = {str(window): [{"order": order}] for window, order in zip(WINDOWS, (0.6, 0.75, None), strict=True)}
    made_up = replace(found.influence, metadata={"draws_agree": cosines, "bank": banks})
    assert ("4-8" in answer_sentences(replace(found, influence=made_up))[1]) is False
    by_window = [window_sentences(found, position)[1] for position in range(3)]
    assert ["too kinked" in said for said in by_window] == [cosine is not None and cosine < 0.5 for cosine in agree]
