"""Orientations to draw samples in: the image turned and mirrored, exactly, by permuting the bins of its sinogram.

A network that was trained on turned and mirrored slices still errs in a way that depends on how a slice lies. Samples
that are each drawn in an orientation of their own, and turned back, differ by these errors, too: they average out of
the mean and count into the standard deviation, for no more calls of the network.
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
    """

    largest_rotation_deg: float = 0.0
    mirrored: bool = False

    @classmethod
    def seen(cls, augmentation: Any) -> Orientations:
        """Return those that an augmentation draws; of one that is no ``SymmetryAugmentation`` nothing is known."""
        if not isinstance(augmentation, SymmetryAugmentation):
            return cls()
        return cls(augmentation.largest_rotation_deg if augmentation.rotation else 0.0, augmentation.reflection)

    def several(self, n_views: int) -> bool:
        """Return whether there is more than one, of so many views."""
        return self.mirrored or self._largest(n_views) > 0

    def of(self, number: int, n_views: int) -> Orientation:
        """Return that of a sample: of the first as it is, of all of them evenly spread however many there are.

        Angles follow the golden section, and every other sample is mirrored.

        Args:
            number: of the sample, from 0.
            n_views: of the sinogram.
        """
        share = (number * _GOLDEN + 0.5) % 1 - 0.5
        return Orientation(round(2 * share * self._largest(n_views)), self.mirrored and number % 2 == 1)

    def _largest(self, n_views: int) -> int:
        return math.floor(self.largest_rotation_deg / 180 * n_views + 1e-6)
