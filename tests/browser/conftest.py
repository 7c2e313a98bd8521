from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import stores
import world
from browsing import REQUIRED, missing
from filelock import FileLock
from mlflow import MlflowClient
from world import World

MODE = "workflowType=machine_learning"


@dataclass(frozen=True)
class Site:
    """A server with a :class:`World` in it."""

    url: str
    world: World

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.url)

    def run(self, run_id: str, tab: str = "", experiment: str = "") -> str:
        """The address of a run's page."""
        place = f"{self.url}/#/experiments/{experiment or self.world.experiment}/runs/{run_id}"
        return f"{place}{'/' if tab else ''}{tab}?{MODE}"

    def runs(self, query: str = "") -> str:
        """The address of the run list."""
        return f"{self.url}/#/experiments/{self.world.experiment}/runs?{MODE}{query}"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Site]:
    """The world, built once for all workers; each has a server of its own before it."""
    if missing() and not REQUIRED:
        pytest.skip(str(missing()))
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "browser-world"
    folder.mkdir(exist_ok=True)
    story = folder / "world.json"
    with ExitStack() as running:
        with FileLock(f"{folder}.lock"):
            server = running.enter_context(stores.server(folder))
            if not story.exists():
                story.write_text(world.saved(world.build(server.uri, folder)))
        yield Site(server.uri, world.restored(story.read_text()))


@pytest.fixture
def names(page: Any) -> Any:
    """The names of the runs that the run list shows, from top to bottom."""

    def listed() -> list[str]:
        rows = page.get_by_role("row").filter(has=page.locator("a[href*='/runs/']"))
        places = rows.evaluate_all(
            """rows => rows.map(row => [Number(row.getAttribute('row-index')),
                                        row.querySelector("a[href*='/runs/']").innerText])"""
        )
        return [name for _, name in sorted(places)]

    return listed
