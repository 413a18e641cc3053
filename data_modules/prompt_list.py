"""What to generate: prompts and seeds for ``allpet predict``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from allpet.batches import PromptBatch
from allpet.prompts import Prompt


class PromptList(LightningDataModule):
    """Ask for samples, the prompts taking turns.

    Args:
        prompts: ``tracer:region`` texts, such as FDG:brain; "open" leaves either half open.
        n_samples: number of samples in all.
        seed: seed of the first sample; the next has one more. A sample depends on its seed and prompt alone.
        batch_size: samples generated at once.

    Raises:
        ValueError: if there is nothing to generate or a prompt is not in the vocabulary.
    """

    def __init__(
        self, prompts: Sequence[str] = ("FDG:brain",), n_samples: int = 16, seed: int = 0, batch_size: int = 16
    ) -> None:
        super().__init__()
        if n_samples < 1 or batch_size < 1 or not prompts:
            given = f"{len(prompts)} prompts, {n_samples} samples, batches of {batch_size}"
            raise ValueError(f"There is nothing to generate ({given}): each must be at least 1.")
        self.prompts = [prompts[i % len(prompts)] for i in range(n_samples)]
        self.prompt, self.seed, self.batch_size = Prompt.of(self.prompts), seed, batch_size

    def predict_dataloader(self) -> DataLoader[int]:
        """Batches of prompts and seeds, in order."""
        # range is a sequence of numbers, all that a DataLoader asks of a data set
        rows = range(len(self.prompts))
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self._batch)  # type: ignore[arg-type]

    def _batch(self, rows: list[int]) -> PromptBatch:
        index = torch.tensor(rows)
        return PromptBatch(Prompt(self.prompt.tracer[index], self.prompt.region[index]), self.seed + index)
