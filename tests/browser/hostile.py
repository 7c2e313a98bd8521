"""A workload whose samples are called what an attacker would call them."""

from __future__ import annotations

from workloads import digits_workload

from dit_mlflow import Workload

TEXTS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "# heading [link](javascript:alert(1)) **bold** `code`",
    "| cell | cell | $x^2$",
    "\u202egnirts desrever",
    "👩‍🔬 naïve 数据",
    "half \ud83d of a pair",
    "long " * 2000,
)


def text_of(index: int) -> str:
    return TEXTS[index % len(TEXTS)]


def workload() -> Workload:
    return digits_workload(describe=text_of, label=text_of, show=text_of, corrupted=tuple(range(7)))
