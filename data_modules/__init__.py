"""What goes in: Lightning data modules that give batches of sinograms."""

from importlib import import_module
from typing import Any

# Imported on first use: `python -m data_modules.validate` must not find its own module imported already.
_HOME = {
    "PairedFiles": "paired_files",
    "PairedMix": "paired_mix",
    "PairedTask": "paired",
    "SimulatedPET": "simulated",
    "SinogramDataModule": "base",
    "SinogramFiles": "files",
    "SinogramsToRestore": "restoration",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'data_modules' has no attribute {name!r}; its names are {', '.join(__all__)}.")
    return getattr(import_module(f"data_modules.{_HOME[name]}"), name)
