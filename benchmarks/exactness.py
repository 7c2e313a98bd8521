"""Are scores the derivatives of what training did? Many kinds of training against central differences of their loops.

``python benchmarks/exactness.py`` trains each kind for a few steps in float64, sweeps it for every kind of window, and
trains it again in plain PyTorch with one sample's weight a little larger and smaller. It writes docs/exactness.md.
Names of rows after it, as in that page, are measured alone and printed.
Optimizers of timm are measured where it is installed (with the torchvision of that torch).
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from dit_mlflow import DitError, Trajectory, Window, Workload, track, train
from dit_mlflow.torch_internals import widening

SAMPLES, BATCH, EPOCHS, NUDGE = 24, 8, 2, 1e-5
SOME = (0, 5, 11)
KINDS = ("local", "final", "cumulative")


def data(count: int, seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 6, generator=random), torch.randint(3, (count,), generator=random))


def losses(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Net(nn.Module):
    """A network with something in its middle, and maybe something else of its own."""

    def __init__(self, middle: Callable[..., Any] | nn.Module = torch.tanh, width: int = 8) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, width), middle, nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(self.first(inputs)))


class Spectrum(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.rfft(values)).flatten(1)[:, :6]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layer(inputs[:, None] * torch.arange(1.0, 4.0).to(inputs)[:, None]).mean(dim=1))


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cell(inputs.view(-1, 3, 2))[0][:, -1])


class Words(nn.Module):
    def __init__(self, bag: nn.Module) -> None:
        super().__init__()
        self.bag, self.last = bag, nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.bag((inputs.clamp(-2, 2) * 3 + 6).long()))


class Tied(nn.Module):
    """Words scored by the table that they come from, with a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(13, 4, padding_idx=6), nn.Linear(24, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(self.words((inputs.clamp(-2, 2) * 3 + 6).long()).flatten(1))
        return (torch.tanh(hidden) @ self.words.weight.T)[:, 5:8]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128) * 0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(self.weight.dtype) @ self.weight).abs()


class Recomputed(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(checkpoint(lambda x: torch.tanh(self.first(x)), inputs, use_reentrant=False))


class Taught(nn.Module):
    """A running average of the parameters, kept in buffers, teaches the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        for name, value in self.net.named_parameters():
            self.register_buffer("mean_" + name.replace(".", "_"), value.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            for name, value in self.net.named_parameters():
                getattr(self, "mean_" + name.replace(".", "_")).lerp_(value.detach(), 0.1)
        return self.net(inputs)


def consistent(model: Any, batch: Any) -> Tensor:
    means = {name: getattr(model, "mean_" + name.replace(".", "_")) for name, _ in model.net.named_parameters()}
    taught = torch.func.functional_call(model.net, means, (batch[0],)).detach()
    return losses(model, batch) + mse_loss(model.net(batch[0]), taught, reduction="none").sum(dim=1)


def focal(model: nn.Module, batch: Any) -> Tensor:
    loss = losses(model, batch)
    return (1 - torch.exp(-loss)).detach() ** 2 * loss


def soft_target(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    target = (0.5 * logits.softmax(dim=1) + 0.5 * nn.functional.one_hot(batch[1], 3)).detach()
    return -(target * logits.log_softmax(dim=1)).sum(dim=1)


def balanced(model: nn.Module, batch: Any) -> Tensor:
    one, other = losses(model, batch), model(batch[0]).square().mean(dim=1)
    return one + other * (one / other).detach().clamp(max=10)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    """A gradient penalty."""
    inputs = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).logsumexp(dim=1).sum(), inputs, create_graph=True)
    return losses(model, batch) + 0.1 * slope.square().sum(dim=1)


def forces(model: nn.Module, batch: Any) -> Tensor:
    """An energy, and the force that is its derivative."""
    inputs = batch[0].clone().requires_grad_()
    energy = model(inputs)[:, 0]
    (force,) = torch.autograd.grad(energy.sum(), inputs, create_graph=True)
    return (energy - batch[1]).square() + (force - batch[0]).square().sum(dim=1)


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """One step of the fast gradient sign method, held fixed."""
    inputs = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses(model, (inputs, batch[1])).sum(), inputs)
    return losses(model, (batch[0] + 0.1 * slope.sign(), batch[1]))


def distilled(model: nn.Module, batch: Any) -> Tensor:
    teacher = torch.tanh(batch[0] @ torch.linspace(-1, 1, 18).view(6, 3).to(batch[0])).softmax(dim=1)
    return losses(model, batch) - (teacher * model(batch[0]).log_softmax(dim=1)).sum(dim=1)


def straight_through(value: Tensor) -> Tensor:
    return torch.tanh(value) + (torch.round(4 * torch.tanh(value)) / 4 - torch.tanh(value)).detach()


def halved(value: Tensor) -> Tensor:
    value = torch.tanh(value)
    if value.requires_grad:
        value.register_hook(lambda gradient: 0.5 * gradient)
    return value


class Lamb(torch.optim.Optimizer):
    """Each parameter's step is scaled by norms; written with ``.data``, as many are."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state["step"], state["first"] = 0, torch.zeros_like(value.data)
                    state["second"] = torch.zeros_like(value.data)
                state["step"] += 1
                for key, beta, part in zip(
                    ("first", "second"), group["betas"], (value.grad.data, value.grad.data**2), strict=True
                ):
                    state[key].mul_(beta).add_(part, alpha=1 - beta)
                first = state["first"] / (1 - group["betas"][0] ** state["step"])
                second = state["second"] / (1 - group["betas"][1] ** state["step"])
                move = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * value.data
                trust = value.data.norm() / move.norm() if value.dim() > 1 else 1.0
                value.data.sub_(group["lr"] * trust * move)


class Lion(torch.optim.Optimizer):
    """The sign of a mean gradient."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                mean = self.state[value].setdefault("mean", torch.zeros_like(value))
                value.sub_(group["lr"] * (0.9 * mean + 0.1 * value.grad).sign())
                mean.lerp_(value.grad, 0.01)


class OnlyMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)))


def unrounded(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """The same optimizers without what they round to low precision."""

    def made(model: nn.Module) -> Any:
        optimizers = make(model)
        for optimizer in optimizers.values() if isinstance(optimizers, dict) else [optimizers]:
            optimizer.__class__ = in_float64(type(optimizer))
        return optimizers

    return made


def in_float64(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    class InFloat64(cls):  # type: ignore[valid-type, misc]
        def step(self, closure: Any = None) -> Any:
            with widening(torch.float64, lambda dtype: None):
                return super().step(closure)

    return InFloat64


def rounding(name: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """An optimizer as it is, held against differences of training in which it does not round; and that training."""
    optimizer = unrounded(settings["optimizer"])
    return {
        name: {**settings, "again": optimizer},
        f"{name}, made to compute in float64": {**settings, "optimizer": optimizer},
    }


def muon_and_adamw(model: nn.Module) -> Any:
    matrices, others = ([value for value in model.parameters() if (value.dim() == 2) == of] for of in (True, False))
    return {"muon": torch.optim.Muon(matrices, lr=0.02), "adamw": torch.optim.AdamW(others, lr=0.02)}


def two_optimizers(model: nn.Module, optimizers: Any, batch: Any, weights: Tensor) -> Tensor:
    model.zero_grad()
    loss = (weights * losses(model, batch)).mean()
    loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return loss


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def a_step(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weights * losses(model, batch)).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def three_steps(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    return [a_step(model, optimizer, batch, weights) for _ in range(3)][-1]


def sharpness_aware(model: nn.Module, optimizer: Any, batch: Any, weights: Tensor, adaptive: bool = False) -> Tensor:
    """SAM (Foret et al. 2021); ``adaptive``: ASAM (Kwon et al. 2021)."""

    def gradients() -> Tensor:
        optimizer.zero_grad()
        loss = (weights * losses(model, batch)).mean()
        loss.backward()
        return loss

    gradients()
    held = list(model.parameters())
    scaled = [value.grad * (value.abs() if adaptive else 1) for value in held]
    length = torch.stack([part.norm() for part in scaled]).norm() + 1e-12
    away = [0.05 * part * (value.abs() if adaptive else 1) / length for part, value in zip(scaled, held, strict=True)]
    with torch.no_grad():
        for value, part in zip(held, away, strict=True):
            value.add_(part)
    loss = gradients()
    with torch.no_grad():
        for value, part in zip(held, away, strict=True):
            value.sub_(part)
    optimizer.step()
    return loss


class TaughtByAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Net(), Net().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(inputs)


def mean_teacher(model: Any, optimizer: Any, batch: Any, weights: Tensor) -> Tensor:
    optimizer.zero_grad()
    apart = (model(batch[0]).softmax(dim=1) - model.teacher(batch[0]).softmax(dim=1)).square().sum(dim=1)
    loss = (weights * (losses(model, batch) + apart)).mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for average, value in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            average.lerp_(value, 0.2)
    return loss


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6)), Net()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.critic(inputs)[:, 0]


def against_each_other(
    model: Any, optimizers: Any, batch: Any, weights: Tensor, made_up: Callable[[Tensor], Tensor], real: Any
) -> Tensor:
    """A GAN's two steps: ``real`` and ``made_up`` are the losses of scores."""
    made = model.maker(batch[0][:, :2])
    optimizers["critic"].zero_grad()
    loss = (weights * (real(model(batch[0])) + made_up(model(made.detach())))).mean()
    loss.backward()
    optimizers["critic"].step()
    optimizers["maker"].zero_grad()
    real(model(made)).mean().backward()
    optimizers["maker"].step()
    return loss


def adversaries(real: Any, made_up: Any) -> dict[str, Any]:
    return {
        "model": Adversaries,
        "loss": lambda model, batch: real(model(batch[0])),
        "optimizer": lambda model: {
            "maker": torch.optim.Adam(model.maker.parameters(), lr=0.02),
            "critic": torch.optim.Adam(model.critic.parameters(), lr=0.02),
        },
        "step": partial(against_each_other, real=real, made_up=made_up),
    }


RATES = {"Adadelta": 1.0, "Rprop": 0.01, "LBFGS": 0.1, "SGD": 0.1, "ASGD": 0.1, "Adagrad": 0.1, "Muon": 0.02}
OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
)


def of_torch(name: str, **settings: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), lr=RATES.get(name, 0.02), **settings)


MUON = hasattr(torch.optim, "Muon")
TIMM = find_spec("timm") is not None
OF_TIMM = (
    *(
        "adabelief",
        "adafactor",
        "adafactorbv",
        "adamp",
        "adan",
        "adopt",
        "cadamw",
        "lamb",
        "laprop",
        "lars",
        "lion",
        "madgrad",
    ),
    *("mars", "nadamw", "novograd", "rmsproptf", "sgdw"),
)


def of_timm(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(model, opt=name, lr=0.02)

    return make


CASES: dict[str, dict[str, Any]] = {
    **{f"torch.optim.{name}": {"optimizer": of_torch(name)} for name in OPTIMIZERS if name != "Muon"},
    **(rounding("torch.optim.Muon", model=OnlyMatrices, optimizer=of_torch("Muon")) if MUON else {}),
    **{f"timm: {name}": {"optimizer": of_timm(name)} for name in OF_TIMM if TIMM},
    **(rounding("timm: muon", optimizer=of_timm("muon")) if TIMM else {}),
    "LAMB, one's own": {"optimizer": lambda model: Lamb(model.parameters())},
    "Lion, one's own": {"optimizer": lambda model: Lion(model.parameters())},
    "SGD, Nesterov, weight decay": {"optimizer": of_torch("SGD", momentum=0.9, nesterov=True, weight_decay=0.01)},
    "AdamW, AMSGrad, clipping by norm": {"optimizer": of_torch("AdamW", amsgrad=True), "clip_grad_norm": 0.5},
    "clipping by value, two micro-batches a step": {"clip_grad_value": 0.02, "accumulate": 2},
    "BatchNorm": {"model": lambda: Net(nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()))},
    "GroupNorm": {"model": lambda: Net(nn.Sequential(nn.GroupNorm(2, 8), nn.Tanh()))},
    "LayerNorm": {"model": lambda: Net(nn.Sequential(nn.LayerNorm(8), nn.GELU()))},
    "weight norm": {"model": lambda: weight_norm_net()},
    "spectral norm": {"model": lambda: spectral_norm_net()},
    "attention": {"model": Attending},
    "LSTM": {"model": Remembering},
    "EmbeddingBag, mean": {"model": lambda: Words(nn.EmbeddingBag(13, 4))},
    "EmbeddingBag, max": {"model": lambda: Words(nn.EmbeddingBag(13, 4, mode="max"))},
    "tied words with a padding row": {"model": Tied},
    "complex parameters": {"model": Complex},
    "gradient checkpointing": {"model": Recomputed},
    "an average of the parameters in the loss": {"model": Taught, "loss": consistent},
    "detached focal weight": {"loss": focal},
    "detached soft target": {"loss": soft_target},
    "detached balance of two losses": {"loss": balanced},
    "gradient penalty": {"loss": penalised},
    "gradient penalty, LayerNorm": {"model": lambda: Net(nn.Sequential(nn.LayerNorm(8), nn.GELU())), "loss": penalised},
    "gradient penalty, BatchNorm": {
        "model": lambda: Net(nn.Sequential(nn.BatchNorm1d(8), nn.GELU())),
        "loss": penalised,
    },
    "energy and forces": {"loss": forces},
    "adversarial step, held fixed": {"loss": adversarial},
    "distillation": {"loss": distilled},
    "gradient reversal": {"model": partial(Net, lambda value: torch.tanh(Reversed.apply(value)))},
    "straight-through rounding": {"model": partial(Net, straight_through)},
    "hook on an activation": {"model": partial(Net, halved)},
    "a step of one's own: AdamW, clipping": {"step": a_step, "optimizer": of_torch("AdamW")},
    "a step of one's own: three steps a batch": {"step": three_steps, "optimizer": of_torch("SGD", momentum=0.9)},
    "a step of one's own: LAMB": {"step": a_step, "optimizer": lambda model: Lamb(model.parameters())},
    **(rounding("a step of one's own: Muon and AdamW", step=two_optimizers, optimizer=muon_and_adamw) if MUON else {}),
    "a step of one's own: Adafactor": {"step": a_step, "optimizer": of_torch("Adafactor")},
    "a step of one's own: complex values": {"step": a_step, "model": lambda: Net(Spectrum(), 6)},
    "SAM": {"step": sharpness_aware, "optimizer": of_torch("AdamW")},
    "ASAM": {"step": partial(sharpness_aware, adaptive=True)},
    "mean teacher": {
        "step": mean_teacher,
        "model": TaughtByAverage,
        "optimizer": lambda model: torch.optim.SGD(model.student.parameters(), lr=0.1),
    },
    "GAN, two optimizers": adversaries(lambda z: nn.functional.softplus(-z), nn.functional.softplus),
    "GAN by least squares": adversaries(lambda z: (z - 1).square(), torch.square),
    "fake quantisation": {
        "model": partial(Net, lambda v: torch.fake_quantize_per_tensor_affine(torch.tanh(v), 0.1, 0, -128, 127))
    },
}


def weight_norm_net() -> nn.Module:
    model = Net()
    weight_norm(model.first)
    return model


def spectral_norm_net() -> nn.Module:
    model = Net()
    spectral_norm(model.first)
    return model


def trained_again(
    workload: Workload, trajectory: Trajectory, weights: np.ndarray, first: int, last: int, until: int
) -> float:
    """Validation loss at ``until`` of a plain loop, with other weights in ``[first, last)``."""
    assert workload.optimizer is not None
    model = trajectory.checkpoint(0).load_into(workload.build_model())
    optimizer: Any = workload.optimizer(model)
    model.train()
    for t in range(until):
        model.zero_grad()
        for indices in trajectory.step(t).indices:
            own = torch.from_numpy(weights[np.array(indices)] if first <= t < last else np.ones(len(indices)))
            if workload.step is not None:
                workload.step(model, optimizer, workload.batch(indices), own)
                continue
            loss = workload.loss(model, workload.batch(indices))
            (own * loss / (len(indices) * workload.accumulate)).sum().backward()
        if workload.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), workload.clip_grad_norm)
        if workload.clip_grad_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), workload.clip_grad_value)
        if workload.step is None:
            optimizer.step()
    model.eval()
    return float(workload.loss(model, workload.validation_set.tensors).mean().detach())  # type: ignore[attr-defined]


def differences(workload: Workload, trajectory: Trajectory, window: Window, kind: str) -> np.ndarray:
    """``-dq / dw_j`` of :data:`SOME` by central differences of the loop."""

    def value(weights: np.ndarray) -> float:
        if kind == "cumulative":
            ends = (trained_again(workload, trajectory, weights, 0, end, end) for end in (window.end, window.start))
            return next(ends) - next(ends)
        until = window.end if kind == "local" else trajectory.num_steps
        return trained_again(workload, trajectory, weights, window.start, window.end, until)

    def slope(sample: int) -> float:
        nudge = NUDGE * np.eye(SAMPLES)[sample]
        return (value(1 - nudge) - value(1 + nudge)) / (2 * NUDGE)

    return np.array([slope(sample) for sample in SOME])


def measure(name: str) -> dict[str, object]:
    """The row of a case."""
    settings = {"model": Net, "loss": losses, "optimizer": sgd, "batch_size": BATCH, "epochs": EPOCHS} | CASES[name]
    optimizer_again = settings.pop("again", settings["optimizer"])
    workload = Workload(train_set=data(SAMPLES, 0), validation_set=data(16, 1), **settings)
    row: dict[str, object] = {"training": name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trajectory = train(workload, Path(folder) / "trajectory")
            steps = trajectory.num_steps
            for kind in KINDS:
                window = Window(1, steps - 1)
                found = track(trajectory, workload, [window], kind)  # type: ignore[arg-type]
                scores = found.of(0)
                exact = differences(replace(workload, optimizer=optimizer_again), trajectory, window, kind)
                row[kind] = float(np.abs(scores[list(SOME)] - exact).max() / max(np.abs(scores).max(), 1e-300))
            row["derivative"] = "trace" if found.metadata.get("derivative") else "autograd"
            row["derivative"] += ", without rounding" if "again" in CASES[name] else ""
        except (DitError, RuntimeError) as error:
            row["derivative"] = shorten(f"refused: {error}", 160, placeholder=" …")
    return row


PAGE = """# Which training is swept exactly

`python benchmarks/exactness.py` wrote this page, with torch {torch}{timm}, in {seconds} s. It holds scores of all
three kinds of window against central differences of the loop itself, in float64, over {steps} steps: {agree} kinds of
training agree to {worst} of the largest score or better, {traced} of these by a trace of what ran, the others by
autograd; {refused} are refused, with the reason. `leave_one_out` takes no derivative, and works for all.

{rounded} kinds of training round to bfloat16 in their optimizer (Muon's Newton-Schulz). They are replayed as they ran,
and their scores, derivatives "without rounding", are held against differences of the same training without it, which
goes another way: they agree to {apart}. Made to compute in float64 in training too, all of them are among the others.

{table}
"""


def cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.0e}"
    return str(value).replace("|", "/")


def main(names: Sequence[str]) -> None:
    """Measures all, and writes the page; with ``names`` of some, only prints these."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begun = time.process_time()
    rows = []
    for name in names or CASES:
        rows.append(measure(name))
        print(*(f"{key} {cell(value)}," for key, value in rows[-1].items()), flush=True)
    if names:
        return
    table = pd.DataFrame(rows)
    known = table[table[KINDS[0]].notna()]
    rounded = known["derivative"].str.endswith("rounding")
    apart, known = known[rounded], known[~rounded]
    lines = [[*table.columns], ["---"] * len(table.columns), *table.itertuples(index=False)]
    page = PAGE.format(
        torch=version("torch"),
        timm=f" and timm {version('timm')}" if TIMM else "",
        seconds=round(time.process_time() - begun),
        steps=EPOCHS * SAMPLES // BATCH,
        agree=len(known),
        worst=f"{known[list(KINDS)].to_numpy().max():.0e}",
        traced=(known["derivative"] == "trace").sum(),
        refused=len(table) - len(known) - len(apart),
        rounded=len(apart),
        apart=f"{apart[list(KINDS)].to_numpy().min():.0e} to {apart[list(KINDS)].to_numpy().max():.0e}",
        table="\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines),
    )
    (Path(__file__).parents[1] / "docs" / "exactness.md").write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
