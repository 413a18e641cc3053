"""The data module that all others share: batches keyed by identity, resumable in mid-epoch, augmented on the device.

Vocabulary. A *slice* is one sinogram; its *sample id* is its identity in the data set and keys every random draw made
for it. *Evaluation* is validation, test, the sanity check and prediction: there, draws depend on the sample id alone,
so that every run is scored on the same masks. Training draws depend on (seed, epoch, sample id, purpose), never on
rank, worker or batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from allpet.augmentation import RadonMaskAugmentation
from allpet.batches import SinogramBatch
from allpet.geometry import ParallelBeam
from allpet.mixup import MIXUP_LABEL_SIZE, MixupAugmentation
from allpet.projector import Radon
from allpet.prompts import REGIONS, TRUNK_REGIONS, Prompt
from allpet.randomness import keyed_generator
from data_modules.loading import KeyedBatches, ResumableLoader, as_it_is, collate
from data_modules.mixing import Mixer
from data_modules.slice_cache import StoredArray


class SinogramSet(Dataset[SinogramBatch]):
    """Slices of a data set, held in memory or read from a cache when asked for.

    ``set[i]`` is a batch of one slice and ``set[[i, j, ...]]`` a batch of several; ``collate`` joins batches.

    Args:
        sinogram: ``(slices, views, bins)`` float32.
        expected: noise-free sinograms, the same shape; None where they are not known.
        prompt: tracer and region of each slice.
        sample_id: identity of each slice in the whole data set, ``(slices,)`` int64.
        patient_id: index of each slice's patient in the whole data set, ``(slices,)`` int64.
    """

    def __init__(
        self,
        sinogram: Tensor | StoredArray,
        expected: Tensor | StoredArray | None,
        prompt: Prompt,
        sample_id: Tensor,
        patient_id: Tensor,
    ) -> None:
        self.sinogram, self.expected, self.prompt = sinogram, expected, prompt
        self.sample_id, self.patient_id = sample_id, patient_id

    def __len__(self) -> int:
        return len(self.sinogram)

    def __getitem__(self, index: int | Sequence[int]) -> SinogramBatch:
        rows = torch.as_tensor([index] if isinstance(index, int) else index, dtype=torch.int64)
        return SinogramBatch(
            sinogram=self.sinogram[rows].unsqueeze(1),
            noise_free=None if self.expected is None else self.expected[rows].unsqueeze(1),
            prompt=Prompt(self.prompt.tracer[rows], self.prompt.region[rows]),
            sample_id=self.sample_id[rows],
            patient_id=self.patient_id[rows],
        )

    def subset(self, indices: Sequence[int]) -> SinogramSet:
        """Return the chosen slices, in the given order, as a set of their own."""
        chosen = self[indices]
        return SinogramSet(
            chosen.sinogram.squeeze(1),
            None if chosen.noise_free is None else chosen.noise_free.squeeze(1),
            chosen.prompt,
            chosen.sample_id,
            chosen.patient_id,
        )


@dataclass(frozen=True)
class LoadedData:
    """What a data module has found or made.

    Attributes:
        geometry: of all sinograms.
        train: slices to train on, the few-shot subset already chosen.
        val: slices to validate on.
        test: slices to test on.
        data_hash: identity of the data; equal on every machine.
        reprojected: whether the sinograms are projections of reconstructed images.
        notes: whatever else is worth recording, JSON-able. It may be sent away: no paths, no names of patients.
        local: what must stay on this machine, such as paths and names of patients, JSON-able.
    """

    geometry: ParallelBeam
    train: SinogramSet
    val: SinogramSet
    test: SinogramSet
    data_hash: str
    reprojected: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)


class SinogramDataModule(LightningDataModule, ABC):
    """Batches of sinograms for stages 1 and 2; subclasses say where the slices come from.

    Augmentation is injected as a factory, which a configuration spells as a class with some of its arguments::

        augmentation:
          class_path: allpet.RadonMaskAugmentation
          init_args: {n_cells: [1, 4]}

    Masks and symmetries are drawn for each slice by its own key and applied on the batch's device. Mix-up comes before
    symmetries and these before masks; both in training only, with the same parameters for ``sinogram`` and
    ``expected``. Partners of mix-up are read from the training set by the process that trains, not by its loaders.

    Args:
        batch_size: most slices of a batch on each device; the slices of an epoch are spread evenly over its batches.
        num_workers: loader processes; the slices are in memory, so 0 is fastest unless they are very large.
        num_scans: number of training slices (few-shot); None for all. Whole patients in a fixed order, the last cut.
        seed: keys the order of training slices and their draws; it does not change the data or their split.
        augmentation: makes the mask augmentation (``draw(n, generator, epoch)``, ``apply(sinogram, cells)``) from
            the projector; None for no stack.
        symmetry: makes the symmetry augmentation (``draw(n, generator)``, ``apply(sinogram, parameters)``) from the
            geometry; None for none.
        trunk_probability: how often a chest, abdomen or pelvis slice is prompted as trunk in training.
        mixup: mixes training slices with others of the same tracer and region (``Mixer``); None for none.

    After ``setup``: ``geometry``, ``radon``, ``train_set``, ``val_set``, ``test_set``, ``scale`` (data units per
    network unit, one number for the data set), ``data_hash``, ``reprojected``, ``summary()``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        num_scans: int | None = None,
        seed: int = 0,
        augmentation: Callable[[Radon], nn.Module] | None = RadonMaskAugmentation,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
        trunk_probability: float = 0.2,
        mixup: MixupAugmentation | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")
        if not 0 <= trunk_probability <= 1:
            raise ValueError(f"trunk_probability is {trunk_probability}, but must lie between 0 and 1.")
        self.batch_size, self.num_workers, self.num_scans, self.seed = batch_size, num_workers, num_scans, seed
        self.trunk_probability, self.mixup = trunk_probability, mixup
        self._make_augmentation, self._make_symmetry = augmentation, symmetry
        self._loaded: LoadedData | None = None
        self._mixer: Mixer | None = None

    @abstractmethod
    def load(self) -> LoadedData:
        """Read, check or make the data. Called once, on every process."""

    def setup(self, stage: str | None = None) -> None:
        """Load the data and make projector and augmentations; does nothing the second time."""
        if self._loaded is None:
            loaded = self.load()
            self.geometry, self.radon = loaded.geometry, Radon(loaded.geometry)
            self.train_set, self.val_set, self.test_set = loaded.train, loaded.val, loaded.test
            self.data_hash, self.reprojected = loaded.data_hash, loaded.reprojected
            self.scale = fixed_scale(self.train_set.sinogram)
            # Any: their apply() is not that of nn.Module.
            self.augmentation: Any = self._make_augmentation(self.radon) if self._make_augmentation else None
            self.symmetry: Any = self._make_symmetry(self.geometry) if self._make_symmetry else None
            self._mixer = Mixer(self.mixup, self.train_set) if self.mixup else None
            self._loaded = loaded
        if stage == "fit" and self.trainer is not None:
            rank_zero_info("Training on %s", _in_words(self.summary()))
            for logger in self.trainer.loggers:
                # A CSVLogger writes into the run's folder; any other may send away what it is given.
                local = self._require_setup().local if isinstance(logger, CSVLogger) else {}
                logger.log_hyperparams({"data": {**self.summary(), **local}})

    def summary(self) -> dict[str, Any]:
        """Return what the data are, as plain numbers, texts, lists and dictionaries: no paths, no names of patients.

        ``train_ids`` holds the sample ids of the chosen training slices in their fixed order.
        """
        loaded = self._require_setup()
        parts = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
        return {
            "data": type(self).__name__,
            "data_hash": loaded.data_hash,
            "geometry": loaded.geometry.to_dict(),
            "scale": self.scale,
            "reprojected": loaded.reprojected,
            "num_scans": self.num_scans,
            **{
                name: {
                    "slices": len(part),
                    "patients": len(part.patient_id.unique()),
                    "prompts": dict(Counter(part.prompt.names())),
                }
                for name, part in parts.items()
            },
            **loaded.notes,
            "train_ids": loaded.train.sample_id.tolist(),
        }

    def train_dataloader(self) -> DataLoader[SinogramBatch]:
        """Batches in an order keyed by (seed, epoch); resumable in mid-epoch."""
        loader = self._loader(self._require_setup().train, ResumableLoader, self.seed)
        trainer = self.trainer
        if trainer is not None and isinstance(loader, ResumableLoader):
            loader.epoch_now = lambda: trainer.current_epoch
        return loader

    def val_dataloader(self) -> DataLoader[SinogramBatch]:
        """Validation batches, in order."""
        return self._loader(self._require_setup().val, DataLoader, None)

    def test_dataloader(self) -> DataLoader[SinogramBatch]:
        """Test batches, in order.

        Raises:
            ValueError: if the data were too few for a test set.
        """
        if not len(self._require_setup().test):
            raise ValueError("There is no test set: the data have too few patients; validate instead, or add patients.")
        return self._loader(self.test_set, DataLoader, None)

    def _loader(
        self, data: SinogramSet, kind: type[DataLoader[SinogramBatch]], seed: int | None
    ) -> DataLoader[SinogramBatch]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return kind(
            data,
            # The sampler gives whole batches of indices, which the set answers with one indexing operation.
            batch_size=None,
            sampler=KeyedBatches(len(data), self.batch_size, seed, rank, world_size),
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it would draw a seed for its workers from the global one
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment on the batch's device. Validation within a fit and its sanity check count as evaluation."""
        if not isinstance(batch, SinogramBatch):
            return batch
        training = self.trainer is not None and self.trainer.training
        return self.augment(batch, self.trainer.current_epoch if training else None)  # type: ignore[union-attr]

    @torch.no_grad()
    def augment(self, batch: SinogramBatch, epoch: int | None = None) -> SinogramBatch:
        """Draw and apply what training or evaluation applies to a batch.

        Args:
            batch: slices without a stack.
            epoch: keys the draws of training; None for evaluation.
        """
        self._require_setup()
        ids, device = batch.sample_id.tolist(), batch.sinogram.device

        def generators(purpose: str) -> list[torch.Generator]:
            run = ("evaluation",) if epoch is None else (self.seed, epoch)
            return [keyed_generator(*run, i, purpose) for i in ids]

        if epoch is not None and self.trunk_probability:
            chance = torch.stack([torch.rand((), generator=generator) for generator in generators("trunk")])
            batch = batch._replace(prompt=_generalise(batch.prompt, chance < self.trunk_probability))
        labels = []
        if epoch is not None and self._mixer is not None:
            batch, told = self._mixer(batch, generators("mixup"))
            labels.append(told)
        if epoch is not None and self.symmetry is not None:
            drawn = collate([self.symmetry.draw(1, generator) for generator in generators("symmetry")])
            noise_free = None if batch.noise_free is None else self.symmetry.apply(batch.noise_free, drawn)
            batch = batch._replace(
                sinogram=self.symmetry.apply(batch.sinogram, drawn),
                noise_free=noise_free,
            )
            labels.insert(0, drawn.label().to(device))
        if labels:
            batch = batch._replace(symmetry=torch.cat(labels, dim=1))
        if self.augmentation is not None:
            cells = torch.cat([self.augmentation.draw(1, generator, epoch) for generator in generators("mask")])
            batch = batch._replace(stack=self.augmentation.apply(batch.sinogram, cells))
        return batch

    @property
    def label_size(self) -> int:
        """Length of the label of training batches (``SinogramBatch.symmetry``); 0 where they have none."""
        self._require_setup()
        drawn = 0 if self.symmetry is None else self.symmetry.draw(1, torch.Generator()).label().shape[1]
        return drawn + (MIXUP_LABEL_SIZE if self.mixup else 0)

    @contextmanager
    def unmixed(self, moved: bool = True) -> Iterator[None]:
        """Leave slices unmixed meanwhile: for what is measured on patients, such as the statistics of latents.

        Args:
            moved: whether symmetries go on; without, slices have the noise that they were measured with.
        """
        mixer, self._mixer = self._mixer, None
        symmetry = self.symmetry
        if not moved:
            self.symmetry = None
        try:
            yield
        finally:
            self._mixer, self.symmetry = mixer, symmetry

    @property
    def stage1_data_hash(self) -> str | None:
        """Hash of the data that a stage 1 must have been trained on to serve these; None if any data will do."""
        return self._require_setup().data_hash

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the data, for the checkpoint."""
        if self._loaded is None:
            return {}
        return {"data_hash": self.data_hash, "scale": self.scale, "train_ids": self.train_set.sample_id.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that training continues on the data that it began with.

        Raises:
            RuntimeError: if the data of a resumed fit differ from the checkpoint's.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and state_dict.get("data_hash") != self._require_setup().data_hash:
            raise RuntimeError(
                f"The checkpoint was trained on other data (hash {state_dict.get('data_hash')}, here "
                f"{self.data_hash}); give it the same data, or start a new run from its pretrained folder."
            )

    def _require_setup(self) -> LoadedData:
        if self._loaded is None:
            raise RuntimeError(f"{type(self).__name__} holds no data yet; call setup() first.")
        return self._loaded


def fixed_scale(sinogram: Tensor | StoredArray) -> float:
    """Return the 99.9th percentile of all bins, rounded to three digits; the largest value where that is zero.

    A high percentile, because the maximum of a noisy set grows with the number of slices. Rounded, because the last
    digits mean nothing and differ between machines.

    Args:
        sinogram: any shape; at most 16 million evenly spread bins are looked at.

    Raises:
        ValueError: if no bin is positive.
    """
    if isinstance(sinogram, StoredArray):  # whole slices, for that is how they are read
        sinogram = sinogram[torch.arange(0, len(sinogram), 1 + math.prod(sinogram.shape) // 2**24)]
    values = sinogram.flatten()[:: 1 + sinogram.numel() // 2**24].numpy()
    scale = float(np.quantile(values, 0.999))
    scale = scale if scale > 0 else float(sinogram.max())
    if scale <= 0:
        raise ValueError("All training sinograms are zero or negative; check that the right array was read.")
    return float(f"{scale:.3g}")


def _generalise(prompt: Prompt, chosen: Tensor) -> Prompt:
    """Ask for the trunk instead of the part of it that a slice shows.

    Args:
        prompt: the slices' prompts.
        chosen: ``(batch,)`` bool, the slices it may happen to.
    """
    parts = torch.tensor([REGIONS.index(region) for region in TRUNK_REGIONS], device=prompt.region.device)
    change = chosen.to(prompt.region.device) & torch.isin(prompt.region, parts)
    return prompt._replace(region=torch.where(change, REGIONS.index("trunk"), prompt.region))


def _in_words(summary: dict[str, Any]) -> str:
    """Say in one line what is trained on."""
    parts = [
        f"{summary[part]['slices']} slices of {summary[part]['patients']} patient(s)"
        for part in ("train", "val", "test")
    ]
    kinds = ", ".join(f"{count} {name}" for name, count in summary["train"]["prompts"].items())
    return f"{parts[0]} ({kinds}); validation {parts[1]}, test {parts[2]}; data hash {summary['data_hash']}"
