"""What a generator costs: its numbers and its arithmetic, for tables that compare."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from allpet.batches import SinogramBatch
from allpet.prompts import Prompt


class Cost(NamedTuple):
    """Size and compute of one generator.

    Floating-point operations are those of convolutions, matrix products and attention, a multiplication and an addition
    being two; everything else is not counted.

    Attributes:
        trainable: parameters that its own training changes.
        total: all numbers it holds: parameters, buffers and what is frozen, such as stage 1 under stage 2.
        calls: of the trained network for one sample.
        flops_per_call: of the trained network.
        flops_per_sample: in all, decoding included.
    """

    trainable: int
    total: int
    calls: int
    flops_per_call: int
    flops_per_sample: int


class _Untracked:
    """Stands in for the counter's module tracker: its hooks stand in the way of a penalty on gradients (torch 2.13)."""

    parents = frozenset(["Global"])

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def sampling_cost(system: Any, prompt: Prompt | None = None) -> Cost:
    """Count while one sample is made, as the system samples by itself.

    Args:
        system: anything with ``sample(prompt, seeds)``: ``LatentDiffusion`` or a baseline.
        prompt: one prompt; None leaves it open.
    """
    held: dict[int, Tensor] = {}
    for module in (system, getattr(system, "autoencoder", None)):
        if isinstance(module, nn.Module):
            held |= {id(value): value for value in (*module.parameters(), *module.buffers())}
    network = getattr(system, "backbone", None)
    counter = FlopCounterMode(display=False)
    calls, inside, begun = 0, 0, 0

    def before(*arguments: Any) -> None:
        nonlocal begun
        begun = counter.get_total_flops()

    def after(*arguments: Any) -> None:
        nonlocal calls, inside
        calls, inside = calls + 1, inside + counter.get_total_flops() - begun

    hooks = []
    if network is not None:
        hooks = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        with counter, torch.no_grad():
            system.sample(prompt if prompt is not None else Prompt.of(["open:open"]), [0])
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(
        trainable=sum(value.numel() for value in held.values() if value.requires_grad),
        total=sum(value.numel() for value in held.values()),
        calls=calls,
        flops_per_call=inside // calls if calls else 0,
        flops_per_sample=counter.get_total_flops(),
    )


def training_flops(system: Any, batch: SinogramBatch) -> int:
    """Floating-point operations of one training step, forward and backward, per slice; weights stay as they are.

    Of a GAN's penalty, which is due at the first of every ``penalty_every`` steps, its share is counted.

    Args:
        system: with ``training_step``, on the batch's device; no trainer is needed.
        batch: as the data module gives it.
    """

    def counted() -> int:
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Untracked()  # type: ignore[assignment]
        with warnings.catch_warnings(), counter, torch.enable_grad():
            warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered.*")
            system.training_step(batch, 0).backward()
        system.zero_grad()
        return counter.get_total_flops()

    step = counted()
    if getattr(system, "penalty", 0):
        weight, system.penalty = system.penalty, 0.0
        without = counted()
        system.penalty = weight
        step = without + (step - without) // system.penalty_every
    return step // len(batch.sinogram)
