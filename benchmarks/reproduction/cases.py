"""The trainings of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dit_mlflow import InputError, Workload, load_workload

PROJECTS = Path(__file__).parents[2] / "projects"

FILES = {"adult": "adult", "newsgroups": "20news-bydate.tar.gz"}
"""Read from the data folder; without one, the projects download it."""

Windows = Literal["epochs", "ends"]


@dataclass(frozen=True)
class Case:
    """A data set and a model, with the paper's settings where the paper has it.

    Attributes:
        data, model: as the project has them.
        settings: further ones of the project.
        truth: random samples that are left out exactly; ``None`` = all.
        windows: ``epochs`` = one for each, ``ends`` = the first, the middle and the last epoch, and all of training.
        final_windows: the same for the kind ``final``, of which each window costs a training to the end.
        detects: whether exact leave-one-out takes part in detection, where it must leave out all samples.
        most_seeds: that take part.
        folder: of the data, see :data:`FILES`; empty = the project's own source.
    """

    data: str
    model: str
    settings: tuple[tuple[str, str], ...] = ()
    truth: int | None = None
    windows: Windows = "epochs"
    final_windows: Windows = "epochs"
    detects: bool = True
    most_seeds: int | None = None
    folder: str = ""

    @property
    def name(self) -> str:
        return f"{self.data} {self.model}"

    def workload(self, seed: int, flipped: float = 0.0) -> Workload:
        """The workload of a seed, which has its own split, flips, weights and batch order; ``flipped``: a share.

        Raises:
            WorkloadError: the data cannot be had, or a setting cannot be used.
        """
        given = {"model": self.model, "data_seed": str(seed), "corrupt": str(flipped), "corrupt_seed": str(seed)}
        if self.folder and self.data in FILES:
            given["data_dir"] = str(Path(self.folder) / FILES[self.data])
        return load_workload(str(PROJECTS / self.data), **given, **dict(self.settings))


_PAPER = (("preset", "paper"),)

CASES = (
    Case("mnist", "logreg", _PAPER),
    Case("mnist", "dnn", _PAPER),
    Case("mnist", "cnn", _PAPER, truth=24, most_seeds=2, windows="ends", final_windows="ends", detects=False),
    Case("adult", "logreg", _PAPER),
    Case("adult", "dnn", _PAPER),
    Case("newsgroups", "logreg", _PAPER, final_windows="ends"),
    Case("newsgroups", "dnn", _PAPER, final_windows="ends"),
    Case("digits", "dnn"),
    Case("digits", "cnn", truth=32, windows="ends", final_windows="ends", detects=False),
)

SMALL = tuple((f"n_{split}", "96") for split in ("train", "validation", "test"))
"""Settings of a quick reproduction, which also has few epochs."""


def cases(datasets: str = "all", quick: bool = False, folder: str = "") -> list[Case]:
    """The cases on ``datasets`` (names with commas between, or ``all``), or fewer and smaller ones.

    Raises:
        InputError: a data set that is not there, or a folder without its files.
    """
    known = list(dict.fromkeys(case.data for case in CASES))
    names = known if datasets.strip() == "all" else [name.strip() for name in datasets.split(",") if name.strip()]
    if quick and datasets.strip() == "all":
        names = ["mnist", "digits"]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"datasets={datasets!r}; expected all, or some of {', '.join(known)}")
    for name in names:
        if folder and name in FILES and not (Path(folder) / FILES[name]).exists():
            raise InputError(f"data={folder!r} has no {FILES[name]}, which datasets={name} needs; see projects/{name}")
    chosen = [
        replace(case, folder=str(Path(folder).resolve()) if folder else "") for case in CASES if case.data in names
    ]
    if not quick:
        return chosen
    return [
        replace(case, settings=(*case.settings, *SMALL, ("epochs", "6")), truth=case.truth and 8)
        for case in chosen
        if case.name != "mnist cnn"
    ]


def seeds_of(case: Case, seeds: int) -> Sequence[int]:
    """The seeds that take part, of ``seeds`` that were asked for."""
    return range(min(seeds, case.most_seeds or seeds))
