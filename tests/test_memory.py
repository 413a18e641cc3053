"""Memory: what is estimated, what is refused, and what saves it."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from allpet import Autoencoder, AutoencoderSystem, Denoiser, LatentDiffusion, ParallelBeam, Prompt
from allpet.augmentation import MaskedStack
from allpet.batches import SinogramBatch
from allpet.cli import main
from allpet.diffusion.linear_denoiser import LinearDenoiser
from allpet.memory import GB, OverBudget, Training, check_budget, estimate, largest_batch
from allpet.memory.counting import LiveBytes
from allpet.memory_report import main as report
from allpet.symmetry import roll_views, strip

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parent / "experiments"
GEOMETRY = ParallelBeam(16, 24, 10.0, 24, 10.0)


def stage1(optimizer="adamw", checkpointing=False, **changes) -> AutoencoderSystem:
    autoencoder = Autoencoder(channels=(8, 16), patch=2, seam=4, checkpointing=checkpointing)
    return AutoencoderSystem(autoencoder, optimizer=optimizer, **changes)


def stage2(optimizer="adamw") -> LatentDiffusion:
    denoiser = Denoiser(channels=(8, 16), layers_per_block=1, attention=(False, True), head_channels=8)
    return LatentDiffusion(Autoencoder(channels=(8, 16), patch=2), denoiser, optimizer=optimizer)


def training(make_system=stage1, batch_size=2, **changes) -> Training:
    return Training(make_system, GEOMETRY, batch_size, **{"device": "cpu", **changes})


def n_bytes(tensors) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


def batch_of(n: int = 3) -> SinogramBatch:
    generator = torch.Generator().manual_seed(0)
    sinogram, mask = torch.rand(2, n, 1, *GEOMETRY.sinogram_shape, generator=generator)
    stack = MaskedStack(torch.cat([mask * sinogram, sinogram, sinogram - mask * sinogram], 1), mask, torch.zeros(n, 1))
    prompt = Prompt(torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64))
    return SinogramBatch(sinogram, None, prompt, torch.arange(n), torch.arange(n), stack)


def test_bytes_are_counted_as_they_come_and_go():
    counter = LiveBytes()
    with counter:
        first = torch.zeros(1000)
        second = first * 2
        view = second[:10]
        del second
        assert counter.live == 8000, "a view keeps what it looks at"
        del view
        assert (counter.live, counter.peak) == (4000, 8000)
        first += 1
        assert (counter.live, counter.peak) == (4000, 8000)


class Planned:
    precision, estimated_stepping_batches, strategy, current_epoch, global_step = "32-true", 10, None, 0, 0


@pytest.mark.parametrize("make_system", [stage1, stage2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_optimiser_and_averages_are_those_of_a_real_step(make_system, optimizer):
    found = estimate(training(lambda: make_system(optimizer)))
    with torch.random.fork_rng():
        system = make_system(optimizer)
    system.log = system.log_dict = lambda *_, **__: None
    plan = Planned()
    system.trainer = plan
    real = system.configure_optimizers()["optimizer"]
    system.training_step(batch_of(), 0).backward()
    real.step()
    own = [*system.parameters(), *system.buffers()]
    frozen = [*system.autoencoder.parameters(), *system.autoencoder.buffers()] if make_system is stage2 else []
    assert found.parameters == n_bytes(own + frozen)
    states = [value for state in real.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert found.optimizer == n_bytes(states)
    system.trainer, system.log, system.log_dict = None, None, None
    average = AveragedModel(system, use_buffers=True).module
    assert found.ema == n_bytes([*average.parameters(), *average.buffers()]), "a frozen network is not copied"
    assert found.gradients <= n_bytes(p.grad for p in system.parameters() if p.grad is not None)
    assert found.activations > 0


def test_the_linear_denoiser_counts_as_it_is_fitted_and_the_estimates_it_makes():
    def make(rank: int) -> LatentDiffusion:
        denoiser = Denoiser(4, 4, (8, 16), 1, attention=(False, True), head_channels=8)
        return LatentDiffusion(Autoencoder(channels=(8, 16), patch=2), denoiser, linear_rank=rank)

    with torch.random.fork_rng():
        shape = make(0).autoencoder.latent_shape(*GEOMETRY.sinogram_shape)
    latents = torch.randn(60, *shape, generator=torch.Generator().manual_seed(0))
    prompt = Prompt(torch.ones(60, dtype=torch.int64), torch.ones(60, dtype=torch.int64))
    fitted = LinearDenoiser.fit(latents, prompt, None, rank=20)
    none, some, all_axes = (estimate(training(lambda rank=rank: make(rank))) for rank in (0, 20, 10**6))
    assert (none.linear, some.linear) == (0, n_bytes(fitted.buffers()))
    elements = math.prod(shape)
    assert all_axes.linear == 4 * (24 * elements + elements**2 + elements + 1), (
        "no more axes than a latent has elements"
    )
    held = [found.parameters + found.optimizer + found.ema for found in (none, some)]
    assert held[0] == held[1], "it is not trained, and not averaged"
    assert some.peak - none.peak >= some.linear


def test_the_peak_grows_by_the_same_for_every_slice():
    peaks = [estimate(training(batch_size=n)).peak for n in (4, 8, 12)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.02)
    assert peaks[1] - peaks[0] > 4 * n_bytes([batch_of(1).stack.stack])


def test_estimates_leave_nothing_behind():
    """Neither drawn random numbers nor cached tables without contents, such as a default's noise schedule."""
    before = torch.random.get_rng_state()
    estimate(training(stage2))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        assert type(stage2().diffusion.alpha_sigma[0]) is torch.Tensor


def test_norms_take_more_on_a_gpu_in_bfloat16_only():
    peaks = {
        (precision, device): estimate(training(batch_size=8, precision=precision, device=device)).peak
        for precision in ("32-true", "bf16-mixed")
        for device in ("cpu", "cuda")
    }
    assert peaks["32-true", "cpu"] == peaks["32-true", "cuda"]
    assert peaks["bf16-mixed", "cpu"] < 0.9 * peaks["bf16-mixed", "cuda"] < peaks["32-true", "cuda"]


def test_recomputing_takes_less_memory_and_strips_in_proportion():
    whole = estimate(training(batch_size=16)).activations
    assert estimate(training(lambda: stage1(checkpointing=True), 16)).activations < 0.75 * whole
    half = estimate(training(lambda: stage1(strip_views=8), 16)).activations
    # a seam of 4 views at both ends of 8 or 16
    assert half == pytest.approx(16 / 24 * whole, rel=0.15)


def test_a_budget_names_the_largest_batch_that_fits():
    planned = training(lambda: AutoencoderSystem(Autoencoder(channels=(8,), patch=2)), 8)
    budget = estimate(replace(planned, batch_size=5)).peak / GB * 1.001
    with pytest.raises(OverBudget, match=r"the largest batch that fits is 5 \(--data.batch_size=5\)"):
        check_budget(planned, budget)
    assert check_budget(replace(planned, batch_size=5), budget).peak <= budget * GB
    assert estimate(replace(planned, batch_size=6)).peak > budget * GB
    assert largest_batch(replace(planned, batch_size=4), budget * GB) == 5, "from below as from above"
    with pytest.raises(OverBudget, match="not even single slices fit"):
        check_budget(replace(planned, batch_size=1), 1e-4)
    with pytest.raises(ValueError, match="must be positive"):
        check_budget(planned, -1)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        estimate(training(precision="int8"))


def test_fit_refuses_what_does_not_fit_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["allpet"])
    words = ["fit", "-c", str(HERE / "tiny_vae.yaml"), "--run.root", str(tmp_path), "--run.memory_budget_gb=0.0001"]
    with pytest.raises(SystemExit, match=r"allpet: Batches of 4 at 16 views x 16 bins would take 0.0\d GB"):
        main(words)
    assert not list(tmp_path.iterdir())


def test_a_configuration_is_estimated_without_data_or_stage_1(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory"])
    files = [str(EXPERIMENTS / f"{name}.yaml") for name in ("defaults", "ldm", "scale/laptop")]
    report(["--config", *files, "--batch", "64", "128", "--output", str(tmp_path), "--trainer.precision=32-true"])
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["stage"], row["views"], row["bins"], row["batch"]) for row in rows] == [
        ("ldm", 64, 80, 64),
        ("ldm", 64, 80, 128),
    ]
    for row in rows:
        parts = [value for name, value in row.items() if name.endswith("_gb") and name != "peak_gb"]
        assert len(parts) == 7
        assert sum(parts) == pytest.approx(row["peak_gb"])
    assert rows[0]["peak_gb"] < rows[1]["peak_gb"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("vae",), ("ldm",), ("finetune/bridge", "finetune/separation")])
def test_what_is_shipped_for_a_gpu_fits_on_it(names, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory"])
    files = [str(EXPERIMENTS / f"{name}.yaml") for name in ("defaults", *names, "scale/gpu24")]
    report(["--config", *files, "--output", str(tmp_path)])
    peak = json.loads((tmp_path / "memory.json").read_text())["rows"][0]["peak_gb"]
    assert peak < 20, "of 24 GB the driver and the allocator's gaps take some"


@pytest.mark.parametrize("name", ["autoencoder", "denoiser"])
def test_how_a_network_computes_does_not_change_what(name):
    def build(**flags):
        torch.manual_seed(0)
        if name == "autoencoder":
            return Autoencoder(channels=(8, 16), patch=2, seam=4, **flags)
        network = Denoiser(channels=(8, 16), layers_per_block=1, attention=(False, True), head_channels=8, **flags)
        torch.nn.init.normal_(network.unet.conv_out.weight)
        return network

    def gradients(network):
        batch = batch_of()
        if name == "autoencoder":
            loss = network(batch.stack.stack)[0].stack.square().mean()
        else:
            latent = torch.rand(3, 4, 8, 6, generator=torch.Generator().manual_seed(1))
            loss = network(latent, torch.tensor([1.0, 500.0, 900.0]), batch.prompt).square().mean()
        loss.backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    with torch.random.fork_rng():
        network = build()
        plain = gradients(network)
        for flags, tolerance in (({"checkpointing": True}, 0.0), ({"channels_last": True}, 1e-5)):
            other = build(**flags)
            other.load_state_dict(network.state_dict())
            changed = gradients(other)
            largest = max(value.abs().max() for value in plain.values())
            for key, value in plain.items():
                assert (changed[key] - value).abs().max() <= tolerance * largest, f"{flags} {key}"
        compiled = build(compiled=True)
        assert compiled.state_dict().keys() == build().state_dict().keys()
        assert compiled.config == build().config
        copy.deepcopy(compiled)  # as weight averaging does


def test_a_strip_of_a_turned_image_is_the_strip_turned():
    sinogram = batch_of().sinogram
    turn = torch.tensor([0, 5, -19])
    for start in (-9, 0, 13, 30):
        expected = strip(sinogram, start - turn, 7)
        torch.testing.assert_close(strip(roll_views(sinogram, turn), start, 7), expected, rtol=0, atol=0)
    torch.testing.assert_close(strip(sinogram, 14, 4)[..., 2:, :], sinogram[..., :2, :].flip(-1), rtol=0, atol=0)


def test_a_strip_of_all_views_is_the_half_turn_of_a_turned_image(monkeypatch):
    """The network sees its seam either way: cut out of the sinogram, or continued past its ends.

    A half turn's ends are faded into one another in the end; a strip, most often a part, has none that meet.
    """
    monkeypatch.setattr("allpet.models.autoencoder.close_seam", lambda inside, before, after: inside)
    batch, seen = batch_of(), {}
    strips, whole = stage1(strip_views=16), stage1()
    whole.load_state_dict(strips.state_dict())
    for system in (strips, whole):
        system.log, system.log_dict = lambda *_, **__: None, lambda values: seen.update(values)
    cut, given, _ = strips._cut(batch, batch.as_stack(), 16)
    turned = batch._replace(stack=batch.stack._replace(stack=given[:, :, 4:-4], mask=cut.stack.mask))
    loss, losses = strips.training_step(batch, 0), dict(seen)
    torch.testing.assert_close(loss, whole.training_step(turned, 0))
    for name, value in losses.items():
        torch.testing.assert_close(value, seen[name], msg=name)
    assert not torch.equal(given[:, :, 4:-4], batch.as_stack()), "the strip starts anywhere"


def test_strips_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="strip_views is 6, but must be a multiple of 4"):
        stage1(strip_views=6)
    with pytest.raises(ValueError, match="A strip has 18 views, but must have a multiple of 4"):
        stage1().autoencoder.encode(torch.zeros(1, 3, 18, 24), strip=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_what_a_process_takes(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "benchmarks")
    from memory_check import BATCHES, measure

    for stage, batch_size in BATCHES.items():
        row = measure(stage, batch_size)
        assert 0.5 < row["estimated_gb"] < 2
        assert row["ratio"] == pytest.approx(1, abs=0.15), row
