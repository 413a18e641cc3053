"""Samples drawn in several orientations: exact, evenly spread, as far as the training went, and laid back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_paired_methods import METHODS, asked, awake, fitted, make
from tiny_pairs import TinyPairs
from tiny_pet import GEOMETRY

from allpet import AttentionUse, BridgeSampling, Condition, ConditionalSampling, LatentBridge, SymmetryAugmentation
from allpet.augmentation import SymmetryParameters
from allpet.orientations import Orientation, Orientations
from data_modules import PairedTask

VIEWS = GEOMETRY.n_views


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def turned_data(task: str = "low_dose", **symmetry) -> TinyPairs:
    data = TinyPairs(task)
    data.setup()
    data.symmetry = SymmetryAugmentation(GEOMETRY, **symmetry)
    return data


@pytest.mark.parametrize("orientation", [Orientation(), Orientation(3), Orientation(-5, True), Orientation(0, True)])
def test_laying_is_what_augmentation_does_and_is_undone_bit_by_bit(orientation):
    sinogram = torch.rand(2, 2, *GEOMETRY.sinogram_shape)
    one = torch.ones(2)
    drawn = SymmetryParameters(
        gain=one,
        dilation=one,
        mirrored=torch.tensor([orientation.mirrored] * 2),
        angle_rad=one * orientation.views * math.pi / VIEWS,
        translation_mm=torch.zeros(2, 2),
        blur_mm=0 * one,
    )
    laid = orientation.lay(sinogram)
    torch.testing.assert_close(laid, SymmetryAugmentation(GEOMETRY).apply(sinogram, drawn))
    assert torch.equal(orientation.lay_back(laid), sinogram)
    assert torch.equal(laid, sinogram) == (orientation == Orientation())


def test_the_first_lies_as_it_is_and_all_that_were_seen_come_before_any_comes_again():
    for seen, angles in ((Orientations(180.0, True), 128), (Orientations(10.0, True), 7), (Orientations(180.0), 128)):
        assert seen.of(0, 64) == Orientation()
        assert seen.count(64) == angles * (2 if seen.mirrored else 1)
        first = [seen.of(number, 64) for number in range(seen.count(64))]
        assert len({(one.views % 128, one.mirrored) for one in first}) == len(first)
        assert seen.of(len(first), 64) == first[0]
    narrow = {Orientations(10.0).of(number, 64) for number in range(7)}
    assert narrow == {Orientation(views) for views in range(-3, 4)}, "64 views are 2.8 degrees apart"


@pytest.mark.parametrize("n_views", [16, 64, 100, 180])
def test_few_of_many_angles_are_spread_evenly_mirrored_or_not(n_views):
    few = [Orientations(180.0, True).of(number, n_views) for number in range(16)]
    assert sum(one.mirrored for one in few) == 8
    for mirrored in (False, True):
        places = sorted(one.views / (2 * n_views) % 1 for one in few if one.mirrored == mirrored)
        gaps = [(after - before) % 1 for before, after in zip(places, places[1:] + places[:1], strict=True)]
        assert max(gaps) <= 2.2 / 8, "an eighth if all were equal"


@pytest.mark.parametrize(
    ("augmentation", "seen", "count"),
    [
        (None, Orientations(), 1),
        (torch.nn.Identity(), Orientations(), 1),
        (SymmetryAugmentation(GEOMETRY), Orientations(180.0, True), 64),
        (SymmetryAugmentation(GEOMETRY, probability=0.5), Orientations(180.0, True), 64),
        (SymmetryAugmentation(GEOMETRY, probability=0.0), Orientations(), 1),
        (SymmetryAugmentation(GEOMETRY, rotation="any", reflection=False), Orientations(180.0), 32),
        (SymmetryAugmentation(GEOMETRY, rotation=False), Orientations(0.0, True), 2),
        (SymmetryAugmentation(GEOMETRY, reflection=False, largest_rotation_deg=5.0), Orientations(5.0), 1),
        (SymmetryAugmentation(GEOMETRY, rotation=False, reflection=False), Orientations(), 1),
    ],
)
def test_what_was_seen_is_what_the_augmentation_draws(augmentation, seen, count):
    assert Orientations.seen(augmentation) == seen
    assert seen.count(VIEWS) == count, "16 views are 11 degrees apart"


def test_impossible_angles_are_refused():
    for angle in (-1.0, 181.0, math.nan):
        with pytest.raises(ValueError, match=r"largest_rotation_deg is .*, but must lie in"):
            Orientations(angle)


@pytest.mark.parametrize("given", [{}, {"reproject": 2}, METHODS["pixels"], METHODS["reprojected"]])
def test_a_sample_is_what_the_turned_input_gives_turned_back(given, tmp_path):
    data = turned_data()
    system = awake(fitted(tmp_path, data, **given))
    assert system.orientations == Orientations(180.0, True)
    if system.reproject:
        # OSEM takes its subsets of views in another order where the image is turned; these treat all bins alike
        system.starting = lambda measured: measured.clamp(min=0).sqrt()
        system.attend = lambda measured, roi, strength: 1 + measured / measured.amax((1, 2, 3), keepdim=True)
    inputs = data.test_set[[0, 1]].input
    several = system.restore(inputs, asked(2), [5, 6], BridgeSampling(nfe=1, samples=3))
    assert torch.equal(several.samples[0], system.restore(inputs, asked(2), [5, 6], BridgeSampling(nfe=1)).mean)
    for number in (1, 2):
        lies = system.orientations.of(number, VIEWS)
        alone = system.restore(lies.lay(inputs), asked(2), [5, 6], BridgeSampling(nfe=1)).mean
        close = {"rtol": 0.0, "atol": 1e-4 * float(alone.std())}
        torch.testing.assert_close(several.samples[number], lies.lay_back(alone), **close)
    assert several.std.amax() > 0
    others = system.restore(inputs[1:], asked(1), [6], BridgeSampling(nfe=1, samples=3, batch_size=1))
    torch.testing.assert_close(
        others.samples[:, 0], several.samples[:, 1], rtol=0, atol=1e-4 * float(several.mean.std())
    )
    as_it_lies = BridgeSampling(nfe=1, samples=3, turned=False)
    with pytest.raises(ValueError, match=r"gives the same each time: use --model.sampling.samples=1, or .*turned=true"):
        system.restore(inputs, asked(2), [5, 6], as_it_lies)
    with pytest.raises(ValueError, match=r"has 64 results, one for each orientation: use --model.sampling.samples=64;"):
        system.restore(inputs, asked(2), [5, 6], BridgeSampling(nfe=1, samples=65))


def test_two_tracers_add_up_in_every_orientation(tmp_path):
    data = turned_data("separation")
    system = awake(fitted(tmp_path, data))
    given = data.test_set[[0, 1]].input
    condition = Condition.of("separation", ["FDG:abdomen"] * 4, target_tracers=["FDG", "PSMA"] * 2)
    samples = system.restore(given, condition, [5, 6], BridgeSampling(nfe=2, samples=3), n_targets=2).samples
    ratio = system.input_scale(condition.task[::2])
    for number, total in enumerate(samples.sum(2, keepdim=True)):
        lies = system.orientations.of(number, VIEWS)
        whole = system._decode(system._encode(lies.lay(given / ratio)), GEOMETRY.sinogram_shape) * ratio
        torch.testing.assert_close(total, lies.lay_back(whole))


def test_what_the_network_attends_to_is_turned_along(tmp_path):
    data = turned_data()
    system = awake(fitted(tmp_path, data, attention=AttentionUse(("channel",))))
    inputs = data.test_set[[0, 1]].input
    roi = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    roi[..., 3:6, 9:12] = True
    shown = []
    draw = system.draw
    system.draw = lambda source, focus, *more: shown.append(focus.further) or draw(source, focus, *more)
    system.restore(inputs, asked(2), [5, 6], BridgeSampling(nfe=1, samples=2), roi=roi)
    attended = system.attention(inputs / system.input_scale(asked(2).task), roi, 1.0)
    for number, further in enumerate(shown):
        lies = system.orientations.of(number, VIEWS)
        torch.testing.assert_close(further, system.autoencoder.pool(lies.lay(attended) - 1))
    assert not torch.equal(*shown)


def test_samples_of_diffusion_and_those_that_are_fitted_are_turned_too(tmp_path):
    data = turned_data()
    inputs = data.test_set[[0, 1]].input
    drawn = BridgeSampling(nfe=1, samples=2, data_consistency=2)
    for given, sampling in (({}, drawn), (METHODS["conditional"], ConditionalSampling(nfe=2, samples=2))):
        system = awake(fitted(tmp_path / type(sampling).__name__, data, **given))
        lying, turned = (
            system.restore(inputs, asked(2), [5, 6], replace(sampling, turned=way)).samples for way in (False, True)
        )
        assert torch.equal(lying[0], turned[0])
        assert not torch.allclose(lying[1], turned[1], rtol=1e-3)


def test_a_model_says_how_pairs_were_turned_and_one_of_before_draws_as_the_input_lies(tmp_path):
    data = turned_data(reflection=False)
    system = awake(fitted(tmp_path / "fit", data))
    assert system.orientations == Orientations(180.0)
    inputs, sampling = data.test_set[[0, 1]].input, BridgeSampling(nfe=2, samples=2)
    ours = system.restore(inputs, asked(2), [5, 6], sampling).mean

    def exported(folder: Path) -> torch.Tensor:
        return LatentBridge.from_pretrained(folder).restore(inputs, asked(2), [5, 6], sampling).mean

    system.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(tmp_path / "out"), ours)
    config = tmp_path / "out/config.json"
    said = json.loads(config.read_text())
    del said["orientations"]
    config.write_text(json.dumps(said))
    before = system.restore(inputs, asked(2), [5, 6], replace(sampling, turned=False)).mean
    torch.testing.assert_close(exported(tmp_path / "out"), before)
    assert not torch.allclose(before, ours, rtol=1e-3)

    checkpoint: dict = {}
    system.on_save_checkpoint(checkpoint)
    loaded = make()
    loaded.on_load_checkpoint({"state_dict": system.state_dict(), **checkpoint})
    assert loaded.orientations == system.orientations
    loaded.on_load_checkpoint({"state_dict": system.state_dict()})
    assert loaded.orientations == Orientations()


def test_the_data_that_users_train_on_say_how_they_turn(tmp_path):
    symmetry = partial(SymmetryAugmentation, largest_rotation_deg=30.0)
    whole = {"prompts": ["FDG:abdomen"], "num_scans": 4, "slices_per_patient": 2, "val_patients": 1, "test_patients": 1}
    data = PairedTask("delayed", GEOMETRY, cache=None, symmetry=symmetry, batch_size=2, **whole)
    data.setup()
    assert fitted(tmp_path, data, 1).orientations == Orientations(30.0, True)
