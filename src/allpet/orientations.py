"""Orientations to draw samples in: the image turned and mirrored, exactly, by permuting the bins of its sinogram.

A network that was trained on turned and mirrored slices still errs in a way that depends on how a slice lies. Samples
that are drawn in several orientations, and turned back, differ by these errors, too: they average out of the mean and
count into the standard deviation, for no more calls of the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from allpet.augmentation import SymmetryAugmentation
from allpet.symmetry import reflect_x, roll_views

_GOLDEN = (math.sqrt(5) - 1) / 2


class Orientation(NamedTuple):
    """How an image is laid; sinograms are ``(batch, channel, views, bins)``.

    Attributes:
        views: by how many it is turned counter-clockwise, after it has been mirrored.
        mirrored: whether left and right are exchanged.
    """

    views: int = 0
    mirrored: bool = False

    def lay(self, sinogram: Tensor) -> Tensor:
        """Return the sinogram of the image laid so."""
        sinogram = reflect_x(sinogram) if self.mirrored else sinogram
        return roll_views(sinogram, self.views) if self.views else sinogram

    def lay_back(self, sinogram: Tensor) -> Tensor:
        """Undo ``lay``, bit by bit."""
        sinogram = roll_views(sinogram, -self.views) if self.views else sinogram
        return reflect_x(sinogram) if self.mirrored else sinogram


@dataclass(frozen=True)
class Orientations:
    """What a network has seen.

    Attributes:
        largest_rotation_deg: to either side; 180 is all the way round, 0 none.
        mirrored: whether slices were mirrored, too.

    Raises:
        ValueError: if the angle is impossible.
    """

    largest_rotation_deg: float = 0.0
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.largest_rotation_deg <= 180:
            raise ValueError(f"largest_rotation_deg is {self.largest_rotation_deg}, but must lie in [0, 180].")

    @classmethod
    def seen(cls, augmentation: Any) -> Orientations:
        """Return those that an augmentation draws; of one that is no ``SymmetryAugmentation`` nothing is known."""
        if not isinstance(augmentation, SymmetryAugmentation) or not augmentation.probability:
            return cls()
        return cls(augmentation.largest_rotation_deg if augmentation.rotation else 0.0, augmentation.reflection)

    def count(self, n_views: int) -> int:
        """Return how many there are of a sinogram of so many views."""
        return self._angles(n_views) * (1 + self.mirrored)

    def of(self, number: int, n_views: int) -> Orientation:
        """Return that of a sample: the first as it lies, each other one once before any comes again, evenly spread.

        Angles follow the golden section, and every other sample is mirrored.

        Args:
            number: of the sample, from 0.
            n_views: of the sinogram.
        """
        angles = self._angles(n_views)
        # whatever is nearest to the golden section and visits all
        step = min(
            (k for k in range(1, angles + 1) if math.gcd(k, angles) == 1), key=lambda k: abs(k - _GOLDEN * angles)
        )
        turn = number * step % angles
        views = turn if self.largest_rotation_deg == 180 else (turn + angles // 2) % angles - angles // 2
        # where angles are even in number, odd samples would always meet the same half of them
        rounds = number // angles if angles % 2 == 0 else 0
        return Orientation(views, self.mirrored and (number + rounds) % 2 == 1)

    def _angles(self, n_views: int) -> int:
        if self.largest_rotation_deg == 180:
            return 2 * n_views
        return 2 * math.floor(self.largest_rotation_deg / 180 * n_views + 1e-6) + 1
