from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import stores
from stores import Start, Store, tracking

KINDS = {
    "sqlite": stores.sqlite,
    "server": stores.server,
    "postgresql": stores.postgresql,
    "s3": stores.s3,
}
REQUIRED = os.environ.get("DIT_REQUIRE_SERVERS") == "1"
"""Set where the stores' software must be there, as in CI: a test whose store is missing then fails."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test's own file cache: the folder that the files are in."""
    monkeypatch.setenv("DIT_MLFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dit-mlflow"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh SQLite store with its artifacts beside it; returns its URI."""
    with stores.sqlite(tmp_path) as fresh, tracking(fresh, tmp_path, monkeypatch):
        yield fresh.uri


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts the store of a kind, once for all tests; skips the test if its software is missing."""
    started: dict[str, Store] = {}
    with ExitStack() as running:

        def begin(kind: str) -> Store:
            if kind not in started:
                started[kind] = running.enter_context(KINDS[kind](tmp_path_factory.mktemp(kind)))
            return started[kind]

        def begin_or_skip(kind: str) -> Store:
            try:
                return begin(kind)
            except stores.Missing as error:
                if REQUIRED:
                    pytest.fail(f"{error}; DIT_REQUIRE_SERVERS=1 forbids to skip")
                pytest.skip(str(error))

        yield begin_or_skip


SELDOM = ("postgresql", "s3")
"""Kinds of store that most tests meet among the slow ones only."""


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.slow if kind in SELDOM else ()) for kind in KINDS])
def any_store(
    request: pytest.FixtureRequest, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """Each kind of store in turn, with a fresh experiment."""
    chosen = start(request.param)
    with tracking(chosen, tmp_path, monkeypatch, tmp_path.name):
        yield chosen


@pytest.fixture(params=["server", "s3"])
def remote_store(
    request: pytest.FixtureRequest, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """Each kind of store whose artifacts are not in a folder of this machine, with a fresh experiment."""
    chosen = start(request.param)
    with tracking(chosen, tmp_path, monkeypatch, tmp_path.name):
        yield chosen
