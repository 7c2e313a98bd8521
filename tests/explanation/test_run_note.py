"""Notes as a Markdown renderer shows them: which elements come out, where links lead, what stays text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from workloads import digits_workload

from dit_mlflow import Influence, Window, Workload, train
from dit_mlflow.evaluation import Metrics
from dit_mlflow.explanation import (
    Explanation,
    Gallery,
    Links,
    Truth,
    comparison_note,
    influence_note,
    training_note,
    window_note,
)
from dit_mlflow.explanation.markdown import GAP, escaped, markdown_table
from dit_mlflow.explanation.model_card import BEGIN, END, CardFacts, with_card
from dit_mlflow.tracking.jobs.verify import verify_target

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "image": '"><img src=x onerror=alert(1)>',
    "markdown": "**bold** _it_ `code` # x [l](http://a.b) ![i](http://a.b/c.png) ~~s~~ | cell",
    "autolinks": "http://evil.example www.evil.example me@evil.example <http://a.b>",
    "entities": "&lt;b&gt; &amp; &#60;i&#62;",
    "lines": "first\n\n# second\n- third\n```\nfourth",
    "mathematics": "$\\frac{1}{2}$ costs $5",
    "backslashes": "\\*a\\* \\\\",
    "emoji": "😀 :smile: ✓",
    "terminal": "a\x1b[31mred\x07",
}


def rendered(markdown: str) -> list[Token]:
    """All tokens, of a renderer that knows tables and strikethrough, and lets HTML through."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(markdown):
        found += [token, *(token.children or [])]
    return found


def kinds(markdown: str) -> set[str]:
    return {token.type for token in rendered(markdown)}


def shown(markdown: str) -> str:
    return "".join(token.content for token in rendered(markdown) if token.type in ("text", "text_special"))


def plain_text(text: str) -> str:
    """On one line, without what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@pytest.mark.parametrize("name", HOSTILE)
def test_escaped_text_comes_out_as_it_is(name: str) -> None:
    text = HOSTILE[name]
    assert kinds(escaped(text)) <= {"paragraph_open", "inline", "text", "text_special", "paragraph_close"}
    assert shown(escaped(text)) == plain_text(text)
    row = rendered(markdown_table(["a", "b"], [[escaped(text), "last"]], GAP))
    assert sum(token.type == "td_open" for token in row) == 2


def test_direction_of_text_cannot_be_turned_and_length_has_an_end() -> None:
    assert escaped("a\u202eb\u2067c") == "a b c"
    assert len(shown(escaped("x" * 10_000))) == 200
    assert escaped("half \ud83d of a pair") == "half ? of a pair"


PARTS = st.lists(st.sampled_from([BEGIN, END, *(f"word{i}" for i in range(9))]), max_size=12)


@given(PARTS)
def test_what_people_write_around_our_part_of_a_description_is_kept(parts: list[str]) -> None:
    influence = findings().influence
    once = with_card(" ".join(parts), influence, CardFacts())
    twice = with_card(once, influence, CardFacts(made=["another run"]))
    # The last part between marks is ours, whoever wrote it.
    before, begun, rest = " ".join(parts).rpartition(BEGIN)
    theirs = before + rest.partition(END)[2] if begun and END in rest else " ".join(parts)
    for text in (once, twice):
        assert [word for word in text.split() if word.startswith("word")] == [
            word for word in theirs.split() if word.startswith("word")
        ]
    assert "another run" in twice


WINDOWS = (Window(0, 4), Window(4, 8))


def findings(line: str = "digit 7", count: int = 2, windows: tuple[Window, ...] = WINDOWS) -> Explanation:
    scores = np.tile(np.array([[-2.0, 1.0, 3.0]]), (len(windows), 1))[:, None]
    found = Influence(scores, windows, ("mean_validation_loss",), np.arange(3), "local", "dit")
    data = torch.utils.data.TensorDataset(torch.zeros(3, 1))
    workload = Workload(
        torch.nn.Linear(1, 1), lambda model, batch: model(batch[0])[:, 0], data, data, describe=lambda index: line
    )
    metrics = tuple(Metrics({"ground_truth/spearman": 0.5 + 0.4 * k / len(windows)}) for k in range(len(windows)))
    return Explanation(found, Metrics({"ground_truth/spearman": 0.75}), metrics, Gallery(workload), truth=Truth(found))


LINKS = Links(
    ("train mnist", "#/training"),
    ["#/w0", "#/w1"],
    {"report.html": "#/report", "heat_map.png": "#/heat"},
    "#/charts",
    {"windows": "#/view?a=1&b=2"},
)


def hrefs(markdown: str) -> list[str]:
    return [str(token.attrs["href"]) for token in rendered(markdown) if token.type == "link_open"]


def test_influence_note_answers_first_and_leads_on() -> None:
    note = influence_note(findings(), LINKS)
    first = next(token for token in rendered(note) if token.type == "inline")
    assert shown(first.content).startswith("Sample 0 (digit 7) hurt the model most")
    assert "Agreement with exact retraining is moderate" in shown(first.content)
    assert hrefs(note) == ["#/training", "#/w0", "#/w1", "#/view?a=1&b=2", "#/report", "#/heat", "#/charts"]
    cells = [shown(token.content).strip() for token in rendered(note) if token.type == "inline"]
    assert "0 digit 7" in cells
    assert "2 digit 7" in cells
    assert "0.70" in cells
    assert "absent from the steps of the window, and the effect is measured at the window's end" in shown(note)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_stay_text_in_every_note(name: str) -> None:
    plain = findings("digit 7")
    hostile = findings(HOSTILE[name])
    for make in (lambda found: influence_note(found, LINKS), lambda found: window_note(found, 0, ("run", "#/run"))):
        # The same elements as with a harmless description, in the same order, and no more links.
        structure = [[t.type for t in rendered(make(found)) if "text" not in t.type] for found in (plain, hostile)]
        assert structure[0] == structure[1]
        assert hrefs(make(plain)) == hrefs(make(hostile))
        assert plain_text(HOSTILE[name])[:10] in shown(make(hostile))


def test_notes_never_exceed_what_a_tag_holds() -> None:
    many = tuple(Window(t, t + 1) for t in range(200))
    links = Links(("t", "#/t"), [f"#/experiments/0/runs/{'a' * 32}?workflowType=machine_learning"] * 200)
    for line in ("*" * 10_000, "digit 7"):
        note = influence_note(findings(line, windows=many), links)
        assert len(note) < 8000
        # Whole rows: the table has as many cells in each.
        assert kinds(note) >= {"table_open", "td_open"}
        cells = sum(token.type == "td_open" for token in rendered(note))
        assert cells % 4 == 0
        assert cells >= 4 * 5


def test_window_note_speaks_of_its_window_and_leads_to_its_parent() -> None:
    note = window_note(findings(), 1, ("influence mnist", "#/parent"))
    assert shown(note).startswith("In steps 4-8, sample 0 (digit 7) hurt the model most")
    assert hrefs(note) == ["#/parent"]


def test_training_note_has_commands_that_can_be_copied(tmp_path: Path) -> None:
    trajectory = train(digits_workload(), tmp_path)
    note = training_note("abc123", trajectory)
    blocks = [token.content for token in rendered(note) if token.type == "fence"]
    assert blocks[0] == "dit-mlflow influence --training-run abc123 --workload package.module:function\n"
    compile(blocks[1], "note", "exec")
    # 64*6 + 6 + 6*3 + 3 weights; 24 samples in batches of 8, 3 epochs.
    assert "411 parameters, 9 steps of SGD in 3 epochs on 24 samples" in shown(note)
    assert f"{len(trajectory.checkpoint_steps)} checkpoints" in shown(note)
    assert "broken off" not in note


def test_one_step_is_one(tmp_path: Path) -> None:
    trajectory = train(digits_workload(), tmp_path, max_steps=1)
    assert "411 parameters, 1 step of SGD" in shown(training_note("abc123", trajectory))
    assert repr(trajectory).startswith("<Trajectory of 1 step, 24 samples")
    told: list[str] = []
    verify_target(str(tmp_path), "", {}, told.append)
    assert any("1 step in" in line for line in told)


def test_comparison_note_has_the_table_best_first() -> None:
    table = pd.DataFrame(
        {
            "method": ["a_b", "c", "d"],
            "failed": [False, False, True],
            "error": ["", "", "no <b>luck</b>"],
            "spearman": [0.25, 0.75, None],
            "seconds": [1.0, 2.0, None],
        }
    )
    note = comparison_note(table, [], 1, "local")
    assert shown(note).startswith(
        "Without one sample (exact leave-one-out, Spearman), nearest come c 0.75 (2 s) and a_b"
    )
    rows = [shown(token.content).strip() for token in rendered(note) if token.type == "inline"][2:]
    assert rows == [
        *("method", "Spearman (95 % interval)", "seconds"),
        *("c", "0.75", "2.00", "a_b", "0.25", "1.00", "d", "failed: no <b>luck</b>", ""),
    ]
    assert "html_inline" not in kinds(note)
