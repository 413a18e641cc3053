"""The Radon transform of a whole batch as one call of ASTRA's 3D parallel-beam projector, on CUDA tensors in place.

Slices of the 3D volume are the images of the batch: with rays in the slice's own plane ASTRA never mixes slices.

What the code must respect (found in ASTRA 2.5's sources):

- 3D rows run along +y, 2D rows along -y, so the angles are negated;
- ``direct_FP3D`` swallows its failures, ``do_composite_FP`` and ``do_composite_BP`` raise;
- without a CUDA device a projection kills the process (SIGFPE), so availability is checked before;
- geometry lies in per-device constant memory: one call at a time;
- the calling thread's current device decides, and autograd runs backward in threads of its own;
- ASTRA's streams wait for the default stream only, and ASTRA synchronises before it returns;
- handles are numbers into tables of the process that made them.

Forward is Joseph's "linear" kernel with 8-bit interpolation weights (about 1e-4 off the matrix). Backward interpolates
in the sinogram, pixel by pixel, and is not the exact transpose: about 0.6 % off for a sinogram's backprojection.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import torch
from torch import Tensor

from allpet.geometry import ParallelBeam

_lock = threading.Lock()
_projectors: dict[tuple[object, ...], tuple[int, Any, Any]] = {}


def why_unavailable() -> str | None:
    """Return why ASTRA cannot project on a GPU here, or None if it can."""
    # Asking torch, since astra.use_cuda() would create a CUDA context in a process that may fork.
    return _why_not_installed() or (None if torch.cuda.is_available() else "torch sees no CUDA device")


@functools.cache
def _why_not_installed() -> str | None:
    try:
        import astra
    except ImportError as error:
        return f"astra-toolbox cannot be imported ({error})"
    return None if astra.has_feature("cuda") else "this build of astra-toolbox has no CUDA"


def project(image: Tensor, geometry: ParallelBeam, angles: Tensor) -> Tensor:
    """``(batch, rows, columns) -> (batch, views, bins)``, activity x mm; float32, on the image's CUDA device.

    Raises:
        RuntimeError: if ASTRA fails, for example for want of memory.
    """
    return _run(image, geometry, angles, transpose=False)


def backproject(sinogram: Tensor, geometry: ParallelBeam, angles: Tensor) -> Tensor:
    """``(batch, views, bins) -> (batch, rows, columns)``, in mm times the sinogram's unit; otherwise as ``project``."""
    return _run(sinogram, geometry, angles, transpose=True)


def _run(source: Tensor, geometry: ParallelBeam, angles: Tensor, transpose: bool) -> Tensor:
    shape = geometry.image_shape if transpose else (len(angles), geometry.n_bins)
    target = source.new_zeros(len(source), *shape)
    if len(source) == 0:
        return target
    source = source.detach().contiguous()
    image, sinogram = (target, source) if transpose else (source, target)
    with _lock, torch.cuda.device(source.device):
        try:
            _call(image, sinogram, geometry, angles, transpose)
        except RuntimeError:
            # ASTRA allocates outside torch, whose cache counts as used.
            torch.cuda.empty_cache()
            _call(image, sinogram, geometry, angles, transpose)
    return target.mul_(geometry.pixel_mm)


def _call(image: Tensor, sinogram: Tensor, geometry: ParallelBeam, angles: Tensor, transpose: bool) -> None:
    """Run ASTRA on tensors in place, in pixel units; the caller holds the lock and has set the device."""
    import astra
    import astra.experimental

    batch, device = len(image), image.device
    astra.set_gpu_index(device.index)
    projector, volume, beam = _projector(geometry, angles, batch, device)
    run = astra.experimental.do_composite_BP if transpose else astra.experimental.do_composite_FP
    handles: list[int] = []
    torch.cuda.current_stream(device).synchronize()
    try:
        handles.append(astra.data3d.link("-vol", volume, image))
        handles.append(astra.data3d.link("-sino", beam, sinogram))
        run(projector, handles[:1], handles[1:])
    except astra.log.AstraError as error:
        free = torch.cuda.mem_get_info(device)[0] / 2**20
        raise RuntimeError(
            f"ASTRA failed on a batch of {batch} on {device}, where {free:.0f} MiB are free; if memory is short, use "
            f"smaller batches ({error})."
        ) from error
    finally:
        astra.data3d.delete(handles)


def _projector(
    geometry: ParallelBeam, angles: Tensor, batch: int, device: torch.device
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Handle, volume geometry and projection geometry for a batch; made once per process, device and batch size."""
    import astra

    key = (os.getpid(), device, geometry, tuple(angles.tolist()), batch)
    if key not in _projectors:
        volume = astra.create_vol_geom(geometry.image_size, geometry.image_size, batch)
        spacing = geometry.bin_mm / geometry.pixel_mm
        beam = astra.create_proj_geom("parallel3d", spacing, 1.0, batch, geometry.n_bins, -angles.numpy())
        _projectors[key] = (astra.create_projector("cuda3d", beam, volume), volume, beam)
    return _projectors[key]
