from __future__ import annotations

import json
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
