"""Are generated slices good for anything? Train a small denoiser on them and use it on real ones.

Sinograms with counting noise are to be turned into the expected ones they were drawn from. The same network with the
same number of steps learns from generated slices, from as many real ones, and from both; what they reach on held-out
real slices, whose noise is that of their own acquisition, is compared with each other and with doing nothing. Generated
slices that are blurred or unlike patients teach the wrong thing. Both expected and noisy slices must be known, as the
simulator knows them, so the studies measure this and ``make evaluate`` does not (it has ``naming``).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allpet.metrics import relative_l2
from allpet.models.layers import MoebiusConv2d
from allpet.randomness import keyed_generator


class Utility(NamedTuple):
    """Median relative L2 error on held-out real slices.

    Attributes:
        nothing: of the noisy slices themselves.
        synthetic: of a denoiser that has seen generated slices alone.
        real: of one that has seen real slices alone.
        both: of one that has seen both.
    """

    nothing: float
    synthetic: float
    real: float
    both: float


class SmallDenoiser(nn.Module):
    """Convolutions over views and bins that predict the noise; the half turn is closed.

    Args:
        width: channels.
        depth: hidden layers.
    """

    def __init__(self, width: int = 24, depth: int = 4) -> None:
        super().__init__()
        widths = [1, *[width] * depth]
        self.hidden = nn.ModuleList(MoebiusConv2d(a, b, 5 if a == 1 else 3) for a, b in itertools.pairwise(widths))
        self.last = MoebiusConv2d(width, 1, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, noisy: Tensor) -> Tensor:
        """Return the expected sinograms of noisy ones, ``(batch, 1, views, bins)``, in network range."""
        x = noisy
        for layer in self.hidden:
            x = F.silu(layer(x))
        return noisy - self.last(x)


def denoising_utility(
    fake: Tensor,
    training: Tensor,
    noisy: Tensor,
    expected: Tensor,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Utility:
    """Train three denoisers and test them.

    Args:
        fake: generated expected sinograms, ``(n, 1, views, bins)``; negative values count as zero.
        training: real expected sinograms to learn from, ``(m, 1, views, bins)``, same units.
        noisy: held-out real slices as measured, ``(k, 1, views, bins)``.
        expected: what they would be without noise, the same shape.
        steps: of each training.
        batch_size: slices per step.
        learning_rate: peak of the cosine schedule.
        seed: keys weights, order and noise.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if noisy.shape != expected.shape or any(x.shape[1:] != noisy.shape[1:] or not len(x) for x in (fake, training)):
        raise ValueError(
            f"Shapes are {tuple(fake.shape)}, {tuple(training.shape)}, {tuple(noisy.shape)} and "
            f"{tuple(expected.shape)}; expected (slices, 1, views, bins), at least one of each, the last two alike."
        )
    # as noisy as the held-out slices: activity per count
    per_count = float(((noisy - expected).square().sum((1, 2, 3)) / expected.sum((1, 2, 3)).clamp(min=1e-6)).median())
    scale = float(expected.square().mean().sqrt())
    fake = fake.clamp(min=0)
    few = min(len(fake), len(training))
    found = {}
    for name, slices in {
        "synthetic": fake[:few],
        "real": training[:few],
        "both": torch.cat([fake[:few], training[:few]]),
    }.items():
        network = _train(slices, per_count, scale, steps, batch_size, learning_rate, seed)
        with torch.no_grad():
            restored = torch.cat([network(part / scale) for part in noisy.split(64)]) * scale
        found[name] = float(relative_l2(restored, expected).median())
    return Utility(float(relative_l2(noisy, expected).median()), **found)


def _train(
    slices: Tensor, per_count: float, scale: float, steps: int, batch_size: int, learning_rate: float, seed: int
) -> SmallDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=keyed_generator(seed, "utility"))))
        network = SmallDenoiser()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        generator = keyed_generator(seed, step, "utility")
        clean = slices[torch.randint(len(slices), (batch_size,), generator=generator)]
        noisy = torch.poisson(clean.clamp(min=0) / per_count, generator=generator) * per_count
        loss = (network(noisy / scale) - clean / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()
