"""How much a distance between samples and held-out slices depends on which slices and patients there happen to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allpet.evaluation.distances import polynomial_mmd, sliced_wasserstein
from allpet.evaluation.features import RandomConvolutions, standardise
from allpet.randomness import keyed_generator

DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "kid": polynomial_mmd,
    "sw": sliced_wasserstein,
}
"""Of whole sets."""


class Difference(NamedTuple):
    """A difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Difference:
        """Take the difference of two distances as ``resampled`` returns them.

        The interval is centred: slices that are drawn twice make all distances of a bootstrap larger.
        """
        apart = first - second
        low, high = (apart[1:] - apart[1:].mean()).quantile(torch.tensor([0.025, 0.975])).tolist()
        return cls(float(apart[0]), float(apart[0]) + low, float(apart[0]) + high)

    def __str__(self) -> str:
        return f"{self.value:+.3g} ({self.low:+.2g} to {self.high:+.2g})"


def resampled(
    real: Tensor,
    patients: Tensor,
    sets: Mapping[str, Tensor],
    distance: str = "kid",
    draws: int = 200,
    extract: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Measure how far sets are from real slices, and again with both drawn with replacement, patient by patient.

    All sets are compared with the same draws of patients, so that differences between them have little of that scatter,
    and by as many samples, since distances depend on their number.

    Args:
        real: held-out slices, ``(n, 1, views, bins)``: expected ones for expected samples, noisy ones for noisy ones.
        patients: of each, ``(n,)``.
        sets: of samples, ``(m, 1, views, bins)``, by name.
        distance: one of ``DISTANCES``.
        draws: how many.
        extract: features of sinograms; None for random convolutions.

    Returns:
        ``(1 + draws,)`` by name; the first is of the sets as they are.
    """
    extract = extract or RandomConvolutions.of(real)
    known, features = extract(real), [extract(x) for x in sets.values()]
    names, size = patients.unique(), min(len(x) for x in sets.values())
    found: dict[str, list[float]] = {name: [] for name in sets}
    for draw in range(draws + 1):
        generator = keyed_generator(0, draw, "bootstrap")
        chosen, samples = torch.arange(len(known)), [x[_evenly(len(x), size)] for x in features]
        if draw:
            drawn = names[torch.randint(len(names), (len(names),), generator=generator)]
            chosen = torch.cat([(patients == one).nonzero()[:, 0] for one in drawn])
            samples = [x[torch.randint(len(x), (size,), generator=generator)] for x in features]
        elif distance == "kid":  # without bias at any number
            samples = features
        whole = standardise(known[chosen], *samples)
        for name, x in zip(sets, whole[1:], strict=True):
            found[name].append(DISTANCES[distance](whole[0], x))
    return {name: torch.tensor(values) for name, values in found.items()}


def _evenly(n: int, size: int) -> Tensor:
    return torch.linspace(0, n - 1, size).round().long()


def mean_of(found: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return the mean over sets of what ``resampled`` found of each.

    Sets of several trainings are never put together: what trainings differ by would count as variety.
    """
    return torch.stack([found[name] for name in names]).mean(0)


def samples_of(folder: Path, rows: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Read the samples that rows have kept, ``(n, 1, views, bins)`` by the row's key."""
    kept = {row["row"]: torch.load(folder / row["row"] / "samples.pt", weights_only=True) for row in rows}
    return {key: one["sinogram"].float() for key, one in kept.items()}
