"""Semi-real attenuation pairs from folders of NAC-PET and CT slices, as one native data set (``allpet.nac_inversion``).

``sinogram`` is not attenuation corrected, ``acf`` holds the correction factors; ``sinogram * acf`` is corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from allpet.geometry import ParallelBeam
from allpet.io import DataError, Scan, content_hash, write_scan
from allpet.io.atomic import replacing
from allpet.nac_inversion import Inversion, attenuation_of, hounsfield, invert_attenuation, resample_image
from allpet.projector import Radon
from allpet.reconstruction import fbp
from data_modules.folder import FoundFile, find_files, identify_patients, read_files, split_of

_BATCH = 8


class Pairs(NamedTuple):
    """What became of the slices.

    Attributes:
        names: of all slices, file and number.
        residuals: relative L2 difference of each slice, as ``allpet.nac_inversion.Inversion``.
        kept: numbers of the slices that were written.
    """

    names: list[str]
    residuals: list[float]
    kept: list[int]


def make_pairs(
    nac: str | Path,
    ct: str | Path,
    path: str | Path,
    nac_pixel_mm: float,
    ct_pixel_mm: float,
    ct_units: Literal["auto", "hu", "stored", "scaled"] = "auto",
    max_residual: float = 0.1,
    resolution_mm: float = 5.0,
    picture: str | Path | None = None,
) -> Pairs:
    """Invert every slice, write those that the inversion explains, and draw some.

    Args:
        nac: folder of PET slices without attenuation correction.
        ct: folder of CT slices with the same file names, centred on the same point.
        path: of the data set, ending in .h5.
        nac_pixel_mm: pixel width of PET.
        ct_pixel_mm: pixel width of CT.
        ct_units: of CT values (``allpet.nac_inversion.hounsfield``).
        max_residual: slices with more are left out.
        resolution_mm: of PET, full width at half maximum; CT is blurred to it.
        picture: PNG of some slices: PET, attenuation, what the inversion explains of PET, corrected image.

    Raises:
        DataError: if files are missing or do not fit together, or no slice is explained; nothing is written then.
    """
    if Path(path).suffix.lower() not in (".h5", ".hdf5"):
        raise DataError(path, "a data set is an HDF5 file", "let its name end in .h5")
    pet_files, ct_files = _matching(Path(nac), Path(ct))
    slices = [(one, other, i) for one, other in zip(pet_files, ct_files, strict=True) for i in range(len(one.slices))]
    size = pet_files[0].slices.shape[1]
    radon = Radon(ParallelBeam(size, size, nac_pixel_mm, size, nac_pixel_mm))
    images: list[Tensor] = []
    attenuations: list[Tensor] = []
    found: list[Inversion] = []
    for start in tqdm(range(0, len(slices), _BATCH), "Inverting attenuation", unit="batch", disable=None):
        chosen = slices[start : start + _BATCH]
        image = torch.from_numpy(np.stack([one.slices[i] for one, _, i in chosen])).unsqueeze(1)
        hu = []
        for _, other, i in chosen:
            try:
                hu.append(hounsfield(torch.from_numpy(other.slices[i]), ct_units))
            except ValueError as error:
                raise DataError(Path(ct, other.name), str(error).rstrip("."), "name them with --ct-units") from error
        mu = attenuation_of(torch.stack(hu).unsqueeze(1))
        mu = resample_image(mu, ct_pixel_mm, size, nac_pixel_mm, resolution_mm)
        try:
            found.append(invert_attenuation(radon, image, mu, resolution_mm=resolution_mm))
        except ValueError as error:
            first, last = chosen[0][0].name, chosen[-1][0].name
            raise DataError(Path(nac), f"{first} to {last}: {str(error).rstrip('.')}", "correct the slices") from error
        images.append(image)
        attenuations.append(mu)
    inversion = Inversion(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    residuals = inversion.residual.tolist()
    kept = [i for i, residual in enumerate(residuals) if residual <= max_residual]
    names = [one.name if len(one.slices) == 1 else f"{one.name} [{i}]" for one, _, i in slices]
    if not kept:
        finding = f"no slice is explained to {max_residual:.0%}, the best to {min(residuals):.1%}"
        raise DataError(nac, finding, "check pixel widths, CT units and that both show the same slices")
    _write(path, radon.geometry, inversion, [slices[i] for i in kept], kept, pet_files, str(nac), str(ct))
    if picture is not None:
        some = [kept[k] for k in np.unique(np.linspace(0, len(kept) - 1, 8).astype(int))]
        _draw(picture, radon, torch.cat(images), torch.cat(attenuations), inversion, names, some)
    return Pairs(names, residuals, kept)


def _matching(nac: Path, ct: Path) -> tuple[list[FoundFile], list[FoundFile]]:
    """Read both folders; the same names, one shape each."""
    names = []
    for folder in (nac, ct):
        if not folder.is_dir():
            raise DataError(folder, "there is no such folder", "check the path")
        names.append(find_files(folder)[0])
    if not names[0]:
        raise DataError(nac, "it holds no files that can be read", "check the path")
    if missing := sorted(set(names[0]) ^ set(names[1])):
        where = ct if missing[0] in names[0] else nac
        finding = f"{len(missing)} file(s) have no partner, the first is {missing[0]}"
        raise DataError(where, finding, "give PET and CT of a slice the same name")
    files: tuple[list[FoundFile], list[FoundFile]] = ([], [])
    for folder, those in zip((nac, ct), files, strict=True):
        for found in read_files(folder, names[0]):
            if not isinstance(found, FoundFile):
                raise found
            if found.slices.shape[1:] != (found.slices.shape[1],) * 2:
                raise DataError(folder / found.name, f"slices of {found.slices.shape[1:]}", "give square images")
            if those and found.slices.shape[1:] != those[0].slices.shape[1:]:
                finding = f"slices of {found.slices.shape[1:]}, the first file has {those[0].slices.shape[1:]}"
                raise DataError(folder / found.name, finding, "give all slices one size")
            those.append(found)
    for one, other in zip(*files, strict=True):
        if len(one.slices) != len(other.slices):
            finding = f"{len(other.slices)} slices where PET has {len(one.slices)}"
            raise DataError(ct / other.name, finding, "give CT slices at the positions of PET")
    return files


def _write(
    path: str | Path,
    geometry: ParallelBeam,
    inversion: Inversion,
    slices: Sequence[tuple[FoundFile, FoundFile, int]],
    kept: Sequence[int],
    files: Sequence[FoundFile],
    nac: str,
    ct: str,
) -> None:
    patients = identify_patients([split_of(found.name)[1] for found in files], [len(found.slices) for found in files])
    patient_of = dict(zip((found.name for found in files), patients.names, strict=True))
    before = inversion.before[list(kept), 0].numpy()
    scan = Scan(
        before,
        "sinogram",
        geometry,
        units="units of the NAC image x mm",
        state=("reprojected",),
        acf=(1 / inversion.factors[list(kept), 0]).numpy(),
        table={
            "patient": [patient_of[one.name] for one, _, _ in slices],
            "file": [one.name for one, _, _ in slices],
            "slice": [i for _, _, i in slices],
            "residual": [float(inversion.residual[i]) for i in kept],
            "hash": [content_hash(one) for one in before],
        },
        provenance={
            "made_by": "allpet.nac_inversion: semi-real, activity and attenuation re-simulated from images",
            "nac": Path(nac).name,
            "ct": Path(ct).name,
        },
    )
    write_scan(path, scan)


def _draw(
    path: str | Path,
    radon: Radon,
    image: Tensor,
    attenuation: Tensor,
    inversion: Inversion,
    names: Sequence[str],
    rows: Sequence[int],
) -> None:
    """Draw a row for each slice."""
    explained = fbp(radon, inversion.before[list(rows)])
    corrected = fbp(radon, (inversion.before / inversion.factors)[list(rows)])
    figure = Figure(figsize=(13.2, 2.3 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 6, squeeze=False)
    titles = (
        "NAC image",
        "attenuation",
        "FBP, not corrected",
        "difference",
        "FBP, corrected",
        "sinogram, not corrected",
    )
    for k, i in enumerate(rows):
        parts = (image[i], attenuation[i], explained[k], explained[k] - image[i], corrected[k], inversion.before[i])
        for axis, part, title in zip(axes[k], parts, titles, strict=True):
            top = float(image[i].quantile(0.999)) if title in titles[2:4] else float(part.quantile(0.999))
            low = -top if title == "difference" else 0.0
            axis.imshow(part[0].numpy(), cmap="gray_r", vmin=low, vmax=max(top, 1e-30), aspect="equal")
            axis.set_xticks([])
            axis.set_yticks([])
            if k == 0:
                axis.set_title(title, fontsize=9)
        label = f"{names[i]}\nresidual {float(inversion.residual[i]):.1%}"
        axes[k][0].set_ylabel(label, fontsize=7, parse_math=False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")
