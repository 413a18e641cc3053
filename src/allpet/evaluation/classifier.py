"""Are prompts obeyed? A small network that names tracer and region of a sinogram.

It is trained on real (simulated) slices and judged on held-out ones before anybody believes what it says of samples.
*Trunk* is the parent of chest, abdomen and pelvis: a training slice called trunk may be any of them, and any of them
answers a prompt for trunk; a half that is left open is always right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.prompts import REGIONS, TRACERS, TRUNK_REGIONS, Prompt, matches
from allpet.randomness import keyed_generator
from allpet.reconstruction import fbp
from allpet.symmetry import rotate, translate

_TRUNK = tuple(REGIONS.index(name) for name in TRUNK_REGIONS)
_TRUNK_PROMPT = REGIONS.index("trunk")


class PromptClassifier(nn.Module):
    """Strided convolutions over the FBP image of a sinogram, with one output for each half of a prompt.

    A kidney is a spot in the image and a curve through everything else in the sinogram; with a few hundred slices to
    learn from, the image is told more reliably.

    Args:
        geometry: of the sinograms.
        scale: units of the images per unit of the network.
        width: channels of the first convolution.
    """

    scale: Tensor

    def __init__(self, geometry: ParallelBeam, scale: float = 1.0, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.radon = Radon(geometry)
        widths = (1, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 3 if a > 1 else 5, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU()]
        layers += [nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.GroupNorm(4, 4 * width), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width * 2 * 4, len(TRACERS) + len(REGIONS))

    def forward(self, sinogram: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of tracers ``(batch, TRACERS)`` and regions ``(batch, REGIONS)``.

        Open and trunk, which no slice is, have a probability of 0.

        Args:
            sinogram: ``(batch, 1, views, bins)`` in the units of the data.
        """
        # A root makes faint tracers as visible as bright ones.
        x = self.layers((fbp(self.radon, sinogram) / self.scale).clamp_min(0).sqrt())
        pooled = torch.cat([F.adaptive_avg_pool2d(x, 2), F.adaptive_max_pool2d(x, 2)], dim=1)
        tracer, region = self.head(pooled.flatten(1)).split([len(TRACERS), len(REGIONS)], dim=1)
        open_half = torch.tensor([0], device=x.device)
        no_region = torch.tensor([0, _TRUNK_PROMPT], device=x.device)
        return (
            tracer.index_fill(1, open_half, -math.inf).log_softmax(1),
            region.index_fill(1, no_region, -math.inf).log_softmax(1),
        )

    @torch.no_grad()
    def name(self, sinogram: Tensor, batch_size: int = 128) -> Prompt:
        """Return the most probable tracer and region of each sinogram."""
        found = [self(part) for part in sinogram.split(batch_size)]
        return Prompt(*(torch.cat([half[k].argmax(1) for half in found]) for k in (0, 1)))

    def obeyed(self, sinogram: Tensor, prompt: Prompt) -> Tensor:
        """Return whether each sinogram shows what its prompt asks for, both halves, ``(batch,)`` bool."""
        return matches(prompt, self.name(sinogram))


def train_classifier(
    real: Tensor,
    prompts: Prompt | Sequence[str],
    geometry: ParallelBeam,
    steps: int = 500,
    batch_size: int = 48,
    learning_rate: float = 2e-3,
    gain: float = 0.05,
    shift_mm: float = 10.0,
    turn_rad: float = 0.15,
    seed: int = 0,
) -> PromptClassifier:
    """Train on real slices; the same arguments give the same network.

    Gains, positions and turns are jittered. Gains only a little: the level of uptake does tell tracers apart.

    Args:
        real: ``(n, 1, views, bins)``.
        prompts: of each slice; open halves are not learned from.
        geometry: of the sinograms.
        steps: of training.
        batch_size: slices per step.
        learning_rate: peak of the cosine schedule.
        gain: standard deviation of the logarithm of the gains.
        shift_mm: standard deviation of the shifts in x and y, mm.
        turn_rad: standard deviation of the turns, radians.
        seed: keys the network's first weights and all draws.

    Raises:
        ValueError: if there is no slice, no prompt for each, or nothing to learn from.
    """
    asked = prompts if isinstance(prompts, Prompt) else Prompt.of(prompts)
    if len(real) != len(asked.tracer) or not len(real):
        raise ValueError(f"{len(real)} slices come with {len(asked.tracer)} prompts; give one prompt for each slice.")
    if not (asked.tracer > 0).any() and not (asked.region > 0).any():
        raise ValueError(
            "All prompts are open, so there is nothing to learn; say the tracers or regions of the slices."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=keyed_generator(seed, "classifier"))))
        network = PromptClassifier(geometry)
    network.scale.fill_(float(fbp(network.radon, real[:256]).square().mean().sqrt()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        generator = keyed_generator(seed, step, "classifier")
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(real), generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        jitter = torch.randn(4, batch_size, generator=generator)
        moved = rotate(real[rows], turn_rad * jitter[3])
        moved = translate(moved, geometry, shift_mm * jitter[0], shift_mm * jitter[1])
        moved = moved * (gain * jitter[2]).exp()[:, None, None, None]
        loss = _loss(network(moved), Prompt(asked.tracer[rows], asked.region[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _loss(found: tuple[Tensor, Tensor], asked: Prompt) -> Tensor:
    """Minus the log-probability of what is known of each slice; trunk is chest or abdomen or pelvis."""
    tracer, region = found
    trunk = torch.logsumexp(region[:, _TRUNK], dim=1)
    said_tracer = tracer.gather(1, asked.tracer.clamp_min(1)[:, None])[:, 0]
    plain = torch.where((asked.region == 0) | (asked.region == _TRUNK_PROMPT), 1, asked.region)
    said_region = torch.where(asked.region == _TRUNK_PROMPT, trunk, region.gather(1, plain[:, None])[:, 0])
    known_tracer, known_region = asked.tracer > 0, asked.region > 0
    return -(said_tracer[known_tracer].sum() + said_region[known_region].sum()) / len(asked.tracer)
