"""Which slices make which batch: keyed order, one share per device, resumable in mid-epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from allpet.randomness import keyed_generator

Batch = TypeVar("Batch")


class KeyedBatches(DistributedSampler):
    """Batches of indices for one device; the order of an epoch depends on (seed, epoch) alone.

    The slices of an epoch are spread evenly over its batches and devices: nothing is dropped or repeated, every device
    has the same number of batches, and batches differ by at most one slice (33 slices in batches of 32 are 17 + 16).
    What n devices train on together in a step is what one would with n times the batch.
    No batch is empty: in batches of one, where devices do not divide the number of slices, a few hold two.

    A ``DistributedSampler`` by type, so that Lightning calls ``set_epoch`` and does not put its own, which repeats
    slices, in its place.

    Args:
        n_slices: number of slices in the set.
        batch_size: most slices per batch and device; 1 may become 2 on several devices.
        seed: keys the order; None for the order of the set (evaluation).
        rank: which device this is.
        world_size: number of devices.

    Raises:
        ValueError: if there are fewer slices than devices.
    """

    def __init__(self, n_slices: int, batch_size: int, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(n_slices), world_size, rank, shuffle=seed is not None)  # type: ignore[arg-type]
        if n_slices < world_size:
            raise ValueError(f"{n_slices} slice(s) cannot be shared by {world_size} devices; use fewer devices.")
        self.n_slices, self.key = n_slices, seed
        self.n_batches = min(math.ceil(n_slices / (batch_size * world_size)), n_slices // world_size)
        self.start = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Give this device's batches of the epoch, from batch ``start`` on."""
        if self.key is None:
            order = torch.arange(self.n_slices)
        else:
            order = torch.randperm(self.n_slices, generator=keyed_generator(self.key, self.epoch, "order"))
        for together in torch.tensor_split(order, self.n_batches)[self.start :]:
            yield torch.tensor_split(together, self.num_replicas)[self.rank].tolist()


class ResumableLoader(DataLoader):
    """A loader of ``KeyedBatches`` that tells how far into its epoch it is and continues from there.

    Lightning stores ``state_dict`` in every checkpoint. The position is the number of batches handed out, not the
    number prepared by workers. Iteration begins with the first batch asked for, when the epoch is already known.

    Attributes:
        epoch_now: tells the epoch when iteration begins; by default the last one set on the sampler. Lightning sets
            one too many there when it resumes from a checkpoint written at the end of an epoch.
    """

    epoch_now: Callable[[], int] | None = None
    _given = 0
    _resume_at: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, KeyedBatches)
        if self.epoch_now is not None:
            sampler.set_epoch(self.epoch_now())
        epoch, given = self._resume_at or (-1, 0)
        self._resume_at = None
        # A checkpoint written behind the last batch is followed by the next epoch, from its beginning.
        sampler.start = self._given = given if epoch == sampler.epoch and given < len(sampler) else 0
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches already handed out."""
        assert isinstance(self.sampler, KeyedBatches)
        return {"epoch": self.sampler.epoch, "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue, at the next iteration, where ``state_dict`` was taken."""
        assert isinstance(self.sampler, KeyedBatches)
        self.sampler.set_epoch(state_dict["epoch"])
        self._resume_at = (state_dict["epoch"], state_dict["batches"])


def collate(rows: Sequence[Batch]) -> Batch:
    """Join batches along their first axis: tensors, None and NamedTuples of them, nested at will."""
    first = rows[0]
    if first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(rows))  # type: ignore[arg-type, return-value]
    return type(first)(*(collate(column) for column in zip(*rows, strict=True)))


def as_it_is(batch: Batch) -> Batch:
    """Leave a batch as the data set gave it."""
    return batch
