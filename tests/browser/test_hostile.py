"""Strings from data are shown as they are, wherever MLflow shows them, and nothing of them runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import TEXTS
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

MARKUP = "img[src='x'], a[href^='javascript:'], svg[onload]"


def spaced(text: str) -> str:
    """As a browser shows white space."""
    return " ".join(text.split())


def test_table_shows_descriptions_literally(page, site, shot, tmp_path: Path) -> None:
    path = site.client.download_artifacts(site.world.hostile, "influence/top_samples.json", str(tmp_path))
    table = json.loads(Path(path).read_text())
    place = table["columns"].index("sample")
    stored = [row[place] for row in table["data"]]
    # What turns the direction of writing is taken out.
    assert {*TEXTS[:4], 199 * "long " + "long…", "gnirts desrever"} < set(stored)
    page.goto(site.run(site.world.hostile, "artifacts/influence/top_samples.json", site.world.hostile_experiment))
    expect(page.get_by_role("columnheader").filter(has_text="sample_index")).to_be_visible()
    rows = page.get_by_role("table").get_by_role("row")
    shown = rows.evaluate_all("(rows, place) => rows.map(row => row.children[place].textContent)", place)[1:]
    assert len(shown) > 10
    assert [spaced(text) for text in shown] == [spaced(text) for text in stored[: len(shown)]]
    assert page.locator(MARKUP).count() == 0
    shot("hostile-table")


def test_note_shows_texts_literally(page, site, shot) -> None:
    note = site.client.get_run(site.world.hostile).data.tags["mlflow.note.content"]
    page.goto(site.run(site.world.hostile, experiment=site.world.hostile_experiment))
    page.get_by_text("Show more").click()
    named = [text for text in TEXTS[:4] if page.get_by_text(text[:20]).count()]
    assert named, note
    assert page.locator(MARKUP).count() == 0
    assert page.get_by_role("heading", name="heading", exact=False).count() == 0
    shot("hostile-note")


def test_report_shows_texts_literally(page, site, shot) -> None:
    page.goto(site.run(site.world.hostile, "artifacts/influence/report.html", site.world.hostile_experiment))
    report = page.frame_locator("iframe")
    expect(report.locator("#samples tbody tr").first).to_be_visible()
    for text in TEXTS[:4]:
        expect(report.get_by_text(text).first).to_be_attached()
    assert report.locator(MARKUP).count() == 0
    shot("hostile-report")
