from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"queries": ("a\ud83d",)}, "surrogates not allowed"),
        ({"queries": ("a", "a"), "scores": np.zeros((2, 2, 4))}, "not all different"),
        ({"samples": np.array([3, 0, 0, 1])}, "samples begin with"),
        ({"samples": np.array([-1, 0, 1, 2])}, "samples begin with"),
        ({"samples": np.arange(4.0)}, "samples begin with"),
        ({"kind": "mine"}, "kind"),
        ({"method": "x" * 1001}, "method"),
        ({"standard_error": np.full((2, 1, 4), np.inf)}, "standard_error is infinite"),
        ({"degrees_of_freedom": np.ones((2, 1))}, "no standard_error"),
        ({"metadata": {"kind": "final"}}, "the keys"),
        ({"metadata": {"seconds": "5 s"}}, "seconds"),
        ({"metadata": {"bank": [1]}}, "bank"),
        ({"metadata": {"a": np.arange(3)}}, "JSON"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        replace(example(), **changes).save(tmp_path / "influence")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 1, 0), (2, 0, 4)])
def test_results_of_nothing_and_unknown_freedom_come_back(shape: tuple[int, int, int], tmp_path: Path) -> None:
    empty = Influence(
        np.zeros(shape), example().windows[: shape[0]], ("loss",)[: shape[1]], np.arange(shape[2]), "local", "dit"
    )
    assert Influence.load(empty.save(tmp_path / "empty")).scores.shape == shape
    unknown = replace(example(), standard_error=np.ones((2, 1, 4)), degrees_of_freedom=np.array([[np.nan], [np.inf]]))
    found = Influence.load(unknown.save(tmp_path / "unknown")).degrees_of_freedom
    np.testing.assert_array_equal(found, unknown.degrees_of_freedom)


def test_damaged_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no influence result"):
        Influence.load(tmp_path)
    folder = example().save(tmp_path / "influence")
    description = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(description | {"num_samples": 5}))
    with pytest.raises(InputError, match=r"since metadata\.json has the shape"):
        Influence.load(folder)


def test_shape_that_contradicts_the_axes_is_refused() -> None:
    with pytest.raises(InputError, match="expected \\[windows, queries, samples\\]"):
        Influence(np.zeros((1, 1, 3)), (Window(0, 1),), ("loss",), np.arange(4), "local", "dit")


def test_infinite_scores_are_refused() -> None:
    with pytest.raises(InputError, match="a score is infinite"):
        replace(example(), scores=np.full((2, 1, 4), -np.inf))


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


def two_queries() -> Influence:
    """Every score differs from every other."""
    scores = np.arange(16.0).reshape(2, 2, 4) - 5
    windows = (Window(0, 2), Window(2, 7))
    return Influence(scores, windows, ("loss", "margin"), np.array([3, 0, 7, 5]), "local", "dit")


def edited(folder: Path, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
    two_queries().save(folder)
    edit(pd.read_parquet(folder / "scores.parquet")).to_parquet(folder / "scores.parquet", index=False)
    return folder


def described(folder: Path, **changes: Any) -> Path:
    """``None`` takes a key away."""
    two_queries().save(folder)
    description = json.loads((folder / "metadata.json").read_text()) | changes
    kept = {key: value for key, value in description.items() if value is not None}
    (folder / "metadata.json").write_text(json.dumps(kept))
    return folder


def reversed_in_one_window(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame[:8], frame[8:][::-1]])


def test_an_order_of_samples_of_its_own_comes_back(tmp_path: Path) -> None:
    loaded = Influence.load(edited(tmp_path, lambda frame: frame))
    assert loaded.samples.tolist() == [3, 0, 7, 5]
    np.testing.assert_array_equal(loaded.scores, two_queries().scores)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda frame: frame.sample(frac=1, random_state=0), "window_index of row 2 is 1; expected 0"),
        (reversed_in_one_window, "query of row 8"),
        (lambda frame: frame[::-1], "window_index of row 0"),
        (lambda frame: pd.concat([frame[8:], frame[:8]]), "window_index of row 0"),
        (lambda frame: pd.concat([frame[:4][::-1], frame[4:]]), "sample_index of row 4"),
        (lambda frame: frame.assign(window_index=frame["window_index"][::-1].to_numpy()), "window_index of row 0"),
        (lambda frame: frame.assign(window_end=frame["window_end"] + 1), "window_end of row 0 is 3; expected 2"),
        (lambda frame: frame.assign(window_start=0), "window_start of row 8 is 0; expected 2"),
        (lambda frame: frame.assign(query="loss"), "query of row 4 is another; expected 'margin'"),
        (lambda frame: frame.assign(query=1), "'query' holds int64; expected text"),
        (lambda frame: frame.assign(sample_index=1), "sample_index occurs twice"),
        (lambda frame: frame.assign(sample_index=-frame["sample_index"]), "sample_index -7"),
        (lambda frame: frame.assign(sample_index=frame["sample_index"].astype(str)), "expected whole numbers"),
        (lambda frame: frame.assign(sample_index=frame["sample_index"].where(frame["sample_index"] > 0)), "whole"),
        (lambda frame: frame.assign(score=frame["score"] > 0), "'score' holds bool; expected numbers"),
        (lambda frame: frame.assign(score=pd.Timestamp("2024-01-01")), "'score' holds timestamp"),
        (lambda frame: frame.assign(score=frame["score"].astype(str)), "'score' holds"),
        (lambda frame: frame.assign(score=np.inf), "score of row 0 is inf"),
        (lambda frame: frame.assign(standard_error=-1.0), "standard_error of row 0 is -1.0"),
        (lambda frame: frame.drop(columns="score"), "0 columns 'score'"),
        (lambda frame: frame.drop(columns="window_index"), "0 columns 'window_index'"),
        (lambda frame: frame[:-1], "has 15 rows"),
    ],
)
def test_rows_that_are_not_those_written_are_refused_by_field(
    edit: Callable[[pd.DataFrame], pd.DataFrame], field: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=field):
        Influence.load(edited(tmp_path, edit))


@pytest.mark.parametrize(
    "changes",
    [
        *({key: None} for key in ("kind", "method", "queries", "windows", "num_samples")),
        {"windows": [[2, 7], [0, 2]]},
        {"windows": [[0, 2], [2, 8]]},
        {"windows": [[0, 2], [7, 2]]},
        {"windows": [[0, 2], [2, True]]},
        {"windows": [[0, 2], "27"]},
        {"queries": ["margin", "loss"]},
        {"queries": ["loss", "loss"]},
        {"queries": "ab"},
        {"queries": ["loss", 1]},
        {"num_samples": 4.0},
        {"num_samples": -4},
        {"num_samples": 10**30},
        {"kind": "locally"},
        {"kind": ["local"]},
        {"method": 3},
        {"measures": "length"},
        {"method": "m" * 1001},
        # What others read of it.
        {"coupled": [True]},
        {"removal": 1},
        {"seconds": "long"},
        {"trajectory_digest": 5},
        {"versions": "torch"},
        {"draws_agree": 3},
        {"bank": [1]},
        {"removed": "most"},
        {"degrees_of_freedom": [[1, 2]]},
        {"degrees_of_freedom": [[1, -2], [1, 2]]},
        {"coupled": "no"},
        {"removal": "gone"},
        {"not_finite": "few"},
        {"sign_convention": "positive = harmful"},
    ],
)
def test_a_description_that_is_not_that_of_the_rows_is_refused_by_field(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = changes
    field = {"queries": "quer", "windows": "window"}.get(name, name)
    with pytest.raises(InputError, match=field):
        Influence.load(described(tmp_path, **changes))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = two_queries().save(tmp_path) / "metadata.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "method": "another"}')
    with pytest.raises(InputError, match="'method' is there twice"):
        Influence.load(tmp_path)


def test_degrees_of_freedom_of_no_standard_error_are_refused(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda frame: frame.drop(columns="standard_error", errors="ignore"))
    content = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(content | {"degrees_of_freedom": [[1, 2], [1, 2]]}))
    with pytest.raises(InputError, match="degrees_of_freedom"):
        Influence.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1, 2]", "{", "\xff", "9" * 10_000, '{"kind": 1, "kind": 2}'])
def test_what_is_no_description_is_refused(text: str, tmp_path: Path) -> None:
    (two_queries().save(tmp_path) / "metadata.json").write_text(text)
    with pytest.raises(InputError, match=r"metadata\.json"):
        Influence.load(tmp_path)


@pytest.mark.parametrize("name", ["scores.parquet", "metadata.json"])
@pytest.mark.parametrize("endless", [True, False])
def test_what_has_no_end_is_not_read(name: str, endless: bool, tmp_path: Path) -> None:
    path = two_queries().save(tmp_path) / name
    path.unlink()
    if endless:
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        Influence.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "count", "message"),
    [("[]", 20_000_000, "more than 4000000 values"), ('""', 900_000, "900000 values are not what is expected")],
)
def test_descriptions_of_very_many_values_are_refused_at_once(
    part: str, count: int, message: str, tmp_path: Path
) -> None:
    """A list takes thirty times its two bytes, and the report of a fault a thousand times."""
    path = described(tmp_path, windows=["here"]) / "metadata.json"
    path.write_text(path.read_text().replace('"here"', ",".join([part] * count)))
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message):
        Influence.load(tmp_path)
    assert time.perf_counter() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    """Ten million rows of nothing, in some thousand bytes; and names of 32 MiB."""
    rows = 10**7
    folder = described(tmp_path, windows=[[0, 1]], queries=["loss"], num_samples=rows)
    part = 10**6
    columns: dict[str, Any] = {name: np.zeros(part, np.int64) for name in ("sample_index", "window_index")}
    columns |= {"window_start": np.zeros(part, np.int64), "window_end": np.ones(part, np.int64)}
    table = pa.table({**columns, "query": pa.array(["loss"] * part), "score": np.zeros(part)})
    with pq.ParquetWriter(folder / "scores.parquet", table.schema, compression="zstd") as writer:
        for _ in range(rows // part):
            writer.write_table(table)
    with pytest.raises(InputError, match="claims 10000000 rows"):
        Influence.load(folder)
    described(tmp_path / "long")
    frame = pd.read_parquet(tmp_path / "long" / "scores.parquet").assign(query="x" * 2**25)
    frame.to_parquet(tmp_path / "long" / "scores.parquet", index=False, compression="zstd")
    written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="column 'query' takes"):
        Influence.load(tmp_path / "long")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - written < 50_000
