"""Chromium for tests: pages that must not fail, must not leave this machine, and are kept as pictures."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "/usr/bin/chromium", "/usr/lib/chromium/chromium")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTH, HEIGHT = 1400, 900
WAIT = 60_000
"""Milliseconds for something to appear: a machine with other work is slow, and what is there is not waited for."""
LOCAL = {"127.0.0.1", None}
REQUIRED = os.environ.get("DIT_REQUIRE_SERVERS") == "1"

MLFLOWS_OWN = (
    # A server without logins says so by 404.
    (r"status of 404", r"/mlflow/users/current$"),
    # MLflow's layout, when many charts appear at once.
    (r"ResizeObserver loop completed with undelivered notifications", r""),
    # Its charts, when they are drawn before they have a size, on a machine that is slow.
    (r"^Error: <\w+> attribute \w+: ", r"/static-files/static/js/[^/]+\.js$"),
)
"""Errors that MLflow's UI writes to the console by itself: text and place of each."""

SETTLED = """
if (location.hostname === '127.0.0.1' && window === window.top) {
    localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')
    localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')
}
"""
"""As for a person who has closed the assistant that MLflow's UI opens on the first visit."""

Shot = Callable[[str], Path]


def chromium() -> str | None:
    """The Chromium to use: ``DIT_CHROMIUM``, else the first that is installed."""
    return os.environ.get("DIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def missing() -> str | None:
    """What is not on this machine, if anything."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright; no browser of its own is needed)"
    return None if chromium() else "no Chromium in PATH (apt-get install chromium, or name one in DIT_CHROMIUM)"


# Not for the session: as long as Playwright runs, nothing else in its thread can start an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Playwright ``Browser``; skips the test where there is none, but fails it with ``DIT_REQUIRE_SERVERS=1``."""
    reason = missing()
    if reason and REQUIRED:
        pytest.fail(f"{reason}; DIT_REQUIRE_SERVERS=1 forbids to skip")
    if reason:
        pytest.skip(reason)
    with launched() as found:
        yield found


@contextmanager
def launched() -> Iterator[Any]:
    """A Playwright ``Browser``."""
    from playwright.sync_api import expect, sync_playwright

    # Chromium writes reports of crashes, and settings of its toolkit, below the home folder.
    with TemporaryDirectory(prefix="dit-chromium-") as folder, sync_playwright() as playwright:
        environment = {**os.environ, "XDG_CONFIG_HOME": folder, "XDG_CACHE_HOME": folder}
        found = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS), env=environment)
        expect.set_options(timeout=WAIT)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page; in the end the test fails if the page threw, logged an error, opened a dialog or asked another host."""
    faults: list[str] = []
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    context.add_init_script(SETTLED)
    found = context.new_page()
    found.set_default_timeout(WAIT)
    watch(found, faults)
    yield found
    context.close()
    assert not faults, faults


def watch(page: Any, faults: list[str]) -> None:
    """Writes down in ``faults`` what a page must not do."""

    def console(message: Any) -> None:
        if message.type == "error" and not mlflows_own(message.text, message.location.get("url", "")):
            faults.append(f"console: {message.text} ({message.location.get('url', '')})")

    def dialog(opened: Any) -> None:
        faults.append(f"dialog: {opened.message}")
        opened.dismiss()

    def asked(request: Any) -> None:
        if urlsplit(request.url).hostname not in LOCAL:
            faults.append(f"request to another host: {request.url[:200]}")

    page.on("console", console)
    page.on("pageerror", lambda error: faults.append(f"page: {error}"))
    page.on("dialog", dialog)
    page.on("request", asked)


def mlflows_own(text: str, place: str) -> bool:
    """Whether an error is one of :data:`MLFLOWS_OWN`."""
    return any(re.search(told, text) and re.search(where, place) for told, where in MLFLOWS_OWN)


@pytest.fixture
def shot(page: Any, tmp_path: Path) -> Shot:
    """A picture of the page as it is now: ``shot("name")`` is ``name.png`` in ``DIT_SCREENSHOTS``, which is kept."""
    folder = Path(os.environ.get("DIT_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)

    def take(name: str) -> Path:
        path = folder / f"{name}.png"
        page.screenshot(path=path)
        return path

    return take


def pixels(path: Path) -> np.ndarray:
    """A picture as integers ``[H, W, 3]``."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)
