"""20 Newsgroups: TF-IDF of training posts alone against scikit-learn's own, odd archives, downloads, clear errors."""

from __future__ import annotations

import gzip
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_files import MAC, PC, posts, real, write_archive
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

from dit_mlflow import Workload, WorkloadError, load_workload
from dit_mlflow.workload.projects import find_factory

SMALL = {"n_train": 24, "n_validation": 12, "n_test": 10, "corrupt": 0}


def loaded(path: Path, **settings: Any) -> Workload:
    return load_workload("projects/newsgroups", **({"data_dir": str(path), **SMALL} | settings))


def tensors(workload: Workload) -> list[torch.Tensor]:
    sets: list[Any] = [workload.train_set, workload.validation_set, workload.test_set]
    return [tensor for part in sets for tensor in part.tensors]


def same(one: Workload, other: Workload) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_real_posts_are_weighted_as_scikit_learn_weights_training_posts(tmp_path: Path) -> None:
    archive = Path(real("20news-bydate.tar.gz"))
    texts: dict[str, dict[tuple[str, int], str]] = {"train": {}, "test": {}}
    with tarfile.open(archive) as opened:
        for member in opened:
            part, group, number = member.name.removeprefix("20news-bydate-").split("/")
            if group in (PC, MAC):
                content = opened.extractfile(member)
                assert content is not None
                texts[part][group, int(number)] = content.read().decode("latin-1").strip()
    drawn = {}
    for part, count in (("train", 60), ("test", 20)):
        keys = sorted(texts[part])
        drawn[part] = [keys[place] for place in np.random.default_rng(4).permutation(len(keys))[:count]]
    training = [texts["train"][key] for key in drawn["train"][:40]]
    vectorizer = TfidfVectorizer(stop_words="english", min_df=0.001, max_df=0.2)
    scaler = StandardScaler().fit(vectorizer.fit_transform(training).toarray())
    workload = loaded(archive, n_train=40, n_validation=20, n_test=20, corrupt=0.1, data_seed=4)
    expected = [drawn["train"][:40], drawn["train"][40:], drawn["test"]]
    for part, keys, (inputs, labels) in zip(
        ("train", "train", "test"), expected, zip(*[iter(tensors(workload))] * 2, strict=True), strict=True
    ):
        values = scaler.transform(vectorizer.transform([texts[part][key] for key in keys]).toarray())
        np.testing.assert_allclose(inputs.numpy(), values, rtol=1e-5, atol=1e-6)
        flipped = np.flatnonzero(labels.numpy() != np.array([key[1 - 1] == MAC for key in keys]))
        assert tuple(flipped) == (workload.corrupted if keys is expected[0] else ())
    assert [workload.appearance(index) for index in range(40)] == training
    damaged = workload.corrupted[0]
    group, number = drawn["train"][damaged]
    other = PC if group == MAC else MAC
    assert workload.label_of(damaged) == other
    assert workload.describe is not None
    line = workload.describe(damaged)
    assert line.endswith(f"”, from {group}, labelled {other} (flipped)")
    assert line[1:50] == texts["train"][group, number][:49]


def test_archive_and_folders_hold_the_same_posts(tmp_path: Path) -> None:
    write_archive(tmp_path / "20news-bydate.tar.gz", posts())
    unpacked = tmp_path / "unpacked"
    for name, content in reversed(posts().items()):
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(content)
    expected = loaded(tmp_path / "20news-bydate.tar.gz")
    assert same(loaded(tmp_path), expected)
    assert same(loaded(unpacked), expected)
    assert not same(loaded(tmp_path, data_seed=1), expected)
    # What a record names is found again from elsewhere.
    assert Path(expected.settings["data_dir"]).is_absolute()


def test_no_post_is_in_two_splits_and_none_for_testing_is_trained_on(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.tar.gz", posts())
    workload = loaded(tmp_path / "a.tar.gz", n_train=28, n_validation=12)
    shown = [workload.appearance(index) for index in range(28)]
    kept = {text.decode() for name, text in posts().items() if "-train/" in name and "space" not in name}
    assert len(set(shown)) == 28
    assert kept.issuperset(shown)  # type: ignore[arg-type]
    changed = posts() | {name: b"other words" for name in posts() if "-test/" in name}
    write_archive(tmp_path / "b.tar.gz", changed)
    other = loaded(tmp_path / "b.tar.gz", n_train=28, n_validation=12)
    assert all(torch.equal(a, b) for a, b in zip(tensors(workload)[:4], tensors(other)[:4], strict=True))
    # 28 + 12 are all training posts there are: validation's are those left, words unknown to training are no column.
    left = sorted(kept.difference(shown))  # type: ignore[arg-type]
    fitted = TfidfVectorizer(stop_words="english", min_df=0.001, max_df=0.2).fit(shown)
    assert len(left) == 12
    assert tensors(workload)[2].shape == (12, len(fitted.vocabulary_))


def test_odd_members_are_passed_over_and_nothing_is_written(tmp_path: Path) -> None:
    odd = [tarfile.TarInfo(name) for name in ("../escaped", "/absolute", "20news-bydate-train/../../escaped", "a\nb")]
    link = tarfile.TarInfo(f"20news-bydate-train/{PC}/1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo(f"20news-bydate-train/{MAC}")
    folder.type = tarfile.DIRTYPE
    inside = tmp_path / "data"
    inside.mkdir()
    write_archive(inside / "plain.tar.gz", posts())
    write_archive(inside / "odd.tar.gz", posts(), [*odd, link, folder])
    before = sorted(tmp_path.rglob("*"))
    assert same(loaded(inside / "odd.tar.gz"), loaded(inside / "plain.tar.gz"))
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_that_unpack_to_very_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four gigabytes of zeros take four megabytes: as a header, as many posts, or as a file."""
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    with gzip.open(tmp_path / "header.tar.gz", "wb") as file:
        file.write(header.tobuf())
    with pytest.raises(WorkloadError, match="a member's header claims 4294967296 bytes"):
        loaded(tmp_path / "header.tar.gz")
    monkeypatch.setattr(sys.modules[find_factory("projects/newsgroups").__module__ + ".posts"], "ALL", 1000)
    write_archive(tmp_path / "many.tar.gz", posts())
    with pytest.raises(WorkloadError, match="holds posts of more than 1000 characters"):
        loaded(tmp_path / "many.tar.gz")
    part = tmp_path / "folder" / "20news-bydate-train" / PC
    part.mkdir(parents=True)
    with (part / "1").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(WorkloadError, match="has 1099511627776 bytes; expected 1048576 at most"):
        loaded(tmp_path / "folder")


def test_headers_quotes_and_signatures_are_left_out(tmp_path: Path) -> None:
    around = (
        b"From: someone@somewhere\nSubject: Re: price\n\nHe writes:\n> quoted words\nmine %s\n\nthanks\n--\nsigned\n"
    )
    write_archive(tmp_path / "a.tar.gz", {name: around % text for name, text in posts().items()})
    workload = loaded(tmp_path / "a.tar.gz")
    bodies = {f"mine {text.decode()}\n\nthanks" for text in posts().values()}
    assert bodies.issuperset(workload.appearance(index) for index in range(24))  # type: ignore[arg-type]


def test_posts_of_other_groups_for_ood(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.tar.gz", posts())
    workload = loaded(tmp_path / "a.tar.gz", corrupt=0.25, corruption="ood")
    strangers = {text.decode() for name, text in posts().items() if "-train/sci.space" in name}
    assert {i for i in range(24) if workload.appearance(i) in strangers} == set(workload.corrupted)
    assert len(workload.corrupted) == 6
    assert workload.describe is not None
    assert workload.describe(workload.corrupted[0]).endswith("(text of another group)")


def test_labels_as_annotators_confuse_them(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.tar.gz", posts())
    settings = {"corruption": "hard_flip"}
    damaged, clean = (loaded(tmp_path / "a.tar.gz", corrupt=share, **settings) for share in (0.25, 0))
    changed = (tensors(damaged)[1] != tensors(clean)[1]).nonzero().flatten().tolist()
    assert changed == list(damaged.corrupted)
    assert len(changed) == 6
    # The texts are as they were.
    assert torch.equal(tensors(damaged)[0], tensors(clean)[0])


def answer(monkeypatch: pytest.MonkeyPatch, found: dict[str, bytes] | None) -> None:
    """Let scikit-learn's download give these posts, or fail."""

    def fetch_20newsgroups(subset: str, categories: list[str] | None, shuffle: bool) -> Any:
        if found is None:
            raise OSError("no network")
        chosen = {
            name: text
            for name, text in reversed(found.items())
            if f"-{subset}/" in name and (categories is None or name.split("/")[1] in categories)
        }
        names = np.array([f"/home/someone/20news_home/{name}" for name in chosen])
        return type("Bunch", (), {"filenames": names, "data": [text.decode() for text in chosen.values()]})

    find_factory("projects/newsgroups")
    module = sys.modules["dit_mlflow_project_newsgroups.posts"]
    monkeypatch.setattr(module, "fetch_20newsgroups", fetch_20newsgroups)


def test_the_download_gives_the_same_posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "a.tar.gz", posts())
    answer(monkeypatch, posts())
    assert same(load_workload("projects/newsgroups", **SMALL), loaded(tmp_path / "a.tar.gz"))
    answer(monkeypatch, None)
    with pytest.raises(WorkloadError, match=r"scikit-learn: OSError.*; give data_dir: 20news-bydate\.tar\.gz"):
        load_workload("projects/newsgroups")


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    def refused(message: str, name: str = "a.tar.gz", **settings: Any) -> None:
        with pytest.raises(WorkloadError, match=message):
            loaded(tmp_path / name, **settings)

    refused("there is no .*a.tar.gz; expected 20news-bydate.tar.gz, a folder")
    refused("there is no 20news-bydate-train in", name=".")
    write_archive(tmp_path / "a.tar.gz", posts())
    refused("60 samples were asked; there are 40 posts to train and validate with", n_train=40, n_validation=20)
    refused("setting model='cnn'", model="cnn")
    refused("setting corruption='noise'", corruption="noise")
    refused("corrupt is -1", corrupt=-1)
    whole = (tmp_path / "a.tar.gz").read_bytes()
    for length in (0, 9, len(whole) // 2, len(whole) - 40, len(whole) - 9, len(whole) - 1):
        (tmp_path / "b.tar.gz").write_bytes(whole[:length])
        refused("b.tar.gz cannot be read", name="b.tar.gz")
    (tmp_path / "b.tar.gz").write_bytes(whole[:500] + b"damaged" + whole[507:])
    refused("b.tar.gz cannot be read", name="b.tar.gz")
    (tmp_path / "c.tar.gz").write_bytes(b"not an archive")
    refused("c.tar.gz cannot be read", name="c.tar.gz")
    write_archive(tmp_path / "d.tar.gz", {name: text for name, text in posts().items() if MAC not in name})
    refused(f"has no posts 20news-bydate-train/{MAC}/<number>", name="d.tar.gz")
    write_archive(tmp_path / "e.tar.gz", posts() | {f"20news-bydate-train/{PC}/7": b"a" * (2**20 + 1)})
    refused("PC.*/7 has 1048577 bytes; no post has over".replace("PC", PC), name="e.tar.gz")
