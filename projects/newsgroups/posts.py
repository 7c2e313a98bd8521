"""Posts of the by-date archive, read from the archive, from its folders, or from scikit-learn's download."""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import fetch_20newsgroups

from dit_mlflow import WorkloadError
from dit_mlflow.examples import Labelled, folder_of, no_larger

GROUPS = ("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware")

ARCHIVE = "20news-bydate.tar.gz"
FILES = f"{ARCHIVE}, a folder with it, or a folder with what it holds (20news-bydate-train and 20news-bydate-test)"

MEMBER = re.compile(r"(?:\./)?20news-bydate-(train|test)/([a-z]+(?:[.-][a-z]+)+)/(\d{1,9})", re.ASCII)
"""Names of posts; anything else in an archive or folder is ignored."""

LONGEST = 2**20
"""Most bytes of a post, six times those of the longest in the archive."""

ALL = 256 * 2**20
"""Most characters of all posts, ten times those of the archive."""

HEADER = re.compile(r"\A[!-9;-~]+:[ \t]")
QUOTE = re.compile(r"^(?:[>|].*|.*\b(?:writes|wrote|said):?[ \t]*)$\n?", re.MULTILINE)
SIGNATURE = re.compile(r"^--[ \t]*$.*", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, eq=False)
class Posts:
    """Texts of the two groups, in the order of group and number.

    Attributes:
        pool: to train and validate with; label 0 is the first of :data:`GROUPS`.
        test: later posts.
        others: texts of other groups, if they were asked for.
        source: the file or folder; ``None`` after a download.
    """

    pool: Labelled
    test: Labelled
    others: np.ndarray | None
    source: str | None


def read_posts(data_dir: str | None, with_others: bool) -> Posts:
    """The posts without headers, quoted lines and signatures.

    Raises:
        WorkloadError: nothing is there, the archive is damaged, a group is missing, or the download fails.
    """
    if data_dir is None:
        found, source = _downloaded(with_others), None
    else:
        path = folder_of(data_dir, FILES)
        if path.is_dir() and (path / ARCHIVE).is_file():
            path = path / ARCHIVE
        found, source = _unpacked(path) if path.is_dir() else _archived(path), str(path)
    # In an order of its own: archives and folders have none.
    posts = {key: _body(text) for key, text in sorted(_bounded(found, source), key=lambda item: item[0])}
    where = source or "the download"
    return Posts(
        _labelled(posts, "train", where),
        _labelled(posts, "test", where),
        _texts(posts[key] for key in posts if key[0] == "train" and key[1] not in GROUPS) if with_others else None,
        source,
    )


Key = tuple[str, str, int]
"""Part, group and number of a post."""


def _bounded(found: Iterable[tuple[Key, str]], source: str | None) -> Iterator[tuple[Key, str]]:
    total = 0
    for key, text in found:
        total += len(text)
        if total > ALL:
            raise WorkloadError(f"{source} holds posts of more than {ALL} characters; expected {FILES}")
        yield key, text


class _Unpacked(gzip.GzipFile):
    """Read in small parts: the header of a member may claim any length, and its archive hold that many zeros."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 2 * LONGEST:
            raise WorkloadError(f"{self.name}: a member's header claims {size} bytes; expected {FILES}")
        return super().read(size)


def _archived(path: Path) -> Iterator[tuple[Key, str]]:
    """Posts read from the archive: nothing is written, so a member's name can do no harm."""
    try:
        with _Unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                key = _key(member.name)
                if key is None or not member.isfile():
                    continue
                if member.size > LONGEST:
                    raise WorkloadError(f"{path}: {member.name} has {member.size} bytes; no post has over {LONGEST}")
                content = archive.extractfile(member)
                assert content is not None
                yield key, content.read().decode("latin-1")
            # An archive that is cut off may seem to end early; the checksum behind it tells.
            while stream.read(LONGEST):
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise WorkloadError(f"{path} cannot be read: {error}; expected {FILES}") from error


def _unpacked(folder: Path) -> Iterator[tuple[Key, str]]:
    if not (folder / "20news-bydate-train").is_dir():
        raise WorkloadError(f"data_dir: there is no 20news-bydate-train in {folder}; expected {FILES}")
    for path in folder.glob("20news-bydate-*/*/*"):
        key = _key(path.relative_to(folder).as_posix())
        if key is not None and path.is_file():
            yield key, no_larger(path, LONGEST).read_bytes().decode("latin-1")


def _downloaded(with_others: bool) -> Iterator[tuple[Key, str]]:
    for part in ("train", "test"):
        try:
            bunch = fetch_20newsgroups(subset=part, categories=None if with_others else list(GROUPS), shuffle=False)
        except Exception as error:
            raise WorkloadError(
                f"20 Newsgroups cannot be downloaded through scikit-learn: {error!r}; give data_dir: {FILES}"
            ) from error
        for name, text in zip(bunch.filenames, bunch.data, strict=True):
            path = Path(str(name))
            yield (part, path.parent.name, int(path.name)), text


def _key(name: str) -> Key | None:
    match = MEMBER.fullmatch(name)
    return None if match is None else (match[1], match[2], int(match[3]))


def _body(text: str) -> str:
    if HEADER.match(text):
        text = text.replace("\r\n", "\n").partition("\n\n")[2]
    return SIGNATURE.sub("", QUOTE.sub("", text)).strip()


def _labelled(posts: dict[Key, str], part: str, where: str) -> Labelled:
    keys = [key for key in posts if key[0] == part and key[1] in GROUPS]
    missing = [group for group in GROUPS if group not in {key[1] for key in keys}]
    if missing:
        raise WorkloadError(f"{where} has no posts 20news-bydate-{part}/{missing[0]}/<number>; expected {FILES}")
    return Labelled(_texts(posts[key] for key in keys), np.array([GROUPS.index(key[1]) for key in keys]))


def _texts(texts: Iterable[str]) -> np.ndarray:
    return np.array(list(texts), dtype=object)
