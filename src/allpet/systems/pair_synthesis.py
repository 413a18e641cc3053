"""Paired synthesis (arXiv 2509.09130, fig. 3): pairs of input and target of a downstream task, generated.

The target is drawn from stage 2. The input follows from it by physics where there are any: a low dose is the same
expectation with fewer counts, two tracers in one scan are the sum of either. Elsewhere it is learned the wrong way
round: a *reverse* model, trained on a few real pairs (``PairedTask(reverse=True)``), returns the most likely input of a
target; in *separation* it returns the second tracer of the first. Counting noise is added as strong as that of real
pairs; it is measured on them without knowing their expectation.

What is generated knows no more than stage 2 and those few pairs do: an input that a reverse model returns is the most
likely one, without the variety of real inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.conditions import Condition, reverse_pairs
from allpet.geometry import ParallelBeam
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS, PairedBatch
from allpet.systems.latent_diffusion import LatentDiffusion
from allpet.systems.paired import PairedSystem
from allpet.systems.prior_restoration import noise_variance
from allpet.systems.sampling import Sampling, add_counting_noise

PHYSICS = ("low_dose",)
"""Tasks whose inputs need no reverse model."""
FIRST_ID = 1 << 40
"""Sample and patient ids of generated pairs begin here: no real one has these."""


class NoiseLevels(NamedTuple):
    """Variance of the noise per unit of activity: of normal-dose targets, and of inputs at normal dose."""

    target: float
    input: float


def measure_noise(pairs: PairedBatch, geometry: ParallelBeam, reverse: PairedSystem | None = None) -> NoiseLevels:
    """Return medians over real pairs.

    Targets, and the sums that *separation* is given, are judged by the range conditions; the input of a low dose has
    the target's level over the dose; any other input is judged by what the reverse model leaves of it.

    Args:
        pairs: real ones, of one task.
        geometry: of their sinograms.
        reverse: see ``synthesise_pairs``.

    Raises:
        ValueError: if the task needs a reverse model and has none.
    """
    task = _task(pairs, reverse)
    target = float(noise_variance(pairs.noisy.flatten(0, 1)[:, None], geometry).median())
    if task in PHYSICS:
        return NoiseLevels(target, target)
    if task == "separation":
        return NoiseLevels(target, float(noise_variance(pairs.input, geometry).median()))
    assert reverse is not None
    learned = _reversed(reverse, pairs, pairs.sample_id.tolist())
    left = (pairs.input - learned).square().sum((1, 2, 3)) / learned.sum((1, 2, 3)).clamp_min(1e-9)
    return NoiseLevels(target, float(left.median()))


@torch.no_grad()
def synthesise_pairs(
    prior: LatentDiffusion,
    real: PairedBatch,
    seeds: Sequence[int],
    reverse: PairedSystem | None = None,
    sampling: Sampling | None = None,
) -> PairedBatch:
    """Generate pairs.

    Args:
        prior: the stage 2 that targets are drawn from.
        real: pairs of the task that prompts, doses, delays, shares and the strength of noise are taken from, in turn.
        seeds: one per generated pair.
        reverse: trained on reversed real pairs; not needed for tasks in ``PHYSICS``.
        sampling: of the prior; None takes its own.

    Returns:
        as many pairs, without images.

    Raises:
        ValueError: if the task needs a reverse model and has none.
        RuntimeError: if the geometry of the prior is not known.
    """
    task = _task(real, reverse)
    if prior.geometry is None:
        raise RuntimeError("The training geometry of stage 2 is unknown: load it with from_pretrained.")
    levels = measure_noise(real, prior.geometry, reverse)
    rows = torch.arange(len(seeds)) % len(real.input)
    ids = FIRST_ID + torch.tensor(list(seeds), dtype=torch.int64)
    fields = ("task", "target_tracer", "delay_min", "dose", "share")
    asked = real._replace(
        **{name: getattr(real, name)[rows] for name in fields},
        prompt=Prompt(*(index[rows] for index in real.prompt)),
        activity=None,
        labels=None,
        attenuation=None,
        sample_id=ids,
        patient_id=ids,
    )
    share = asked.share[:, :1, None, None]
    wanted = Prompt(asked.target_tracer[:, 0], asked.prompt.region)
    target = prior.sample(wanted, seeds, sampling).sinogram.float().cpu().clamp_min(0) * share
    noisy = _counted(target, torch.full((len(seeds),), levels.target), seeds, "first")
    asked = asked._replace(input=target, expected=target, noisy=noisy)
    if task == "low_dose":
        return asked._replace(input=_counted(target, levels.input / asked.dose, seeds, "input"))
    assert reverse is not None
    strength = torch.full((len(seeds),), levels.input)
    if task == "separation":
        # The reverse model reads the first target alone; there is no second one yet.
        both = asked._replace(noisy=noisy.expand(-1, 2, -1, -1), expected=target.expand(-1, 2, -1, -1))
        second = _reversed(reverse, both, seeds)
        expected = torch.cat([target, second], dim=1)
        other = _counted(second, torch.full((len(seeds),), levels.target), seeds, "second")
        given = _counted(expected.sum(1, keepdim=True), strength, seeds, "input")
        return asked._replace(input=given, expected=expected, noisy=torch.cat([noisy, other], dim=1))
    learned = _reversed(reverse, asked, seeds)
    return asked._replace(input=_counted(learned, strength, seeds, "input"))


def _task(pairs: PairedBatch, reverse: PairedSystem | None) -> str:
    task = TASKS[int(pairs.task[0])]
    if task not in PHYSICS and reverse is None:
        raise ValueError(
            f"No physics make the input of {task} from its target: give a reverse model, trained on pairs of "
            "PairedTask(reverse=True)."
        )
    return task


def _reversed(reverse: PairedSystem, pairs: PairedBatch, seeds: Sequence[int]) -> Tensor:
    """Return what the reverse model makes of targets, ``(batch, 1, views, bins)``."""
    turned = reverse_pairs(pairs)
    return reverse.restore(turned.input, Condition.of_pairs(turned), seeds).mean.float().cpu().clamp_min(0)


def _counted(expected: Tensor, level: Tensor, seeds: Sequence[int], purpose: str) -> Tensor:
    """Add Poisson noise whose variance is ``level`` ``(batch,)`` times the expectation."""
    pieces = []
    for sinogram, one, seed in zip(expected, level.tolist(), seeds, strict=True):
        counts = max(float(sinogram.sum()) / max(one, 1e-12), 1.0)
        pieces.append(add_counting_noise(sinogram[None], counts, [keyed_generator(seed, "pairs", purpose)]))
    return torch.cat(pieces)
