"""The budget: a training that would not fit is refused before it begins, with the batch that does."""

from __future__ import annotations

import math
from dataclasses import replace

from allpet.memory.estimate import GB, Estimate, Training, estimate

_LARGEST_BATCH = 4096


class OverBudget(ValueError):
    """A training would need more memory than it may take."""


def largest_batch(training: Training, budget_bytes: float) -> int:
    """Return the largest batch whose estimate lies within a budget, by bisection; 0 if not even one slice does."""

    def fits(batch_size: int) -> bool:
        return estimate(replace(training, batch_size=batch_size)).peak <= budget_bytes

    low, high = 0, max(training.batch_size, 1)
    while high <= _LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_budget(training: Training, budget_gb: float) -> Estimate:
    """Return the estimate of a training that may take ``budget_gb``.

    Raises:
        OverBudget: if it would take more; says which batch fits.
    """
    if not (math.isfinite(budget_gb) and budget_gb > 0):
        raise ValueError(f"memory_budget_gb is {budget_gb}, but must be positive: GB of 1e9 bytes on each device.")
    found = estimate(training)
    if found.peak <= budget_gb * GB:
        return found
    sentence = (
        f"Batches of {training.batch_size} at {training.geometry.n_views} views x {training.geometry.n_bins} bins "
        f"would take {found.peak / GB:.2f} GB of the {budget_gb:g} GB of memory_budget_gb: "
    )
    fitting = largest_batch(training, budget_gb * GB)
    if fitting:
        raise OverBudget(f"{sentence}the largest batch that fits is {fitting} (--data.batch_size={fitting}).")
    raise OverBudget(
        f"{sentence}not even single slices fit; use gradient checkpointing (checkpointing: true of the network) or "
        "smaller channels."
    )
