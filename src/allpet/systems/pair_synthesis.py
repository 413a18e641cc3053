"""Paired synthesis (arXiv 2509.09130, fig. 3): pairs of input and target of a downstream task, generated.

One of the two is drawn from stage 2, the other follows from it by physics where there are any: a low dose is the same
expectation with fewer counts, two tracers in one scan are the sum of either. Elsewhere it is learned, by a *helper*
that is trained on a few real pairs. In *attenuation* and *conversion* the target is drawn, and the helper, trained the
wrong way round (``PairedTask(reverse=True)``), returns the most likely input; in *separation* it returns the second
tracer of the first. In *delayed* the input is drawn, for stage 2 knows scans at the usual time alone, and the helper is
trained the right way round. Counting noise is added as strong as that of real pairs; it is measured on them without
knowing their expectation.

What is generated knows no more than stage 2 and those few pairs do: what a helper returns is the most likely, without
the variety of the real; in *delayed* it is the helper's own answer that is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.conditions import Condition, reverse_pairs
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS, PairedBatch
from allpet.systems.latent_diffusion import LatentDiffusion
from allpet.systems.paired import PairedSystem
from allpet.systems.prior_restoration import noise_variance
from allpet.systems.sampling import Sampling, add_counting_noise

PHYSICS = ("low_dose",)
"""Tasks that need no helper."""
FORWARD = ("delayed",)
"""Tasks whose input is drawn, and whose helper is trained the right way round."""
FIRST_ID = 1 << 40
"""Sample and patient ids of generated pairs begin here: no real one has these."""


class NoiseLevels(NamedTuple):
    """Variance of the noise per unit of activity: of normal-dose targets, and of inputs at normal dose."""

    target: float
    input: float


def measure_noise(pairs: PairedBatch, helper: PairedSystem | None = None) -> NoiseLevels:
    """Return medians over real pairs.

    What is corrected for attenuation is judged by the sums of its views (``noise_variance``); the input of a low dose
    has the target's level over the dose; one that is not corrected is judged by what the helper leaves of it, so that
    the helper's error counts as noise, too.

    Args:
        pairs: real ones, of one task.
        helper: see ``synthesise_pairs``.

    Raises:
        ValueError: if the task needs a helper and has none.
    """
    task = _task(pairs, helper)
    target = float(noise_variance(pairs.noisy.flatten(0, 1)[:, None]).median())
    if task in PHYSICS:
        return NoiseLevels(target, target)
    if task != "attenuation":
        return NoiseLevels(target, float(noise_variance(pairs.input).median()))
    assert helper is not None
    learned = _reversed(helper, pairs, pairs.sample_id.tolist())
    left = (pairs.input - learned).square().sum((1, 2, 3)) / learned.sum((1, 2, 3)).clamp_min(1e-9)
    return NoiseLevels(target, float(left.median()))


@torch.no_grad()
def synthesise_pairs(
    prior: LatentDiffusion,
    real: PairedBatch,
    seeds: Sequence[int],
    helper: PairedSystem | None = None,
    sampling: Sampling | None = None,
) -> PairedBatch:
    """Generate pairs.

    Args:
        prior: the stage 2 that targets, or inputs of ``FORWARD``, are drawn from.
        real: pairs of the task that prompts, doses, delays, shares and the strength of noise are taken from, in turn.
        seeds: one per generated pair.
        helper: trained on reversed real pairs, or for tasks in ``FORWARD`` on real pairs as they are; not needed for
            those in ``PHYSICS``.
        sampling: of the prior; None takes its own.

    Returns:
        as many pairs, without images.

    Raises:
        ValueError: if the task needs a helper and has none.
        RuntimeError: if the geometry of the prior is not known.
    """
    task = _task(real, helper)
    levels = measure_noise(real, helper)
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
    wanted = asked.prompt if task in FORWARD else Prompt(asked.target_tracer[:, 0], asked.prompt.region)
    drawn = prior.sample(wanted, seeds, sampling).sinogram.float().cpu().clamp_min(0) * share
    first, other = (torch.full((len(seeds),), level) for level in levels)
    if task in FORWARD:
        assert helper is not None
        given = _counted(drawn, other, seeds, "input")
        later = _mean(helper, given, Condition.of_pairs(asked), seeds)
        return asked._replace(input=given, expected=later, noisy=_counted(later, first, seeds, "first"))
    noisy = _counted(drawn, first, seeds, "first")
    asked = asked._replace(input=drawn, expected=drawn, noisy=noisy)
    if task == "low_dose":
        return asked._replace(input=_counted(drawn, other / asked.dose, seeds, "input"))
    assert helper is not None
    if task == "separation":
        # The helper reads the first target alone; there is no second one yet.
        both = asked._replace(noisy=noisy.expand(-1, 2, -1, -1), expected=drawn.expand(-1, 2, -1, -1))
        second = _reversed(helper, both, seeds)
        expected = torch.cat([drawn, second], dim=1)
        given = _counted(expected.sum(1, keepdim=True), other, seeds, "input")
        counted = _counted(second, first, seeds, "second")
        return asked._replace(input=given, expected=expected, noisy=torch.cat([noisy, counted], dim=1))
    learned = _reversed(helper, asked, seeds)
    return asked._replace(input=_counted(learned, other, seeds, "input"))


def _task(pairs: PairedBatch, helper: PairedSystem | None) -> str:
    task = TASKS[int(pairs.task[0])]
    if task not in PHYSICS and helper is None:
        how = "on pairs as they are" if task in FORWARD else "on pairs of PairedTask(reverse=True)"
        raise ValueError(f"No physics make the pairs of {task}: give a helper, trained {how}.")
    return task


def _reversed(helper: PairedSystem, pairs: PairedBatch, seeds: Sequence[int]) -> Tensor:
    """Return what the helper makes of targets, ``(batch, 1, views, bins)``."""
    turned = reverse_pairs(pairs)
    return _mean(helper, turned.input, Condition.of_pairs(turned), seeds)


def _mean(helper: PairedSystem, given: Tensor, condition: Condition, seeds: Sequence[int]) -> Tensor:
    """Return what the helper makes by few calls: a regression, as helpers are, knows one."""
    return helper.restore(given, condition, seeds, helper.quick_sampling()).mean.float().cpu().clamp_min(0)


def _counted(expected: Tensor, level: Tensor, seeds: Sequence[int], purpose: str) -> Tensor:
    """Add Poisson noise whose variance is ``level`` ``(batch,)`` times the expectation."""
    pieces = []
    for sinogram, one, seed in zip(expected, level.tolist(), seeds, strict=True):
        counts = max(float(sinogram.sum()) / max(one, 1e-12), 1.0)
        pieces.append(add_counting_noise(sinogram[None], counts, [keyed_generator(seed, "pairs", purpose)]))
    return torch.cat(pieces)
