"""MNIST, EMNIST, CIFAR-10 from files that the test writes, scikit-learn's digits: pixels, labels, splits, errors."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from public_files import idx_bytes, write_cifar, write_idx, write_image_files
from sklearn.datasets import load_digits
from torch import nn

from dit_mlflow import Workload, WorkloadError, load_workload

MNIST = ("train", "t10k")
LETTERS = ("emnist-letters-train", "emnist-letters-test")
SMALL = {"n_train": 6, "n_validation": 4, "n_test": 3, "corrupt": 0}


def tensors(workload: Workload) -> list[torch.Tensor]:
    sets: list[Any] = [workload.train_set, workload.validation_set, workload.test_set]
    return [tensor for part in sets for tensor in part.tensors]


def test_mnist_from_its_own_files(tmp_path: Path) -> None:
    """Pixels, labels and order by hand; compressed or not is the same."""
    labels = np.array([1, 7, 3, 7, 1, 0, 1, 7, 7, 1, 1, 7, 9]), np.array([7, 2, 1, 1, 7])
    images, test = write_image_files(tmp_path / "plain", MNIST, labels)
    write_image_files(tmp_path / "gz", MNIST, labels, compress=True)
    plain, packed = (
        load_workload("projects/mnist", data_dir=str(tmp_path / name), **SMALL, data_seed=2) for name in ("plain", "gz")
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(packed), strict=True))
    kept = np.flatnonzero(np.isin(labels[0], (1, 7)))
    order = kept[np.random.default_rng(2).permutation(10)]
    training = images[order[:6]].reshape(6, 784) / 255
    scale = np.where(training.std(axis=0) > 0, training.std(axis=0), 1)
    held = images[order[6:]].reshape(4, 784) / 255
    np.testing.assert_allclose(tensors(plain)[0], (training - training.mean(axis=0)) / scale, atol=1e-5)
    np.testing.assert_allclose(tensors(plain)[2], (held - training.mean(axis=0)) / scale, rtol=1e-5, atol=1e-5)
    assert tensors(plain)[1].tolist() == (labels[0][order[:6]] == 7).tolist()
    assert tensors(plain)[5].sum() in (1, 2)
    for index in range(6):
        np.testing.assert_allclose(plain.appearance(index), images[order[index]] / 255)
    assert {tuple(image.ravel()) for image in test[[0, 2, 3, 4]]}.issuperset(
        tuple(np.rint((row * scale + training.mean(axis=0)) * 255).astype(int)) for row in tensors(plain)[4].numpy()
    )


def test_test_images_do_not_touch_the_others(tmp_path: Path) -> None:
    labels = np.arange(20) % 10, np.arange(10)
    write_image_files(tmp_path / "a", MNIST, labels)
    write_image_files(tmp_path / "b", MNIST, labels)
    write_idx(tmp_path / "b" / "t10k-images-idx3-ubyte", np.full((10, 28, 28), 200))
    settings: dict[str, Any] = {"classes": "all", **SMALL, "standardise": "channel"}
    a, b = (load_workload("projects/mnist", data_dir=str(tmp_path / name), **settings) for name in "ab")
    assert all(torch.equal(one, other) for one, other in zip(tensors(a)[:4], tensors(b)[:4], strict=True))
    assert not torch.equal(tensors(a)[4], tensors(b)[4])


@pytest.mark.parametrize(("reference", "settings"), [("projects/mnist", {"classes": "all"}), ("projects/digits", {})])
def test_ten_classes(reference: str, settings: dict[str, str]) -> None:
    workload = load_workload(reference, **settings)
    inputs, labels = tensors(workload)[::2], tensors(workload)[1::2]
    assert len(torch.unique(torch.cat(inputs), dim=0)) == 768
    assert torch.unique(torch.cat(labels)).tolist() == list(range(10))
    model = workload.build_model()
    batch = workload.batch(range(50))
    torch.testing.assert_close(workload.loss(model, batch).mean(), nn.CrossEntropyLoss()(model(batch[0]), batch[1]))
    assert workload.metrics is not None
    right = [float(model(batch[0])[i].argmax() == batch[1][i]) for i in range(50)]
    assert workload.metrics(model, batch)["accuracy"].tolist() == right
    assert workload.label_of(0) == str(int(labels[0][0]))
    with pytest.raises(WorkloadError, match=r"there are .* digits"):
        load_workload(reference, **settings, n_train=5000)


def test_digits_are_those_of_scikit_learn() -> None:
    workload = load_workload("projects/digits", corrupt=0, standardise="channel")
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)[:256]
    training = pixels[order] / 16
    np.testing.assert_allclose(tensors(workload)[0], (training - training.mean()) / training.std(), atol=1e-5)
    assert tensors(workload)[1].tolist() == labels[order].tolist()
    np.testing.assert_allclose(workload.appearance(3), pixels[order[3]].reshape(8, 8) / 16)


def test_letters_stand_upright(tmp_path: Path) -> None:
    labels = np.array([1, 2, 26, 2, 1, 1, 2, 1, 2, 2, 1, 1]), np.array([2, 1, 5, 2])
    images, _ = write_image_files(tmp_path, LETTERS, labels)
    workload = load_workload("projects/emnist", data_dir=str(tmp_path), **SMALL, standardise="image")
    order = np.flatnonzero(labels[0] != 26)[np.random.default_rng(0).permutation(11)]
    for index in range(6):
        upright = images[order[index]].T / 255
        np.testing.assert_allclose(workload.appearance(index), upright)
        own = (upright - upright.mean()) / upright.std()
        np.testing.assert_allclose(tensors(workload)[0][index].reshape(28, 28), own, atol=1e-5)
        letter = "AB"[labels[0][order[index]] - 1]
        assert workload.label_of(index) == letter
        assert workload.describe is not None
        assert workload.describe(index) == f"letter {letter}, labelled {letter}"


@pytest.mark.parametrize("classes", ["0,1", "all"])
def test_cifar_by_hand(classes: str, tmp_path: Path) -> None:
    files = write_cifar(tmp_path / "cifar-10-batches-bin")
    workload = load_workload("projects/cifar10", classes=classes, data_dir=str(tmp_path), **SMALL)
    rows = np.concatenate([files[f"data_batch_{number}.bin"] for number in range(1, 6)])
    rows = rows if classes == "all" else rows[rows[:, 0] < 2]
    order = np.random.default_rng(0).permutation(len(rows))
    training = rows[order[:6]]
    assert tensors(workload)[1].tolist() == training[:, 0].tolist()
    pixels = training[:, 1:].reshape(6, 3, 1024) / 255
    held = rows[order[6:10], 1:].reshape(4, 3, 1024) / 255
    for found, values in zip(tensors(workload)[::2], (pixels, held), strict=False):
        for colour in range(3):
            expected = (values[:, colour] - pixels[:, colour].mean()) / pixels[:, colour].std()
            np.testing.assert_allclose(found.reshape(-1, 3, 1024)[:, colour], expected, atol=1e-5)
    image = workload.appearance(0)
    assert isinstance(image, np.ndarray)
    assert image.shape == (32, 32, 3)
    # Row 2, column 5 in red, green, blue.
    np.testing.assert_allclose(image[2, 5], training[0, [1 + 69, 1 + 1024 + 69, 1 + 2048 + 69]] / 255)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert workload.label_of(0) == names[training[0, 0]]


def test_images_of_other_classes_for_ood(tmp_path: Path) -> None:
    files = write_cifar(tmp_path)
    settings: dict[str, Any] = {**SMALL, "corrupt": 0.5, "corruption": "ood"}
    workload = load_workload("projects/cifar10", data_dir=str(tmp_path), **settings)
    rows = np.concatenate([files[f"data_batch_{number}.bin"] for number in range(1, 6)])
    strangers = {row[1:].tobytes() for row in rows[rows[:, 0] > 1]}
    shown = [np.rint(np.moveaxis(workload.appearance(i), 2, 0) * 255).astype(np.uint8).tobytes() for i in range(6)]  # type: ignore[arg-type]
    assert tuple(index for index in range(6) if shown[index] in strangers) == workload.corrupted
    assert len(workload.corrupted) == 3
    with pytest.raises(ValueError, match="corruption='ood' needs"):
        load_workload("projects/cifar10", classes="all", data_dir=str(tmp_path), **settings)


def test_resnet9_is_the_published_one() -> None:
    """Parameters by hand: convolutions 3x3, BatchNorm's two per channel, the linear layer."""
    from dit_mlflow.examples import resnet9

    channels = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    expected = sum(9 * a * b + 2 * b for a, b in channels) + 512 * 10 + 10
    model = resnet9()()
    assert sum(p.numel() for p in model.parameters()) == expected == 6_573_130
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 8
    assert model.eval()(torch.zeros(2, 3072)).shape == (2, 10)
    assert resnet9(2, width=2)()(torch.zeros(4, 3072)).shape == (4,)


IMAGES, NUMBERS = np.zeros((12, 28, 28), dtype=np.uint8), np.array([1, 7] * 6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:-1], "train-images-idx3-ubyte ends too early.*12 items"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES) + b"0", "goes on after its last item"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:9], "is not an IDX file of unsigned bytes with 3 axes"),
        ("train-images-idx3-ubyte", b"", "is not an IDX file"),
        ("train-images-idx3-ubyte", b"\x00\x00\x0d\x03" + idx_bytes(IMAGES)[4:], "it begins with 00 00 0d 03"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES[:, :27]), r"holds items of \[27, 28\]; expected \[28, 28\]"),
        (
            "train-images-idx3-ubyte",
            idx_bytes(IMAGES)[:4] + b"\xff" * 4 + idx_bytes(IMAGES)[8:16],
            "more than .* bytes",
        ),
        ("train-labels-idx1-ubyte", idx_bytes(NUMBERS[:-1]), "has 12 images, .* has 11 labels"),
        ("train-labels-idx1-ubyte", idx_bytes(NUMBERS + 3), "label 10 of image 1 is not one of 0 … 9"),
        ("t10k-images-idx3-ubyte", None, "there is no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"),
    ],
)
def test_a_malformed_idx_file_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    write_image_files(tmp_path, MNIST, (NUMBERS, NUMBERS))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError, match=message):
        load_workload("projects/mnist", data_dir=str(tmp_path), **SMALL)


PACKED = gzip.compress(idx_bytes(IMAGES))


@pytest.mark.parametrize(
    "packed", [PACKED[:-9], b"no gzip", PACKED[:30] + b"\xff" * 40], ids=["cut off", "no gzip", "garbled"]
)
def test_a_damaged_compressed_file_is_named(packed: bytes, tmp_path: Path) -> None:
    write_image_files(tmp_path, MNIST, (NUMBERS, NUMBERS), compress=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(WorkloadError, match=r"train-images-idx3-ubyte\.gz"):
        load_workload("projects/mnist", data_dir=str(tmp_path), **SMALL)


def test_a_malformed_cifar_file_is_named(tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(WorkloadError, match=message):
            load_workload("projects/cifar10", data_dir=str(tmp_path), **(SMALL | settings))

    refused("there is no data_batch_1.bin, .*, test_batch.bin in")
    write_cifar(tmp_path)
    refused("there are 20 images of these classes to train and validate with", n_train=17)
    refused("width is 0", model="resnet9", width=0)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(3073 * 2 - 1))
    refused("data_batch_3.bin has 6145 bytes, not a multiple of 3073")
    (tmp_path / "data_batch_3.bin").write_bytes(bytes([10]) + bytes(3072))
    refused("data_batch_3.bin: label 10 in image 0; expected 0 to 9")
    with (tmp_path / "data_batch_3.bin").open("wb") as file:
        file.truncate(3073 * 10**9)
    refused("data_batch_3.bin has 3073000000000 bytes; expected 61460000 at most")


@pytest.mark.parametrize(
    ("reference", "model", "message"),
    [
        ("projects/mnist", "dnn", "preset=paper is of classes=1,7"),
        ("projects/cifar10", "cnn", "preset=paper is of classes=0,1"),
    ],
)
def test_the_paper_has_two_classes(reference: str, model: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_workload(reference, model=model, classes="all", preset="paper")
    if reference == "projects/cifar10":
        with pytest.raises(WorkloadError, match="preset=paper knows no resnet9 here; it has cnn"):
            load_workload(reference, model="resnet9", classes="0,1", preset="paper")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("projects/emnist", "emnist-letters-train-images-idx3-ubyte"), ("projects/cifar10", "data_batch_1.bin")],
)
def test_without_torchvision_the_message_says_what_to_put_where(
    reference: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(WorkloadError, match=f"cannot be imported.*give data_dir: .*{expected}"):
        load_workload(reference)


class Torchvision(ModuleType):
    """Stands for ``torchvision.datasets``: writes what it would download, in the folder that it is told."""

    def __init__(self) -> None:
        super().__init__("torchvision.datasets")
        self.utils = self
        self.fails = False

    def EMNIST(self, root: str, split: str, download: bool) -> Any:
        self.asked(root, split == "letters" and download)
        folder = Path(root) / "EMNIST" / "raw"
        write_image_files(folder, LETTERS, (np.array([1, 2] * 6), np.array([1, 2] * 3)))
        return type("EMNIST", (), {"raw_folder": str(folder)})

    def download_and_extract_archive(self, url: str, root: str, md5: str) -> None:
        self.asked(root, url.endswith("/cifar-10-binary.tar.gz") and len(md5) == 32)
        write_cifar(Path(root) / "cifar-10-batches-bin")

    def asked(self, root: str, rightly: bool) -> None:
        assert rightly
        if self.fails:
            raise OSError("no network")


@pytest.mark.parametrize(
    ("reference", "folder"), [("projects/emnist", "EMNIST/raw"), ("projects/cifar10", "cifar-10-batches-bin")]
)
def test_torchvision_downloads(reference: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = Torchvision()
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = load_workload(reference, **SMALL)
    expected = load_workload(reference, data_dir=str(tmp_path / "dit-mlflow-data" / folder), **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))
    assert found.settings["data_dir"] is None
    datasets.fails = True
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(WorkloadError, match=r"cannot be downloaded into .*: no network; give data_dir"):
        load_workload(reference, **SMALL)
