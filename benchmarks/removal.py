"""Which scores foretell what leaving out many samples does?

``python benchmarks/removal.py --adult FOLDER --newsgroups ARCHIVE --to rows.csv`` trains each of :data:`TRAININGS` for
each seed, retrains it without random shares of the samples, and holds the summed scores of methods against the real
changes, for the whole run and for ``local`` windows: LDS (the Spearman correlation over the retrainings), and the slope
of real on foretold changes. All methods are judged by retrainings that none has seen. Cost is CPU time, in trainings.

Rows are added to the file as they are measured, seed after seed; a second call goes on from there. The tables are
Markdown: median and, in brackets, the worst over seeds and windows. ``agree`` is the cosine of the derivatives at
opposite random weights (:func:`dit_mlflow.expected_influence`). With ``--ceiling``, additive scores of so many
retrainings show what is attainable, and how many of the intervals of ``removal`` hold.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from scipy import stats

from dit_mlflow import Influence, UnsupportedError, Window, load_workload, parse_windows, train
from dit_mlflow.evaluation import datamodeling_score
from dit_mlflow.evaluation.figures import LDS
from dit_mlflow.influence.draws import DRAWS_AGREE, KINKED
from dit_mlflow.methods import Method, method
from dit_mlflow.methods.datamodel import Datamodel
from dit_mlflow.methods.dit import Expected
from dit_mlflow.methods.removal import Removal
from dit_mlflow.retraining import train_on_subsets

METHODS: dict[str, Method] = {
    "dit": method("dit"),
    "expected": Expected(draws=4),
    "leave_one_out": method("leave_one_out"),
    "tracin": method("tracin"),
}
PEERS: dict[str, Method] = {
    "ridge on 512": Datamodel(subsets=512, share=0.5, regression="ridge"),
    "EK-FAC": method("influence_function_ekfac"),
    "SOURCE": method("source"),
    "TRAK": method("trak"),
}
"""Besides, where they are asked for."""

REMOVAL, INFORMED, CEILING = "removal", "removal, leave-one-out known", "ceiling"

JUDGES = 7
"""Added to the seed of the retrainings that judge, so that they are none of those that a blend was fitted to."""


@dataclass(frozen=True)
class Training:
    """A workload with its settings; ``data`` names the option that says where its data lie."""

    name: str
    workload: str
    settings: dict[str, str] = field(default_factory=dict)
    data: str | None = None


ADAMW = {"optimizer": "adamw", "lr": "0.01"}

TRAININGS = [
    *(Training(f"mnist dnn, {of}", "projects/mnist", {"model": "dnn", **more}) for of, more in [
        ("SGD", {}), ("momentum", {"momentum": "0.9", "lr": "0.02"}), ("AdamW", ADAMW),
    ]),
    *(Training(f"adult dnn, {of}", "projects/adult", {"model": "dnn", **more}, "adult") for of, more in [
        ("SGD", {}), ("momentum", {"momentum": "0.9", "lr": "0.02"}), ("AdamW", ADAMW),
    ]),
    *(Training(f"digits dnn, {of}", "projects/digits", more) for of, more in [
        ("SGD", {}), ("momentum", {"momentum": "0.9", "lr": "0.03"}), ("AdamW", ADAMW),
    ]),
    *(Training(f"newsgroups dnn, {of}", "projects/newsgroups", {"model": "dnn", **more}, "newsgroups") for of, more in [
        ("SGD", {}), ("AdamW", ADAMW),
    ]),
    Training("mnist cnn, SGD", "projects/mnist", {"model": "cnn"}),
]  # fmt: skip


def measure(of: Training, seed: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each share, method and window."""
    found_at = {} if of.data is None else {"data_dir": getattr(options, of.data)}
    workload = load_workload(of.workload, **of.settings, **found_at)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Timed when all that is loaded on first use is there.
        train(workload, Path(folder) / "first", init_seed=seed, order_seed=seed)
        begun = time.process_time()
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        training = time.process_time() - begun

        def scored(by: Method, windows: list[Window]) -> tuple[Influence, float]:
            begun = time.process_time()
            return by(trajectory, workload, windows), (time.process_time() - begun) / training

        for asked in dict.fromkeys(["1", options.windows]):
            windows = parse_windows(asked, trajectory)
            known = {name: scored(by, windows) for name, by in METHODS.items() if name not in options.without}
            if options.peers and len(windows) == 1:
                for name, by in PEERS.items():
                    with suppress(UnsupportedError):  # SOURCE is for SGD alone.
                        known[name] = scored(by, windows)
            for share in options.removed:
                removal = Removal(removed=share, seed=seed)
                found = {**known, REMOVAL: scored(removal, windows)}
                if "leave_one_out" in known:
                    exact, cost_of_exact = known["leave_one_out"]
                    informed, cost = scored(removal.informed_by(exact), windows)
                    found[INFORMED] = informed, cost + cost_of_exact
                if options.ceiling and len(windows) == 1:
                    found[CEILING] = scored(
                        Datamodel(subsets=options.ceiling, share=1 - share, regression="ridge"), windows
                    )
                covered = coverage(found[REMOVAL][0], found[CEILING][0]) if CEILING in found else float("nan")
                judges = train_on_subsets(
                    trajectory, workload, windows, subsets=options.subsets, share=1 - share, seed=seed + JUDGES
                )
                rows += [
                    {
                        "training": of.name,
                        "of": "whole run" if len(windows) == 1 else "windows",
                        "removed": share,
                        "method": name,
                        "seed": seed,
                        "window": str(window),
                        "lds": datamodeling_score(scores.of(place), judges, window).values.get(LDS.leaf),
                        "slope": stats.linregress(~judges.kept @ scores.of(place), judges.changes[place, 0]).slope,
                        "trainings": cost,
                        "covered": covered if name == REMOVAL else float("nan"),
                        "agree": found[REMOVAL][0].metadata[DRAWS_AGREE][str(window)][0],
                    }
                    for name, (scores, cost) in found.items()
                    for place, window in enumerate(windows)
                ]
    return rows


def coverage(scores: Influence, truth: Influence) -> float:
    """Share of the samples whose interval of 95 % holds what a datamodel of many retrainings gives them."""
    low, high = scores.interval(0.95)
    return float(((low <= truth.scores) & (truth.scores <= high)).mean())


def summary(rows: pd.DataFrame) -> str:
    """Markdown: a table of the whole run and one of windows, the costs, and what the agreement of draws foretells."""
    return "\n\n".join(
        [
            *(_table(part, str(of)) for of, part in rows.groupby("of", sort=False)),
            _costs(rows),
            _kinks(rows),
        ]
    )


def _names(rows: pd.DataFrame) -> list[str]:
    return [name for name in [*METHODS, *PEERS, REMOVAL, INFORMED, CEILING] if name in set(rows["method"])]


def _table(rows: pd.DataFrame, of: str) -> str:
    """A line for each training and share, a column for each method."""
    names, covered = _names(rows), rows["covered"].notna().any()
    headings = [*(f"`{name}`" for name in names), "slope of `removal`", *(["its intervals hold"] if covered else [])]
    lines = [f"| {of}: training (seeds) | removed | {' | '.join(headings)} |", "|" + "---|" * (len(headings) + 2)]
    for (training, removed), part in rows.groupby(["training", "removed"], sort=False):
        lds = part.groupby("method")["lds"]
        cells = [f"{lds.median()[name]:.2f} ({lds.min()[name]:.2f})" if name in lds.groups else "" for name in names]
        cells.append(f"{part.loc[part['method'] == REMOVAL, 'slope'].median():.2f}")
        if covered:
            cells.append("" if part["covered"].isna().all() else f"{part['covered'].mean():.0%}")
        lines.append(f"| {training} ({part['seed'].nunique()}) | {removed:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _costs(rows: pd.DataFrame) -> str:
    names = _names(rows)
    lines = [f"| cost in trainings | {' | '.join(f'`{name}`' for name in names)} |", "|" + "---|" * (len(names) + 1)]
    costs = (
        rows.groupby(["training", "of", "method"], sort=False)["trainings"].median().unstack().reindex(columns=names)
    )
    for (training, of), line in costs.iterrows():
        cells = ["" if pd.isna(cost) else f"{cost:.1f}" for cost in line]
        lines.append(f"| {training}, {of} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kinks(rows: pd.DataFrame) -> str:
    """LDS of half of the samples, in windows where opposite draws agree and where they do not."""
    names = ("dit", "expected", REMOVAL)
    halves = rows[(rows["removed"] == 0.5) & rows["method"].isin(names)]
    lines = [
        f"| opposite draws | windows | {' | '.join(f'`{name}`, half removed' for name in names)} |",
        "|---|---|---|---|---|",
    ]
    for agree, part in halves.groupby(halves["agree"] >= KINKED):
        lds = part.groupby("method")["lds"]
        ends = lds.agg(["median", "min", "max"])
        cells = [f"{ends['median'][name]:.2f} ({ends['min'][name]:.2f} to {ends['max'][name]:.2f})" for name in names]
        windows = (part["method"] == REMOVAL).sum()
        lines.append(f"| {'agree' if agree else 'disagree'} | {windows} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", nargs="+", metavar="NAME", help="those whose names begin so (default: all)")
    parser.add_argument("--adult", help="folder of UCI Adult; without it, adult is left out")
    parser.add_argument("--newsgroups", help="archive of 20 Newsgroups; without it, newsgroups is left out")
    parser.add_argument("--windows", default="5")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.02, 0.1, 0.5], help="shares that are left out")
    parser.add_argument("--subsets", type=int, default=100, help="retrainings that judge")
    parser.add_argument("--without", nargs="+", default=[], choices=sorted(METHODS), help="methods that cost too much")
    parser.add_argument("--peers", action="store_true", help="also ridge on 512 retrainings, EK-FAC, SOURCE, TRAK")
    parser.add_argument("--ceiling", type=int, help="also a ridge datamodel of so many retrainings at each share")
    parser.add_argument("--to", type=Path, help="a file of rows, to go on from and to add to")
    options = parser.parse_args()
    rows = pd.read_csv(options.to) if options.to and options.to.exists() else pd.DataFrame()
    done = set() if rows.empty else set(zip(rows["training"], rows["seed"], strict=True))
    chosen = [
        of
        for of in TRAININGS
        if (of.data is None or getattr(options, of.data))
        and (options.trainings is None or of.name.startswith(tuple(options.trainings)))
    ]
    for seed in range(options.seeds):
        for of in chosen:
            if (of.name, seed) not in done:
                rows = pd.concat([rows, pd.DataFrame(measure(of, seed, options))], ignore_index=True)
                if options.to:
                    rows.to_csv(options.to, index=False)
    print(summary(rows))


if __name__ == "__main__":
    main()
