"""Follow README.md and docs/quickstart.md word by word, as a reader who installed the wheel: commands and Python.

``python follow_pages.py PAGES`` in an empty folder, with the Python of the environment that holds the wheel. A command
that begins with ``python3 run.py`` is typed as the pages say for an installed package: ``dit-mlflow``, with
``--name value`` for ``-P name=value``.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

DIT = str(Path(sys.executable).with_name("dit-mlflow"))
LOOP = """
import torch
from torch import nn
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_set, validation_set = TensorDataset(images[:200], labels[:200]), TensorDataset(images[200:400], labels[200:400])
model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
train_loader, epochs = DataLoader(train_set, batch_size=40, shuffle=True), 6
"""
"""What a reader of the README has already: a model, its optimizer, its data."""


def main(pages: Path) -> None:
    training = ""
    for page in ("README.md", "docs/quickstart.md"):
        text = (pages / page).read_text(encoding="utf-8")
        folder = Path(page).stem  # Each page begins in an empty one.
        Path(folder).mkdir()
        os.chdir(folder)
        for command in commands(text):
            said = follow(command, training)
            training = "".join(re.findall(r"^training run +(\w+)$", said, re.M)[:1]) or training
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.M):
            started = time.monotonic()
            run([sys.executable, "-c", LOOP + block if page == "README.md" else block])
            print(f"{page}: {len(block.splitlines())} lines of Python, {time.monotonic() - started:.0f} s")
        os.chdir("..")


def commands(text: str) -> list[str]:
    """Those of a page that stand on a line of their own or in a table's last column, each once, in order."""
    own = r"^    (python3 run\.py [^#\n]*?)(?: +#.*)?$"
    cell = r"\| `((?:python3 run\.py|dit-mlflow) [^`]*)`[^|]* \|$"
    found = ["".join(pair) for pair in re.findall(f"{own}|{cell}", text, re.M)]
    assert found, text[:80]
    return list(dict.fromkeys(found))


def follow(command: str, training: str) -> str:
    """Type ``command``; what it printed."""
    if command == "python3 run.py test":
        return ""  # CI has done that.
    typed = re.sub(r"-P (\w+)=", lambda option: f"--{option[1].replace('_', '-')} ", command)
    typed = re.sub(r"<[^>]*>", training, typed)
    words = shlex.split(typed.replace("python3 run.py", "dit-mlflow"))[1:]
    print("+ dit-mlflow", *words, flush=True)
    return look_at_ui() if words == ["ui"] else run([DIT, *words])


def run(command: list[str]) -> str:
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"{finished.stdout}\n{command} ended with {finished.returncode}")
    return finished.stdout


def look_at_ui() -> str:
    """Start the UI, get its first page, and stop it by Ctrl-C."""
    server = subprocess.Popen([DIT, "ui"], start_new_session=True)
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                with urlopen("http://127.0.0.1:5000", timeout=5) as answer:
                    assert b"MLflow" in answer.read()
                    return ""
            except OSError:
                assert server.poll() is None, server.returncode
        raise AssertionError("no page after a minute")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
