"""What is asked of a model of a downstream task, and of which sinograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.prompts import TRACERS, Prompt, prompt_index
from allpet.simulation.tasks import TASKS, PairedBatch

LABEL_SIZE = len(TASKS) + len(TRACERS) + 2
"""Length of ``Denoiser``'s label: task, tracer of the target, delay in hours, -log10 of the dose."""


class Condition(NamedTuple):
    """What is asked for, one entry per target.

    Attributes:
        task: index into ``TASKS``, ``(batch,)``, int64.
        prompt: tracer and region of the input.
        target_tracer: index into ``TRACERS``, ``(batch,)``, int64; 0 leaves it open.
        delay_min: time from the input's to the target's scan in minutes, ``(batch,)``.
        dose: share of the normal dose that the input has, ``(batch,)``, in (0, 1].
    """

    task: Tensor
    prompt: Prompt
    target_tracer: Tensor
    delay_min: Tensor
    dose: Tensor

    @classmethod
    def of(
        cls,
        task: str,
        prompts: Sequence[str],
        target_tracers: Sequence[str] | None = None,
        delay_min: float = 0.0,
        dose: float = 1.0,
    ) -> Condition:
        """Build the condition of a batch for one task.

        Args:
            task: one of ``TASKS``.
            prompts: tracer:region of each input.
            target_tracers: tracer of each target; None for the input's.
            delay_min: minutes until the target's scan (*delayed*).
            dose: share of the normal dose (*low_dose*).

        Raises:
            ValueError: if a name is unknown or a number impossible.
        """
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
        if not 0 <= delay_min < math.inf:
            raise ValueError(f"delay_min is {delay_min:g}, but must be finite and not negative, in minutes.")
        if not 0 < dose <= 1:
            raise ValueError(f"dose is {dose:g}, but must be a share of the normal dose, above 0 and at most 1.")
        prompt = Prompt.of(prompts)
        if target_tracers is None:
            target = prompt.tracer.clone()
        else:
            target = torch.tensor([prompt_index(name, TRACERS, "tracer") for name in target_tracers])
        n = len(prompts)
        if len(target) != n:
            raise ValueError(f"There are {n} prompts and {len(target)} target tracers: give one for each.")
        return cls(
            torch.full((n,), TASKS.index(task)), prompt, target, torch.full((n,), delay_min), torch.full((n,), dose)
        )

    @classmethod
    def of_pairs(cls, batch: PairedBatch) -> Condition:
        """Return the condition of every target of a batch of pairs, the targets of a pair one after another."""
        k = batch.expected.shape[1]
        task, tracer, region, delay, dose = (
            values.repeat_interleave(k)
            for values in (batch.task, batch.prompt.tracer, batch.prompt.region, batch.delay_min, batch.dose)
        )
        return cls(task, Prompt(tracer, region), batch.target_tracer.flatten(), delay, dose)

    def label(self) -> Tensor:
        """Return ``(batch, LABEL_SIZE)``, what the network is told besides tracer and region."""
        one_hot = torch.nn.functional.one_hot
        numbers = torch.stack([self.delay_min / 60, -self.dose.log10()], dim=1)
        return torch.cat([one_hot(self.task, len(TASKS)), one_hot(self.target_tracer, len(TRACERS)), numbers], dim=1)

    def part(self, rows: slice) -> Condition:
        """Return the condition of some of the targets."""
        prompt = Prompt(self.prompt.tracer[rows], self.prompt.region[rows])
        return Condition(self.task[rows], prompt, *(values[rows] for values in self[2:]))


def reverse_pairs(batch: PairedBatch) -> PairedBatch:
    """Return the pairs the wrong way round: the noisy target is given, the input is wanted.

    In *separation* the first tracer is given and the second wanted: of the two the input is the sum. The expectation of
    an input is not known, so ``expected`` is the input itself, and images, which are the target's, are left out.
    """
    tracer = batch.target_tracer
    prompt = Prompt(tracer[:, 0], batch.prompt.region)
    if tracer.shape[1] == 2:
        second = {name: getattr(batch, name)[:, 1:] for name in ("expected", "noisy", "target_tracer", "share")}
        activity = None if batch.activity is None else batch.activity[:, 1:]
        return batch._replace(input=batch.noisy[:, :1], prompt=prompt, activity=activity, **second)
    return batch._replace(
        input=batch.noisy,
        expected=batch.input,
        noisy=batch.input,
        activity=None,
        labels=None,
        attenuation=None,
        prompt=prompt,
        target_tracer=batch.prompt.tracer[:, None],
    )


class RestorationBatch(NamedTuple):
    """Sinograms of a user's to restore.

    Attributes:
        input: ``(batch, 1, views, bins)``, in the units of the model's training data.
        condition: one entry per target, those of a sinogram one after another.
        seed: of each sinogram, ``(batch,)``, int64.
        gain: what the user's values were multiplied by; results are divided by it.
        roi: region of interest, ``(batch, 1, rows, columns)``, bool; None where none was drawn.
        origin: file and slice, from 0, of each sinogram.
    """

    input: Tensor
    condition: Condition
    seed: Tensor
    gain: float
    roi: Tensor | None
    origin: list[tuple[str, int]]

    @property
    def n_targets(self) -> int:
        """How many sinograms are wanted of each."""
        return len(self.condition.task) // len(self.input)
