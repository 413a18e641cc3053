"""Restoration writer: what a downstream task makes of a user's sinograms, to disk, with pictures."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import allpet
from allpet import Radon, fbp
from allpet.attention import Areas
from allpet.conditions import RestorationBatch
from allpet.io import Scan, write_scan
from allpet.metrics import standard_image
from allpet.prompts import TRACERS
from allpet.simulation.tasks import TASKS
from allpet.systems.paired import PairedSampling, PairedSystem, Restored
from allpet.systems.prior_restoration import PriorRestoration
from callbacks.attention_overlay import attention_overlay, tinted_areas, tinted_sinogram
from callbacks.figures import Tile, draw_grid, save_figure, top

NOTES = {
    "attenuation": "the attenuating body is not given but inferred",
    "delayed": "what happens until then is not measured but inferred",
    "separation": "two tracers in one static scan cannot be told apart by physics, only by what was learned",
    "conversion": "hypothetical: how the other tracer might look, never quantitative",
}
"""What has to be said wherever results of a task are shown, see ``allpet.simulation.tasks``."""
_FOUND = {"image": "attenuation,\nto {:.3g}/mm", "sinogram": "its factors,\nto {:.3g}"}


class RestorationWriter(Callback):
    """Write what ``allpet predict`` restores, one HDF5 file for each file that was read, under the same names.

    In the run's folder: ``sinograms/`` (mean over samples), ``images/`` (their reconstructions), and where more than
    one sample was drawn ``sinograms_std/`` and ``images_std/``; where an input without attenuation correction was
    fitted ``attenuation/``, what the fit found of it, 1/mm; ``gallery.png`` with input, result, deviation and that
    attenuation in both domains, ``attention.png`` where the model attends or a ROI was given: the ROI, or the areas of
    the input that the network was shown, and those of what it drew that the fit attended to. The files keep what their
    inputs say (table, geometry, units, provenance), say that a model has processed them and what has to be said of its
    task (``NOTES``), and can be read and exported as any other (``allpet-data export``). Of two targets, those of a
    slice follow one another. The column ``tracer`` is that of the result; where it is another than the input's, or one
    of two, ``input_tracer`` says what was given.

    Args:
        image: how images are reconstructed, those of the samples, too, whose deviation is written: "osem", as all are
            compared (``metrics.standard_image``), or "fbp", which is faster.
        n_gallery: slices in the pictures.
    """

    def __init__(self, image: Literal["osem", "fbp"] = "osem", n_gallery: int = 8) -> None:
        if image not in ("osem", "fbp"):
            raise ValueError(f"image is {image!r}, but must be 'osem' or 'fbp'.")
        if n_gallery < 1:
            raise ValueError(f"n_gallery is {n_gallery}, but must be at least 1.")
        self.image, self.n_gallery = image, n_gallery
        self._rows: dict[str, list[Tensor]] = {}
        self._name: str | None = None
        self._shown: list[tuple[str, dict[str, Tensor], Tensor | None]] = []
        self._fitted: list[Areas] = []
        self._count = 0
        self._done: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be written.

        Raises:
            TypeError: if the system restores nothing.
            RuntimeError: if several processes would share the files.
        """
        if stage != "predict":
            return
        if not isinstance(pl_module, (PairedSystem, PriorRestoration)):
            raise TypeError(f"{type(pl_module).__name__} restores nothing: name the folder of a downstream task.")
        if trainer.world_size > 1:
            raise RuntimeError("Restored files are written by one process: use --trainer.devices 1.")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Restored,
        batch: RestorationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch; write every file that is complete."""
        assert isinstance(pl_module, (PairedSystem, PriorRestoration))
        radon = Radon(pl_module.geometry)
        results = self._results(radon, outputs, batch)
        tracers = [TRACERS[i] for i in batch.condition.target_tracer.tolist()]
        for i, (name, _) in enumerate(batch.origin):
            if name != self._name:
                self._write(trainer, pl_module, batch)
                self._name, self._targets = name, []
            for part, values in results.items():
                self._rows.setdefault(part, []).append(values[i])
            self._targets += tracers[i * batch.n_targets : (i + 1) * batch.n_targets]
            if len(self._shown) < self.n_gallery:
                self._show(pl_module, radon, results, batch, i)
                if outputs.areas is not None:
                    self._fitted.append(Areas(*(kind[i].cpu() for kind in outputs.areas)))
        self._count += len(batch.origin)
        self._last = batch

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last file, draw the pictures, and say where they are."""
        if self._name is None:
            return
        assert isinstance(pl_module, (PairedSystem, PriorRestoration))
        self._write(trainer, pl_module, self._last)
        folder = Path(trainer.default_root_dir)
        gallery = restoration_gallery(self._shown, self._count, _task(self._last))
        save_figure(gallery, folder / "gallery.png")
        pictures = ["gallery.png"]
        rois = [roi for _, _, roi in self._shown if roi is not None]
        attention = pl_module.attention_to(rois[0] if rois else None)
        if attention is not None:
            sinograms = torch.stack([parts["input"] for _, parts, _ in self._shown])
            results = torch.stack([parts["sinograms"].sum(0, keepdim=True) for _, parts, _ in self._shown])
            areas = Areas(*(torch.stack(kind) for kind in zip(*self._fitted, strict=True))) if self._fitted else None
            drawn = attention_overlay(
                attention,
                sinograms,
                torch.stack(rois) if rois else None,
                pl_module.sampling.strength,
                [title for title, _, _ in self._shown],
                results,
                areas,
            )
            save_figure(drawn, folder / "attention.png")
            pictures.append("attention.png")
        print(f"Wrote {self._count} restored slice(s) of {len(self._done)} file(s), {', '.join(pictures)} to {folder}")

    def _results(self, radon: Radon, restored: Restored, batch: RestorationBatch) -> dict[str, Tensor]:
        """Return what is written, each ``(batch, targets, a, b)``, in the user's units."""
        mean, std, samples = (values.float() / batch.gain for values in restored[:3])
        parts = {"sinograms": mean, "images": self._reconstruct(radon, mean)}
        if len(samples) > 1:
            images = torch.stack([self._reconstruct(radon, sample) for sample in samples])
            parts |= {"sinograms_std": std, "images_std": images.std(0)}
        if restored.attenuation is not None:
            parts["attenuation"] = restored.attenuation
        return {name: values.cpu() for name, values in parts.items()}

    def _reconstruct(self, radon: Radon, sinogram: Tensor) -> Tensor:
        if self.image == "fbp":
            return _each(lambda x: fbp(radon, x), sinogram)
        return _each(lambda x: standard_image(radon, x), sinogram)

    def _show(
        self,
        system: PairedSystem | PriorRestoration,
        radon: Radon,
        results: dict[str, Tensor],
        batch: RestorationBatch,
        i: int,
    ) -> None:
        """Remember a slice for the pictures."""
        given = batch.input[i].float() / batch.gain
        name, number = batch.origin[i]
        parts = {part: values[i] for part, values in results.items()}
        parts |= {"input": given.cpu(), "input image": self._reconstruct(radon, given[None])[0].cpu()}
        if "attenuation" in parts:
            parts["attenuation factor"] = torch.exp(-radon.project(parts["attenuation"][None]))[0]
        roi = None if batch.roi is None else batch.roi[i].cpu()
        if (attention := system.attention_to(roi)) is not None:
            quick = attention.quick_image(given[None])[0, 0]
            areas = attention.areas(given[None], None if roi is None else roi[None])
            attended = attention.attend(areas, system.sampling.strength)[0, 0]
            parts["image attended"] = tinted_areas(quick.cpu(), areas, 0)
            parts["sinogram attended"] = tinted_sinogram(given[0].cpu(), attended.cpu())
        self._shown.append((f"{name}\nslice {number}", parts, roi))

    def _write(self, trainer: Trainer, system: PairedSystem | PriorRestoration, batch: RestorationBatch) -> None:
        """Write the file whose slices have all been restored."""
        if self._name is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source: Scan = data.source(self._name)
        k = len(self._targets) // len(source.values)
        task = _task(batch)
        table = {name: [entry for entry in column for _ in range(k)] for name, column in source.table.items()}
        if k > 1 or task == "conversion":
            if "tracer" in table:
                table["input_tracer"] = table["tracer"]
            table["tracer"] = self._targets
        place = self._place(self._name)
        ways = 1 if isinstance(system, PriorRestoration) else system.ways(system.sampling)
        for part, values in self._rows.items():
            what = "standard deviation" if part.endswith("_std") else "mean"
            provenance = {
                "input": self._name,
                "input_provenance": dict(source.provenance),
                "input_state": list(source.state),
                "processed_by_model": True,
                "synthetic": True,
                "model": type(system).__name__,
                "task": task,
                **({"note": NOTES[task]} if task in NOTES else {}),
                "gain": batch.gain,
                "sampling": repr(_used(system.sampling, batch)),
                "orientations": min(ways, system.sampling.samples),
                "content": f"{what} over {system.sampling.samples} sample(s)",
                "region_of_interest": batch.roi is not None,
                "software": f"allpet {allpet.__version__}",
            }
            scan = replace(
                source,
                values=torch.cat(values).numpy().astype(np.float32),
                kind="sinogram" if part.startswith("sinograms") else "image",
                geometry=system.geometry if part.startswith("sinograms") else None,
                pixel_mm=None if part.startswith("sinograms") or system.geometry is None else system.geometry.pixel_mm,
                units=_units(source, part),
                state=() if part == "attenuation" else _state(source, task),
                table=table,
                provenance=json.loads(json.dumps(provenance, default=str)),
                notes=(),
            )
            write_scan(Path(trainer.default_root_dir) / part / place, scan)
        self._rows, self._name = {}, None

    def _place(self, name: str) -> PurePosixPath:
        """Return where the results of a file lie: under its name, ending in .h5; whole where two would be one."""
        path = PurePosixPath(name)
        short = path.with_suffix(".h5")
        place = short if self._done.get(str(short), name) == name else path.with_name(f"{path.name}.h5")
        self._done[str(place)] = name
        return place


def restoration_gallery(
    shown: list[tuple[str, dict[str, Tensor], Tensor | None]], count: int, task: str = "low_dose"
) -> Any:
    """Draw slices: input, results and their deviations, above in the sinogram, below in the image.

    Args:
        shown: title, parts (``input``, ``sinograms`` ``(targets, views, bins)``, ``sinograms_std``, ``input image``,
            ``images``, ``images_std``, ``attenuation`` and ``attenuation factor`` where it was found, and of a model
            that attends ``sinogram attended`` and ``image attended`` with three colours last), region.
        count: how many slices were restored, of which these are the first.
        task: whose results they are; what has to be said of them stands above.

    Returns:
        a matplotlib figure.
    """
    rows: list[list[Tile]] = []
    labels: list[str] = []
    for title, parts, _ in shown:
        for domain, given, result in (("sinogram", "input", "sinograms"), ("image", "input image", "images")):
            high = top(parts[result])
            row = [Tile(parts[given][0], (0, top(parts[given])), f"input, to {top(parts[given]):.3g}")]
            row += [Tile(one, (0, high), f"result, to {high:.3g}") for one in parts[result]]
            deviations = parts.get(f"{result}_std")
            if deviations is not None:
                widest = top(deviations)
                row += [Tile(one, (0, widest), f"std, to {widest:.3g}") for one in deviations]
            if "attenuation" in parts:
                found = parts["attenuation" if domain == "image" else "attenuation factor"][0]
                row.append(Tile(found, (0, top(found)), _FOUND[domain].format(top(found))))
            if f"{domain} attended" in parts:
                row.append(Tile(parts[f"{domain} attended"], (0, 1), "attended to"))
            rows.append(row)
            labels.append(f"{title}\n{domain}")
    of = f"the first {len(shown)} of {count} slices; " if len(shown) < count else ""
    said = [f"{of}processed by a model: not for diagnosis"]
    if task in NOTES:
        said.append(f"{task}: {NOTES[task]}")
    width = 25 * len(rows[0])  # characters above a tile
    return draw_grid(rows, labels, "\n".join(textwrap.fill(line, width) for line in said), tile_inches=1.6)


def _used(sampling: PairedSampling, batch: RestorationBatch) -> PairedSampling:
    """Return what of a sampling came into play: where the input does not measure the targets, nothing is fitted."""
    if sampling.fitted(batch.condition.task[:1], batch.n_targets):
        task = _task(batch)
        width = sampling.width(task == "attenuation")
        return replace(sampling, data_consistency=sampling.updates(task), neighbourhood_mm=width)
    return replace(sampling, data_consistency=0, neighbourhood_mm=0.0)


def _task(batch: RestorationBatch) -> str:
    return TASKS[int(batch.condition.task[0])]


def _each(reconstruct: Any, sinograms: Tensor) -> Tensor:
    """Reconstruct ``(batch, targets, views, bins)``."""
    return reconstruct(sinograms.flatten(0, 1)[:, None])[:, 0].unflatten(0, sinograms.shape[:2])


def _units(source: Scan, part: str) -> str:
    """Return the unit of what is written."""
    if part == "attenuation":
        return "1/mm"
    return source.units if part.startswith("sinograms") else f"{source.units or 'input units'} / mm"


def _state(source: Scan, task: str) -> tuple[str, ...]:
    """Return the corrections of a result: those of its input, without what a model ends, and what it adds."""
    added = {"attenuation": ("scatter_corrected", "attenuation_corrected")}.get(task, ())
    kept = [name for name in source.state if name != "prompts"]  # no longer counts
    return tuple(dict.fromkeys([*kept, *added, "synthetic"]))
