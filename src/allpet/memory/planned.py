"""What a resolved configuration of ``allpet fit`` plans, as far as it decides the memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from allpet.geometry import ParallelBeam
from allpet.memory.estimate import Training
from allpet.runs import newest_pretrained
from allpet.systems.base import CosineSystem

_AVERAGING = ("WeightAveraging", "EMAWeightAveraging")


def geometry_of(config: Namespace) -> ParallelBeam | None:
    """Return the geometry that a configuration names for its sinograms; None if their files decide."""
    given = _plain(_arguments(config.data).get("geometry"))
    return ParallelBeam(**given) if isinstance(given, dict) else given


def training_of(
    config: Namespace,
    parser: ArgumentParser,
    device: Literal["cuda", "cpu"],
    geometry: ParallelBeam | None = None,
) -> Training:
    """Read what a configuration plans.

    An autoencoder that is named by the root of its runs, such as outputs/vae, is the one that ``scale.vae`` describes,
    whether trained yet or not; without such a scale, the newest in the root.

    Args:
        config: of ``allpet fit``.
        parser: of ``allpet fit``, which builds the model.
        device: what is trained on, where the configuration leaves it open (``accelerator: auto``).
        geometry: of the data, where the configuration names none.

    Raises:
        ValueError: if a number is missing.
        FileNotFoundError: if there is no such autoencoder.
    """
    geometry = geometry or geometry_of(config)
    if geometry is None:
        raise ValueError(
            "The configuration names no views and bins, which its files decide: add --data.geometry "
            '\'{"n_views": 512, "n_bins": 512, "bin_mm": 1.4, "image_size": 512, "pixel_mm": 1.4}\'.'
        )
    trainer, data = config.trainer, _arguments(config.data)
    model = config.model.clone()
    if isinstance(_arguments(model).get("autoencoder"), (str, Path)):
        network = _autoencoder(Path(model.init_args.autoencoder), _plain(config.get("scale")) or {})
        model.init_args.autoencoder = Namespace(class_path="allpet.Autoencoder", init_args=Namespace(**network))

    def make_system() -> CosineSystem:
        system: CosineSystem = parser.instantiate_classes(Namespace(model=model.clone())).model
        return system

    on: dict[str, Literal["cuda", "cpu"]] = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
    return Training(
        make_system=make_system,
        geometry=geometry,
        batch_size=data["batch_size"],
        precision=str(trainer.precision or "32-true"),
        device=on.get(str(trainer.accelerator), device),
        averaged=any(_averages_on_the_device(callback) for callback in trainer.callbacks or []),
        clipped=bool(trainer.gradient_clip_val),
        accumulated=trainer.accumulate_grad_batches > 1,
        n_targets=2 if data.get("task") == "separation" else 1,
        table_bytes=_table_bytes(data.get("augmentation"), geometry),
    )


def _autoencoder(path: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the autoencoder that is meant by a path."""
    for folder in (path, path / "pretrained"):
        if (folder / "config.json").is_file():
            return _stored(folder)
    if isinstance(scale.get("vae"), Mapping) and "channels" in scale["vae"]:
        known = ("channels", "layers_per_block", "patch", "seam")
        network = {name: value for name, value in scale["vae"].items() if name in known}
        return network | {name: scale[name] for name in ("latent_channels",) if name in scale}
    return _stored(newest_pretrained(path))


def _stored(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["autoencoder"]
    return config


def _averages_on_the_device(callback: Namespace) -> bool:
    named = callback.class_path.rpartition(".")[2] in _AVERAGING
    return named and _arguments(callback).get("device") in (None, "cuda", "gpu")


def _table_bytes(augmentation: Any, geometry: ParallelBeam) -> int:
    """Bytes of the projections of RMAS's cells: one sinogram for each, and one of zeros."""
    if not isinstance(augmentation, Namespace) or not augmentation.class_path.endswith("RadonMaskAugmentation"):
        return 0
    grid = _arguments(augmentation).get("grid", 8)
    cells = sum(one**2 for one in ([grid] if isinstance(grid, int) else grid))
    return 4 * (cells + 1) * geometry.n_views * geometry.n_bins


def _arguments(spec: Namespace) -> dict[str, Any]:
    given = spec.get("init_args")
    return dict(vars(given)) if isinstance(given, Namespace) else dict(given or {})


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return value.as_dict()
    return asdict(value) if hasattr(value, "__dataclass_fields__") and not isinstance(value, ParallelBeam) else value
