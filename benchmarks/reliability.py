"""Load and faults, counted: ``python benchmarks/reliability.py`` writes docs/reliability.json and docs/reliability.md.

``--sections`` measures some of them anew and keeps the others. Stores are started on loopback; each is measured if its
software is there (the extra ``dev``; PostgreSQL; full and read-only disks are mounted, which takes root). What has many
steps, samples or windows runs beside all else, since most of the rest waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import stores  # noqa: E402
from benchmarks.faults import disks, kills, load, servers  # noqa: E402
from benchmarks.faults.document import document  # noqa: E402

LOCK = threading.Lock()
FIGURES, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"

BESIDE = ("size", "length")
"""In a lane of their own."""
SECTIONS = {
    "recorders": load.recorders,
    "jobs": load.jobs,
    "size": load.size,
    "length": load.length,
    "faults": servers.faults,
    "reading": servers.reading,
    "full": disks.full,
    "handles": disks.handles,
    "kills": kills.kills,
}

SIZES = {
    "recorder steps": 2_000,
    "recorder steps elsewhere": 300,
    "jobs": 20,
    "jobs elsewhere": 8,
    "samples": 1_000_000,
    "windows": 500,
    "steps": 100_000,
    "kills": 100,
    "kills elsewhere": 5,
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    libraries = ("torch", "mlflow", "numpy", "pandas", "safetensors", "psycopg2-binary", "moto")
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": os.cpu_count(),
        "memory GiB": round(memory),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **found,
    }


def measure(name: str, folder: Path) -> dict[str, Any]:
    begun, load_before = time.time(), os.getloadavg()[0]
    rows = SECTIONS[name](folder / name, SIZES)
    seconds = round(time.time() - begun)
    print(f"{name}: {seconds} s", *rows, sep="\n  ", file=sys.stderr, flush=True)
    return {
        "measured": time.strftime("%Y-%m-%d", time.gmtime(begun)),
        "seconds": seconds,
        "load before": round(load_before, 1),
        "rows": rows,
    }


def _go_through(names: Sequence[str], folder: Path, found: dict[str, Any]) -> None:
    for name in names:
        section = measure(name, folder)
        with LOCK:
            found[name] = section
            keep(found)


def keep(found: dict[str, Any]) -> None:
    """Write what has been measured so far, over what was known of the other sections."""
    kept = json.loads(FIGURES.read_text())["sections"] if FIGURES.is_file() else {}
    sections = {name: {**kept, **found}[name] for name in SECTIONS if name in kept or name in found}
    figures = {"machine": machine(), "sizes": SIZES, "sections": sections}
    FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(document(figures))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    # The processes that are started need it too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    folder = Path(tempfile.mkdtemp(prefix="dit-reliability-"))
    found: dict[str, Any] = {}
    # Before there are threads, of which two must not make it at once.
    stores.empty_database()
    try:
        lanes = [[name for name in options.sections if (name in BESIDE) == beside] for beside in (False, True)]
        with ThreadPoolExecutor(2) as pool:
            for lane in [pool.submit(_go_through, names, folder, found) for names in lanes]:
                lane.result()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
