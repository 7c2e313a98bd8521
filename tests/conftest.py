from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# One thread: the tests' models are small, and their subprocesses must replay with the same number.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

sys.path.insert(0, str(Path(__file__).parent))

from browsing import browser, page, shot  # noqa: F401

torch.set_num_threads(1)
# What torch and MLflow leave in memory, a million objects, is walked seldom: it was a fifth of the tests' CPU time.
gc.set_threshold(50_000, 10, 10)
