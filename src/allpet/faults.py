"""What goes wrong in a training without being a fault of the program, each in one sentence.

A *fault* is a full disk, a file that vanished, a killed loader, a memory too small, a loss that is no number. Whatever
is not known here is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import re

import torch

from allpet.systems.base import Diverged

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "files may not grow on"}
_FORBIDDEN = {errno.EROFS: "the disk is read-only", errno.EACCES: "no permission", errno.EPERM: "no permission"}
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_OURS = ("allpet", "data_modules", "callbacks")
# the last line of what a loader process raised and torch wraps into an error with its traceback
_HANDED_ON = re.compile(rf"Original Traceback.*\n(?:{'|'.join(_OURS)})\.[\w.]+: ([^\n]+)\s*$", re.S)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)")


def in_a_sentence(error: BaseException, batch_size: int | None = None, accumulated: int = 1) -> str | None:
    """Say what happened and what to do about it; None for what is no known fault.

    Args:
        error: what stopped a training.
        batch_size: the data module's, if it has one.
        accumulated: batches per optimiser step.
    """
    if isinstance(error, Diverged):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _is(error, RuntimeError, _NO_MEMORY):
        return _out_of_memory(batch_size, accumulated)
    worker = _WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if worker:
        return (
            f"Loader process {worker[1].strip()} died, most often for want of memory: use fewer with "
            "--data.num_workers, or none (0)."
        )
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, ValueError) and _raised_by_us(error):  # which is always a sentence on what was given
        return str(error)
    handed_on = _HANDED_ON.search(str(error))
    return handed_on[1] if handed_on else None


def _out_of_memory(batch_size: int | None, accumulated: int) -> str:
    if batch_size is None:
        return "The memory does not suffice: use smaller batches."
    if batch_size == 1:
        return "The memory does not suffice for batches of one: use a smaller network or geometry."
    half = batch_size // 2
    return (
        f"The memory does not suffice for batches of {batch_size}: try --data.batch_size={half} "
        f"--trainer.accumulate_grad_batches={-(-batch_size * accumulated // half)}, which learns the same in about "
        "half of it."
    )


def _of_the_system(error: OSError) -> str:
    where = f"{error.filename} " if error.filename else "A file "
    if error.errno in _FULL:
        return f"{where}could not be written ({_FULL[error.errno]}): free space and give the same command again."
    if error.errno in _FORBIDDEN:
        return f"{where}could not be used ({_FORBIDDEN[error.errno]}): choose another folder, or see to its rights."
    if isinstance(error, FileNotFoundError):
        return f"{where}is no longer there: put it back and give the same command again."
    return (
        f"{where}could not be used ({' '.join(str(error).split())}): see to the disk and give the same command again."
    )


def _is(error: BaseException, kind: type[BaseException], pattern: re.Pattern[str]) -> bool:
    return isinstance(error, kind) and pattern.search(str(error)) is not None


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] in _OURS
