"""What a model of downstream tasks has learned: which tasks and targets, of which scans, and how strong these were.

It is noted when training starts and exported with the model, so that whoever uses it is told what it never learned, and
scans in unknown units can be brought to its own.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allpet.conditions import Condition
from allpet.prompts import OPEN, REGIONS, TRACERS, Prompt, matches
from allpet.simulation.tasks import TASKS, TWO_TRACERS, PairedBatch

ENOUGH = 5
"""Slices of a prompt that make its level known."""
_ALL = f"{OPEN}:{OPEN}"
_BAND = (0.6, 0.9)  # of the bins, by rank: what lies beside the patient is below, one hot organ above


def level(sinogram: Tensor) -> Tensor:
    """Return how strong each sinogram is; a times the sinogram has a times the level.

    Of its mean over the views, the mean of the bins between the 60th and the 90th percentile. That neither noise nor a
    bladder decides; patients of one tracer and region differ by some 20 %, as their SUV do.

    Args:
        sinogram: ``(batch, views, bins)``.

    Returns:
        ``(batch,)``, float64, in the sinogram's units.
    """
    profile = sinogram.double().mean(1).sort(1).values
    low, high = (round(share * profile.shape[1]) for share in _BAND)
    return profile[:, low : max(high, low + 1)].mean(1)


class Seen(NamedTuple):
    """What is noted of a batch of training pairs.

    Attributes:
        task: index into ``TASKS``, ``(batch,)``.
        prompt: tracer and region of the inputs.
        target_tracer: index into ``TRACERS``, ``(batch, targets)``.
        level: of the inputs, ``(batch,)``.
        dose: share of the normal dose, ``(batch,)``.
        delay_min: minutes from input to target, ``(batch,)``.
    """

    task: Tensor
    prompt: Prompt
    target_tracer: Tensor
    level: Tensor
    dose: Tensor
    delay_min: Tensor

    @classmethod
    def of(cls, batch: PairedBatch) -> Seen:
        """Note a batch."""
        strength = level(batch.input[:, 0])
        return cls(batch.task, batch.prompt, batch.target_tracer, strength, batch.dose, batch.delay_min)


@dataclass(frozen=True)
class TaskKnowledge:
    """What was learned of one task.

    Attributes:
        targets: tracers of the targets.
        levels: median ``level`` of the inputs of each prompt, tracer:region, that ``ENOUGH`` slices answer; of
            open:open, of all.
        prompts: of the inputs; none where they are not known, as of models of before they were noted.
        dose: smallest and largest share of the normal dose; None where it is not known.
        delay_min: shortest and longest time from input to target; None where it is not known.
    """

    targets: tuple[str, ...] = ()
    levels: dict[str, float] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    dose: tuple[float, float] | None = None
    delay_min: tuple[float, float] | None = None

    def level_of(self, prompt: str) -> float | None:
        """Return the level of a prompt's inputs, or where it is unknown that of all; None where that is, too."""
        return self.levels.get(prompt, self.levels.get(_ALL))

    def lacks_level(self, prompt: str) -> bool:
        """Say whether a whole prompt's level is unknown, though those of others are known by their names."""
        hidden = any(OPEN in one and _may_be(prompt, one) for one in self.prompts)
        return OPEN not in prompt and prompt not in self.levels and len(self.levels) > 1 and not hidden


@dataclass(frozen=True)
class Knowledge:
    """What was learned, by the names of the tasks."""

    tasks: dict[str, TaskKnowledge]

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> Knowledge:
        """Put together what was noted of the training pairs, or of enough of them."""
        each = ((one.task, one.level, one.dose, one.delay_min, *one.prompt) for one in seen)
        task, strength, dose, delay, tracer, region = (torch.cat(parts).cpu() for parts in zip(*each, strict=True))
        tasks = {}
        for number in task.unique().tolist():
            targets = sorted(
                {index for one in seen for index in one.target_tracer[one.task == number].flatten().tolist()}
            )
            chosen = task == number
            prompt = Prompt(tracer[chosen], region[chosen])
            tasks[TASKS[number]] = TaskKnowledge(
                tuple(TRACERS[index] for index in targets),
                levels_of(prompt, strength[chosen]),
                tuple(sorted(set(prompt.names()))),
                _range(dose[chosen]),
                _range(delay[chosen]),
            )
        return cls(tasks)

    def check(self, condition: Condition) -> None:
        """Refuse what was never learned.

        Args:
            condition: what is asked for.

        Raises:
            ValueError: if it names a task or a target's tracer that no training pair had.
        """
        for number, tracer in sorted(set(zip(condition.task.tolist(), condition.target_tracer.tolist(), strict=True))):
            task, target = TASKS[number], TRACERS[tracer]
            known = self.tasks.get(task)
            if known is None:
                raise ValueError(
                    f"This model was trained for {', '.join(self.tasks)}, but is asked for {task}: use a model that "
                    "was trained for it (MODEL=, --model.folder)."
                )
            if task in TWO_TRACERS and target not in known.targets:
                raise ValueError(
                    f"This model was trained to give {', '.join(known.targets)} in {task}, but is asked for {target}: "
                    "ask for what it knows, or use a model that was trained for it (MODEL=, --model.folder)."
                )

    def doubts(self, condition: Condition) -> list[str]:
        """Return a sentence for each prompt, dose or delay that no training pair of its task had.

        Args:
            condition: what is asked for; halves of prompts may be open.
        """
        found: dict[str, None] = {}
        each = zip(condition.task, condition.dose, condition.delay_min, condition.prompt.names(), strict=True)
        for number, dose, delay, name in each:
            task = TASKS[int(number)]
            known = self.tasks.get(task, TaskKnowledge())
            if known.prompts and not any(_may_be(name, one) for one in known.prompts):
                there = ", ".join(known.prompts) + ", the first of two tracers" * (task == "separation")
                found[f"nothing in training was said to show {name}, so results mean little; there are {there}"] = None
            asked = {"low_dose": ("dose", dose, known.dose), "delayed": ("delay_min", delay, known.delay_min)}
            what, value, between = asked.get(task, ("", 0.0, None))
            if between is not None and not 0.99 * between[0] <= value <= 1.01 * between[1]:
                low, high = between
                found[f"{what} is {float(value):g}, but training pairs had {low:g} to {high:g}"] = None
        return list(found)

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able; ``from_dict`` is the inverse."""
        return {name: asdict(known) for name, known in self.tasks.items()}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Knowledge:
        """Return what ``to_dict`` gave."""
        tasks = {}
        for name, known in said.items():
            levels = {key: float(value) for key, value in known["levels"].items()}
            dose, delay = (known.get(key) and tuple(map(float, known[key])) for key in ("dose", "delay_min"))
            tasks[name] = TaskKnowledge(tuple(known["targets"]), levels, tuple(known.get("prompts", ())), dose, delay)
        return cls(tasks)


def warn_of_doubts(knowledge: Knowledge | None, condition: Condition) -> None:
    """Warn whoever called the caller, a method under ``torch.no_grad``, of all ``Knowledge.doubts``."""
    for doubt in [] if knowledge is None else knowledge.doubts(condition):
        warnings.warn(doubt, stacklevel=4)


def _range(values: Tensor) -> tuple[float, float]:
    return float(f"{float(values.min()):.4g}"), float(f"{float(values.max()):.4g}")


def _may_be(asked: str, known: str) -> bool:
    """Say whether two prompts are the same but for what either leaves open."""
    halves = zip(asked.split(":"), known.split(":"), strict=True)
    return all(one == other or OPEN in (one, other) for one, other in halves)


def levels_of(prompt: Prompt, strength: Tensor) -> dict[str, float]:
    """Return the median level of each prompt that ``ENOUGH`` slices answer, with halves open, too; of all in any case.

    Args:
        prompt: tracer and region of each slice.
        strength: its ``level``, ``(slices,)``.
    """
    found = {}
    for tracer, tracer_name in enumerate(TRACERS):
        for region, region_name in enumerate(REGIONS):
            name = f"{tracer_name}:{region_name}"
            answering = strength[matches(Prompt(torch.tensor(tracer), torch.tensor(region)), prompt)].tolist()
            if name != _ALL and len(answering) < ENOUGH:
                continue
            middle = statistics.median(answering)
            if middle > 0:  # empty inputs have no level
                found[name] = float(f"{middle:.4g}")
    return found
