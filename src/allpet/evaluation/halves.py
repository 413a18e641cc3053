"""Random halves of a real set that show the same things, and as large parts of other sets that fit them.

Two halves by patient differ by chance in what they show: one has more brains. A floor made of such halves is so high
that hardly any sample lies above it, because samples are asked for what the whole set shows. So where the *kind* of
each slice (its prompt) is known, patients are dealt to the halves by kind, what is left over is left out, and parts of
other sets are drawn with the halves' shares of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.prompts import REGIONS, Prompt

_TRIES = 16
_EVEN = 0.2  # of the slices of each kind, more on one side than on the other
FEWEST = 4
"""Patients that halves of different patients need; with fewer every slice counts as a patient."""


class Halves(NamedTuple):
    """Slices of two halves, indices in ascending order.

    Attributes:
        first: int64.
        second: int64; where kinds are balanced, as many of each kind as in the first.
    """

    first: Tensor
    second: Tensor


def kinds_of(prompt: Prompt | None, n: int) -> Tensor:
    """Return a number for what each of n slices shows, ``(n,)`` int64; without prompts all are of one kind."""
    return torch.zeros(n, dtype=torch.int64) if prompt is None else prompt.tracer * len(REGIONS) + prompt.region


def owners_of(patients: Sequence[int] | Tensor | None, n: int) -> Tensor:
    """Return whom each of n slices counts as: its patient, or itself where they are unknown or fewer than four.

    Raises:
        ValueError: if there is not one patient for each slice.
    """
    owner = torch.arange(n) if patients is None else torch.as_tensor(patients)
    if len(owner) != n:
        raise ValueError(f"{len(owner)} patients are given for {n} real slices; give one for each.")
    return owner if len(owner.unique()) >= FEWEST else torch.arange(n)


def heeded(owner: Tensor, kind: Tensor) -> Tensor:
    """Return the kinds, or one kind for all where balanced halves would lose more than half of the slices.

    So it is where nearly every owner shows something else: at best a kind's largest owner stands against all others.
    """
    most = 0
    for one in kind.unique():
        counts = owner[kind == one].unique(return_counts=True)[1]
        most += int(min(counts.sum(), 2 * (counts.sum() - counts.max())))
    return kind if 2 * most >= len(kind) else torch.zeros_like(kind)


def halves(owner: Tensor, kind: Tensor, generator: torch.Generator) -> Halves:
    """Split slices into random halves that show the same; no owner is in both.

    Owners come in random order, each to the half that lacks what it shows, until such a deal is even enough, or some
    have been tried. (The most even of them would be the same ever again where there are few owners, and floors would
    not know how they vary.)
    Of each kind both halves then keep as many slices as the smaller has, so a kind of one owner alone is left out.

    Args:
        owner: of each slice, ``(n,)``, at least two.
        kind: of each slice, ``(n,)`` int64, see ``heeded``; with one kind for all no slice is left out.
        generator: draws.
    """
    inside = _deal(owner, kind, generator)
    whole = Halves(inside.nonzero()[:, 0], (~inside).nonzero()[:, 0])
    if len(kind.unique()) == 1:
        return whole
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for one in kind.unique():
        sides = [rows[kind[rows] == one] for rows in whole]
        fewer = min(map(len, sides))
        for rows, side in zip(sides, kept, strict=True):
            side.append(rows[torch.randperm(len(rows), generator=generator)[:fewer]])
    first, second = (torch.cat(side).sort().values for side in kept)
    # what an uneven deal leaves must still be a set
    return Halves(first, second) if 4 * len(first) >= len(kind) else whole


def drawn_like(wanted: Tensor, known: Tensor, kind: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw a random part of a set that stands to the whole set as ``wanted`` stands to ``known``.

    If half of the known brains are wanted, but all of the rest, brains are drawn half as often as the rest. A set that
    lacks a kind still lacks it, and what is in no known slice is drawn as often as on average.

    Args:
        wanted: kinds of the slices that the part is compared with, ``(a,)``.
        known: kinds of the whole set that these were taken from, ``(b,)``.
        kind: of the set to draw from, ``(n,)``.
        size: how many; fewer come where too few are of the kinds that are wanted.
        generator: draws.

    Returns:
        Indices in random order, int64.
    """
    chance = torch.ones(len(kind), dtype=torch.float64)
    for one in known.unique():
        chance[kind == one] = float((wanted == one).double().mean() / (known == one).double().mean())
    if 2 * int((chance > 0).sum()) < len(kind):  # a few that are wanted are no set
        chance.fill_(1)
    # systematic sampling: of each kind as many as its chances add up to, but for rounding
    order = torch.randperm(len(kind), generator=generator)
    order = order[kind[order].argsort(stable=True)]
    steps = (size * chance[order] / chance.sum()).clamp(max=1)
    begin = torch.rand(1, dtype=torch.float64, generator=generator)
    passed = torch.cat([begin, begin + steps.cumsum(0)]).floor()
    taken = order[passed.diff() > 0]
    return taken[torch.randperm(len(taken), generator=generator)]


def remarks(patients: Sequence[int] | Tensor | None, prompt: Prompt | None, n: int) -> list[str]:
    """Say what halves of n real slices cannot do, in sentences.

    Args:
        patients: of each slice; None where they are unknown, which the caller knows.
        prompt: of each slice, if known.
        n: slices.
    """
    said = []
    count = n if patients is None else len(torch.as_tensor(patients).unique())
    if count < FEWEST:
        said.append(
            f"The real slices are of {count} patient(s), but halves of different patients need {FEWEST}: both halves "
            "hold slices of the same ones, and the floor is lower than that of new patients."
        )
    owner, kind = owners_of(patients, n), kinds_of(prompt, n)
    if prompt is None or len(kind.unique()) == 1:
        return said
    if not heeded(owner, kind).any():
        said.append(
            "Hardly any prompt is shown by two real patients, so halves show different things and the floor is high: "
            "give several patients of each prompt."
        )
        return said
    names = prompt.names()
    lone = {names[int((kind == one).nonzero()[0])] for one in kind.unique() if len(owner[kind == one].unique()) < 2}
    if lone:
        said.append(
            f"One real patient alone shows {', '.join(sorted(lone))}, which two halves cannot share: it is in no "
            "number that has a floor; give a second patient."
        )
    return said


def _deal(owner: Tensor, kind: Tensor, generator: torch.Generator) -> Tensor:
    """Deal owners to two sides and return which slices are on the first, ``(n,)`` bool."""
    names, whose = owner.unique(return_inverse=True)
    kinds, what = kind.unique(return_inverse=True)
    counts = torch.zeros(len(names), len(kinds) + 1, dtype=torch.float64)
    counts.index_put_((whose, what), torch.ones(len(kind), dtype=torch.float64), accumulate=True)
    counts[:, -1] = counts.sum(1)
    shares = counts / counts.sum(0)
    order = torch.rand(_TRIES, len(names), generator=generator).argsort(1)
    coins = torch.rand(_TRIES, len(names), generator=generator) < 0.5
    ahead = torch.zeros(_TRIES, len(kinds) + 1, dtype=torch.float64)
    side = torch.zeros(_TRIES, len(names), dtype=torch.bool)
    for who, coin in zip(order.T, coins.T, strict=True):
        # |a + x|^2 < |a - x|^2 if a x < 0
        lean = (ahead * shares[who]).sum(1)
        first = (lean < 0) | ((lean == 0) & coin)
        ahead += torch.where(first[:, None], shares[who], -shares[who])
        side[torch.arange(_TRIES), who] = first
    uneven = ahead.square().mean(1).sqrt()
    return side[int((uneven <= max(_EVEN, float(uneven.min()))).nonzero()[0])][whose]
