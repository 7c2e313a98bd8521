from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from workloads import digits_workload

from dit_mlflow import Checks, InputError, Query, Trajectory, Window, Workload, explain, leave_one_out, track, train
from dit_mlflow.evaluation import Metrics, correlations, datamodeling_score, detection, trust
from dit_mlflow.explanation import find_truth
from dit_mlflow.explanation.numbers import figure
from dit_mlflow.explanation.ranking import extreme_samples
from dit_mlflow.explanation.run_note import Links, influence_note
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.removal import Removal, usual_method
from dit_mlflow.page import explanation_page

WINDOWS = [Window(0, 4), Window(4, 9)]
WHOLE = Window(0, 9)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return digits_workload(corrupted=(3, 8))


@pytest.fixture(scope="module")
def trajectory(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return train(workload, tmp_path_factory.mktemp("explain") / "t")


def test_estimates_truth_and_figures_are_those_of_the_functions_that_they_come_from(
    trajectory: Trajectory, workload: Workload
) -> None:
    parts: list[str] = []
    found = explain(
        trajectory,
        workload,
        WINDOWS,
        method="dit",
        checks=Checks(ground_truth=None, trust=5, subsets=12),
        reached=lambda part, _: parts.append(part),
    )
    estimate = track(trajectory, workload, [*WINDOWS, WHOLE])
    truth = leave_one_out(trajectory, workload, [*WINDOWS, WHOLE])
    np.testing.assert_allclose(found.scores.scores, estimate.scores, rtol=1e-6)
    np.testing.assert_allclose(found.truth.leave_one_out.scores, truth.scores, atol=1e-12)  # type: ignore[union-attr]
    trusted = trust(estimate, trajectory, workload, 5, truth)
    for k, window in enumerate([*WINDOWS, WHOLE]):
        expected = {
            **correlations(estimate.of(k), truth.of(k)).prefixed("ground_truth/").values,
            **detection(estimate.of(k), (3, 8)).prefixed("detection/").values,
            **trusted[k].prefixed("trust/").values,
        }
        told = found.measured[window].values
        assert {name: told[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    lds = datamodeling_score(estimate.of(2), found.truth.subsets, WHOLE)  # type: ignore[arg-type]
    assert found.whole.values["ground_truth/lds"] == lds.values["lds"]
    assert "ground_truth/lds" not in found.per_window[0].values
    assert found.checked == 24
    assert parts == ["influence", "whole_run", "truth", "named"]
    assert list(found.parts) == parts


def test_a_truth_that_is_known_serves_every_method_and_nothing_is_retrained(
    trajectory: Trajectory, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = find_truth(trajectory, workload, WINDOWS, "local", Checks(ground_truth=12))
    monkeypatch.setattr("dit_mlflow.explanation.explainer.find_truth", lambda *_: pytest.fail("retrained"))
    for name in ("dit", "grad_dot", "influence_function"):
        found = explain(trajectory, workload, WINDOWS, method=name, checks=Checks(), truth=truth)
        assert found.influence.method == name
        scores, exact = found.scores.of(WHOLE), truth.leave_one_out.of(WHOLE)  # type: ignore[union-attr]
        assert found.whole.values["ground_truth/spearman"] == correlations(scores, exact).values["spearman"]
    # Which has no scores of windows.
    assert found.windows == (WHOLE,)


def test_samples_that_stand_out_are_exact_and_rank_by_that(trajectory: Trajectory, workload: Workload) -> None:
    found = explain(trajectory, workload, WINDOWS, method="dit", checks=Checks(trust=4))
    truth = leave_one_out(trajectory, workload, [WHOLE]).of(0)
    estimate = found.whole_run.of(0)  # type: ignore[union-attr]
    order = np.argsort(estimate)
    standing_out = {*order[:4], *order[-4:]}
    exact = found.exact.of(WHOLE)  # type: ignore[union-attr]
    assert set(np.flatnonzero(np.isfinite(exact))) == standing_out
    assert exact[list(standing_out)] == pytest.approx(truth[list(standing_out)])
    ranked = found.ranking.of(0)  # type: ignore[union-attr]
    np.testing.assert_array_equal(ranked, np.where(np.isfinite(exact), exact, estimate))
    top = found.top(1).set_index("side")
    assert top.loc["harmful", "sample_index"] == np.argmin(ranked)
    assert top.loc["helpful", "sample_index"] == np.argmax(ranked)
    assert f"sample {np.argmin(ranked)}" in found.sentences[0].lower()
    assert set(found.trust) >= {"smoothness", "slope_ratio"}
    # Of four samples, no correlation is told.
    assert "spearman" not in found.trust
    assert "ground truth: 4 samples; at least 10" in found.whole.undefined["trust/spearman"]
    assert str(found) == " ".join(found.sentences)


def test_the_first_of_several_queries_is_checked_and_all_have_scores(
    trajectory: Trajectory, workload: Workload
) -> None:
    bias = Query("bias", lambda model: model[2].bias[0])
    weight = Query("weight", lambda model: model[0].weight.sum())
    both = explain(
        trajectory, workload, WINDOWS, queries=[bias, weight], method="dit", checks=Checks(ground_truth=5, trust=3)
    )
    alone = explain(trajectory, workload, WINDOWS, queries=[bias], method="dit", checks=Checks(ground_truth=5, trust=3))
    assert both.query == "bias"
    assert both.whole.values == pytest.approx(alone.whole.values, rel=1e-4)
    np.testing.assert_allclose(
        both.scores.scores, track(trajectory, workload, [*WINDOWS, WHOLE], queries=[bias, weight]).scores, rtol=1e-5
    )


def test_confirmed_samples_and_the_table_of_all_scores(trajectory: Trajectory, workload: Workload, tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = explain(trajectory, workload, "2", "final", method="dit", checks=Checks(confirm=2))
    exact = leave_one_out(trajectory, workload, list(found.windows), "final")
    table = pd.read_csv(found.to_csv(tmp_path / "scores.csv"))
    assert len(table) == 3 * 24
    for k, window in enumerate(found.windows):
        scores = found.influence.of(k)
        rows = table[(table["window_start"] == window.start) & (table["window_end"] == window.end)]
        np.testing.assert_allclose(rows["score"], scores)
        known = rows.set_index("sample_index")["exact"].dropna()
        assert set(known.index) == set(np.argsort(-np.abs(scores))[:2])
        assert known.to_numpy() == pytest.approx(exact.of(k)[known.index])


def test_a_table_for_spreadsheets_runs_nothing(trajectory: Trajectory, workload: Workload, tmp_path: Path) -> None:
    formula = Query("=cmd|' /C calc'!A0", lambda model: model[2].bias[0])
    found = explain(trajectory, workload, WINDOWS, queries=[formula], method="dit", checks=Checks())
    table = pd.read_csv(found.to_csv(tmp_path / "scores.csv"))
    assert set(table["query"]) == {f"'{formula.name}"}
    assert (table["score"] < 0).any(), "negative numbers stay numbers"
    np.testing.assert_allclose(table["score"], found.to_frame()["score"])


def test_double_precision_is_the_methods_own_setting(trajectory: Trajectory, workload: Workload) -> None:
    from dit_mlflow.methods.dit import Dit

    found = explain(trajectory, workload, WINDOWS, method=Dit(dtype=torch.float64), checks=Checks())
    expected = track(trajectory, workload, [*WINDOWS, WHOLE], dtype=torch.float64)
    np.testing.assert_array_equal(found.scores.scores, expected.scores)
    assert "cost/ground_truth_seconds" not in found.figures


def test_a_method_with_standard_errors_is_explained_with_them(trajectory: Trajectory, workload: Workload) -> None:
    from dit_mlflow import expected_influence
    from dit_mlflow.methods.dit import Expected

    found = explain(trajectory, workload, WINDOWS, method=Expected(draws=6), checks=Checks(trust=4))
    alone = expected_influence(trajectory, workload, [*WINDOWS, WHOLE], draws=6)
    np.testing.assert_allclose(found.scores.scores, alone.scores, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.scores.standard_error, alone.standard_error, rtol=1e-4, atol=1e-9)  # type: ignore[arg-type]
    exact = np.isfinite(found.exact.of(WHOLE))  # type: ignore[union-attr]
    ranked = found.ranking.standard_error[0, 0]  # type: ignore[union-attr,index]
    assert (ranked[exact] == 0).all()
    np.testing.assert_array_equal(ranked[~exact], found.whole_run.standard_error[0, 0][~exact])  # type: ignore[union-attr,index]


@pytest.mark.parametrize("name", ["grad_dot", "grad_cos", "loss"])
def test_scores_that_are_no_amounts_are_not_told_as_such(name: str, trajectory: Trajectory, workload: Workload) -> None:
    """Nor ranked among exact scores, which are."""
    found = explain(trajectory, workload, WINDOWS, method=name, checks=Checks(trust=12, confirm=2))
    assert found.influence.measures != "query"
    assert found.ranking is found.whole_run
    worst = int(np.argmin(found.whole_run.of(0)))  # type: ignore[union-attr]
    assert found.sentences[0].startswith(f"Sample {worst} ")
    assert name in found.sentences[0]
    assert " by 0." not in found.sentences[0]
    assert "raises it by" not in found.sentences[0]
    exact = leave_one_out(trajectory, workload, [WHOLE], samples=12).of(0)
    agreement = correlations(found.whole_run.of(0), exact)  # type: ignore[union-attr]
    assert found.trust["spearman"] == pytest.approx(agreement.values["spearman"])
    assert "units of the query" in found.whole.undefined["trust/slope_ratio"]
    assert "slope_ratio" not in found.trust


def test_a_truth_of_other_windows_is_refused(trajectory: Trajectory, workload: Workload) -> None:
    truth = find_truth(trajectory, workload, WINDOWS, "local", Checks(ground_truth=3))
    with pytest.raises(InputError, match="has no scores of window 0-3"):
        explain(trajectory, workload, [Window(0, 3)], method="dit", checks=Checks(), truth=truth)


def test_a_sample_that_may_do_either_is_not_named(trajectory: Trajectory, workload: Workload) -> None:
    found = explain(trajectory, workload, WINDOWS, method="dit", checks=Checks())
    whole = found.whole_run
    assert whole is not None
    order = np.argsort(whole.of(0))
    error = np.full(whole.scores.shape, 1e-12)
    error[0, 0, order[[0, -1]]] = 1e3
    doubted = replace(found, whole_run=replace(whole, standard_error=error))
    assert doubted.sentences[0].startswith(f"Sample {order[1]} ")
    assert f"sample {order[-2]} (" in doubted.sentences[0]
    assert not set(order[[0, -1]]) & set(doubted.top(24)["sample_index"])


def test_removal_of_a_share_is_told_with_its_interval_and_held_against_the_bank(
    trajectory: Trajectory, workload: Workload
) -> None:
    method = Removal(removed=0.25)
    found = explain(trajectory, workload, WINDOWS, method=method, checks=Checks(ground_truth=6, trust=5))
    direct = method(trajectory, workload, [*WINDOWS, WHOLE])
    # Draws and retrainings run side by side or one after the other, as a stop-watch says: the same to rounding.
    np.testing.assert_allclose(found.scores.scores, direct.scores, rtol=0, atol=1e-5 * np.abs(direct.scores).max())
    for window in (*WINDOWS, WHOLE):
        (judged,) = direct.metadata["bank"][str(window)]
        figures = found.measured[window].values
        assert figures["removal/lds"] == pytest.approx(judged["order"], abs=0.01)
        assert [figures["removal/lds_low"], figures["removal/lds_high"]] == pytest.approx(
            judged["order_interval"], abs=0.03
        )
        assert figures["removal/slope"] == pytest.approx(judged["size"], rel=1e-3)
    # Exact leave-one-out stands beside, and does not rank.
    assert found.ranking is found.whole_run
    who, sure, _ = found.sentences
    harmful, helpful = extreme_samples(direct.select([WHOLE]), 1)
    assert len(helpful) == 1
    for sample in (*harmful, *helpful):
        low, high = (end[2, 0, sample] for end in direct.interval())
        if low < 0 < high:
            # Nobody knows whether it harms.
            assert "no sample hurt over the whole run" in who
            continue
        low, high = abs(low), abs(high)
        assert f"Sample {sample} " in who or f"sample {sample} " in who
        assert f"{figure(min(low, high))} to {figure(max(low, high))}" in who
    assert "where 25 % of the samples go, its removal" in who
    assert "alone, by exact retraining, it" in who
    assert sure.startswith("Held against retrainings without a random 25 % of the samples, agreement")
    assert "trust/spearman" not in found.whole.values
    note = influence_note(found, Links())
    assert "changes if a training sample is removed among 25 % of the samples" in note
    assert "LDS of removals" in note
    page = explanation_page(found)
    assert "Agreement with retraining without random shares of the samples: Spearman" in page
    assert "were left out of one window of training, measured at the end of that window, among 25 % of" in page
    assert "Agreement with exact leave-one-out" not in page


def test_it_shows_itself(trajectory: Trajectory, workload: Workload, tmp_path: Path) -> None:
    """In a notebook, as a figure and as a page; what samples are called is text there."""
    hostile = replace(workload, describe=lambda index: f"<b>{index}</b>")
    for method in ("dit", Removal(removed=0.25)):
        found = explain(trajectory, hostile, WINDOWS, method=method, checks=Checks(trust=5))
        shown = found._repr_html_()
        assert all(escape(sentence) in shown for sentence in found.sentences)
        assert "<b>" not in shown
        worst, best = extreme_samples(found.influence, 1, found.ranking)
        rows = re.findall(r"<td>(harmful|helpful)</td>\s*<td>[\d-]+</td>\s*<td>(\d+)</td>", shown)
        # Of removal's scores, no harmful one is told from 0 by so few samples.
        assert method != "dit" or rows[0] == ("harmful", str(worst[0]))
        assert ("helpful", str(best[0])) in rows
        drawn = found.plot()
        assert len(drawn.axes) > 1
        with Image.open(BytesIO(drawn._repr_png_())) as picture:
            assert picture.size == tuple(int(100 * inches) for inches in drawn.get_size_inches())
            assert len(picture.convert("RGB").getcolors(2**20)) > 100
        page = found.report(tmp_path / "answer.html").read_text(encoding="utf-8")
        assert page == explanation_page(found)


@pytest.mark.parametrize(("size", "word"), [(1.0, "very high"), (0.3, "moderate"), (1.6, "moderate")])
def test_agreement_in_order_alone_is_not_called_high(
    size: float, word: str, trajectory: Trajectory, workload: Workload
) -> None:
    found = explain(trajectory, workload, WINDOWS, method=Removal(removed=0.25), checks=Checks(trust=0))
    figures = {"removal/lds": 0.95, "removal/lds_low": 0.91, "removal/lds_high": 0.99, "removal/slope": size}
    alike = replace(found, whole=Metrics(figures), per_window=(Metrics(figures),) * 2)
    assert f"changes is {word} in the windows (Spearman 0.95" in alike.sentences[1]
    assert f"real changes being {size:.2f} times the foretold ones" in alike.sentences[1]


def test_by_default_the_method_is_the_main_jobs(trajectory: Trajectory, workload: Workload, tmp_path: Path) -> None:
    """Removal influence of a tenth, two samples at least; of two samples in all, the derivative."""
    found = explain(trajectory, workload, WINDOWS, checks=Checks())
    assert (found.influence.method, found.influence.removed) == ("removal", 0.1)
    assert usual_method(12) == Removal(removed=2 / 12)
    assert usual_method(3) == Removal(removed=2 / 3)
    assert usual_method(2) == Dit()
    few = digits_workload(train_set=Subset(workload.train_set, range(2)), batch_size=1, epochs=1)
    assert explain(train(few, tmp_path / "t"), few, "1", checks=Checks()).influence.method == "dit"
