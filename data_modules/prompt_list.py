"""What to generate: prompts and seeds for ``allpet predict``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from allpet.batches import PromptBatch
from allpet.prompts import Prompt
from data_modules.loading import KeyedBatches, as_it_is


class _Asked(Dataset[PromptBatch]):
    """``set[[i, j, ...]]`` is what is asked of the samples i, j, ..."""

    def __init__(self, prompt: Prompt, first_seed: int) -> None:
        self.prompt, self.first_seed = prompt, first_seed

    def __len__(self) -> int:
        return len(self.prompt.tracer)

    def __getitem__(self, rows: Sequence[int]) -> PromptBatch:
        index = torch.tensor(rows)
        return PromptBatch(Prompt(self.prompt.tracer[index], self.prompt.region[index]), self.first_seed + index)


class PromptList(LightningDataModule):
    """Ask for samples, the prompts taking turns; several processes share them, each sample once.

    Args:
        prompts: ``tracer:region`` texts, such as FDG:brain; "open" leaves either half open.
        n_samples: number of samples in all.
        seed: seed of the first sample; the next has one more. A sample depends on its seed and prompt alone.
        batch_size: most samples generated at once by each process; they are spread evenly over the batches.

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

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Batches of prompts and seeds, in order: this process's share."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(
            _Asked(self.prompt, self.seed),
            batch_size=None,
            sampler=KeyedBatches(len(self.prompts), self.batch_size, None, rank, world_size),
            collate_fn=as_it_is,
        )
