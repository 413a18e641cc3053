"""Prompts: what the model is asked for, as tracer x region (and, for paired tasks, the task).

Index 0 of each vocabulary means *left open*; it is also what classifier-free guidance trains as the null prompt. The
seven pairs of the paper's figure 2 are FDG x {brain, trunk, chest, abdomen}, DOPA x brain and PSMA x {chest, abdomen};
pelvis is added. *Trunk* is the parent of chest, abdomen and pelvis: any trunk slice answers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OPEN = "open"
TRACERS = (OPEN, "FDG", "DOPA", "PSMA")
REGIONS = (OPEN, "brain", "trunk", "chest", "abdomen", "pelvis")
TRUNK_REGIONS = ("chest", "abdomen", "pelvis")
_ALIASES = {"18F-FDG": "FDG", "18F-DOPA": "DOPA", "68Ga-PSMA": "PSMA", "68Ga-PSMA-11": "PSMA", "": OPEN, "any": OPEN}


class Prompt(NamedTuple):
    """A batch of prompts.

    Attributes:
        tracer: index into ``TRACERS``, ``(batch,)``, int64.
        region: index into ``REGIONS``, ``(batch,)``, int64.
    """

    tracer: Tensor
    region: Tensor

    @classmethod
    def of(cls, pairs: Sequence[str | tuple[str, str]]) -> Prompt:
        """Build a batch from ``"tracer:region"`` texts or pairs, e.g. ``["FDG:brain", ("PSMA", "open")]``.

        Raises:
            ValueError: if a name is not in the vocabulary.
        """
        named = [tuple(pair.split(":")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
        for pair in named:
            if len(pair) != 2:
                raise ValueError(f"A prompt is tracer:region, such as FDG:brain; got {':'.join(pair)!r}.")
        return cls(
            torch.tensor([prompt_index(tracer, TRACERS, "tracer") for tracer, _ in named], dtype=torch.int64),
            torch.tensor([prompt_index(region, REGIONS, "region") for _, region in named], dtype=torch.int64),
        )

    def names(self) -> list[str]:
        """Return ``"tracer:region"`` for each prompt."""
        return [f"{TRACERS[t]}:{REGIONS[r]}" for t, r in zip(self.tracer.tolist(), self.region.tolist(), strict=True)]


def prompt_index(name: str, vocabulary: Sequence[str], what: str) -> int:
    """Return the index of a name in a vocabulary, ignoring case and accepting names with the isotope.

    Raises:
        ValueError: if the name is unknown.
    """
    plain = _ALIASES.get(name, name)
    for index, known in enumerate(vocabulary):
        if plain.lower() == known.lower():
            return index
    raise ValueError(f"Unknown {what} {name!r}; choose one of {', '.join(vocabulary)}.")


def matches(asked: Prompt, known: Prompt) -> Tensor:
    """Say whether slices answer prompts: what is left open is not asked, and any part of the trunk is trunk.

    Args:
        asked: one prompt for each slice, or one for all.
        known: what the slices show.

    Returns:
        ``(slices,)`` bool.
    """
    trunk, parts = REGIONS.index("trunk"), torch.tensor([REGIONS.index(part) for part in TRUNK_REGIONS])
    part_of_it = (asked.region == trunk) & torch.isin(known.region, parts.to(known.region.device))
    region = (asked.region == 0) | (known.region == asked.region) | part_of_it
    return ((asked.tracer == 0) | (known.tracer == asked.tracer)) & region


def answers(asked: tuple[int, int], known: Prompt) -> Tensor:
    """Say which slices answer a prompt, as ``matches`` does.

    Args:
        asked: tracer and region, as indices into ``TRACERS`` and ``REGIONS``.
        known: what the slices show.

    Returns:
        ``(slices,)`` bool.

    Raises:
        ValueError: if none does.
    """
    tracer, region = asked
    right = matches(Prompt(*torch.tensor(asked, device=known.region.device)[:, None]), known)
    if not right.any():
        raise ValueError(
            f"No slice answers {TRACERS[tracer]}:{REGIONS[region]}; there are {', '.join(sorted(set(known.names())))}."
        )
    return right


def count_prompts(known: Prompt) -> Tensor:
    """Count the slices of each tracer and region, ``(len(TRACERS), len(REGIONS))``, int64."""
    counts = torch.bincount(known.tracer * len(REGIONS) + known.region, minlength=len(TRACERS) * len(REGIONS))
    return counts.view(len(TRACERS), len(REGIONS))


def unseen(asked: Prompt, counts: Tensor) -> list[str]:
    """Return the names of prompts that no slice answers, without repetition.

    Args:
        asked: index 0 leaves a half open.
        counts: of slices, as from ``count_prompts``.
    """
    cells = _cells(counts)
    found = dict.fromkeys(zip(asked.tracer.tolist(), asked.region.tolist(), strict=True))
    pairs = [Prompt(torch.tensor([tracer]), torch.tensor([region])) for tracer, region in found]
    return [pair.names()[0] for pair in pairs if not counts.flatten()[matches(pair, cells)].any()]


def _cells(counts: Tensor) -> Prompt:
    return Prompt(*(index.flatten() for index in torch.meshgrid(*map(torch.arange, counts.shape), indexing="ij")))


def draw_open(asked: Prompt, counts: Tensor, generators: Sequence[torch.Generator]) -> Prompt:
    """Draw what prompts leave open in proportion to the slices that answer them; where none do it stays open.

    Args:
        asked: index 0 leaves a half open; the other half stays as it is.
        counts: of slices, as from ``count_prompts``.
        generators: one CPU generator per prompt.
    """
    cells = _cells(counts)
    drawn = []
    for tracer, region, generator in zip(asked.tracer.tolist(), asked.region.tolist(), generators, strict=True):
        answering = matches(Prompt(torch.tensor(tracer), torch.tensor(region)), cells)
        weights = counts.flatten().double() * answering
        if weights.any() and not (tracer and region):
            cell = int(torch.multinomial(weights, 1, generator=generator))
            tracer, region = tracer or int(cells.tracer[cell]), region or int(cells.region[cell])
        drawn.append((tracer, region))
    tracers, regions = torch.tensor(drawn, dtype=torch.int64).view(-1, 2).unbind(1)
    return Prompt(tracers.to(asked.tracer.device), regions.to(asked.region.device))
