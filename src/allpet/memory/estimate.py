"""The estimate: a training of two steps, with tensors that have no contents."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import get_ema_avg_fn

from allpet.augmentation import MaskedStack
from allpet.batches import SinogramBatch, unmasked_stack
from allpet.diffusion.linear_denoiser import LinearDenoiser
from allpet.geometry import ParallelBeam
from allpet.memory.counting import LiveBytes, follow_cuda
from allpet.prompts import Prompt
from allpet.simulation.tasks import PairedBatch
from allpet.systems.autoencoder import AutoencoderSystem
from allpet.systems.base import CosineSystem
from allpet.systems.latent_diffusion import LatentDiffusion
from allpet.systems.latents import LatentSystem
from allpet.systems.paired import PairedSystem

GB = 1e9


@dataclass(frozen=True)
class Training:
    """What decides the memory of a training.

    Args:
        make_system: builds the system; called once per estimate, with tensors that have no contents.
        geometry: of the sinograms.
        batch_size: slices per step on each device.
        precision: Lightning's name.
        device: which device's rules hold.
        averaged: whether weights are averaged on the device.
        clipped: whether gradients are clipped by their norm.
        accumulated: whether gradients are summed over several batches.
        n_targets: targets of each pair (bridge).
        table_bytes: what the data module keeps on the device, such as the projections of a grid's cells.
    """

    make_system: Callable[[], CosineSystem]
    geometry: ParallelBeam
    batch_size: int
    precision: str = "32-true"
    device: Literal["cuda", "cpu"] = "cuda"
    averaged: bool = True
    clipped: bool = True
    accumulated: bool = False
    n_targets: int = 1
    table_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes in use when most are.

    Attributes:
        stage: "vae", "ldm", "bridge", or the name of another system.
        parameters: weights and buffers, those of a frozen autoencoder among them.
        gradients: those alive at the peak.
        optimizer: the optimiser's state.
        ema: averaged weights and buffers.
        tables: of the data module.
        linear: the linear denoiser that stage 2 may start from, with as many axes as it may keep.
        activations: all the rest.
    """

    stage: str
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    tables: int
    linear: int
    activations: int

    @property
    def peak(self) -> int:
        """All parts together."""
        held = self.parameters + self.gradients + self.optimizer + self.ema + self.tables + self.linear
        return held + self.activations


def estimate(training: Training) -> Estimate:
    """Estimate the peak of a training, in seconds.

    In a process of its own where the system can fork: what this one caches, such as noise schedules, must not come to
    hold tensors without contents. Elsewhere a process that has estimated should not train.
    """
    if not hasattr(os, "fork"):
        return _estimate(training)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_estimate, args=(training, sender), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of this process do not matter to one that computes nothing
        process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"The estimate of memory ended with exit code {process.exitcode}.") from None
    process.join()
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, Estimate)
    return found


def _send_estimate(training: Training, sender: Connection) -> None:
    torch.set_num_threads(1)  # the pool of the process that forked is not here
    try:
        sender.send(_estimate(training))
    except Exception as error:
        sender.send(error)


def _estimate(training: Training) -> Estimate:
    plan = _Plan(training)
    ids = torch.arange(training.batch_size)  # numbers, which key the draws
    counter = LiveBytes()
    with _without_contents(counter):
        with plan.precision_plugin.module_init_context():
            system = training.make_system()
        system.log = system.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        system.trainer = plan  # type: ignore[assignment]
        system.train()
        _without_data(system, training)
        frozen = system.autoencoder if isinstance(system, LatentSystem) else nn.Module()
        if training.device == "cuda":
            for network in (system, frozen):
                follow_cuda(network)
        # In the order of a fit: weights are copied for averaging, latents encoded ahead, then come the steps.
        average = [value.detach().clone() for value in _weights(system)] if training.averaged else []
        counter.forget_peak()
        _encode_ahead(system, training)
        linear = _without_fit(system, training)
        optimizer = system.configure_optimizers()["optimizer"]
        _count_gradients(system, counter)
        batch = _batch(system, training, ids)
        _step(system, optimizer, batch, training, counter, average)  # makes the optimiser's state
        _step(system, optimizer, batch, training, counter, average)
        _evaluate(system, batch)
        parts = {
            "parameters": _bytes(itertools.chain(_weights(system), _weights(frozen))),
            "gradients": counter.peak_gradients,
            "optimizer": _bytes(value for state in optimizer.state.values() for value in state.values()),
            "ema": _bytes(average),
            "tables": training.table_bytes,
            "linear": _bytes(linear),
        }
        peak = counter.peak + training.table_bytes
    return Estimate(_stage(system), **parts, activations=peak - sum(parts.values()))


class _Plan:
    """What a system asks of its trainer."""

    current_epoch = global_step = 0
    estimated_stepping_batches = 1000
    strategy = None

    def __init__(self, training: Training) -> None:
        self.precision = training.precision
        kinds: dict[str, Callable[[], Precision]] = {
            "32-true": Precision,
            "64-true": DoublePrecision,
            "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
            "16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),  # as many bytes
            "bf16-true": lambda: HalfPrecision("bf16-true"),
            "16-true": lambda: HalfPrecision("bf16-true"),
        }
        if training.precision not in kinds:
            raise ValueError(f"precision is {training.precision!r}; memory is estimated for {', '.join(kinds)}.")
        self.precision_plugin = kinds[training.precision]()


@contextmanager
def _without_contents(counter: LiveBytes) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        yield


def _step(
    system: CosineSystem,
    optimizer: torch.optim.Optimizer,
    batch: SinogramBatch | PairedBatch,
    training: Training,
    counter: LiveBytes,
    average: list[Tensor],
) -> None:
    with system.trainer.precision_plugin.forward_context():
        loss = system.training_step(batch, 0)
    assert isinstance(loss, Tensor)
    if not training.accumulated:  # as Lightning does: the gradients of the step before live through the forward pass
        optimizer.zero_grad()
        counter.gradients = 0
    loss.backward()
    if training.clipped:
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
    optimizer.step()
    update = get_ema_avg_fn()
    with torch.no_grad():
        for mean, value in zip(average, _weights(system) if average else (), strict=True):
            mean.copy_(update(mean, value, 1))


def _count_gradients(system: CosineSystem, counter: LiveBytes) -> None:
    def note(parameter: Tensor) -> None:
        if counter.gradients < trainable:  # summed over batches, they stay
            counter.gradients += parameter.nbytes

    parameters = [parameter for parameter in system.parameters() if parameter.requires_grad]
    trainable = sum(parameter.nbytes for parameter in parameters)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(note)


def _without_data(system: Any, training: Training) -> None:
    """Tell a system what it would take from its data, and let it cost what it costs without a projector."""
    system.geometry = training.geometry
    if isinstance(system, PairedSystem):
        system.starting = lambda given: given  # type: ignore[method-assign]
        if system.attention_use is not None:
            system.attend = lambda given, *_: given  # type: ignore[method-assign]


def _encode_ahead(system: CosineSystem, training: Training) -> None:
    """Encode what is encoded when training starts, in batches of its own size."""
    if isinstance(system, PairedSystem) or (
        isinstance(system, LatentDiffusion) and (system.latent_views or system.linear_rank)
    ):
        shape = (system.sampling.batch_size, 1, *training.geometry.sinogram_shape)
        with torch.no_grad(), system.trainer.precision_plugin.forward_context():
            system.autoencoder.encode_mean(unmasked_stack(torch.empty(shape)))


def _without_fit(system: CosineSystem, training: Training) -> list[Tensor]:
    """Give stage 2 the linear denoiser that it would fit, with as many axes as it may keep; return its tensors."""
    if not isinstance(system, LatentDiffusion) or not system.linear_rank:
        return []
    shape = system.autoencoder.latent_shape(*training.geometry.sinogram_shape)
    linear = LinearDenoiser(shape, min(system.linear_rank, math.prod(shape)))
    system._aside.linear = linear
    return list(linear.buffers())


def _evaluate(system: CosineSystem, batch: Any) -> None:
    """Decode a batch, the most that validation does at once."""
    system.eval()
    with torch.no_grad(), system.trainer.precision_plugin.forward_context():
        if isinstance(system, AutoencoderSystem):
            system.reconstruct(batch)
        elif isinstance(system, PairedSystem):
            n, _, *shape = batch.input.shape
            network = system.autoencoder
            network.decode(torch.empty(n, *network.latent_shape(*shape)), (shape[0], shape[1]))


def _batch(system: CosineSystem, training: Training, ids: Tensor) -> SinogramBatch | PairedBatch:
    n, k = training.batch_size, training.n_targets
    views, bins = training.geometry.sinogram_shape
    rows, columns = training.geometry.image_shape
    sinogram, whole = torch.empty(n, 1, views, bins), torch.zeros(n, dtype=torch.int64)
    prompt = Prompt(whole, whole)
    if not isinstance(system, PairedSystem):
        masked = MaskedStack(torch.empty(n, 3, views, bins), torch.empty_like(sinogram), whole)
        return SinogramBatch(sinogram, torch.empty_like(sinogram), prompt, ids, whole, masked)
    return PairedBatch(
        input=sinogram,
        expected=torch.empty(n, k, views, bins),
        noisy=torch.empty(n, k, views, bins),
        activity=torch.empty(n, k, rows, columns),
        labels=torch.empty(n, 1, rows, columns, dtype=torch.uint8),
        attenuation=torch.empty(n, 1, rows, columns),
        task=whole,
        prompt=prompt,
        target_tracer=whole[:, None].expand(n, k),
        delay_min=torch.empty(n),
        dose=torch.empty(n),
        share=torch.empty(n, k),
        sample_id=ids,
        patient_id=whole,
    )


def _weights(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _bytes(tensors: Iterable[Any]) -> int:
    """Sum what distinct storages hold."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def _stage(system: CosineSystem) -> str:
    for kind, name in ((AutoencoderSystem, "vae"), (LatentDiffusion, "ldm"), (PairedSystem, "bridge")):
        if isinstance(system, kind):
            return name
    return type(system).__name__
