"""Pairs of several tasks, the wrong way round and generated; restoration by stage 2 alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pairs import TinyPairs
from tiny_pet import GEOMETRY
from torch import Tensor

from allpet import Condition, Denoiser, Diffusion, LatentDiffusion, ParallelBeam, PixelSpace, Prompt, Radon
from allpet.conditions import LABEL_SIZE, reverse_pairs
from allpet.consistency import fit_measured
from allpet.prompts import TRACERS
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS
from allpet.systems.latent_bridge import LatentBridge
from allpet.systems.pair_synthesis import FIRST_ID, measure_noise, synthesise_pairs
from allpet.systems.paired import PairedSampling, Restored
from allpet.systems.prior_restoration import PriorRestoration, noise_variance
from allpet.systems.sampling import Sampling, add_counting_noise
from data_modules import PairedMix, PairedTask
from data_modules.paired_mix import MixedPairs
from data_modules.paired_set import PairedSet, ReversedPairs, read_pairs, write_pairs

SMALL = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8}
FINE = ParallelBeam(n_views=64, n_bins=64, bin_mm=8.0, image_size=64, pixel_mm=8.0)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pairs(task: str = "low_dose", n_slices: int = 16) -> PairedSet:
    data = TinyPairs(task, n_slices)
    data.setup()
    return data.train_set  # type: ignore[return-value]


def prior() -> LatentDiffusion:
    model = LatentDiffusion(PixelSpace(), Denoiser(1, 0, (8, 16), **SMALL))  # type: ignore[arg-type]
    model.geometry = GEOMETRY
    model.autoencoder.scaling.set_scale(1000.0)
    return model.eval()


# ------------------------------------------------------------------------------------------------ several tasks


def test_a_mix_holds_every_target_of_every_task_once_and_the_tasks_take_turns():
    single, double = pairs("low_dose"), pairs("separation")
    mix = MixedPairs([single, double])
    assert len(mix) == len(single) + 2 * len(double)
    batch = mix[list(range(6))]
    assert batch.expected.shape == (6, 1, *GEOMETRY.sinogram_shape)
    assert [TASKS[i] for i in batch.task] == ["low_dose", "separation", "separation"] * 2
    for row, (task, k) in enumerate([("low_dose", 0), ("separation", 0), ("separation", 1)]):
        part = {"low_dose": single, "separation": double}[task][[1]]
        assert torch.equal(batch.input[3 + row], part.input[0])
        assert torch.equal(batch.expected[3 + row, 0], part.expected[0, k])
        assert batch.target_tracer[3 + row, 0] == part.target_tracer[0, k]
    assert len(mix.sample_id.unique()) == len(mix)
    backwards = mix[[5, 0, 4]]
    for name in ("input", "expected", "task", "sample_id"):
        assert torch.equal(getattr(backwards, name), getattr(batch, name)[[5, 0, 4]])
    assert torch.equal(mix.subset([5, 0])[[1]].input, batch.input[:1])
    assert torch.equal(mix.sinogram[torch.arange(6)], batch.noisy[:, 0])


def test_the_mix_of_the_simulator_is_that_of_its_tasks():
    counts = {"num_scans": 3, "slices_per_patient": 2, "val_patients": 1, "test_patients": 1, "cache": None}
    geometry = ParallelBeam(16, 20, 21.6, 20, 21.6)
    mix = PairedMix(("low_dose", "separation"), geometry, **counts)
    mix.setup()
    alone = PairedTask("separation", geometry, **counts)
    alone.setup()
    assert len(mix.train_set) == 9
    chosen = mix.train_set[list(range(9))]
    theirs = alone.train_set[list(range(3))]
    mine = chosen.noisy[chosen.task == TASKS.index("separation")]
    assert torch.equal(mine[:, 0], theirs.noisy.flatten(0, 1))
    assert "low_dose+separation" in str(mix.summary())
    with pytest.raises(ValueError, match=r"tasks are \['low_dose', 'low_dose'\]; name one or more of"):
        PairedMix(("low_dose", "low_dose"))


def test_each_task_is_brought_to_its_targets_scale():
    faint, plain = pairs("attenuation"), pairs("low_dose")
    faint.arrays["input"] = 0.2 * faint.arrays["input"]
    system = LatentBridge(PixelSpace(), Denoiser(1, 1, (8, 16), **SMALL, label_size=LABEL_SIZE))

    class Data:
        train_set, scale = MixedPairs([faint, plain]), 1000.0

    class Trainer:
        datamodule = Data

        class precision_plugin:
            @staticmethod
            def forward_context():
                return torch.no_grad()

    system._trainer = Trainer  # type: ignore[assignment]
    system.on_fit_start()
    ratio = dict(zip(TASKS, system.input_ratio.tolist(), strict=True))
    assert ratio["attenuation"] == pytest.approx(0.2 * ratio["low_dose"], rel=1e-4)
    batch = Data.train_set[[0, 1]]
    _, source = system._latents(batch)
    torch.testing.assert_close(source[0], source[1])


# -------------------------------------------------------------------------------------------- the wrong way round


@pytest.mark.parametrize("task", ["low_dose", "separation"])
def test_reversed_pairs_give_what_was_wanted_and_want_what_was_given(task):
    whole = pairs(task)
    about = whole.target_tracer, whole.prompt, whole.sample_id, whole.patient_id
    turned = ReversedPairs(whole.arrays, task, *about)[[0, 1]]
    batch = whole[[0, 1]]
    assert torch.equal(turned.input, batch.noisy[:, :1])
    assert torch.equal(turned.noisy, batch.input if task == "low_dose" else batch.noisy[:, 1:])
    assert turned.expected.shape == turned.input.shape
    if task == "low_dose":
        again = reverse_pairs(turned)
        assert torch.equal(again.input, batch.input)
        assert torch.equal(again.noisy, batch.noisy)
        assert turned.labels is None
    else:
        asked = Condition.of_pairs(turned)
        assert [TRACERS[i] for i in asked.target_tracer] == ["PSMA", "PSMA"]
        assert [TRACERS[i] for i in asked.prompt.tracer] == ["FDG", "FDG"]


def test_generated_pairs_are_written_read_and_joined(tmp_path):
    whole = pairs()
    path = write_pairs(tmp_path / "pairs.safetensors", whole[[0, 1, 2]])
    back = read_pairs(path, "low_dose", GEOMETRY)
    joined = whole.joined(back)
    assert len(joined) == len(whole) + 3
    again, first = joined[[len(whole) + 1]], whole[[1]]
    for name in ("input", "expected", "noisy", "dose", "target_tracer", "sample_id"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    assert again.activity is None
    with pytest.raises(ValueError, match=r"its sinograms are \(16, 16\), the data \(64, 64\)"):
        read_pairs(path, "low_dose", FINE)
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="it holds no pairs"):
        read_pairs(tmp_path / "none.safetensors", "low_dose", GEOMETRY)


def test_generated_pairs_are_trained_on_besides_the_simulated_ones(tmp_path):
    geometry = ParallelBeam(16, 20, 21.6, 20, 21.6)
    counts = {"num_scans": 3, "slices_per_patient": 2, "val_patients": 1, "test_patients": 1, "cache": None}
    plain = PairedTask("low_dose", geometry, ["FDG:abdomen"], **counts)
    plain.setup()
    path = write_pairs(tmp_path / "pairs.safetensors", plain.train_set[[0, 1]])
    more = PairedTask("low_dose", geometry, ["FDG:abdomen"], generated=str(path), **counts)
    more.setup()
    assert len(more.train_set) == 5
    assert len(more.val_set) == len(plain.val_set)
    assert more.data_hash != plain.data_hash
    turned = PairedTask("low_dose", geometry, ["FDG:abdomen"], reverse=True, **counts)
    turned.setup()
    assert torch.equal(turned.train_set[[0]].input, plain.train_set[[0]].noisy)
    with pytest.raises(ValueError, match="leave out either reverse or generated"):
        PairedTask("low_dose", geometry, reverse=True, generated=str(path))


# ---------------------------------------------------------------------------------------------------- generation


def test_low_doses_are_generated_with_the_counts_of_real_ones():
    real = pairs()[list(range(8))]
    found = synthesise_pairs(prior(), real, range(6), sampling=Sampling("ddim", 2))
    assert found.input.shape == (6, 1, *GEOMETRY.sinogram_shape)
    assert (found.sample_id >= FIRST_ID).all()
    assert torch.equal(found.dose, real.dose[:6])
    level = measure_noise(real)
    expected = found.expected
    for noisy, wanted in ((found.noisy, level.target), (found.input, level.input / 0.1)):
        measured = (noisy - expected).square().sum((1, 2, 3)) / expected.sum((1, 2, 3))
        assert float(measured.mean()) == pytest.approx(wanted, rel=0.15)
    again = synthesise_pairs(prior(), real, [3], sampling=Sampling("ddim", 2))
    assert again.sample_id[0] == found.sample_id[3]


class Says(LatentBridge):
    """A helper that returns a multiple of what it is given."""

    factor = 1.0

    def restore(self, given: Tensor, condition: Condition, seeds: Any, sampling: Any = None, **more: Any) -> Restored:
        assert sampling.nfe == 1, "a regression knows one call"
        self.asked = condition
        return Restored.of(self.factor * given[None])


def helper(factor: float = 1.0) -> Says:
    says = Says(PixelSpace(), Denoiser(1, 1, (8, 16), **SMALL, label_size=LABEL_SIZE))
    says.factor = factor
    return says


def test_what_physics_do_not_say_a_helper_does():
    sampling = Sampling("ddim", 2)
    for task in ("separation", "attenuation", "conversion", "delayed"):
        with pytest.raises(ValueError, match=f"No physics make the pairs of {task}: give a helper, trained on pairs"):
            synthesise_pairs(prior(), pairs(task)[[0, 1]], [0])
    real = pairs("separation")[list(range(4))]
    found = synthesise_pairs(prior(), real, [0, 1], helper(0.5), sampling)
    assert found.expected.shape == found.noisy.shape == (2, 2, *GEOMETRY.sinogram_shape)
    torch.testing.assert_close(found.expected[:, 1], 0.5 * found.noisy[:, 0])
    torch.testing.assert_close(found.input.sum((1, 2, 3)), found.expected.sum((1, 2, 3)), rtol=0.1, atol=0)
    for task in ("attenuation", "conversion"):  # the target is drawn, the input is the helper's
        says, real = helper(0.5), pairs(task)[list(range(4))]
        found = synthesise_pairs(prior(), real, [0, 1], says, sampling)
        torch.testing.assert_close(found.input.sum((1, 2, 3)), 0.5 * found.noisy.sum((1, 2, 3)), rtol=0.1, atol=0)
        assert torch.equal(says.asked.target_tracer, real.prompt.tracer[:2]), "the wrong way round"


def test_delayed_scans_are_learned_from_inputs_at_the_usual_time():
    says, real = helper(0.25), pairs("delayed")[list(range(4))]
    found = synthesise_pairs(prior(), real, [0, 1], says, Sampling("ddim", 2))
    torch.testing.assert_close(found.expected, 0.25 * found.input.clamp_min(0))
    assert torch.equal(says.asked.delay_min, real.delay_min[:2])
    drawn = prior().sample(Prompt(*(part[:2] for part in real.prompt)), [0, 1], Sampling("ddim", 2))
    total = drawn.sinogram.clamp_min(0).sum((1, 2, 3))
    torch.testing.assert_close(found.input.sum((1, 2, 3)), total, rtol=0.1, atol=0)


@pytest.mark.parametrize("task", ["conversion", "delayed", "separation"])
def test_the_noise_of_corrected_inputs_does_not_depend_on_how_good_the_helper_is(task):
    real = pairs(task)[list(range(8))]
    assert measure_noise(real, helper(1.0)) == measure_noise(real, helper(0.1))


# ------------------------------------------------------------------------------------------- stage 2 without pairs


def test_noise_is_measured_by_what_no_image_could_have_caused():
    x, y = FINE.pixel_centers
    image = (torch.hypot(x - 20, y + 10) < 130).float() + 2 * (torch.hypot(x + 40, y) < 40).float()
    clean = Radon(FINE).project(image[None, None])
    counts = [2e4, 2e5]
    for total in counts:
        noisy = torch.cat([add_counting_noise(clean, total, [keyed_generator(i, "noise")]) for i in range(12)])
        truth = float(clean.sum()) / total
        assert float(noise_variance(noisy).mean()) == pytest.approx(truth, rel=0.15)
    assert float(noise_variance(clean)) < 0.05 * float(clean.sum()) / counts[1]
    # attenuation makes it uneven: most is in the middle
    variance = 0.5 * clean * (1 + 4 * torch.exp(-((FINE.bin_centers / 60) ** 2)))
    noise = [torch.randn(clean.shape, generator=keyed_generator(i, "uneven")) for i in range(24)]
    noisy = torch.cat([clean + variance.sqrt() * one for one in noise])
    truth = float(variance.sum() / clean.sum())
    assert float(noise_variance(noisy).mean()) == pytest.approx(truth, rel=0.15)
    with pytest.raises(ValueError, match="but there is only 1 view"):
        noise_variance(clean[:, :, :1])


class Gaussian(LatentDiffusion):
    """A stage 2 that knows its latents to be white with variance 1: the best denoiser is a factor."""

    def forward(self, noisy: Tensor, time: Tensor, prompt: Prompt, label: Tensor | None = None) -> Tensor:
        alpha, sigma = (values[:, None, None, None].to(noisy) for values in self.diffusion.coefficients(time))
        return self.diffusion.from_clean(noisy, alpha * noisy / (alpha**2 + sigma**2), time)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_one_call_is_the_best_linear_estimate_of_what_the_noise_has_left(prediction, monkeypatch):
    model = Gaussian(PixelSpace(), Denoiser(1, 0, (8, 16), **SMALL), Diffusion(prediction=prediction))  # type: ignore[arg-type]
    model.geometry = GEOMETRY
    clean = torch.randn(64, 1, 16, 16, generator=keyed_generator("clean")).abs()
    size = 0.7
    monkeypatch.setattr(PriorRestoration, "latent_noise", lambda self, given, latent, seeds: torch.full((64,), size))
    asked = Condition.of("low_dose", ["FDG:abdomen"] * 64, dose=0.1)
    method = PriorRestoration(model)
    result = method.restore(clean, asked, list(range(64))).mean
    torch.testing.assert_close(result, clean / (1 + size**2), rtol=2e-2, atol=1e-2)  # times are discrete
    flow = method.restore(clean, asked, list(range(64)), PairedSampling(nfe=50)).mean
    # the probability flow shrinks x / alpha from sqrt(1 + s^2) to 1
    torch.testing.assert_close(flow, clean / math.sqrt(1 + size**2), rtol=5e-2, atol=1e-2)
    with pytest.raises(ValueError, match="restores low doses, but is asked for two targets"):
        method.restore(clean, asked, list(range(64)), n_targets=2)
    with pytest.raises(ValueError, match="restores low doses, but is asked for delayed"):
        method.restore(clean[:1], Condition.of("delayed", ["FDG:abdomen"], delay_min=60.0), [0])


def test_more_noise_begins_later_and_samples_differ():
    method, batch = PriorRestoration(prior()), pairs()[[0, 1]]
    given = torch.cat([batch.expected, batch.input])
    latent = method._encode(given)
    size = method.latent_noise(given, latent, [0, 1, 0, 1])
    assert (size[2:] > 1.5 * size[:2]).all()
    asked = Condition.of("low_dose", ["FDG:abdomen"] * 2, dose=0.1)
    drawn = method.restore(batch.input, asked, [0, 1], PairedSampling(nfe=1, samples=3))
    assert drawn.samples.shape == (3, 2, 1, *GEOMETRY.sinogram_shape)
    assert (drawn.std > 0).any()


def test_what_the_prior_makes_of_a_scan_is_fitted_to_it():
    method, batch = PriorRestoration(prior()), pairs()[[0, 1]]
    asked = Condition.of("low_dose", ["FDG:abdomen"] * 2, dose=0.1)
    before, after = (
        method.restore(batch.input, asked, [0, 1], PairedSampling(nfe=1, data_consistency=n)).mean for n in (0, 3)
    )
    torch.testing.assert_close(after, fit_measured(before, batch.input, Radon(GEOMETRY), 3))
    roi = torch.zeros(1, 1, *GEOMETRY.image_shape, dtype=torch.bool)
    roi[..., 6:9, 6:9] = True
    looked = method.restore(batch.input, asked, [0, 1], PairedSampling(nfe=1, data_consistency=3), roi=roi).mean
    wanted = fit_measured(before, batch.input, Radon(GEOMETRY), 3, 1 + roi.float())
    torch.testing.assert_close(looked, wanted)
    assert (looked - after).norm() > 1e-3 * after.norm()
    with pytest.raises(ValueError, match="in the fit to the input"):
        method.restore(batch.input, asked, [0, 1], roi=roi)


def test_files_of_pairs_are_written_where_they_are_asked_for(tmp_path: Path):
    path = write_pairs(tmp_path / "new/folder/pairs.safetensors", pairs()[[0]])
    assert path.exists()
