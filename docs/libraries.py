"""Write the last section of docs/comparison.md, the table of other libraries: ``python docs/libraries.py``.

It downloads their source distributions with pip, and counts and searches in them. What is in none of them is not
checked, and the table says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
PAGE = HERE / "comparison.md"
HEADING = "## Beside other libraries"
NOT_FOUND, NOT_CHECKED = "not found", "not checked"

WORDS = {
    "tracker": r"\bimport (mlflow|wandb|aim|comet_ml)\b|torch\.utils\.tensorboard",
    "windows": r"\b(windows?|step_range|start_step|end_step)\s*:\s*[A-Za-z\[]+.*[,)=]",
    "error bars": r"standard_error|std_err|confidence_interval|bootstrapp?ed|n_bootstrap",
    "progress": r"\btqdm\b|rich\.progress",
    "live": r"\bfollow\b\(|\blive=",
}
"""What is searched for in the package's Python files."""


@dataclass(frozen=True)
class Library:
    """A library and where to look in its source distribution.

    Attributes:
        folder: of its Python files.
        answer: the line of its README with the first answer; empty: there is none in Python.
        given: what the code before that line takes as given.
    """

    name: str
    folder: str
    answer: str = ""
    given: str = ""


LIBRARIES = (
    Library("bergson", "bergson"),
    Library("dattri", "dattri", "score = attributor.attribute", "data and training of its benchmark"),
    Library("captum", "captum"),
    Library("quanda", "quanda", "tda = explainer.explain", "a model and its data"),
    Library("cleanlab", "cleanlab", "lab.report", "features and predicted probabilities"),
    Library("traker", "trak", "scores = traker.finalize_scores", "checkpoints and loaders"),
)
OURS = Library("dit-mlflow", "dit_mlflow", "print(explain", "model, optimizer and data; training included")

HEAD = f"""{HEADING}

Written by `python docs/libraries.py`, which downloads their source distributions with pip, and counts and searches in
them. *Lines* are the lines of Python, without blank ones, in their README up to its first scores of training samples.
Where a file is named, the search for words of this kind (the script has them) found it first: that is a lead, and no
verdict. *Not found* means that no Python file of the package has such words. Source distributions hold no CI, so that
is *not checked*, and nothing was looked up on the web. What the libraries cost and how well they agree with
retraining, on the same training: [cost](cost.md).

"""


def main() -> None:
    rows = [described(OURS, HERE.parent, "here")]
    with TemporaryDirectory() as folder:
        for library in LIBRARIES:
            version, source = downloaded(library.name, Path(folder))
            rows.append(described(library, source, version))
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    before = PAGE.read_text(encoding="utf-8").split(HEADING)[0]
    PAGE.write_text(before.rstrip() + "\n\n" + HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def downloaded(name: str, folder: Path) -> tuple[str, Path]:
    """The version and the unpacked source distribution."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", str(folder), name]
    subprocess.run(pip, check=True)
    (archive,) = folder.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    stem = archive.name.removesuffix(".tar.gz")
    return stem.removeprefix(f"{name}-"), folder / stem


def described(library: Library, source: Path, version: str) -> dict[str, str]:
    """The library's row."""
    readme = (source / "README.md").read_text(encoding="utf-8")
    ours = library is OURS
    found = {column: searched(source / library.folder, words) for column, words in WORDS.items()}
    if ours:
        found |= {
            "live": "yes (`dit-mlflow follow`)",
            "windows": "yes",
            "error bars": "yes",
            "tracker": "MLflow",
            "progress": "yes",
        }
    return {
        "library": f"{library.name} ({version})",
        "README, bytes": f"{len(readme.encode()):,}",
        "lines": to_the_answer(readme, library),
        "docs engine": docs_engine(source),
        "notebooks run in CI": "yes (`.ci/run`)" if ours else NOT_CHECKED,
        **found,
        "page tested in a browser": "yes (`tests/browser`)" if ours else NOT_CHECKED,
    }


def to_the_answer(readme: str, library: Library) -> str:
    if not library.answer:
        return "none in Python"
    count = 0
    for block in re.findall(r"^ *```python\n(.*?)^ *```", readme, re.DOTALL | re.M):
        for line in block.splitlines():
            count += bool(line.strip())
            if library.answer in line:
                return f"{count} (given: {library.given})"
    return NOT_FOUND


def docs_engine(source: Path) -> str:
    """Named by the configuration, or asked for by the package."""
    if (source / "docs").is_dir() and list((source / "docs").rglob("conf.py")):
        return "Sphinx"
    asked = [source / name for name in ("pyproject.toml", "setup.cfg", "setup.py") if (source / name).is_file()]
    text = "".join(path.read_text(encoding="utf-8") for path in asked)
    engines = {"Sphinx": r"[\"']sphinx\b", "MkDocs": r"[\"']mkdocs\b"}
    return next((name for name, words in engines.items() if re.search(words, text)), NOT_CHECKED)


def searched(folder: Path, words: str) -> str:
    for path in sorted(folder.rglob("*.py")):
        if re.search(words, path.read_text(encoding="utf-8", errors="replace")):
            return f"`{path.relative_to(folder.parent).as_posix()}`"
    return NOT_FOUND


if __name__ == "__main__":
    main()
