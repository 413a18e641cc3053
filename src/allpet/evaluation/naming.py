"""Do samples show what they were asked for, and is it what real slices of that prompt look like? Two classifiers tell.

One learns to name tracer and region from samples, the other from as many real slices of the same prompts. What the
first names of held-out real slices is the samples' *utility*, beside what the second names of them; what the second
names of the samples is how far prompts are *obeyed*, beside what it names of real slices. All are means over prompts of
the share that is named rightly, so it does not matter that one set has more brains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.evaluation.classifier import train_classifier
from allpet.evaluation.halves import halves, kinds_of, owners_of
from allpet.geometry import ParallelBeam
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator

LEAST = 8
"""Slices of a prompt that each set must have for the prompt to count."""


class Labelled(NamedTuple):
    """Slices of which is known what they show.

    Attributes:
        sinogram: ``(n, 1, views, bins)``.
        prompt: of each slice; None where they are unknown.
        patients: number of each slice's patient, ``(n,)``; None: every slice is a patient of its own.
    """

    sinogram: Tensor
    prompt: Prompt | None
    patients: Tensor | None = None

    def take(self, rows: Tensor) -> Labelled:
        """Return some of the slices."""
        prompt = None if self.prompt is None else Prompt(*(half[rows] for half in self.prompt))
        return Labelled(self.sinogram[rows], prompt, None if self.patients is None else self.patients[rows])


def naming_numbers(
    real: Labelled,
    fake: Labelled,
    geometry: ParallelBeam,
    training: Labelled | None = None,
    steps: int = 200,
    seed: int = 0,
) -> tuple[dict[str, float], str]:
    """Train both classifiers and say what they name, or why that cannot be done.

    The second learns from training slices or, where there are none with prompts, from one half of the real patients;
    both are tested on the others. Both learn from equally many slices of each prompt.

    Args:
        real: held-out slices.
        fake: samples with what they were asked for; each counts as a patient of its own.
        geometry: of all sinograms.
        training: real slices of other patients; None: half of the real ones are taken.
        steps: of each training.
        seed: keys halves, choices and trainings.

    Returns:
        ``utility`` and ``prompt_obeyed``, each with ``_std``, ``_floor`` and ``_floor_std`` as in
        ``Evaluation.numbers``, and a sentence. Without two prompts of which all sets have enough slices there are no
        numbers, and the sentence says what is missing.
    """
    generator, fake = keyed_generator(seed, "naming"), fake._replace(patients=None)
    known, test, sets = training, real, {"REAL": real, "FAKE": fake, "TRAIN": training}
    if training is None or _silent(training.prompt):
        sets = {"REAL": real, "FAKE": fake}
        if not _silent(real.prompt):
            owner, kind = owners_of(real.patients, len(real.sinogram)), kinds_of(real.prompt, len(real.sinogram))
            known, test = (real.take(rows) for rows in halves(owner, kind, generator))
            sets = {"one half of REAL": known, "the other half": test, "FAKE": fake}
    names, missing = common_prompts({name: None if one is None else one.prompt for name, one in sets.items()})
    if missing:
        return {}, f"Utility and obeyed prompts are left out: {missing}."
    assert known is not None
    known, test, fake = (one.take(_of(one, names)) for one in (known, test, fake))
    chosen = [_as_many(a, b, generator) for a, b in ((known, fake), (fake, known))]
    network, other = (train_classifier(x.sinogram, _prompt(x), geometry, steps, seed=seed) for x in chosen)
    floor, floor_std = _share(network.obeyed(test.sinogram, _prompt(test)), test)
    numbers: dict[str, float] = {}
    for name, named, one in (("utility", other, test), ("prompt_obeyed", network, fake)):
        value, std = _share(named.obeyed(one.sinogram, _prompt(one)), one)
        # of as many real slices as there are samples, if these are fewer
        fewer = max(1.0, len(test.sinogram) / len(one.sinogram)) ** 0.5
        numbers |= {name: value, f"{name}_std": std, f"{name}_floor": floor, f"{name}_floor_std": fewer * floor_std}
    source = "one half of REAL" if "TRAIN" not in sets else "TRAIN"
    said = (
        f"Utility and obeyed prompts: classifiers of {', '.join(names)}, one trained on {len(chosen[1].sinogram)} "
        f"slices of FAKE and one on as many of {source}, tested on {len(test.sinogram)} of REAL."
    )
    ours, theirs = known.patients, test.patients
    if source != "TRAIN" and ours is not None and theirs is not None and bool(torch.isin(theirs, ours).any()):
        said += " Too few real patients to keep them apart: the second knows those that it is tested on, and its floor"
        said += " is too high."
    return numbers, said


def common_prompts(sets: Mapping[str, Prompt | None], least: int = LEAST) -> tuple[list[str], str]:
    """Return the prompts of which all sets have enough slices, sorted, or none and what is missing.

    Args:
        sets: prompts by the name of the set.
        least: slices of each.
    """
    for name, prompt in sets.items():
        if prompt is None or _silent(prompt):
            return [], f"{name} does not tell tracer or region of its slices (columns tracer, region or prompt)"
    counts = {name: Counter(prompt.names()) for name, prompt in sets.items() if prompt is not None}
    every = set().union(*counts.values()) - {"open:open"}
    common = sorted(one for one in every if all(count[one] >= least for count in counts.values()))
    if len(common) > 1:
        return common, ""
    have = "; ".join(
        f"{name} has {', '.join(f'{one} {n}' for one, n in sorted(count.items()))}" for name, count in counts.items()
    )
    return [], f"two prompts with {least} slices in each set are needed, but {have}"


def _silent(prompt: Prompt | None) -> bool:
    return prompt is None or not bool(((prompt.tracer > 0) | (prompt.region > 0)).any())


def _prompt(one: Labelled) -> Prompt:
    assert one.prompt is not None
    return one.prompt


def _of(one: Labelled, names: list[str]) -> Tensor:
    wanted = set(names)
    return torch.tensor([name in wanted for name in _prompt(one).names()]).nonzero()[:, 0]


def _as_many(one: Labelled, other: Labelled, generator: torch.Generator) -> Labelled:
    """Draw as many slices of each prompt as the smaller of two sets has."""
    kind, theirs = (kinds_of(x.prompt, len(x.sinogram)) for x in (one, other))
    rows = []
    for value in kind.unique():
        mine = (kind == value).nonzero()[:, 0]
        rows.append(mine[torch.randperm(len(mine), generator=generator)[: int((theirs == value).sum())]])
    return one.take(torch.cat(rows).sort().values)


def _share(right: Tensor, one: Labelled) -> tuple[float, float]:
    """Return the mean over prompts of the share that is right and its standard error, over patients; at least 1 / n."""
    kind = kinds_of(one.prompt, len(right))
    _, what, count = kind.unique(return_inverse=True, return_counts=True)
    right = right.double()
    shares = torch.zeros(len(count), dtype=torch.float64).index_add_(0, what, right) / count
    left = (right - shares[what]) / (count[what] * len(count))
    whose = owners_of(one.patients, len(right)).unique(return_inverse=True)[1]
    by_patient = torch.zeros(int(whose.max()) + 1, dtype=torch.float64).index_add_(0, whose, left)
    return float(shares.mean()), max(float(by_patient.square().sum().sqrt()), 1 / len(right))
