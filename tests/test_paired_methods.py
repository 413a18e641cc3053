"""Downstream methods beside the bridge, and attention in all of them: one face, one budget, nothing hidden."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from tiny_pairs import TinyPairs
from tiny_pet import GEOMETRY
from torch import Tensor

from allpet import (
    AttentionUse,
    Autoencoder,
    Bridge,
    BridgeSampling,
    Condition,
    ConditionalDiffusion,
    ConditionalSampling,
    Denoiser,
    Diffusion,
    LatentBridge,
    ParallelBeam,
    PixelSpace,
    Radon,
    symmetry,
)
from allpet.attenuation import BONE, explain_uncorrected, fit_uncorrected
from allpet.batches import unmasked_stack
from allpet.conditions import LABEL_SIZE
from allpet.consistency import carry_over, fit_measured, quick_image, reproject
from allpet.metrics import moment_residuals, psnr
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS
from allpet.systems.focus import Focus
from allpet.systems.knowledge import Knowledge, Seen, level
from allpet.systems.paired import PairedSystem
from allpet.systems.simple_methods import GaussOracle, Identity, OsemOracle, ReprojectedIdentity

DDBM = {
    "bridge": Bridge("vp", first=1e-4, end_share=0.0),
    "form": "published",
    "measure_covariance": False,
    "sampling": BridgeSampling(sampler="heun", nfe=5),
}
REGRESSION = {"bridge": Bridge(end_share=1.0), "sampling": BridgeSampling(nfe=1)}
METHODS: dict[str, dict[str, Any]] = {
    "bridge": {},
    "attention": {"attention": AttentionUse(("gain", "loss", "channel"), (0.0, 2.0))},
    "ddbm": DDBM,
    "regression": {**REGRESSION, "loss": "l1"},
    "pixels": {**REGRESSION, "autoencoder": PixelSpace},
    "reprojected": {"reproject": 2, "attention": AttentionUse(("gain", "channel"))},
    "pixels reprojected": {**REGRESSION, "autoencoder": PixelSpace, "reproject": 2},
    "conditional": {"kind": ConditionalDiffusion, "sampling": ConditionalSampling(nfe=3)},
}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def data() -> TinyPairs:
    data = TinyPairs()
    data.setup()
    return data


def make(
    kind: type[PairedSystem] = LatentBridge, autoencoder: Any = lambda: Autoencoder((8, 16)), **given: Any
) -> PairedSystem:
    space = autoencoder()
    channels = space.latent_channels
    attention = given.get("attention")
    extra = int(attention is not None and "channel" in attention.uses) + channels * bool(given.get("reproject"))
    settings = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8, "label_size": LABEL_SIZE}
    denoiser = Denoiser(channels, channels + extra, (8, 16), **settings)
    return kind(space, denoiser, **{"learning_rate": 1e-3, "warmup_steps": 1, **given})


def fitted(folder: Path, data: TinyPairs, steps: int = 2, **given: Any) -> PairedSystem:
    system = make(**given)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 1, "enable_checkpointing": False}
    Trainer(default_root_dir=folder, accelerator="cpu", **quiet, **settings).fit(system, datamodule=data)
    return system.eval()


def awake(system: PairedSystem) -> PairedSystem:
    """Give the last layer weights, so that what the network is given matters."""
    torch.nn.init.normal_(system.denoiser.unet.conv_out.weight, std=0.3)
    return system


def asked(n: int) -> Condition:
    return Condition.of("low_dose", ["FDG:abdomen"] * n, dose=0.1)


def relative_errors(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Of each slice, relative to what is drawn of it, but to no less than a hundredth of what is wanted."""
    error, size, least = (x.square().sum((1, 2, 3)) for x in (drawn - wanted, drawn, wanted))
    return error / size.maximum(0.01 * least)


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_restores_and_is_exported(name, data, tmp_path):
    system = awake(fitted(tmp_path, data, **METHODS[name]))
    given = data.test_set[[0, 1]].input
    result = system.restore(given, asked(2), [3, 4])
    assert result.mean.shape == (2, 1, *GEOMETRY.sinogram_shape)
    assert (result.samples >= 0).all()
    assert result.mean.isfinite().all()
    alone = system.restore(given[1:], asked(1), [4])
    torch.testing.assert_close(alone.mean[0], result.mean[1], rtol=1e-3, atol=1e-3 * float(result.mean.max()))
    system.save_pretrained(tmp_path / "out")
    loaded = type(system).from_pretrained(tmp_path / "out", system.sampling)
    again = loaded.restore(given, asked(2), [3, 4])
    torch.testing.assert_close(again.mean, result.mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"The sinograms are 8 x 8; the model was trained on 16 x 16"):
        loaded.restore(torch.zeros(1, 1, 8, 8), asked(1), [0])


def test_ddbm_takes_no_covariance_and_makes_its_calls(data, tmp_path):
    system = fitted(tmp_path, data, 1, **DDBM)
    assert (system.moments[4] == 0).all()
    assert (system.moments[2:4] > 0).all()
    calls = []
    system.denoiser.register_forward_hook(lambda *_: calls.append(1))
    system.restore(data.test_set[[0]].input, asked(1), [0], BridgeSampling(sampler="heun", nfe=11))
    assert len(calls) == 11
    with pytest.raises(ValueError, match="grid is 'log', but must be 'cosine' or 'uniform'"):
        BridgeSampling(grid="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nfe is 118, but Heun's sampler makes 3 steps - 1 calls: 2, 5, ..., 119"):
        BridgeSampling(sampler="heun", nfe=118)


def test_regression_sees_nothing_but_the_end_of_the_bridge(data, tmp_path):
    """Its loss is that of one call at the end: no noise, no times."""
    system = awake(fitted(tmp_path, data, 1, **METHODS["pixels"]))
    batch = data.train_set[[0, 1, 2]]
    target, source = system._latents(batch)
    assert torch.equal(source, batch.input / system.input_scale(batch.task) / data.scale)
    end, condition = torch.ones(3, dtype=torch.float64), Condition.of_pairs(batch)
    wanted = system.preconditioning.residual(source, source, end, target)
    error = (system(source, source, end, condition).float() - wanted).square().mean()
    torch.testing.assert_close(system._loss(batch, ("any",)), error)
    predicted = system.restore(batch.input, condition, [0, 1, 2]).mean
    clean = system.preconditioning.clean(source, source, end, system(source, source, end, condition).float())
    torch.testing.assert_close(predicted, clean.clamp_min(0) * data.scale)


def test_untrained_regression_in_pixels_is_the_line_through_input_and_target(data, tmp_path):
    system = fitted(tmp_path, data, 1, learning_rate=0.0, **METHODS["pixels"])
    batch = data.train_set[list(range(12))]
    x, y = (values.double() / data.scale for values in (batch.noisy, batch.input / system.input_scale(batch.task)))
    slope = ((x - x.mean()) * (y - y.mean())).mean() / y.var(correction=0)
    slope = slope.clamp_max(0.995 * x.std(correction=0) / y.std(correction=0))
    line = (x.mean() + slope * (y - y.mean())).clamp_min(0) * data.scale
    got = system.restore(batch.input, Condition.of_pairs(batch), list(range(12))).mean
    torch.testing.assert_close(got.double(), line, rtol=1e-4, atol=1e-4 * data.scale)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_conditional_diffusion_finds_what_a_perfect_network_knows(sampler, data, tmp_path, monkeypatch):
    system = fitted(tmp_path, data, 1, kind=ConditionalDiffusion)
    target, source = system._latents(data.train_set[[0, 1]])
    mean, variance = system.moments[0].float(), system.moments[2].float()
    clean = (target - mean[:, None, None]) / variance.sqrt()[:, None, None]

    def velocity(noisy: Tensor, time: Tensor, *_: Any) -> Tensor:
        alpha, sigma = Diffusion()._at(time, noisy)
        return (alpha * noisy - clean) / sigma

    monkeypatch.setattr(system.denoiser, "forward", velocity)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    sampling = ConditionalSampling(sampler=sampler, nfe=4)
    torch.testing.assert_close(system.draw(source, Focus(source), asked(2), generators, sampling), target)
    errors = system.errors(target, source, Focus(source), asked(2), generators)
    assert errors.residual.abs().max() < 1e-4
    torch.testing.assert_close(errors.clean, target)


def test_the_grid_of_times_is_the_one_asked_for(data):
    """One call takes place at the end in any grid; of several, the times between differ."""
    system = awake(make().eval())
    given = data.train_set[[0, 1]].input
    for nfe in (1, 4):
        cosine, uniform = (
            system.restore(given, asked(2), [0, 1], BridgeSampling(nfe=nfe, grid=grid)).mean
            for grid in ("cosine", "uniform")
        )
        assert torch.equal(cosine, uniform) == (nfe == 1)


def test_l1_is_the_mean_distance(data, tmp_path):
    system = awake(fitted(tmp_path, data, 1, loss="l1"))
    batch, drawn = data.train_set[[0, 1]], []
    errors = system.errors
    system.errors = lambda *given: drawn.append(errors(*given)) or drawn[-1]
    torch.testing.assert_close(system._loss(batch, ("x",)), drawn[0].residual.abs().mean())
    system.loss = "l2"
    torch.testing.assert_close(system._loss(batch, ("x",)), drawn[0].residual.square().mean())


@pytest.mark.parametrize("name", ["bridge", "conditional"])
def test_the_error_of_the_sinogram_is_that_of_what_is_decoded(name, data, tmp_path):
    """A network that knows the target's latent is left with what stage 1 loses, and gradients reach it."""
    system = awake(fitted(tmp_path, data, 1, sinogram_weight=3.0, **METHODS[name]))
    batch = data.train_set[[0, 1, 2]]
    errors = system.errors
    wanted, _ = system._latents(batch)
    decoded = system._decode(wanted, GEOMETRY.sinogram_shape)
    lost = relative_errors(decoded, batch.noisy).mean()
    system.errors = lambda *given: errors(*given)._replace(clean=wanted)
    whole = system._loss(batch, ("x",))
    system.sinogram_weight = 0.0
    torch.testing.assert_close(whole - system._loss(batch, ("x",)), 3 * lost, rtol=1e-3, atol=1e-6)
    system.errors = errors
    source = system._latents(batch)[1]
    focus = system.focus(system._scaled(batch), source, None)
    gradients = []
    for at_once in (None, 2):
        system.decode_batch = at_once
        generators = [torch.Generator() for _ in range(3)]
        clean = system.errors(wanted, source, focus, Condition.of_pairs(batch), generators).clean
        weight = system.denoiser.unet.conv_out.weight
        gradients.append(torch.autograd.grad(system._sinogram_error(clean, batch, None), weight)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
    assert not any(parameter.requires_grad for parameter in system.autoencoder.parameters())


def test_the_error_of_the_sinogram_stands_still_at_the_mean(data):
    """Of targets of unlike strength that one input may have, none counts for more; nothing drawn divides by nothing."""
    system = make(autoencoder=PixelSpace)
    batch = data.train_set[[0, 0]]
    strengths = torch.tensor([0.2, 1.8])[:, None, None, None]
    batch = batch._replace(noisy=strengths * batch.expected)

    def gradient(times: float) -> Tensor:
        drawn = (times * batch.expected[:1]).requires_grad_()
        loss = system._sinogram_error(drawn.expand(2, -1, -1, -1), batch, None)
        return torch.autograd.grad(loss, drawn)[0]

    down, still, up, higher, nothing = map(gradient, (0.8, 1.0, 1.2, 1.4, 0.0))
    shown = batch.expected[:1] > 0
    assert still.abs().max() < 1e-6 * up.abs().max()
    assert (down[shown] < 0).all()
    assert (up[shown] > 0).all()
    torch.testing.assert_close(up, higher * (0.2 / 1.2**2) / (0.4 / 1.4**2))
    assert (nothing[shown] < 0).all()


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_error_of_the_sinogram_is_relative_to_each_slice_as_drawn(loss, data):
    system = make(autoencoder=PixelSpace, loss=loss)
    batch = data.train_set[[0, 1]]
    batch = batch._replace(noisy=batch.expected * torch.tensor([1.0, 30.0])[:, None, None, None])
    power = 2 if loss == "l2" else 1
    for times in (2.0, 0.5):
        found = system._sinogram_error(times * batch.noisy, batch, None)
        torch.testing.assert_close(found, torch.tensor(abs(times - 1) ** power / times**power))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"sinogram_weight": -1.0}, "sinogram_weight is -1.0"), ({"decode_batch": 0}, "decode_batch is 0, but must be")],
)
def test_impossible_losses_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**wrong)


def test_two_targets_are_judged_together():
    """An empty target, as of a tracer that shows nothing, divides by nothing."""
    data = TinyPairs("separation")
    data.setup()
    system = make().eval()
    batch = data.train_set[[0, 1]]
    batch = batch._replace(noisy=torch.cat([batch.noisy[:, :1], 0 * batch.noisy[:, :1]], dim=1))
    latents = system._latents(batch)[0]
    error = system._sinogram_error(latents, batch, None)
    decoded = system._decode(latents, GEOMETRY.sinogram_shape).view_as(batch.noisy)
    torch.testing.assert_close(error, relative_errors(decoded, batch.noisy).mean())
    empty = batch._replace(noisy=batch.noisy * torch.tensor([1.0, 0.0])[:, None, None, None])
    one = system._sinogram_error(latents, empty, None)
    alone = relative_errors(decoded[:1], batch.noisy[:1])[0]
    torch.testing.assert_close(one, alone, msg="a slice without any target does not count")
    assert system._sinogram_error(latents, batch._replace(noisy=0 * batch.noisy), None) == 0
    doubled = system._sinogram_error(latents, batch, torch.full((4, 1, 1, 1), 2.0).expand(-1, -1, 16, 16))
    torch.testing.assert_close(doubled, 2 * error)


# -------------------------------------------------------------------------------------------------- reprojection


def test_a_bridge_starts_where_an_image_could_have_caused_it(data, tmp_path):
    """What no image causes is gone from the source, but not hidden from the network."""
    system = awake(fitted(tmp_path, data, 1, reproject=2))
    given = data.test_set[[0, 1]].input
    source = system.starting(given)
    assert moment_residuals(source, GEOMETRY, 1).max() < 0.25 * moment_residuals(given, GEOMETRY, 1).min()
    total = given.clamp_min(0).sum((1, 2, 3))
    torch.testing.assert_close(source.sum((1, 2, 3)), total, rtol=0.1, atol=0)  # noise lies outside the image, too
    torch.testing.assert_close(system.starting(7 * given), 7 * source)
    seen = []
    denoise = system.draw
    system.draw = lambda *args: seen.append((args[0], args[1].further)) or denoise(*args)
    changed = given + 0.3 * given.mean() * torch.linspace(-1, 1, given.shape[-2])[:, None]  # totals of views differ
    for inputs in (given, changed):
        system.restore(inputs, asked(2), [1, 2], BridgeSampling(nfe=1))
    ratio = system.input_scale(asked(2).task)
    torch.testing.assert_close(seen[0][0], system._encode(source / ratio))
    far = [float((second - first).norm() / first.norm()) for first, second in zip(*seen, strict=True)]
    assert far[1] > 2 * far[0]


def test_what_the_network_is_given_besides_has_unit_size(data, tmp_path):
    system = fitted(tmp_path, data, 1, reproject=1)
    batch = data.train_set[list(range(12))]
    given = batch.input / system.input_scale(batch.task)
    further = system.focus(given, system._encode(given), None).further
    torch.testing.assert_close(further.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(further.var((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)


def test_what_was_trained_before_inputs_were_reprojected_is_still_read(data, tmp_path):
    system = awake(fitted(tmp_path / "fit", data, 1))
    system.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    del config["reproject"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "out/model.safetensors")
    del weights["given_moments"]
    save_file(weights, tmp_path / "out/model.safetensors")
    loaded = LatentBridge.from_pretrained(tmp_path / "out")
    given = data.test_set[[0]].input
    ours, theirs = (one.restore(given, asked(1), [0]).mean for one in (system, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    state = {name: value for name, value in system.state_dict().items() if name != "given_moments"}
    checkpoint = {"state_dict": state, "current_model_state": dict(state)}
    system.on_load_checkpoint(checkpoint)
    for weights in checkpoint.values():
        make().load_state_dict(weights)


def test_reprojecting_needs_a_geometry():
    system = make(reproject=2).eval()
    with pytest.raises(RuntimeError, match="nothing is reprojected: train on data first"):
        system.restore(torch.rand(1, 1, 16, 16), asked(1), [0])
    with pytest.raises(ValueError, match="reproject is -1, but must be a number of iterations, or 0"):
        make(reproject=-1)


# ---------------------------------------------------------------------------------------------- data consistency


@pytest.mark.parametrize("name", ["bridge", "pixels", "conditional"])
def test_results_are_fitted_to_what_their_input_measures_and_to_nothing_else(name, data, tmp_path):
    system = awake(fitted(tmp_path, data, **METHODS[name]))
    system.knowledge = None  # for it has not learned separation
    given = data.test_set[[0, 1]].input
    condition = asked(2)._replace(task=torch.tensor([TASKS.index("low_dose"), TASKS.index("separation")]))
    before = system.restore(given, condition, [3, 4], system.sampling).mean
    after = system.restore(given, condition, [3, 4], replace(system.sampling, data_consistency=2)).mean
    assert torch.equal(after[1], before[1]), "one of two tracers is not what was measured"
    wanted = fit_measured(before[:1], given[:1] / system.input_scale(condition.task)[:1], Radon(GEOMETRY), 2)
    torch.testing.assert_close(after[:1], wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
    assert (after[0] - before[0]).norm() > 0.01 * before[0].norm()


@pytest.mark.parametrize("iterations", [0, 1])
@pytest.mark.parametrize("name", ["bridge", "pixels", "conditional"])
def test_other_scans_are_corrected_as_what_the_model_makes_of_the_input_is(name, iterations, data, tmp_path):
    system = awake(fitted(tmp_path, data, **(METHODS[name] | {"reproject": iterations})))
    system.knowledge = None
    system.input_ratio.fill_(1.5)
    given, radon = data.train_set[[0, 1, 2]].input, Radon(GEOMETRY)
    tasks = [TASKS.index(task) for task in ("delayed", "low_dose", "conversion")]
    condition, later = asked(3)._replace(task=torch.tensor(tasks)), [0, 2]
    before = system.restore(given, condition, [3, 4, 5], system.sampling).mean
    sampling = replace(system.sampling, data_consistency=2)
    after = system.restore(given, condition, [3, 4, 5], sampling).mean
    measured = given / 1.5
    start = reproject(measured, radon, iterations) if iterations else measured
    itself = system.autoencoder.scaling(unmasked_stack(start))
    itself = system.autoencoder.decode(system.autoencoder.encode_mean(itself), GEOMETRY.sinogram_shape).full
    itself = system.autoencoder.scaling.inverse(itself)
    wanted = carry_over(before[later], itself[later], measured[later], radon, 2)
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(wanted.max())}
    torch.testing.assert_close(after[later], wanted, **tolerance)
    torch.testing.assert_close(after[1:2], fit_measured(before[1:2], measured[1:2], radon, 2), **tolerance)
    area = torch.zeros(1, 1, *GEOMETRY.image_shape, dtype=torch.bool)
    area[..., 6:10, 6:10] = True
    looked = system.restore(given, condition, [3, 4, 5], sampling, roi=area).mean
    wanted = carry_over(before[later], itself[later], measured[later], radon, 2, 1 + area.float())
    torch.testing.assert_close(looked[later], wanted, **tolerance)


def test_samples_of_delayed_scans_differ_by_what_the_first_scan_leaves_open(data):
    """Noise is what the first scan differs from what the model makes of it by, not from the delayed result."""
    number, sampling = torch.tensor([TASKS.index("delayed")]), BridgeSampling(samples=8, data_consistency=3)
    first = data.test_set[[0]].expected
    later, radon = 2 * first, Radon(GEOMETRY)
    draws = later.expand(8, -1, -1, -1, -1)
    clean = sampling.fit(draws, reproject(first, radon), number, GEOMETRY, [7], None, first).samples
    noise = 0.1 * first.max() * torch.randn(first.shape, generator=keyed_generator("first scan"))
    noisy = sampling.fit(draws, first + noise, number, GEOMETRY, [7], None, first).samples
    inside = first > 0.2 * first.max()
    spreads = [float((one.std(0) / one.mean(0))[inside].mean()) for one in (clean, noisy)]
    assert spreads[0] < 0.25 * spreads[1]
    with pytest.raises(ValueError, match="reference is None, but delayed needs what the model makes of inputs"):
        sampling.fit(draws, first, number, GEOMETRY, [7])


def test_without_attenuation_correction_results_are_fitted_to_the_input_as_it_is(data, tmp_path):
    """To what attenuation leaves of them, whose scale is not that of the targets."""
    system = awake(fitted(tmp_path, data))
    system.knowledge, radon = None, Radon(GEOMETRY)
    system.input_ratio.fill_(0.5)
    given = data.train_set[[0, 1, 2]].input
    tasks = [TASKS.index(name) for name in ("attenuation", "low_dose", "attenuation")]
    condition = asked(3)._replace(task=torch.tensor(tasks))
    before = system.restore(given, condition, [3, 4, 5], system.sampling)
    after = system.restore(given, condition, [3, 4, 5], replace(system.sampling, data_consistency=2))
    assert before.attenuation is None
    wanted, found = fit_uncorrected(before.mean[[0, 2]], given[[0, 2]], radon, 2)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(wanted.max())}
    torch.testing.assert_close(after.mean[[0, 2]], wanted, **tolerance)
    torch.testing.assert_close(after.attenuation[[0, 2]], found.attenuation)
    torch.testing.assert_close(after.mean[1:2], fit_measured(before.mean[1:2], given[1:2] / 0.5, radon, 2), **tolerance)
    assert (after.attenuation[1] == 0).all(), "it is corrected"
    roi = torch.zeros(1, 1, *GEOMETRY.image_shape, dtype=torch.bool)
    roi[..., 6:10, 6:10] = True
    looked = system.restore(given, condition, [3, 4, 5], replace(system.sampling, data_consistency=2), roi=roi)
    wanted, _ = fit_uncorrected(before.mean[[0, 2]], given[[0, 2]], radon, 2, 1 + roi.float())
    torch.testing.assert_close(looked.mean[[0, 2]], wanted, **tolerance)


def test_attenuation_that_no_body_has_is_doubted(data):
    """As found where input and results are in different units; kept in float32 whatever the samples are in."""
    radon, number = Radon(GEOMETRY), torch.tensor([TASKS.index("attenuation")])
    truth = data.test_set[[0]].expected
    body = quick_image(truth, radon) > 0.1 * truth.max() / 100
    passed = torch.exp(-0.0096 * radon.project(body.float()))
    sampling = BridgeSampling(data_consistency=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampling.fit(truth[None], passed * truth, number, GEOMETRY, [7])
    with pytest.warns(UserWarning, match=r"attenuation that was found in the body is 0\.\d\d of water's in the mean"):
        found = sampling.fit(truth[None].bfloat16(), 20 * passed * truth, number, GEOMETRY, [7])
    assert found.samples.dtype == torch.bfloat16
    assert found.attenuation.dtype == torch.float32
    assert found.attenuation.max() <= BONE


@pytest.mark.parametrize("task", ["low_dose", "attenuation"])
@pytest.mark.filterwarnings("ignore:The attenuation that was found")  # noise of 1 is no patient
def test_samples_that_are_fitted_differ_by_what_the_counts_leave_open(task, data):
    """As results of so many measurements would; fitted to the same values they would be all but alike."""
    radon, number, n = Radon(GEOMETRY), torch.tensor([TASKS.index(task)]), 64
    truth, passed = data.test_set[[0]].expected, torch.ones(())
    if task == "attenuation":
        passed = torch.exp(-0.004 * radon.project((quick_image(truth, radon) > 0.1).float()))
    noise = 0.1 * truth.max() * passed * torch.randn(n, *truth.shape, generator=keyed_generator("measured"))
    sampling = BridgeSampling(samples=n, data_consistency=3, neighbourhood_mm=24.0)
    measured = passed * truth + noise
    once = sampling.fit(truth.expand(n, -1, -1, -1, -1), measured[0], number, GEOMETRY, [7]).samples
    how: tuple[Any, ...] = (radon, 3, None, 24.0)
    if task == "attenuation":
        start = explain_uncorrected(truth, measured[0], radon)  # the scan is the same, but for its noise
        truly = torch.stack([fit_uncorrected(truth, one, *how, start)[0] for one in measured])
    else:
        truly = torch.stack([fit_measured(truth, one, *how) for one in measured])
    inside = truth > 0.2 * truth.max()
    spreads = [results.std(0)[inside].mean() for results in (once, truly)]
    assert spreads[0] == pytest.approx(float(spreads[1]), rel=0.2)
    alone = sampling.fit(truth[None], measured[0], number, GEOMETRY, [7]).samples[0]
    assert (once.mean(0) - alone)[inside].abs().mean() < 0.3 * spreads[0], "about the same mean"


def test_several_samples_are_fitted_each_to_noise_of_its_own(data, tmp_path):
    sampling = BridgeSampling(samples=2, data_consistency=3, nfe=1)
    system = awake(fitted(tmp_path, data))
    given = data.test_set[[0, 1]].input
    several = system.restore(given, asked(2), [3, 4], sampling)
    assert (several.std.amax((1, 2, 3)) > 0).all()
    again = system.restore(given[1:], asked(1), [4], replace(sampling, samples=2, nfe=1))
    torch.testing.assert_close(again.samples[:, 0], several.samples[:, 1], rtol=1e-3, atol=1e-3 * float(given.max()))


def test_samples_that_would_all_be_the_same_are_refused(data, tmp_path):
    system, given = awake(fitted(tmp_path, data)), data.test_set[[0]].input
    with pytest.raises(ValueError, match=r"samples is 3, but one call \(nfe=1\) gives the same each time: use"):
        system.restore(given, asked(1), [0], BridgeSampling(nfe=1, samples=3))
    for differing in (BridgeSampling(nfe=2, samples=3), BridgeSampling(nfe=1, samples=3, data_consistency=1)):
        assert (system.restore(given, asked(1), [0], differing).std.amax((1, 2, 3)) > 0).all()
    noise_first = awake(fitted(tmp_path, data, **METHODS["conditional"]))
    assert (noise_first.restore(given, asked(1), [0], ConditionalSampling(nfe=1, samples=2)).std > 0).any()


# ------------------------------------------------------------------------------------------------------ knowledge


def test_what_was_never_learned_is_refused_also_by_what_is_exported(data, tmp_path):
    system, given = fitted(tmp_path / "fit", data), data.test_set[[0]].input
    mixes = TinyPairs("separation")
    mixes.setup()
    separating = fitted(tmp_path / "separating", mixes)
    for number, one in enumerate((system, separating)):
        one.save_pretrained(tmp_path / str(number))
    for one in (system, LatentBridge.from_pretrained(tmp_path / "0")):
        one.restore(given, asked(1), [0])
        with pytest.raises(ValueError, match="was trained for low_dose, but is asked for delayed: use a model") as no:
            one.restore(given, Condition.of("delayed", ["FDG:abdomen"], delay_min=60.0), [0])
        assert "\n" not in str(no.value)
    for one in (separating, LatentBridge.from_pretrained(tmp_path / "1")):
        for tracers in (["FDG", "PSMA"], ["FDG", "DOPA"]):
            condition = Condition.of("separation", ["FDG:abdomen"] * 2, tracers)
            if "PSMA" in tracers:
                one.restore(given, condition, [0], n_targets=2)
            else:
                with pytest.raises(ValueError, match="to give FDG, PSMA in separation, but is asked for DOPA: ask"):
                    one.restore(given, condition, [0], n_targets=2)
    # exports of before it was noted do as they are told
    config = json.loads((tmp_path / "0/config.json").read_text())
    del config["trained"]
    (tmp_path / "0/config.json").write_text(json.dumps(config))
    old = LatentBridge.from_pretrained(tmp_path / "0")
    assert old.restore(given, Condition.of("attenuation", ["FDG:abdomen"]), [0]).mean.isfinite().all()


def test_of_many_pairs_some_from_all_over_are_measured(data, tmp_path, monkeypatch):
    """Those of one patient stand together, generated ones come last, and in a mix tasks take turns."""
    whole = fitted(tmp_path / "all", data)
    monkeypatch.setattr("allpet.systems.paired._MEASURED", 6)
    asked_for, real = [], type(data.train_set).__getitem__
    monkeypatch.setattr(
        type(data.train_set), "__getitem__", lambda self, index: asked_for.append(index) or real(self, index)
    )
    some = fitted(tmp_path / "some", data)
    measured = next(index for index in asked_for if len(index) == 6)
    assert measured == sorted(set(measured)) != list(range(6))
    assert max(measured) >= len(data.train_set) // 2
    assert not torch.equal(some.moments, whole.moments)
    torch.testing.assert_close(some.moments[:1], whole.moments[:1], rtol=0.5, atol=0.5)


def test_what_a_run_is_scored_on_may_be_more_than_it_has_learned(data, tmp_path):
    system, other = fitted(tmp_path, data), TinyPairs("separation")
    other.setup()
    assert system._restore_pairs(other.val_set[[0]], BridgeSampling(nfe=1)).mean.shape[1] == 2


def test_a_level_tells_gain_from_noise_and_from_one_hot_organ():
    geometry = ParallelBeam(16, 64, 5.0, 64, 5.0)
    x, y = geometry.pixel_centers
    body = (torch.hypot(x, y) < 110).float()
    hot = body + 60 * (torch.hypot(x - 3, y + 3) < 12)
    given, bladder = Radon(geometry).project(torch.stack([body, hot])[:, None])[:, 0]
    noisy = given + 0.5 * given.max() * torch.randn(20, 16, 64, generator=keyed_generator("noise"))
    plain = level(given[None])
    torch.testing.assert_close(level(7 * given[None]), 7 * plain)
    torch.testing.assert_close(level(noisy).mean(), plain[0], rtol=0.1, atol=0)
    assert level(bladder[None]) < 1.1 * plain
    assert bladder.mean() > 1.5 * given.mean(), "which the mean would not stand"


def test_levels_are_those_of_the_prompts_that_enough_slices_answer(data):
    batch = data.train_set[list(range(12))]
    names = ["FDG:brain"] * 5 + ["FDG:abdomen"] * 5 + ["PSMA:pelvis"] * 2
    gains = torch.tensor([4.0] * 5 + [1.0] * 5 + [2.0] * 2)[:, None, None, None]
    same = batch.input[:1].expand(12, -1, -1, -1)
    seen = [Seen.of(batch._replace(input=gains * same, prompt=Prompt.of(names)))]
    known = Knowledge.of(seen).tasks["low_dose"]
    one = float(level(same[0]))
    wanted = {"FDG:brain": 4, "FDG:abdomen": 1, "open:trunk": 1, "FDG:open": 2.5, "PSMA:pelvis": 2, "DOPA:brain": 2}
    for prompt, factor in wanted.items():
        assert known.level_of(prompt) == pytest.approx(factor * one, rel=1e-3), prompt
    assert "PSMA:pelvis" not in known.levels, "two slices are not enough: it has the level of all"


def test_one_of_two_tracers_is_not_fitted_to_the_sum_of_both():
    """As multi-task training and the reverse direction have them."""
    one, sum_of_both = torch.rand(1, 3, 1, 16, 16), 2 + torch.rand(3, 1, 16, 16)
    sampling, task = BridgeSampling(data_consistency=2, batch_size=2), torch.full((3,), TASKS.index("separation"))
    assert torch.equal(sampling.fit(one, sum_of_both, task, GEOMETRY, range(3)).samples, one)
    both = one.expand(-1, -1, 2, -1, -1)
    in_parts = sampling.fit(both, sum_of_both, task, GEOMETRY, range(3)).samples
    assert (in_parts.sum(2).sum() - sum_of_both.sum()).abs() < 0.5 * (both.sum(2).sum() - sum_of_both.sum()).abs()
    at_once = replace(sampling, batch_size=3).fit(both, sum_of_both, task, GEOMETRY, range(3)).samples
    torch.testing.assert_close(in_parts, at_once)


def test_two_tracers_are_fitted_to_the_mix_as_given(tmp_path):
    data = TinyPairs("separation")
    data.setup()
    system = awake(fitted(tmp_path, data, reproject=1))
    given = data.test_set[[0, 1]].input
    condition = Condition.of("separation", ["FDG:abdomen"] * 4, target_tracers=["FDG", "PSMA"] * 2)
    totals = [
        system.restore(given, condition, [0, 1], BridgeSampling(nfe=1, data_consistency=n), 2).mean.sum(1, keepdim=True)
        for n in (0, 8)
    ]
    inside = data.test_set[[0, 1]].expected.sum(1, keepdim=True) > 0.2 * given.max()
    before, after = ((total - given)[inside].norm() for total in totals)
    assert after < 0.8 * before


def test_each_task_gets_as_many_updates_as_suit_it(data):
    """Where none are asked for, also within one batch."""
    tasks = torch.tensor([TASKS.index(name) for name in ("low_dose", "attenuation", "delayed", "conversion")])
    measured = data.train_set[[0, 1, 2, 3]].input
    drawn, reference = 1.2 * measured[None, :, None, 0], 0.9 * measured

    def results(updates):
        sampling = BridgeSampling(data_consistency=updates)
        return sampling.fit(drawn, measured, tasks, GEOMETRY, range(4), None, reference).samples[0]

    suiting = results(None)
    for row, number in enumerate((16, 32, 16, 0)):
        assert torch.equal(suiting[row], results(number)[row]), TASKS[tasks[row]]
    assert not torch.equal(results(16)[1], results(32)[1])
    assert not torch.equal(results(16)[3], results(0)[3])


def test_fitting_needs_a_geometry():
    system = make().eval()
    with pytest.raises(RuntimeError, match="no data are fitted: train on data first"):
        system.restore(torch.rand(1, 1, 16, 16), asked(1), [0], BridgeSampling(data_consistency=1))
    with pytest.raises(ValueError, match="data_consistency is -1, but must be a number of updates, 0 for none"):
        BridgeSampling(data_consistency=-1)
    with pytest.raises(ValueError, match="neighbourhood_mm is inf, but must be finite and not negative"):
        BridgeSampling(neighbourhood_mm=float("inf"))


# ----------------------------------------------------------------------------------------------------- attention


def attending(*uses: Any, **given: Any) -> PairedSystem:
    system = awake(make(attention=AttentionUse(uses, **given))).eval()
    system.geometry = GEOMETRY
    return system


def roi(row: int, column: int) -> Tensor:
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., row : row + 3, column : column + 3] = True
    return mask


@pytest.mark.parametrize("uses", [("gain",), ("channel",), ("gain", "channel", "loss")])
def test_a_roi_changes_the_result_through_the_attention_alone(uses, data):
    system, given = attending(*uses), data.test_set[[0, 1]].input

    def restored(**asking: Any) -> Tensor:
        return system.restore(given, asked(2), [1, 2], BridgeSampling(nfe=2), **asking).mean

    here, there = restored(roi=roi(5, 6)), restored(roi=roi(9, 8))
    assert not torch.allclose(here, there, rtol=1e-3)
    # What the model is given of a ROI is its attention: where that is taken away, so is every difference.
    nowhere = restored(roi=roi(5, 6), attention_strength=0.0)
    assert torch.equal(nowhere, restored(roi=roi(9, 8), attention_strength=0.0))
    assert torch.equal(nowhere, restored(roi=torch.zeros(1, 1, 16, 16, dtype=torch.bool)))
    assert torch.equal(nowhere, restored(attention_strength=0.0))
    assert torch.equal(restored(roi=roi(5, 6), attention_strength=1.0), here)


def test_the_target_is_never_looked_at(data):
    system, batch = attending("gain", "loss", "channel"), data.train_set[[0, 1, 2]]
    seen = []
    focus = system.focus
    system.focus = lambda *given: seen.append(focus(*given)) or seen[-1]
    for change in (1.0, 0.0, 7.0):
        system._loss(batch._replace(noisy=change * batch.noisy, expected=change * batch.expected), ("x",))
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


def test_gain_emphasises_the_condition_and_not_the_source(data):
    system, given = attending("gain"), data.test_set[[0, 1]].input
    source = system._encode(given)
    attended = system.attention(given, roi(5, 6), 2.0)
    focus = system.focus(given, source, attended)
    torch.testing.assert_close(focus.source, system._encode(given * attended))
    assert focus.further is None
    assert focus.weight is None
    assert system.focus(given, source, system.attend(given, None, 0.0)).source.equal(source)


def test_channel_and_weight_lie_on_the_grid_of_the_latent(data):
    system, given = attending("channel", "loss"), data.test_set[[0, 1]].input
    source = system._encode(given)
    focus = system.focus(given, source, system.attend(given, roi(3, 11), 1.5))
    assert focus.source is source
    assert focus.further.shape == focus.weight.shape == (2, 1, *source.shape[2:])
    extra = system.attention(given, roi(3, 11), 1.5) - 1
    torch.testing.assert_close(focus.further.mean((2, 3)), extra.mean((2, 3)))
    torch.testing.assert_close(focus.weight.mean((1, 2, 3)), torch.ones(2))
    half = system.focus(given, source, system.attend(given, roi(3, 11), 0.75)).further
    torch.testing.assert_close(2 * half, focus.further)


def test_a_seam_goes_on_as_sinograms_do():
    autoencoder = Autoencoder((8, 16), seam=4)
    sinogram = torch.rand(1, 1, 16, 16)
    pooled = autoencoder.pool(sinogram)
    assert pooled.shape[1:] == (1, *autoencoder.latent_shape(16, 16)[1:])
    inner = torch.nn.functional.avg_pool2d(sinogram, autoencoder.factor)
    rows = 4 // autoencoder.factor
    torch.testing.assert_close(pooled[:, :, rows:-rows], inner)
    torch.testing.assert_close(pooled[:, :, :rows], inner[:, :, -rows:].flip(-1))


def test_attention_weights_the_loss(data):
    system, batch = attending("loss"), data.train_set[[0, 1]]
    plain = awake(make()).eval()
    plain.geometry = GEOMETRY
    plain.load_state_dict(system.state_dict())
    plain._aside = system._aside
    drawn = []
    errors = system.errors
    system.errors = lambda *given: drawn.append((errors(*given), given[2].weight)) or drawn[-1][0]
    weighted = system._loss(batch, ("x",))
    error, weight = drawn[0]
    assert weight.std() > 0.01
    torch.testing.assert_close(weighted, (weight * error.residual.square()).mean())
    torch.testing.assert_close(plain._loss(batch, ("x",)), error.residual.square().mean())


def test_training_draws_strengths_and_evaluation_the_same_ones(data):
    system = attending("channel", strengths=(0.5, 1.5))
    drawn = system._strengths((0, 1), list(range(200)))
    assert 0.5 <= drawn.min() < 0.6
    assert 1.4 < drawn.max() <= 1.5
    assert torch.equal(drawn[3:5], system._strengths((0, 1), [3, 4]))
    assert not torch.equal(drawn, system._strengths((0, 2), list(range(200))))


def test_a_model_that_cannot_heed_a_roi_says_so(data):
    given = data.test_set[[0]].input
    one_of_two = asked(1)._replace(task=torch.tensor([TASKS.index("separation")]))  # which nothing is fitted to
    fitted = BridgeSampling(data_consistency=2)
    for system in (make().eval(), attending("loss")):
        for condition, sampling in ((asked(1), None), (one_of_two, fitted)):
            with pytest.raises(ValueError, match="cannot heed a region of interest"):
                system.restore(given, condition, [0], sampling, roi=roi(5, 5))


def test_a_strength_is_refused_where_nothing_attends(data):
    given, fitted = data.test_set[[0]].input, BridgeSampling(nfe=1, data_consistency=2)
    for system, sampling in ((make().eval(), fitted), (attending("loss"), BridgeSampling(nfe=1))):
        system.geometry = GEOMETRY
        with pytest.raises(ValueError, match="attention_strength is 2, but nothing attends: give a region of interest"):
            system.restore(given, asked(1), [0], replace(sampling, attention_strength=2.0))
        with pytest.raises(ValueError, match="attention_strength is 0, but nothing attends"):
            system.restore(given, asked(1), [0], sampling, attention_strength=0.0)
        system.restore(given, asked(1), [0], replace(sampling, attention_strength=1.0))  # as files of before say
    system = attending("loss")  # attends where it fits
    assert system.restore(given, asked(1), [0], replace(fitted, attention_strength=2.0)).areas is not None


def test_the_fit_of_any_model_heeds_a_roi_and_that_of_one_that_attends_its_areas(data):
    given, sampling = data.test_set[[0, 1]].input, BridgeSampling(nfe=1, data_consistency=3)
    radon = Radon(GEOMETRY)
    for system in (awake(make()).eval(), attending("loss")):
        system.geometry = GEOMETRY
        start = system.restore(given, asked(2), [3, 4], BridgeSampling(nfe=1)).mean
        for region, strength in ((None, None), (None, 1.0), (roi(5, 6), 1.0), (roi(5, 6), 2.0), (roi(9, 8), 0.0)):
            restored = system.restore(given, asked(2), [3, 4], sampling, roi=region, attention_strength=strength)
            result, attention = restored.mean, torch.ones(2, 1, 16, 16)
            if region is not None:
                attention = attention + strength * region
                assert torch.equal(restored.areas.roi, region.expand(2, -1, -1, -1))
            elif system.attention is None:
                assert restored.areas is None
            else:
                hot, cold, _, _ = system.attention.areas(start)  # of what was drawn, not of the input or the result
                assert torch.equal(restored.areas.hot, hot)
                assert torch.equal(restored.areas.cold, cold)
                attention = attention + hot.float() + cold.float()
                assert attention.max() == 2
            wanted = fit_measured(start, given, radon, 3, attention)
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
        with pytest.raises(ValueError, match="attention_strength is -1, but must be finite and not negative"):
            system.restore(given, asked(2), [3, 4], sampling, roi=roi(5, 6), attention_strength=-1)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"uses": ("look",)}, "choose one or more of gain, loss, channel"),
        ({"uses": ()}, "choose one or more"),
        ({"strengths": (1.0, 0.5)}, r"must be \(smallest, largest\)"),
    ],
)
def test_impossible_uses_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionUse(**wrong)
    with pytest.raises(ValueError, match="attention_strength is -1"):
        BridgeSampling(attention_strength=-1.0)


def test_a_denoiser_without_room_for_attention_is_refused():
    denoiser = Denoiser(4, 4, (8, 16), attention=(False, False), label_size=LABEL_SIZE)
    for more, sentence in (
        ({"attention": AttentionUse()}, "with attention as a channel needs 4, 5 and"),
        ({"attention": AttentionUse(), "reproject": 2}, "with reproject and attention as a channel needs 4, 9 and"),
        ({"reproject": 2}, "over this autoencoder with reproject needs 4, 8 and"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LatentBridge(Autoencoder((8, 16)), denoiser, **more)


def test_a_share_of_noise_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        ConditionalSampling(eta=1.5)


# ------------------------------------------------------------------------------------------------ without training


def test_identity_gives_each_target_its_total():
    data = TinyPairs("separation")
    data.setup()
    batch = data.train_set[list(range(12))]
    identity = Identity().fit(batch.input, batch.expected)
    result = identity.restore(batch.input, n_targets=2)
    torch.testing.assert_close(result.mean.sum((0, 2, 3)), batch.expected.sum((0, 2, 3)), rtol=1e-4, atol=0)
    assert not result.std.any()
    with pytest.raises(ValueError, match="must hold activity"):
        identity.fit(0 * batch.input, batch.expected)


def test_the_input_reprojected_is_where_trained_methods_begin(data, tmp_path):
    system, given = fitted(tmp_path, data, reproject=2), data.train_set[[0, 1, 2]].input
    system.input_ratio.fill_(1)
    method = ReprojectedIdentity(Radon(GEOMETRY)).fit(given, 3 * given)
    torch.testing.assert_close(method.restore(given).mean, 3 * system.starting(given))


def test_identity_knows_the_tracers_where_it_is_told(data):
    """Of a tracer that is ten times as strong it gives ten times as much, and to strangers what all have together."""
    given = data.train_set[[0, 1, 2, 3]].input
    truth = given * torch.tensor([1.0, 10.0, 1.0, 10.0])[:, None, None, None]
    condition = Condition.of("conversion", ["FDG:abdomen"] * 4, ["PSMA", "DOPA"] * 2)
    identity = Identity().fit(given, truth, condition)
    torch.testing.assert_close(identity.restore(given, condition).mean, truth)
    stranger = Condition.of("conversion", ["DOPA:brain"] * 4, ["PSMA"] * 4)
    torch.testing.assert_close(identity.restore(given, stranger).mean, given * truth.sum() / given.sum())
    torch.testing.assert_close(identity.restore(given).mean, given * truth.sum() / given.sum())
    identity.fit(given, 2 * given)
    torch.testing.assert_close(identity.restore(given, condition).mean, 2 * given, msg="nothing is left of before")


def test_the_oracle_is_the_best_of_its_widths_and_beats_the_input(data):
    batch = data.train_set[list(range(12))]
    noisy = torch.cat([batch.input[:9], batch.expected[9:]])
    oracle = GaussOracle(GEOMETRY, (0.0, 1.0, 2.0, 5.0)).fit(noisy, batch.expected)
    assert (0.0, 0.0) not in oracle.chosen[:9]
    assert oracle.chosen[9:] == [(0.0, 0.0)] * 3, "slices have widths of their own"

    def score(method: Identity) -> Tensor:
        return psnr(method.restore(noisy).mean, batch.expected)

    best = score(oracle)
    assert best[:9].mean() > score(Identity().fit(noisy, batch.expected))[:9].mean() + 1
    for way in oracle.ways:
        other = GaussOracle(GEOMETRY, (0.0,)).fit(noisy, batch.expected)
        other.chosen = [way] * 12
        assert (score(other) <= best + 1e-4).all()
    with pytest.raises(ValueError, match="There are 3 slices, but the oracle was told the truth of 12"):
        oracle.restore(noisy[:3])


def test_the_reconstruction_oracle_is_the_best_of_its_choices(data):
    batch = data.train_set[list(range(12))]
    radon = Radon(GEOMETRY)
    oracle = OsemOracle(radon, (1, 3), (0.0, 40.0, 80.0)).fit(batch.input, batch.expected)

    def score(method: Identity) -> Tensor:
        return psnr(method.restore(batch.input).mean, batch.expected)

    best = score(oracle)
    for iterations, width in oracle.ways:
        other = OsemOracle(radon, (int(iterations),), (width,)).fit(batch.input, batch.expected)
        assert other.chosen == [(iterations, width)] * 12
        assert (score(other) <= best + 1e-4).all()
    assert best.mean() > score(Identity().fit(batch.input, batch.expected)).mean() + 1
    result = oracle.restore(batch.input).mean
    assert moment_residuals(result, GEOMETRY, 1).max() < 0.01


def test_the_oracle_blurs_over_the_seam(data):
    """A turned image gives the turned result, wherever the first view lies."""
    given = data.train_set[[0, 1]].input
    oracle = GaussOracle(GEOMETRY)
    oracle.chosen = [(2.0, 3.0)] * 2
    turned = oracle.restore(symmetry.roll_views(given, 5)).mean
    torch.testing.assert_close(turned, symmetry.roll_views(oracle.restore(given).mean, 5), rtol=1e-4, atol=1e-2)


def test_a_regression_that_is_loaded_takes_one_call_whatever_the_sampling_says(data, tmp_path):
    """As files for all models say five."""
    system = awake(fitted(tmp_path / "fit", data, **METHODS["regression"]))
    system.save_pretrained(tmp_path / "out")
    given = data.test_set[[0, 1]].input
    loaded = LatentBridge.from_pretrained(tmp_path / "out", BridgeSampling(nfe=5, data_consistency=2))
    assert loaded.sampling == BridgeSampling(nfe=1, data_consistency=2)
    wanted = system.restore(given, asked(2), [0, 1], BridgeSampling(nfe=1, data_consistency=2)).mean
    torch.testing.assert_close(loaded.restore(given, asked(2), [0, 1]).mean, wanted)
    with pytest.raises(ValueError, match="nfe is 5, but this model is a regression, trained for one call"):
        loaded.restore(given, asked(2), [0, 1], BridgeSampling(nfe=5))
