"""Make the brain template that ships with the simulator from nilearn's wheel.

The simulator's brains are warps of the ICBM 2009a nonlinear symmetric average (Fonov 2011), whose 1-mm grey- and
white-matter maps nilearn redistributes. This script reduces them to 2 mm and 6 bits and, as they are exactly
symmetric, to the right half: about 0.2 MB. It needs the wheel, not an installed nilearn::

    pip download nilearn --no-deps --dest outputs/nilearn
    python experiments/make_brain_template.py outputs/nilearn/nilearn-*.whl
"""

from __future__ import annotations

import argparse
import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
from scipy import ndimage

NAME = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
OUTPUT = Path(__file__).parents[1] / "src/allpet/simulation/mni152_2mm.npz"
LEVELS = 63  # 6 bits


def read_nifti(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read a gzipped single-file NIfTI-1 volume of unsigned bytes; return the volume and its 3 x 4 affine."""
    data = gzip.decompress(data)
    shape = struct.unpack("<8h", data[40:56])[1:4]
    kind, offset = struct.unpack("<h", data[70:72])[0], int(struct.unpack("<f", data[108:112])[0])
    if kind != 2:
        raise ValueError(f"The volume has NIfTI type {kind}, but unsigned bytes (2) were expected.")
    affine = np.frombuffer(data[280:328], "<f4").reshape(3, 4)
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape, order="F"), affine


def halve(volume: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth with (1, 2, 1) / 4 and keep every second sample, so that x = 0 stays on the grid."""
    smooth = volume.astype(np.float64)
    for axis in range(3):
        smooth = ndimage.convolve1d(smooth, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    return smooth[::2, ::2, ::2], origin


def main() -> None:
    """Write the template."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="nilearn's wheel from PyPI")
    wheel = zipfile.ZipFile(parser.parse_args().wheel)
    maps = {}
    for name in ("gm", "wm", "t1"):
        volume, affine = read_nifti(wheel.read(NAME.format(name)))
        if not np.array_equal(volume, volume[::-1]):
            raise ValueError(f"The {name} map is not symmetric; this script keeps only one half.")
        maps[name], origin = halve(volume / volume.max(), affine[:, 3])
    # T1 is stripped of the skull: what is left of it, with holes filled, is the brain with its fluid spaces.
    mask = ndimage.binary_fill_holes(maps["t1"] > 0.05)
    right = slice(maps["gm"].shape[0] // 2, None)
    np.savez_compressed(
        OUTPUT,
        grey=np.round(maps["gm"][right] * LEVELS).astype(np.uint8),
        white=np.round(maps["wm"][right] * LEVELS).astype(np.uint8),
        mask=np.packbits(mask[right]),
        shape=mask[right].shape,
        origin_mm=np.array([0.0, *origin[1:]]),
        pitch_mm=2.0,
    )
    print(f"{OUTPUT}: {mask[right].shape}, {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
