"""A data set of a few pairs of discs, made in milliseconds: for tests of downstream tasks."""

from __future__ import annotations

import torch
from tiny_pet import GEOMETRY

from allpet import Prompt, Radon
from allpet.prompts import TRACERS
from allpet.randomness import keyed_generator
from data_modules.base import LoadedData, SinogramDataModule
from data_modules.paired import PairedSet


class TinyPairs(SinogramDataModule):
    """Discs with a hot spot, noisy and not; of two tracers, the disc and the spot."""

    def __init__(self, task: str = "low_dose", n_slices: int = 16, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.task, self.n_slices = task, n_slices

    def load(self) -> LoadedData:
        radon = Radon(GEOMETRY)
        x, y = GEOMETRY.pixel_centers
        discs, spots = [], []
        for i in range(self.n_slices):
            a, b, c, d = (torch.rand(4, generator=keyed_generator(i, "place")) * 60 - 30).tolist()
            discs.append(((x - a) ** 2 + (y - b) ** 2 < 110**2).float())
            spots.append(3 * ((x - a - c) ** 2 + (y - b - d) ** 2 < 30**2).float())
        parts = torch.stack([torch.stack(discs), torch.stack(spots)], dim=1)
        activity = parts if self.task == "separation" else parts.sum(1, keepdim=True)
        expected = radon.project(activity.flatten(0, 1)[:, None])[:, 0].unflatten(0, activity.shape[:2])
        noise = torch.randn(expected.shape, generator=keyed_generator("noise"))
        noisy = expected + 0.02 * expected.max() * noise
        n = self.n_slices
        one = torch.ones(n)
        arrays = {
            "input": noisy.sum(1, keepdim=True) + 0.1 * expected.max() * noise[:, :1],
            "expected": expected,
            "noisy": noisy,
            "activity": activity,
            "labels": (activity.sum(1, keepdim=True) > 0).to(torch.uint8),
            "attenuation": 0 * activity[:, :1],
            "delay_min": 0 * one,
            "dose": 0.1 * one,
            "share": one[:, None].expand(-1, activity.shape[1]),
        }
        targets = torch.tensor([[TRACERS.index(name) for name in ("FDG", "PSMA")[: activity.shape[1]]]] * n)
        prompt = Prompt.of(["FDG:abdomen"] * n)
        whole = PairedSet(arrays, self.task, targets, prompt, torch.arange(n), torch.arange(n) // 2)
        train, val, test = list(range(4, n)), [2, 3], [0, 1]
        return LoadedData(GEOMETRY, whole.subset(train), whole.subset(val), whole.subset(test), f"pairs-{self.task}")

    @property
    def stage1_data_hash(self) -> None:
        """Any stage 1 will do."""
        return None
