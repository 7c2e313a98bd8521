"""The file cache: by checksum, bounded, repaired, shared by processes."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import processes
import pytest

from dit_mlflow import InputError, TrajectoryError
from dit_mlflow.tracking.store import cache as module
from dit_mlflow.tracking.store.cache import FileCache


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Source:
    """A place to download from, which counts."""

    def __init__(self, content: bytes) -> None:
        self.content, self.downloads = content, 0

    def __call__(self, folder: Path) -> Path:
        self.downloads += 1
        (folder / "file").write_bytes(self.content)
        return folder / "file"


def get(cache: FileCache, content: bytes, source: Callable[[Path], Path] | None = None) -> Path:
    return cache.get(digest(content), len(content), source or Source(content))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_file_is_downloaded_once_and_again_if_damaged(tmp_path: Path) -> None:
    cache, source = FileCache(tmp_path / "c", 1e9), Source(b"content")
    path = get(cache, b"content", source)
    assert get(cache, b"content", source) == path
    assert (path.read_bytes(), source.downloads) == (b"content", 1)
    for damage in (b"c0ntent", b"", b"content and more"):
        path.write_bytes(damage)
        assert get(cache, b"content", source).read_bytes() == b"content"
    path.unlink()
    assert get(cache, b"content", source).read_bytes() == b"content"
    assert source.downloads == 5
    assert list(cache.folder.iterdir()) == [path]


def test_least_recently_used_go_first_and_nothing_else_does(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 250)
    (tmp_path / "thesis.tex").write_bytes(b"t" * 1000)
    paths = [get(cache, bytes([i]) * 100) for i in range(2)]
    age(paths[0], 500)
    age(paths[1], 1000)
    (tmp_path / "part-of-a-killed-process").mkdir()
    age(tmp_path / "part-of-a-killed-process", 2 * 24 * 3600)
    (tmp_path / "part-of-a-living-process").mkdir()
    last = get(cache, b"\2" * 100)
    expected = {paths[0], last, tmp_path / "thesis.tex", tmp_path / "part-of-a-living-process"}
    assert set(tmp_path.iterdir()) == expected
    # Being used, if only from the cache, counts.
    get(cache, b"\0" * 100)
    age(last, 100)
    newest = get(cache, b"\3" * 100)
    assert set(tmp_path.iterdir()) == expected - {last} | {newest}


def test_what_is_in_use_is_kept_however_small_the_cache(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 0)
    paths = [get(cache, bytes([i])) for i in range(3)]
    assert all(path.exists() for path in paths)
    age(paths[0], 100)
    get(cache, b"x")
    assert [path.exists() for path in paths] == [False, True, True]


def test_another_content_than_asked_for_is_refused_and_not_kept(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1e9)
    with pytest.raises(TrajectoryError, match="8 bytes arrived, recorded 7"):
        cache.get(digest(b"content"), 7, Source(b"content!"))
    with pytest.raises(TrajectoryError, match=r"SHA-256 \w{12}… arrived, recorded \w{12}…"):
        cache.get(digest(b"content"), 7, Source(b"c0ntent"))
    with pytest.raises(TrajectoryError, match=r"'\.\./\.\./etc/passwd' is not a SHA-256"):
        cache.get("../../etc/passwd", 7, Source(b"content"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["ten", "-1", "nan"])
def test_a_size_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_MLFLOW_CACHE_GB", text)
    with pytest.raises(InputError, match=f"DIT_MLFLOW_CACHE_GB='{text}'; expected a number of GB"):
        FileCache.of_user()


def test_environment_decides_folder_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_MLFLOW_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DIT_MLFLOW_CACHE_GB", "0.5")
    cache = FileCache.of_user()
    assert (cache.folder, cache.limit) == (tmp_path / "elsewhere" / "dit-mlflow", 5e8)
    get(cache, b"content")
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_used_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"cannot take 7 bytes: .* set DIT_MLFLOW_CACHE to a folder"):
        get(FileCache(tmp_path / "file" / "c", 1e9), b"content")


def fill_and_empty(folder: Path) -> tuple[int, set[int]]:
    """Ask a small cache for many files, for some seconds; the number of downloads, and what was asked for."""
    # Longer than a process waits for its turn on a busy machine.
    module.IN_USE_SECONDS = 2
    cache = FileCache(folder, 100_000)
    downloads, asked, end = 0, set(), time.monotonic() + 4
    while time.monotonic() < end:
        number = random.randrange(600)
        content = number.to_bytes(2, "big") * 5_000
        source = Source(content)
        assert get(cache, content, source).read_bytes() == content
        downloads += source.downloads
        asked.add(number)
        time.sleep(0.005)
    return downloads, asked


@pytest.mark.slow
def test_processes_that_fill_and_empty_one_cache_at_once_all_read_what_they_asked_for(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=processes.context()) as pool:
        downloads, asked = zip(*pool.map(fill_and_empty, [tmp_path / "c"] * 4), strict=True)
    # Files were removed while others read.
    assert sum(downloads) > len(set().union(*asked))
    for path in (tmp_path / "c").iterdir():
        assert digest(path.read_bytes()) == path.name


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes")
def test_the_folder_is_closed_to_others_and_must_be_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path / "c", 1e9)
    cache.folder.mkdir()
    cache.folder.chmod(0o777)
    path = get(cache, b"content")
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    source = Source(b"content")
    with pytest.raises(InputError, match=r"belongs to another user \(number \d+\); set DIT_MLFLOW_CACHE"):
        get(cache, b"content", source)
    assert source.downloads == 0


def test_a_link_in_the_cache_is_replaced_by_the_file(tmp_path: Path) -> None:
    """Its target could change after the check."""
    cache, source = FileCache(tmp_path / "c", 1e9), Source(b"content")
    (tmp_path / "elsewhere").write_bytes(b"content")
    age(tmp_path / "elsewhere", 1000)
    cache.folder.mkdir()
    (cache.folder / digest(b"content")).symlink_to(tmp_path / "elsewhere")
    path = get(cache, b"content", source)
    assert (path.is_symlink(), source.downloads) == (False, 1)
    assert time.time() - (tmp_path / "elsewhere").stat().st_mtime > 900


def fill(folder: Path) -> Path:
    return get(FileCache(folder, 1e9), b"content" * 100_000, Slow(b"content" * 100_000))


class Slow(Source):
    def __call__(self, folder: Path) -> Path:
        path = super().__call__(folder)
        time.sleep(0.5)
        return path


def test_two_processes_that_make_the_folder_and_the_same_file_at_once_both_get_it(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=processes.context()) as pool:
        paths = set(pool.map(fill, [tmp_path / "c"] * 2))
    assert [path.read_bytes() for path in paths] == [b"content" * 100_000]
    assert set((tmp_path / "c").iterdir()) == paths
