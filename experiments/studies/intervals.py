"""How much a distance between samples and held-out slices depends on which slices and patients there happen to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allpet.batches import SinogramBatch
from allpet.evaluation.distances import polynomial_mmd, sliced_wasserstein
from allpet.evaluation.features import RandomConvolutions, standardise
from allpet.randomness import keyed_generator

DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "kid_conv": polynomial_mmd,
    "sw_conv": sliced_wasserstein,
}
"""On random convolution features, of whole sets."""


class Difference(NamedTuple):
    """A difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Difference:
        """Take the difference of two distances as ``resampled`` returns them."""
        apart = first - second
        low, high = apart[1:].quantile(torch.tensor([0.025, 0.975])).tolist()
        return cls(float(apart[0]), low, high)

    def __str__(self) -> str:
        return f"{self.value:+.3g} ({self.low:+.2g} to {self.high:+.2g})"


def resampled(
    real: SinogramBatch, sets: Mapping[str, Tensor], distance: str = "kid_conv", draws: int = 200
) -> dict[str, Tensor]:
    """Measure how far sets are from real slices, and again with both drawn with replacement, patient by patient.

    All sets are compared with the same draws of patients, so that differences between them have little of that scatter.

    Args:
        real: held-out slices.
        sets: of expected sinograms, ``(n, 1, views, bins)``, by name.
        distance: one of ``DISTANCES``.
        draws: how many.

    Returns:
        ``(1 + draws,)`` by name; the first is of the sets as they are.
    """
    extract = RandomConvolutions.of(real.expected)
    known, features = extract(real.expected), [extract(x) for x in sets.values()]
    patients = real.patient_id.unique()
    found: dict[str, list[float]] = {name: [] for name in sets}
    for draw in range(draws + 1):
        generator = keyed_generator(0, draw, "bootstrap")
        chosen, samples = torch.arange(len(known)), features
        if draw:
            drawn = patients[torch.randint(len(patients), (len(patients),), generator=generator)]
            chosen = torch.cat([(real.patient_id == one).nonzero()[:, 0] for one in drawn])
            samples = [x[torch.randint(len(x), (len(x),), generator=generator)] for x in features]
        whole = standardise(known[chosen], *samples)
        for name, x in zip(sets, whole[1:], strict=True):
            found[name].append(DISTANCES[distance](whole[0], x))
    return {name: torch.tensor(values) for name, values in found.items()}


def samples_of(folder: Path, rows: list[dict[str, Any]]) -> Tensor:
    """Read the samples that rows have kept, all together, ``(n, 1, views, bins)``."""
    kept = [torch.load(folder / row["row"] / "samples.pt", weights_only=True) for row in rows]
    return torch.cat([one["sinogram"].float() for one in kept])
