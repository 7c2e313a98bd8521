"""Take the pictures of docs/mlflow.md: ``python docs/screenshots.py``, about three minutes.

Starts an MLflow server of its own, runs the jobs that the page tells of with their defaults, and looks at them in
Chromium. Needs the extra ``dev`` and a Chromium (``DIT_CHROMIUM``, or one in PATH).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from browsing import HEIGHT, SETTLED, WIDTH, launched  # noqa: E402

from benchmarks import stores  # noqa: E402
from dit_mlflow.evaluation.figures import ACCURACY, SPEARMAN, VALIDATION  # noqa: E402

IMAGES = HERE / "images"
MODE = "workflowType=machine_learning"
EXPERIMENT = "digits"
MODEL = "digits-1-against-7"


@dataclass
class Jobs:
    """Runs jobs against a server, and remembers what they printed."""

    url: str
    folder: Path
    said: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, *arguments: str) -> None:
        """Run a job of the command line as ``name``; the program ends if it fails."""
        print("dit-mlflow", *arguments, file=sys.stderr)
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
            "DIT_MLFLOW_CACHE": str(self.folder / "cache"),
        }
        command = [sys.executable, "-m", "dit_mlflow.cli", *arguments]
        self.said[name] = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def id_of(self, name: str, label: str) -> str:
        """The run that the job ``name`` named as its ``label``."""
        return re.findall(rf"^{label} +(\w+)$", self.said[name], re.MULTILINE)[0]

    def link(self, name: str, to: str) -> str:
        """The link that the job ``name`` printed below ``compare <to>``."""
        return re.findall(rf"compare {to}\n +(\S+)", self.said[name])[0]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, stores.server(Path(temporary)) as server:
        jobs = Jobs(server.uri, Path(temporary))
        jobs.run("local", "influence")
        first = jobs.id_of("local", "training run")
        jobs.run("second", "influence", "--init-seed", "1", "--order-seed", "1")
        jobs.run("cumulative", "influence", "--training-run", first, "--kind", "cumulative")
        jobs.run("compare", "compare", "--training-run", first)
        jobs.run("register", "register", "--influence-run", jobs.id_of("local", "influence run"), "--model-name", MODEL)
        with launched() as browser:
            context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
            context.add_init_script(SETTLED)
            look(context.new_page(), jobs, first, f"{jobs.url}/#/models/{MODEL}/versions/1?{MODE}")


def look(page: Any, jobs: Jobs, training: str, registered: str) -> None:
    """Visit what the page tells of, in its order."""
    influence = jobs.id_of("local", "influence run")
    experiment = MlflowClient(jobs.url).get_experiment_by_name(EXPERIMENT).experiment_id
    runs = f"{jobs.url}/#/experiments/{experiment}/runs"

    visit(page, f"{runs}/{influence}?{MODE}", SPEARMAN.name)
    page.get_by_text("Show more").click()
    picture(page, "note")

    visit(page, f"{runs}?{MODE}", "local 5 windows · influence mnist dnn")
    row = page.get_by_role("row").filter(
        has=page.get_by_role("link", name="local 5 windows · influence mnist dnn", exact=True)
    )
    row.get_by_role("button").click()
    page.get_by_text("w00 0-16").wait_for()
    picture(page, "runs")

    for name, to, shown in (
        ("local", "windows", SPEARMAN.name),
        ("compare", "methods", SPEARMAN.by_window),
        ("local", "influence runs", SPEARMAN.by_window),
        ("local", "trainings", VALIDATION + ACCURACY),
    ):
        visit(page, jobs.link(name, to), shown)
        cards = page.get_by_test_id("experiment-view-compare-runs-card")
        cards.nth(1).locator(".main-svg").first.wait_for()
        picture(page, to.replace(" ", "-"))
    visit(page, jobs.link("local", "influence runs").replace("=CHART", "=ARTIFACT"), "influence/windows.json")
    picture(page, "tables")

    visit(page, f"{runs}/{influence}/artifacts/influence/report.html?{MODE}", "influence/report.html")
    page.frame_locator("iframe").locator("#samples tbody tr").first.wait_for()
    picture(page, "report")
    plot = "influence/influence_over_windows.png"
    visit(page, f"{runs}/{influence}/artifacts/{plot}?{MODE}", plot)
    page.get_by_role("img", name=plot).wait_for()
    picture(page, "plot")

    visit(page, f"{runs}/{training}?{MODE}", VALIDATION + ACCURACY)
    picture(page, "training")
    visit(page, registered, "Version 1")
    picture(page, "model-version")


def visit(page: Any, address: str, text: str) -> None:
    """Go there, and wait until the page shows ``text``."""
    page.goto("about:blank")  # An address that differs after the # alone would be the same page.
    page.goto(address)
    page.get_by_text(text).first.wait_for()


def picture(page: Any, name: str) -> None:
    """Keep the page as ``images/<name>.png``, in 256 colours."""
    page.wait_for_timeout(1500)  # For the charts below and beside the one that was waited for.
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path, animations="disabled")
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} {path.stat().st_size // 1024} KB", file=sys.stderr)


if __name__ == "__main__":
    main()
