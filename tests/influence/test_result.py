from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_mlflow import Influence, InputError, Window


def example() -> Influence:
    scores = np.array([[[0.5, -2.0, 0.0, 3.0]], [[np.nan, 1.0, -1.0, -4.0]]])
    return Influence(
        scores, (Window(0, 2), Window(2, 7)), ("loss",), np.arange(4), "local", "dit", {"dtype": "float64"}
    )


def test_top_lists_harmful_and_helpful_by_sign() -> None:
    table = example().top(1)
    rows = table[["window_index", "side", "rank", "sample_index", "score"]].to_numpy().tolist()
    assert rows == [
        [0, "harmful", 1, 1, -2.0],
        [1, "harmful", 1, 3, -4.0],
        [0, "helpful", 1, 3, 3.0],
        [1, "helpful", 1, 1, 1.0],
    ]


def test_long_form_carries_every_score_to_its_place() -> None:
    frame = example().to_frame()
    row = frame[(frame.window_index == 1) & (frame.sample_index == 3)].iloc[0]
    assert (row.window_start, row.window_end, row["query"], row.score) == (2, 7, "loss", -4.0)
    assert len(frame) == 8


def test_saved_result_comes_back(tmp_path: Path) -> None:
    original = example()
    loaded = Influence.load(original.save(tmp_path / "influence"))
    np.testing.assert_array_equal(loaded.scores, original.scores)
    assert (loaded.windows, loaded.queries, loaded.kind, loaded.method) == (
        original.windows,
        original.queries,
        "local",
        "dit",
    )
    assert loaded.metadata == {"dtype": "float64"}
    description = json.loads((tmp_path / "influence" / "metadata.json").read_text())
    assert "positive = helpful" in description["sign_convention"]


def test_damaged_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no influence result"):
        Influence.load(tmp_path)
    folder = example().save(tmp_path / "influence")
    description = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(description | {"num_samples": 5}))
    with pytest.raises(InputError, match="announces"):
        Influence.load(folder)


def test_shape_that_contradicts_the_axes_is_refused() -> None:
    with pytest.raises(InputError, match="expected \\[windows, queries, samples\\]"):
        Influence(np.zeros((1, 1, 3)), (Window(0, 1),), ("loss",), np.arange(4), "local", "dit")


def with_errors() -> Influence:
    """Scores of 1 to 4 errors each; of the second window from two pairs, where 12.7 errors make an interval."""
    errors = np.array([[[0.4, 0.5, 1.0, 3.0]], [[np.nan, 1.0, 0.05, 0.4]]])
    return replace(example(), standard_error=errors, degrees_of_freedom=np.array([[1000], [1]]))


def test_a_sample_whose_interval_holds_0_is_neither_harmful_nor_helpful() -> None:
    low, high = with_errors().interval()
    np.testing.assert_allclose((high - low)[:, 0, 1:] / 2, [[0.981, 1.962, 5.887], [12.706, 0.635, 5.082]], rtol=1e-3)
    table = with_errors().top(4)
    assert table[["window_index", "side", "sample_index", "standard_error"]].to_numpy().tolist() == [
        [0, "harmful", 1, 0.5],
        [1, "harmful", 2, 0.05],
    ]
    # Where errors are not known, scores are listed as they are.
    unknown = replace(with_errors(), standard_error=np.full((2, 1, 4), np.nan)).top(4)
    assert unknown["sample_index"].tolist() == example().top(4)["sample_index"].tolist()
    with pytest.raises(InputError, match="no standard error"):
        example().interval()


def test_errors_come_back_and_follow_their_windows(tmp_path: Path) -> None:
    original = with_errors()
    loaded = Influence.load(original.save(tmp_path / "influence"))
    assert loaded.standard_error is not None and loaded.degrees_of_freedom is not None
    np.testing.assert_array_equal(loaded.standard_error, original.standard_error)
    np.testing.assert_array_equal(loaded.degrees_of_freedom, original.degrees_of_freedom)
    assert loaded.metadata == original.metadata
    late = original.select([Window(2, 7)])
    np.testing.assert_array_equal(late.standard_error, original.standard_error[1:])  # type: ignore[index]
    np.testing.assert_array_equal(late.degrees_of_freedom, [[1]])
    assert "standard_error" not in example().to_frame()


def test_errors_of_another_shape_are_refused() -> None:
    for name, value in [
        ("standard_error", np.ones((2, 1, 3))),
        ("standard_error", np.full((2, 1, 4), -1.0)),
        ("degrees_of_freedom", np.ones(2)),
    ]:
        with pytest.raises(InputError, match=f"{name} has shape"):
            replace(example(), **{name: value})  # type: ignore[arg-type]


def test_a_group_is_the_sum_of_its_members() -> None:
    chosen = replace(example(), samples=np.array([10, 11, 12, 13]))
    np.testing.assert_array_equal(chosen.of_group([13, 11, 11]), [[1.0], [-3.0]])
    np.testing.assert_array_equal(chosen.of_group([10]), [[0.5], [np.nan]])
    np.testing.assert_array_equal(chosen.of_group([]), [[0.0], [0.0]])
    with pytest.raises(InputError, match=r"samples \[3\] of the group"):
        chosen.of_group([3, 10])
