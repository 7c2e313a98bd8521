"""A distribution of somebody else's, built as they would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

LOSS_DROP = Path(__file__).parent / "methods" / "third_party"


def wheel_of(source: Path, folder: Path) -> Path:
    """The wheel of the project in ``source``, made by its own backend in ``folder``; Python imports from it as is."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(source, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    finished = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel
