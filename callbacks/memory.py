"""How much memory a training took."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

GIB = 2**30


class PeakMemory(Callback):
    """Log and print the peak memory of a fit: of the GPU's allocator on CUDA, of the process otherwise.

    Logged once, at the end, as ``memory/peak_gib``; on CUDA also ``memory/reserved_gib``, what the allocator took from
    the device.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier peaks of the device."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        if pl_module.device.type == "cuda":
            values = {
                "memory/peak_gib": torch.cuda.max_memory_allocated(pl_module.device) / GIB,
                "memory/reserved_gib": torch.cuda.max_memory_reserved(pl_module.device) / GIB,
            }
        else:
            values = {"memory/peak_gib": peak_process_bytes() / GIB}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            where = torch.cuda.get_device_name(pl_module.device) if pl_module.device.type == "cuda" else "process"
            print(f"Peak memory ({where}): {values['memory/peak_gib']:.2f} GiB")


def forget_process_peak() -> None:
    """Let ``peak_process_bytes`` begin anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_process_bytes() -> int:
    """Largest resident size of this process so far, bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return peak if psutil.MACOS else peak * 1024
