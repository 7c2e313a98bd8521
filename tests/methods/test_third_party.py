"""Methods that other distributions register."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from building import LOSS_DROP, wheel_of
from oracles import train_again
from workloads import digits_workload, sample_losses

from dit_mlflow import InputError, Window, methods, train
from dit_mlflow.methods import method

OURS = methods.NAMES


def test_a_method_of_another_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wheel, not imported until it is asked for; its scores against losses of a plain training."""
    with pytest.raises(InputError, match="there is no method 'loss_drop'"):
        method("loss_drop")
    monkeypatch.syspath_prepend(wheel_of(LOSS_DROP, tmp_path))
    assert (*OURS, "loss_drop") == methods.NAMES
    assert method("tracin").name == "tracin"
    assert "dit_loss_drop" not in sys.modules
    monkeypatch.setitem(sys.modules, "dit_loss_drop", None)  # Taken away afterwards.
    del sys.modules["dit_loss_drop"]
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    found = method("loss_drop")(trajectory, workload, windows)

    def losses(step: int) -> np.ndarray:
        model = train_again(workload, trajectory, lambda t, i: 1.0, step, torch.float32)
        inputs, targets = workload.train_set.tensors  # type: ignore[attr-defined]
        with torch.no_grad():
            return sample_losses(model, (inputs, targets)).numpy()

    assert (found.method, found.kind) == ("loss_drop", "none")
    for k, window in enumerate(windows):
        np.testing.assert_allclose(found.of(k), losses(window.start) - losses(window.end), atol=1e-5)


HEAD = "from dataclasses import dataclass\nfrom dit_mlflow.methods import Estimate, Method\n"
NAMED = HEAD + "@dataclass(frozen=True)\nclass Mine(Method):\n    name = {name!r}\n"
ESTIMATE = "    def estimate(self, question):\n        raise AssertionError\n"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "tracin",
            NAMED.format(name="tracin") + ESTIMATE,
            r"'tracin' is registered by dit-mlflow itself and by mine 2",
        ),
        ("mine", "import no_such_module", r"'mine' of mine 2.* cannot be imported: ModuleNotFoundError: No module"),
        ("mine", "raise SystemError('no GPU')", r"'mine' of mine 2.* cannot be imported: SystemError: no GPU"),
        ("mine", "Yours = 1", r"'mine' of mine 2 \(mine_module:Mine\) cannot be imported: AttributeError"),
        ("mine", "Mine = dict", r"'mine' of mine 2.* is <class 'dict'>; expected a subclass of dit_mlflow.methods"),
        ("mine", "def Mine(): ...", r"'mine' of mine 2.* is <function.*; expected a subclass"),
        ("mine", NAMED.format(name="mine"), r"'mine' of mine 2.* cannot be made: TypeError: .*abstract.*estimate"),
        ("mine", NAMED.format(name="mine") + "    damping: float\n" + ESTIMATE, r"cannot be made: .*'damping'"),
        ("mine", NAMED.format(name="yours") + ESTIMATE, r"'mine' of mine 2.* calls itself 'yours'; expected the entry"),
        ("mine", HEAD + "class Mine(Method):\n" + ESTIMATE, r"'mine' of mine 2.* calls itself None"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_distribution(
    name: str, source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "mine", name, source, monkeypatch)
    with pytest.raises(InputError, match=message):
        method(name)
    assert method("loss").name == "loss"


def test_two_distributions_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner in ("one", "other"):
        install(tmp_path, owner, "shared", NAMED.format(name="shared") + ESTIMATE, monkeypatch)
    assert (*OURS, "shared") == methods.NAMES
    with pytest.raises(InputError, match="'shared' is registered by one 2 and by other 2; uninstall all but one"):
        method("shared")


def install(folder: Path, distribution: str, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put down what an installer would."""
    known = folder / distribution / f"{distribution}-2.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2\n")
    (known / "entry_points.txt").write_text(f"[dit_mlflow.methods]\n{name} = {distribution}_module:Mine\n")
    (known.parent / f"{distribution}_module.py").write_text(source)
    monkeypatch.syspath_prepend(known.parent)
    monkeypatch.setitem(sys.modules, f"{distribution}_module", None)  # Taken away afterwards.
    del sys.modules[f"{distribution}_module"]
