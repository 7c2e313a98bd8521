"""A noise-predicting network and the noising process that it learns to undo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FREQUENCIES = 8


class NoisePredictor(nn.Module):
    """``(noisy images [B, P], timesteps [B]) -> noise [B, P]``: two hidden layers, smooth.

    Args:
        pixels: ``P``.
        hidden: width of both layers.
        timesteps: ``N``; timestep ``n`` comes as sines and cosines of ``n / N``.
    """

    def __init__(self, pixels: int, hidden: int, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.layers = nn.Sequential(
            nn.Linear(pixels + 2 * FREQUENCIES, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, pixels),
        )

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        moment = timesteps.to(noisy.dtype)[:, None] / self.timesteps
        angles = moment * math.pi * torch.arange(1, FREQUENCIES + 1, dtype=noisy.dtype, device=noisy.device)
        return self.layers(torch.cat([noisy, angles.sin(), angles.cos()], dim=1))


@dataclass(frozen=True)
class Noising:
    """The forward process of DDPM (Ho et al. 2020, arXiv 2006.11239) and its loss.

    Timestep ``n`` of ``0 … N - 1`` leaves ``x_n = sqrt(a_n) x + sqrt(1 - a_n) e`` of an image ``x``, with normal noise
    ``e`` and ``a_n = prod_{m <= n} (1 - beta_m)``; ``beta`` rises evenly from ``0.1 / N`` to ``20 / N``, which is
    theirs for ``N = 1000``.

    Attributes:
        timesteps: ``N``.
    """

    timesteps: int

    def kept(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """``a_n``, ``[...]`` like ``timesteps``."""
        betas = torch.linspace(0.1 / self.timesteps, 20 / self.timesteps, self.timesteps, dtype=torch.float64)
        return (1 - betas).cumprod(dim=0).to(timesteps.device)[timesteps].to(dtype)

    def losses(self, model: nn.Module, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """``mean_pixels (e - model(x_n, n))^2``, ``[B]``.

        Args:
            images, noise: ``[B, P]``.
            timesteps: ``[B]``, integers.
        """
        kept = self.kept(timesteps, images.dtype)[:, None]
        noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
        return (noise - model(noisy, timesteps)).square().mean(dim=1)

    def sample_losses(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """Per-sample losses ``[B]`` of a batch ``(images [B, P], timesteps [B, D], noise [B, D, P])``.

        In training, each sample draws one timestep and its noise anew from torch's global generator. In evaluation
        mode, nothing is drawn: the loss is the mean over the ``D`` draws that the batch carries.
        """
        images, timesteps, noise = batch
        if model.training:
            drawn = torch.randint(self.timesteps, timesteps.shape[:1], device=images.device)
            return self.losses(model, images, drawn, torch.randn_like(images))
        size, draws, pixels = noise.shape
        repeated = images[:, None].expand(size, draws, pixels).reshape(size * draws, pixels)
        each = self.losses(model, repeated, timesteps.reshape(-1), noise.reshape(size * draws, pixels))
        return each.reshape(size, draws).mean(dim=1)

    def fixed_draws(self, size: int, draws: int, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
        """Timesteps ``[size, D]``, one from each of ``D`` equal parts of ``0 … N - 1``, and noise ``[size, D, P]``."""
        generator = torch.Generator().manual_seed(seed)
        within = torch.rand(size, draws, generator=generator, dtype=torch.float64)
        timesteps = ((torch.arange(draws) + within) / draws * self.timesteps).long().clamp(max=self.timesteps - 1)
        return timesteps, torch.randn(size, draws, pixels, generator=generator)
