"""Which slices mix-up mixes: each with another training slice of the same tracer and the same part of the body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allpet.batches import SinogramBatch
from allpet.mixup import MixupAugmentation, MixupParameters, blend
from allpet.prompts import OPEN, REGIONS, TRACERS
from data_modules.loading import collate

if TYPE_CHECKING:
    from data_modules.base import SinogramSet


class Mixer:
    """Mixes batches of training slices with other training slices.

    Partners are the other slices of the set with the same prompt, so that the mixture answers it, too. Where the prompt
    does not say what a slice shows (a half left open, or trunk, which may be chest or pelvis), its slices are left as
    they are: they might be mixed with anything. Only the chosen few are partners in few-shot training.

    Args:
        mixup: draws and mixes.
        slices: the training set.

    Raises:
        ValueError: if no slice has a partner.
    """

    def __init__(self, mixup: MixupAugmentation, slices: SinogramSet) -> None:
        self.mixup, self.slices = mixup, slices
        vague = {TRACERS.index(OPEN)}, {REGIONS.index(OPEN), REGIONS.index("trunk")}
        alike: dict[tuple[int, int], list[int]] = {}
        for row, (tracer, region) in enumerate(zip(*(half.tolist() for half in slices.prompt), strict=True)):
            if tracer not in vague[0] and region not in vague[1]:
                alike.setdefault((tracer, region), []).append(row)
        ids = slices.sample_id.tolist()
        # sample id -> the rows of its prompt, and its own place among them
        self._place = {
            ids[row]: (rows, place) for rows in alike.values() if len(rows) > 1 for place, row in enumerate(rows)
        }
        if not self._place:
            raise ValueError(
                "mixup mixes slices of the same tracer and region, but no two training slices are known to be alike: "
                "say tracer and region (trunk is too vague), take more slices, or leave mixup out."
            )

    def __call__(self, batch: SinogramBatch, generators: Sequence[torch.Generator]) -> tuple[SinogramBatch, Tensor]:
        """Mix what is drawn; ``expected`` with the same shares. Slices that are not of the set are left as they are.

        Args:
            batch: slices on any device.
            generators: one CPU generator per slice.

        Returns:
            the batch, and its label, ``(batch, MIXUP_LABEL_SIZE)`` on the batch's device.

        Raises:
            ValueError: if counts are to be thinned that are none.
        """
        drawn = collate([self.mixup.draw(1, generator) for generator in generators])
        partners = [
            self._partner(sample, place)
            for sample, place in zip(batch.sample_id.tolist(), drawn.partner.tolist(), strict=True)
        ]
        share = drawn.share * torch.tensor([partner is not None for partner in partners])
        rows = share.nonzero()[:, 0].tolist()
        device = batch.sinogram.device
        label = MixupParameters(share, drawn.partner).label().to(device)
        if not rows:
            return batch, label
        other = self.slices[[partner for row in rows if (partner := partners[row]) is not None]]
        share = share[rows]
        mixed = self.mixup.mix(
            batch.sinogram[rows], other.sinogram.to(device), share, [generators[row] for row in rows]
        )
        noise_free = batch.noise_free
        if noise_free is not None and other.noise_free is not None:
            noise_free = _replaced(noise_free, rows, blend(noise_free[rows], other.noise_free.to(device), share))
        return batch._replace(sinogram=_replaced(batch.sinogram, rows, mixed), noise_free=noise_free), label

    def _partner(self, sample: int, place: float) -> int | None:
        """Return the row of the slice at a place in [0, 1) among the others alike; None if there is none."""
        if sample not in self._place:
            return None
        rows, own = self._place[sample]
        chosen = int(place * (len(rows) - 1))
        return rows[chosen + (chosen >= own)]


def _replaced(values: Tensor, rows: list[int], new: Tensor) -> Tensor:
    values = values.clone()
    values[rows] = new
    return values
