from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import Opener


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """Opens HTML in a sandboxed frame, and in the end asks for what a page must never do."""
    seen: list[str] = []
    contexts = []

    def open_page(html: str, scheme: str = "light", width: int = 900) -> Any:
        (tmp_path / "report.html").write_text(html, encoding="utf-8", newline="\n")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        outer = context.new_page()
        outer.on("console", lambda message: seen.append(f"console: {message.text}"))
        outer.on("pageerror", lambda error: seen.append(f"error: {error}"))
        outer.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        outer.on("popup", lambda page: seen.append(f"popup: {page.url}"))
        inside = ("file:", "blob:", "data:")
        outer.on("request", lambda asked: None if asked.url.startswith(inside) else seen.append(f"net: {asked.url}"))
        # As MLflow does it: a frame with this sandbox attribute around a blob.
        (tmp_path / "outer.html").write_text(
            "<!doctype html><style>body{margin:0}iframe{border:0;width:100vw;height:100vh;display:block}</style>"
            "<iframe sandbox='allow-scripts'></iframe>"
        )
        outer.goto((tmp_path / "outer.html").as_uri())
        outer.evaluate(
            "html => document.querySelector('iframe').src = URL.createObjectURL(new Blob([html], {type: 'text/html'}))",
            html,
        )
        frame = outer.frame_locator("iframe")
        frame.locator("#samples tbody tr").first.wait_for(timeout=15_000)
        return frame

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []
