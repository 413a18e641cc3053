"""Your own slices: a folder of sinograms, or of images that are projected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from tqdm.auto import tqdm

from allpet.augmentation import RadonMaskAugmentation
from allpet.geometry import ParallelBeam
from allpet.mixup import MixupAugmentation
from allpet.projector import Radon
from allpet.prompts import OPEN, Prompt
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet
from data_modules.few_shot import Split, nested_subset, split_as_known
from data_modules.folder import FoundFile, patients_of, splits_of
from data_modules.layouts import AUTO
from data_modules.validate import Kind, inspect_folder

FIELD_OF_VIEW_MM = 500.0
"""Diameter assumed where neither file nor user gives a length."""


class SinogramFiles(SinogramDataModule):
    """Slices from a folder of .mat, .npy, .npz, .h5, .hs, .nii and DICOM files, or from one file such as a native set.

    The folder is checked before anything else happens (``data_modules.validate``); errors refuse it in one sentence,
    warnings are printed. Sinograms are never resampled: without a geometry the files' own views and bins are taken.
    Images are brought to the geometry's pixels by area averaging, projected, and flagged as ``reprojected``. No patient
    is in two splits; where nothing tells patients apart, or there is only one, the first slices are for training and
    the last for validation and test.

    Args:
        folder: the folder, with its subfolders.
        kind: what the slices are; ``auto``: images if most are square and zero outside the inscribed circle.
        geometry: of the sinograms; None: sinograms keep their own views and bins, images get ``image_geometry``.
        image_geometry: what images are projected to where ``geometry`` is None; None: the views and bins of the preset
            ``laptop``. Sinograms do not heed it.
        key: name of the array in each file, where files hold several.
        slices: axis that counts slices in three-dimensional arrays; ``auto``: the last in .mat files, else the first.
        full_turn: sinograms cover 360 degrees and are folded to 180.
        pixel_mm: pixel width of the images; None: they fill the geometry's image grid.
        bin_mm: bin width of sinograms without a geometry; None: that of a scanner preset with the same views and bins,
            else a field of view of 500 mm.
        tracer: tracer of all slices, or ``open``.
        region: region of all slices, or ``open``.
        patient: pattern (regular expression) that finds the patient in a file's name; None: subfolders, else files
            with several slices, else names up to their last underscore.
        layout: name of a public data set's layout (``data_modules.layouts``); ``auto`` looks for one, ``none`` not.
        role: which files of the layout are read, such as ``input`` or ``target``; None: the layout's default.
        val_share: share of the patients (or slices) to validate on.
        test_share: share of the patients (or slices) to test on.
        num_scans: number of training slices (few-shot); None for all.
        batch_size: see ``SinogramDataModule``, as all that follows.
        num_workers: loader processes.
        seed: keys order and draws, not the split.
        augmentation: makes the mask augmentation.
        symmetry: makes the symmetry augmentation.
        trunk_probability: how often a part of the trunk is prompted as trunk in training.
        mixup: mixes training slices with others of the same tracer and region.

    Raises:
        ValueError: from ``setup``: if the folder cannot be used, or is too small to be split.
    """

    def __init__(
        self,
        folder: str,
        kind: Kind = "auto",
        geometry: ParallelBeam | None = None,
        image_geometry: ParallelBeam | None = None,
        key: str | None = None,
        slices: Literal["auto", "first", "last"] = "auto",
        full_turn: bool = False,
        pixel_mm: float | None = None,
        bin_mm: float | None = None,
        tracer: str = OPEN,
        region: str = OPEN,
        patient: str | None = None,
        layout: str = AUTO,
        role: str | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        num_scans: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        augmentation: Callable[[Radon], nn.Module] | None = RadonMaskAugmentation,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
        trunk_probability: float = 0.2,
        mixup: MixupAugmentation | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, num_scans, seed, augmentation, symmetry, trunk_probability, mixup)
        self.save_hyperparameters(
            logger=False, ignore=["geometry", "image_geometry", "augmentation", "symmetry", "mixup"]
        )
        if kind not in ("auto", "sinogram", "image"):
            raise ValueError(f"kind is {kind!r}, but must be 'auto', 'sinogram' or 'image'.")
        for name, length in {"pixel_mm": pixel_mm, "bin_mm": bin_mm}.items():
            if length is not None and not 0 < length < float("inf"):
                raise ValueError(f"{name} is {length}, but must be a positive length in mm.")
        self.prompt = Prompt.of([(tracer, region)])
        self.folder, self.kind, self.key, self.slices, self.full_turn = folder, kind, key, slices, full_turn
        self.asked_geometry, self.pixel_mm, self.bin_mm = geometry, pixel_mm, bin_mm
        self.asked_image_geometry = geometry or image_geometry
        self.patient, self.val_share, self.test_share = patient, val_share, test_share
        self.layout, self.role = layout, role

    def load(self) -> LoadedData:
        """Check and read the folder, and project images."""
        report, files = inspect_folder(
            self.folder,
            self.kind,
            self.key,
            self.asked_geometry,
            self.slices,
            self.full_turn,
            self.patient,
            self.layout,
            self.role,
        )
        report.raise_errors()
        for row in report.warnings:
            say(f"WARN  {self.folder}, {row.file}: {row.finding}; {row.remedy}.")
        patients = patients_of(files, self.patient)
        owner = patients.names
        split, by_patient, how = split_as_known(patients, splits_of(files), self.val_share, self.test_share)

        values = torch.from_numpy(np.concatenate([found.slices for found in files]))
        reprojected = report.kind == "image"
        if reprojected:
            geometry, pixel_mm, lengths = image_geometry(
                self.asked_image_geometry, values.shape[1:], self.pixel_mm or report.pixel_mm
            )
            values = project_images(values, pixel_mm, geometry)
        else:
            geometry, lengths = sinogram_geometry(self.asked_geometry, values.shape[1:], self.bin_mm)
            if report.geometry is not None and self.asked_geometry is None and self.bin_mm is None:
                geometry, lengths = report.geometry, f"bins of {report.geometry.bin_mm:g} mm as the files say"
        say(
            f"{self.folder}: {len(values)} {report.kind}s (kind={self.kind}) of {len(files)} files, "
            f"{'projected to' if reprojected else 'with'} {geometry.n_views} views x {geometry.n_bins} bins, "
            f"{lengths}; {how}."
        )

        names = sorted(set(owner))
        whole = SinogramSet(
            values,
            None,
            prompts_of(files, self.prompt),
            torch.arange(len(values)),
            torch.tensor([names.index(name) for name in owner]),
        )
        prompts = whole.prompt.names()
        chosen = nested_subset([owner[i] for i in split.train], [prompts[i] for i in split.train], self.num_scans)
        train = [split.train[i] for i in chosen]
        return LoadedData(
            geometry,
            whole.subset(train),
            whole.subset(split.val),
            whole.subset(split.test),
            self._digest(files, geometry, report.kind, Split(train, split.val, split.test)),
            reprojected,
            notes={"split": "by patient" if by_patient else "by position, patients unknown or only one"},
            local={
                "folder": str(self.folder),
                "split_rule": how,
                "train_patients": list(dict.fromkeys(owner[i] for i in train)),
            },
        )

    def _digest(self, files: list[FoundFile], geometry: ParallelBeam, kind: str, split: Split) -> str:
        """Identify the data by what was read and what became of it; where the folder lies does not matter."""
        digest = hashlib.blake2b(digest_size=8)
        for name, slices, _ in files:
            digest.update(f"{name}\x1f{slices.shape}\x1f".encode())
            digest.update(slices.astype("<f4", copy=False).tobytes())
        settings = [geometry.to_dict(), kind, self.full_turn, self.pixel_mm, self.prompt.names(), *split]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()


def prompts_of(files: Sequence[FoundFile], asked: Prompt) -> Prompt:
    """Return tracer and region of each slice: as asked for, where that is not open, else as the files' tables say.

    Args:
        files: whose slices.
        asked: one prompt for all.
    """
    columns = []
    for name, said in zip(("tracer", "region"), asked.names()[0].split(":"), strict=True):
        entries = [entry for found in files for entry in found.column(name) or [OPEN] * len(found.slices)]
        columns.append([said] * len(entries) if said != OPEN else entries)
    return Prompt.of(list(zip(*columns, strict=True)))


def sinogram_geometry(
    asked: ParallelBeam | None, shape: tuple[int, ...], bin_mm: float | None
) -> tuple[ParallelBeam, str]:
    """Return the geometry of sinograms, and where its lengths come from.

    Args:
        asked: a geometry that fits; None to make one.
        shape: ``(views, bins)``.
        bin_mm: bin width, if known.
    """
    if asked is not None:
        return asked, f"bins of {asked.bin_mm:g} mm as asked"
    n_views, n_bins = shape
    presets = {name: ParallelBeam.preset(name) for name in ParallelBeam.presets()}
    known = [name for name, preset in presets.items() if preset.sinogram_shape == (n_views, n_bins)]
    if bin_mm is None and known:
        return presets[known[0]], f"lengths of the preset {known[0]!r} with the same shape"
    lengths = "as said" if bin_mm is not None else f"assuming {FIELD_OF_VIEW_MM:g} mm across (say bin_mm)"
    bin_mm = bin_mm if bin_mm is not None else FIELD_OF_VIEW_MM / n_bins
    return ParallelBeam(n_views, n_bins, bin_mm, n_bins, bin_mm), f"bins of {bin_mm:g} mm {lengths}"


class _ImageGeometry(NamedTuple):
    geometry: ParallelBeam
    pixel_mm: float
    lengths: str


def image_geometry(asked: ParallelBeam | None, shape: tuple[int, ...], pixel_mm: float | None) -> _ImageGeometry:
    """Return the geometry to project images to, their pixel width, and where it comes from.

    Args:
        asked: a geometry; None for the views and bins of the preset ``laptop``, made as wide as the images.
        shape: ``(rows, columns)`` of the images.
        pixel_mm: pixel width of the images; None if unknown.
    """
    geometry = asked or ParallelBeam.preset("laptop")
    if pixel_mm is None:
        pixel_mm = geometry.image_size * geometry.pixel_mm / max(shape)
        return _ImageGeometry(geometry, pixel_mm, f"assuming pixels of {pixel_mm:.4g} mm (say pixel_mm)")
    if asked is None:
        width = max(shape) * pixel_mm
        geometry = ParallelBeam(
            geometry.n_views, geometry.n_bins, width / geometry.n_bins, geometry.image_size, width / geometry.image_size
        )
    return _ImageGeometry(geometry, pixel_mm, f"pixels of {pixel_mm:.4g} mm as said")


def regrid(images: Tensor, pixel_mm: float, geometry: ParallelBeam) -> Tensor:
    """Bring images to a geometry's pixels by area averaging, both grids centred on the axis of rotation.

    Each new pixel is the mean of what it covers, and what lies outside the old images is zero, so that the integral
    over the new grid's area is kept exactly and nothing is aliased.

    Args:
        images: ``(batch, rows, columns)``, activity.
        pixel_mm: their pixel width.
        geometry: gives the new grid.

    Returns:
        ``(batch, geometry.image_size, geometry.image_size)`` of the same type.
    """

    def edges(n: int, width: float) -> Tensor:
        return (torch.arange(n + 1, dtype=torch.float64) - n / 2) * width

    def shares(n: int) -> Tensor:
        new, old = edges(geometry.image_size, geometry.pixel_mm), edges(n, pixel_mm)
        overlap = torch.minimum(new[1:, None], old[1:]) - torch.maximum(new[:-1, None], old[:-1])
        return (overlap.clamp_min(0) / geometry.pixel_mm).to(images)

    return shares(images.shape[1]) @ images @ shares(images.shape[2]).T


def project_images(images: Tensor, pixel_mm: float, geometry: ParallelBeam) -> Tensor:
    """Project images of any pixel width; what lies outside the field of view is set to zero first.

    Activity there is seen by some views and not by others, which no image inside could explain.

    Args:
        images: ``(slices, rows, columns)``.
        pixel_mm: their pixel width.
        geometry: to project to.

    Returns:
        ``(slices, views, bins)`` float32, activity x mm.
    """
    radon = Radon(geometry)
    inside = torch.hypot(*geometry.pixel_centers) <= geometry.field_of_view_mm
    sinograms, kept = [], 0.0
    for part in tqdm(images.split(32), desc="Projecting", unit="batch", leave=False, disable=len(images) <= 32):
        part = torch.where(inside, regrid(part, pixel_mm, geometry), 0.0)
        kept += float(part.sum(dtype=torch.float64)) * geometry.pixel_mm**2
        sinograms.append(radon.project(part.unsqueeze(1)).squeeze(1))
    lost = 1 - kept / max(float(images.sum(dtype=torch.float64)) * pixel_mm**2, 1e-30)
    if lost > 1e-3:
        say(
            f"WARN  {lost:.1%} of the images' activity lies outside the field of view of "
            f"{2 * geometry.field_of_view_mm:g} mm and is left out; choose a wider geometry, or check pixel_mm."
        )
    return torch.cat(sinograms)


@rank_zero_only
def say(line: str) -> None:
    """Print a line, on one process only."""
    print(line)
