"""Sample writer: generated sinograms to disk, and pictures of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import allpet
from allpet import LatentDiffusion, ParallelBeam, Prompt, Radon, fbp
from allpet.systems.baselines.base import SinogramGenerator
from allpet.systems.sampling import Samples
from callbacks.figures import Tile, draw_grid, save_animation, save_figure, top

_ROWS = 64  # joined at a time


class SampleWriter(Callback):
    """Write what ``allpet predict`` generates.

    ``samples.h5`` holds ``sinogram`` (n, views, bins), ``image`` (n, rows, columns; FBP), ``seed`` (n,) and ``prompt``
    (n,), and says in its attributes that it is synthetic, in which units and geometry, and how it was sampled;
    ``gallery.png`` shows sinograms with their images, ``transition.gif`` how the first ones emerge from noise. All lie
    in the run's folder. Each of several processes writes a file of its own there, and the first joins them at the end,
    in the order of the seeds.

    Args:
        n_gallery: samples in the gallery.
        n_transition: samples in the animation; 0 draws none.
    """

    def __init__(self, n_gallery: int = 16, n_transition: int = 4) -> None:
        self.n_gallery, self.n_transition = n_gallery, n_transition
        self._file: h5py.File | None = None
        self._radon: Radon | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse systems that do not generate.

        Raises:
            TypeError: if the system is neither of stage 2 nor a baseline.
        """
        if stage == "predict" and not isinstance(pl_module, (LatentDiffusion, SinogramGenerator)):
            raise TypeError(f"Samples come from stage 2, not from {type(pl_module).__name__}: name a stage-2 folder.")
        if stage == "predict":  # what a killed run of the same folder has left
            self._part(trainer, trainer.global_rank).unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Samples,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch."""
        if self._radon is None:
            self._radon = Radon(outputs.geometry)
        images = fbp(self._radon, outputs.sinogram.float())
        names, seeds = outputs.prompt.names(), outputs.seed.tolist()
        if self._file is None:
            part = self._part(trainer, trainer.global_rank)
            part.parent.mkdir(parents=True, exist_ok=True)
            self._file = _create(part, pl_module, outputs.geometry)
        _append(self._file["sinogram"], outputs.sinogram[:, 0].float().cpu().numpy())
        _append(self._file["image"], images[:, 0].cpu().numpy())
        _append(self._file["seed"], np.asarray(seeds, dtype=np.int64))
        _append(self._file["prompt"], np.asarray(names, dtype=object))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the processes' files, draw the gallery and the animation, and say where they are."""
        if self._file is not None:
            self._file.close()
            self._file = None
        trainer.strategy.barrier()
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        parts = [part for part in parts if part.exists()]
        if not trainer.is_global_zero or not parts:
            return
        folder = Path(trainer.default_root_dir)
        path = folder / "samples.h5"
        if len(parts) > 1:
            _join(parts, folder / ".samples.h5.part", pl_module)
            parts = [folder / ".samples.h5.part"]
        os.replace(parts[0], path)
        with h5py.File(path, "r") as file:
            n = max(self.n_gallery, self.n_transition)
            names, seeds = file["prompt"].asstr()[:n].tolist(), file["seed"][:n].tolist()
            shown = [
                (torch.from_numpy(sinogram), torch.from_numpy(image), f"{name}\nseed {seed}")
                for sinogram, image, name, seed in zip(
                    file["sinogram"][: self.n_gallery], file["image"][: self.n_gallery], names, seeds, strict=False
                )
            ]
        counts = getattr(getattr(pl_module, "sampling", None), "counts", None)
        written = [path, save_figure(gallery(shown, counts), folder / "gallery.png")]
        asked = names[: self.n_transition], seeds[: self.n_transition]
        if asked[0] and isinstance(pl_module, LatentDiffusion):  # others have nothing in between to show
            written.append(transition(pl_module, *asked, folder / "transition.gif"))
        print("Wrote", ", ".join(map(str, written)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no half-written file."""
        if self._file is not None:
            name = Path(self._file.filename)
            self._file.close()
            self._file = None
            name.unlink(missing_ok=True)

    @staticmethod
    def _part(trainer: Trainer, rank: int) -> Path:
        return Path(trainer.default_root_dir) / f".samples-{rank}.h5.part"


def gallery(samples: Sequence[tuple[Tensor, Tensor, str]], counts: float | None = None, n_columns: int = 4) -> Any:
    """Draw sinograms, each with its image to the right.

    Args:
        samples: sinogram ``(views, bins)``, image ``(rows, columns)`` and title of each.
        counts: of the noise that was added; None for none.
        n_columns: samples per row.

    Returns:
        a matplotlib figure.
    """
    tiles = [
        [Tile(sinogram, (0, top(sinogram)), title), Tile(image, (0, top(image)), "FBP")]
        for sinogram, image, title in samples
    ]
    starts = range(0, len(tiles), n_columns)
    rows = [[tile for pair in tiles[start : start + n_columns] for tile in pair] for start in starts]
    noise = "without noise" if counts is None else f"noise of {counts:.3g} counts"
    title = f"synthetic sinograms and reconstructions,\n{noise}, each in its own range"
    return draw_grid(rows, [""] * len(rows), title)


def transition(system: LatentDiffusion, prompts: Sequence[str], seeds: Sequence[int], path: str | Path) -> Path:
    """Animate how samples emerge: the estimate of the final sinogram after every denoising step, above its image.

    Args:
        system: stage 2.
        prompts: ``tracer:region`` of each.
        seeds: of each.
        path: where to write the GIF.
    """
    assert system.geometry is not None
    radon = Radon(system.geometry)
    moments: list[tuple[Tensor, Tensor, str]] = []

    def remember(step: int, steps: int, sinogram: Tensor) -> None:
        moments.append((sinogram.cpu(), fbp(radon, sinogram.float()).cpu(), f"synthetic, step {step} of {steps}"))

    system.sample(Prompt.of(list(prompts)), list(seeds), progress=True, callback=remember)
    last_sinograms, last_images, _ = moments[-1]
    frames = [
        [
            [
                Tile(s[0], (0, top(last[0])), name)
                for s, last, name in zip(sinograms, last_sinograms, prompts, strict=True)
            ],
            [Tile(i[0], (0, top(last[0])), "FBP") for i, last in zip(images, last_images, strict=True)],
        ]
        for sinograms, images, _ in moments
    ]
    return save_animation(frames, [label for _, _, label in moments], path)


def _create(path: Path, system: LightningModule, geometry: ParallelBeam) -> h5py.File:
    """Begin a file of samples."""
    file = h5py.File(path, "w")
    for name, shape in (("sinogram", geometry.sinogram_shape), ("image", geometry.image_shape)):
        file.create_dataset(
            name, (0, *shape), "float32", maxshape=(None, *shape), chunks=(1, *shape), compression="gzip"
        )
    file.create_dataset("seed", (0,), "int64", maxshape=(None,))
    file.create_dataset("prompt", (0,), h5py.string_dtype(), maxshape=(None,))
    file["sinogram"].attrs.update(axes="slice, view, bin", units="activity x mm, in the units of the training data")
    file["image"].attrs.update(axes="slice, row, column", units="activity, by filtered backprojection (Hann)")
    file.attrs.update(
        provenance="synthetic",
        generator=f"allpet {allpet.__version__} {type(system).__name__}",
        geometry=json.dumps(geometry.to_dict()),
        sampling=repr(getattr(system, "sampling", None)),
    )
    return file


def _join(parts: Sequence[Path], path: Path, system: LightningModule) -> None:
    """Put the samples of several files into one, in the order of their seeds, and remove those files."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(h5py.File(part, "r")) for part in parts]
        geometry = ParallelBeam(**json.loads(files[0].attrs["geometry"]))
        whole = stack.enter_context(_create(path, system, geometry))
        places = sorted((seed, k, row) for k, file in enumerate(files) for row, seed in enumerate(file["seed"][:]))
        for start in range(0, len(places), _ROWS):
            chosen = places[start : start + _ROWS]
            for name in ("sinogram", "image", "seed"):
                _append(whole[name], np.stack([files[k][name][row] for _, k, row in chosen]))
            _append(whole["prompt"], np.asarray([files[k]["prompt"][row] for _, k, row in chosen], dtype=object))
    for part in parts:
        part.unlink()


def _append(dataset: h5py.Dataset, values: np.ndarray) -> None:
    start = len(dataset)
    dataset.resize(start + len(values), axis=0)
    dataset[start:] = values
