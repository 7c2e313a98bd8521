"""Strings from data are shown as they are, wherever MLflow shows them, and nothing of them runs."""

from __future__ import annotations

from hostile import TEXTS
from playwright.sync_api import expect


def test_table_shows_hostile_descriptions_literally(page, site, shot) -> None:
    page.goto(site.run(site.world.hostile, "artifacts/influence/top_samples.json", site.world.hostile_experiment))
    expect(page.get_by_role("columnheader").filter(has_text="sample_index")).to_be_visible()
    for text in TEXTS[:4]:
        expect(page.get_by_text(text, exact=True).first).to_be_attached()
    assert page.locator("img[src='x']").count() == 0
    shot("hostile-table")


def test_note_shows_no_markup_of_the_data(page, site, shot) -> None:
    page.goto(site.run(site.world.hostile, experiment=site.world.hostile_experiment))
    expect(page.get_by_role("heading", name="influence hostile", exact=False)).to_be_visible()
    expect(page.get_by_text("ground_truth/spearman", exact=True).first).to_be_visible()
    assert page.locator("img[src='x'], a[href^='javascript:']").count() == 0
    assert page.get_by_role("heading", name="heading", exact=False).count() == 0
    shot("hostile-note")
