"""Mix-up of slices: another slice of the same prompt, added in part (an augmentation beside the exact symmetries).

A sinogram is linear in its image, so that (1 - b) p_1 + b p_2 is the sinogram of the image (1 - b) f_1 + b f_2, which
fulfils every consistency condition. It is no patient's: a network that reconstructs or removes noise has more sinograms
to learn from, and one that generates must be told (``MixupParameters.label``). Attenuation is not linear: mixtures of
sinograms without attenuation correction are those of no image; mix them only of what hardly attenuates.

Vocabulary. The *share* b of the other slice is at most a half. *Thinning* mixes counts so that Poisson noise stays
Poisson noise (``symmetry.thinning_mixup``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allpet.symmetry import thinning_mixup

MIXUP_LABEL_SIZE = 1
"""Length of ``MixupParameters.label()``, which follows that of the symmetries in a ``Denoiser``'s ``label_size``."""


class MixupParameters(NamedTuple):
    """What is mixed into the slices of a batch.

    Attributes:
        share: of the other slice, ``(batch,)``, from 0 (nothing is mixed) to a half.
        partner: which of the possible others, as a place in [0, 1) among them, ``(batch,)``.
    """

    share: Tensor
    partner: Tensor

    def label(self) -> Tensor:
        """Return what a network is told, ``(batch, MIXUP_LABEL_SIZE)`` float32: twice the other's share.

        It is zero for a slice on its own, and grows steadily as the other comes in: zero at sampling asks for one
        patient, as with the symmetries (arXiv 2206.00364, section 5). That is why mix-up need not be kept to stage 1.
        Who the other is, is not told: the prompt is the same, and a label that names slices would be learned by heart.
        Shares above a half would give the same mixtures again, with the label of the other slice.
        """
        return 2 * self.share[:, None]


class MixupAugmentation:
    """Mix slices two by two: draw shares and partners (``draw``) and mix what was drawn (``mix``).

    Args:
        kind: ``thinning`` for counts: Bin(first, 1 - b) + Bin(second, b), whose noise is Poisson noise again, of the
            mean (1 - b) l_1 + b l_2. ``plain`` for all else, such as corrected or noise-free sinograms:
            (1 - b) first + b second, with (1 - b)^2 and b^2 of the variances of their noise, which for equal ones is
            down to a half of what a scan of the mixture would have.
        probability: of mixing a slice at all.
        largest_share: most of the other slice; shares are uniform from 0 to this.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        kind: Literal["thinning", "plain"] = "thinning",
        probability: float = 0.5,
        largest_share: float = 0.5,
    ) -> None:
        if kind not in ("thinning", "plain"):
            raise ValueError(f"kind is {kind!r}, but must be 'thinning' (counts) or 'plain' (all else).")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}, but must lie in [0, 1].")
        if not 0 < largest_share <= 0.5:
            raise ValueError(
                f"largest_share is {largest_share}, but must be positive and at most 0.5: a slice keeps half of itself."
            )
        self.kind, self.probability, self.largest_share = kind, probability, largest_share

    def draw(self, batch_size: int, generator: torch.Generator) -> MixupParameters:
        """Draw parameters for a batch, on the generator's device."""
        mixed, share, partner = torch.rand(batch_size, 3, generator=generator, device=generator.device).unbind(1)
        return MixupParameters(share * self.largest_share * (mixed < self.probability), partner)

    def mix(self, first: Tensor, second: Tensor, share: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Mix sinograms as they were measured.

        Args:
            first: ``(batch, 1, views, bins)``.
            second: of the partners, same shape.
            share: of the partners, ``(batch,)``.
            generators: one CPU generator per slice, for thinning.

        Returns:
            the mixtures, same shape and units.

        Raises:
            ValueError: if what is to be thinned are no counts.
        """
        if self.kind == "plain":
            return blend(first, second, share)
        return thinning_mixup(first, second, 1 - share.to(first), generators)


def blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Mix sinograms plainly, (1 - b) p_1 + b p_2: what the mixture of either kind is expected to be.

    Args:
        first: ``(batch, 1, views, bins)``.
        second: same shape.
        share: b, ``(batch,)``.
    """
    b = share.to(first)[:, None, None, None]
    return (1 - b) * first + b * second
