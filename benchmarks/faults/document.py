"""docs/reliability.md, made of the figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = """# Load and faults

`python benchmarks/reliability.py` measured what follows and wrote this page and [reliability.json](reliability.json);
`--sections` measures some of it anew. Nothing here is written by hand but the words between the tables, which say
what was done.

{machine}. Servers, workers and the benchmark share these cores, with whatever else ran there (load of the machine
before each section: {loads}); so seconds on the clock say little more than that something ends.

**Wrong** counts what must never be: a trajectory that opens and does not replay bit for bit, or does not end in the
state that training ended in, or scores other than those of the same job undisturbed, but for rounding. In all
sections together: **{wrong} wrong**.

What is recorded is a network of 64-6-3 on 64 real digits, batch 8, SGD with momentum; a segment is written every
second here (10 s by default). The stores: *SQLite* with artifacts in a folder; *server*: `mlflow server` on HTTP,
which proxies the artifacts; *PostgreSQL* with artifacts in a folder; *S3*: an endpoint of moto, runs in SQLite.
"""

SECTIONS: dict[str, tuple[str, str]] = {
    "recorders": (
        "Eight trainings at once into one store",
        "Processes of one step after another without a pause; every tenth step logs the loss. Kept: what the "
        "store holds afterwards, read back and replayed.",
    ),
    "jobs": (
        "Main jobs at once on one store",
        "Each trains, computes two windows, leaves four samples out and logs plots and report; all from the same "
        "seeds. Their scores are held against those of a job that ran alone. Draws and retrainings run side by side "
        "or one after the other, whichever a measurement of their time prefers, so under load equal jobs may differ "
        "by the rounding of float32; more than 1e-5 of the largest score counts as wrong.",
    ),
    "length": (
        "A long training",
        "In one process, which runs beside the other sections.",
    ),
    "size": (
        "Many samples, many windows",
        "A logistic regression on made-up data of 8 features, batch 4,096, one epoch; and a window for every two "
        "steps of the network above, each a child run. The whole answer: scores, tables, plots, report, runs.",
    ),
    "faults": (
        "Stores that fail",
        "Four trainings of 1,500 steps that take 30 s each are being recorded, and three main jobs began to train a "
        "second ago, when the fault comes. `exit 0`: training and the end of its run passed. Where the store stays "
        "away, the "
        "message names a folder; kept after `log_trajectory` counts what the store holds once it is back and that"
        " was called. MLflow's own retries are the default, except where the fault is for good (2 retries, 20 s)."
        " MLflow repeats no request whose answer was cut, and none to a database that ended the connection: jobs "
        "do that, for 51 s; a training's own `mlflow.start_run` does not, whose error ends it after its trajectory was "
        "kept. Where the store stays away, jobs end with exit code 1 and an error, and their runs cannot be ended. S3 "
        "is asked again by botocore alone, for some seconds.",
    ),
    "reading": (
        "Reading from a server that fails",
        "A trajectory of 300 steps is opened and replayed, each time with an empty cache; 1 retry of MLflow's.",
    ),
    "full": (
        "Disks that are full or read-only",
        "Disks in memory. A training of 3,000 steps, a reader, or a main job on each. A job that cannot store its"
        " scores fails. Where the folder of a store is read-only, training goes on in a temporary folder, which a"
        " message names.",
    ),
    "handles": (
        "File handles used up",
        "`RLIMIT_NOFILE` is set so that no file can be opened, in the middle of a training of 900 steps, which "
        "writes every 50 ms. MLflow needs handles too: where there are none at the end, it cannot end the run.",
    ),
    "kills": (
        "Recording processes killed",
        "SIGKILL 0 to 600 ms after the first step, and with MLflow after the first upload; a segment is written "
        "every 10 ms, so that most are in the middle of something. Then each trajectory is opened, replayed and swept "
        "over its first 20 steps.",
    ),
}


def document(figures: Mapping[str, Any]) -> str:
    """The page."""
    sections = figures["sections"]
    machine = figures["machine"]
    versions = ", ".join(
        f"{name} {value}" for name, value in machine.items() if name not in ("cores", "memory GiB", "system")
    )
    told = (
        f"{machine['cores']} cores, {machine['memory GiB']} GiB, {machine['system']}; {versions}; one thread a process"
    )
    rows = [row for section in sections.values() for row in section["rows"]]
    parts = [
        HEAD.format(
            machine=told,
            loads=", ".join(
                f"{name} {section['load before']}" for name, section in sections.items() if section["load before"]
            ),
            wrong=sum(int(row.get("wrong", 0)) + int(row.get("wrong scores", 0)) for row in rows),
        )
    ]
    for name, (title, text) in SECTIONS.items():
        if name in sections:
            parts.append(f"## {title}\n\n{text}\n\n{_table(sections[name]['rows'])}")
            parts.append(f"(`--sections {name}`: {sections[name]['seconds']} s on {sections[name]['measured']})\n")
    return "\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
