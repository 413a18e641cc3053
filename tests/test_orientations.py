"""Samples drawn in several orientations: exact, evenly spread, as far as the training went, and laid back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_paired_methods import METHODS, asked, awake, fitted
from tiny_pairs import TinyPairs
from tiny_pet import GEOMETRY

from allpet import AttentionUse, BridgeSampling, Condition, LatentBridge, SymmetryAugmentation
from allpet.augmentation import SymmetryParameters
from allpet.orientations import Orientation, Orientations

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


def test_the_first_lies_as_it_is_and_many_are_spread_evenly_over_what_was_seen():
    whole = [Orientations(180.0, True).of(number, 64) for number in range(32)]
    assert whole[0] == Orientation()
    assert sum(one.mirrored for one in whole) == 16
    for mirrored in (False, True):
        places = sorted(one.views % 128 for one in whole if one.mirrored == mirrored)
        gaps = [(after - before) % 128 for before, after in zip(places, places[1:] + places[:1], strict=True)]
        assert 4 <= min(gaps) <= max(gaps) <= 16, "8 views if all were equal"
    narrow = [Orientations(10.0, False).of(number, 64) for number in range(32)]
    assert {one.views for one in narrow} == set(range(-3, 4))
    assert not any(one.mirrored for one in narrow)


@pytest.mark.parametrize(
    ("augmentation", "seen", "several"),
    [
        (None, Orientations(), False),
        (SymmetryAugmentation(GEOMETRY), Orientations(180.0, True), True),
        (SymmetryAugmentation(GEOMETRY, rotation=False), Orientations(0.0, True), True),
        (SymmetryAugmentation(GEOMETRY, reflection=False, largest_rotation_deg=5.0), Orientations(5.0, False), False),
        (SymmetryAugmentation(GEOMETRY, rotation=False, reflection=False), Orientations(), False),
    ],
)
def test_what_was_seen_is_what_the_augmentation_draws(augmentation, seen, several):
    assert Orientations.seen(augmentation) == seen
    assert seen.several(VIEWS) == several, "16 views are 11 degrees apart"


@pytest.mark.parametrize("given", [{}, {"reproject": 2}, METHODS["pixels"]])
def test_a_sample_is_what_the_turned_input_gives_turned_back(given, tmp_path):
    data = turned_data()
    system = awake(fitted(tmp_path, data, **given))
    assert system.orientations == Orientations(180.0, True)
    if system.reproject:
        # OSEM takes its subsets of views in another order where the image is turned; this treats all bins alike
        system.starting = lambda measured: measured.clamp(min=0).sqrt()
    inputs = data.test_set[[0, 1]].input
    several = system.restore(inputs, asked(2), [5, 6], BridgeSampling(nfe=1, samples=3))
    assert torch.equal(several.samples[0], system.restore(inputs, asked(2), [5, 6], BridgeSampling(nfe=1)).mean)
    for number in (1, 2):
        lies = system.orientations.of(number, VIEWS)
        alone = system.restore(lies.lay(inputs), asked(2), [5, 6], BridgeSampling(nfe=1)).mean
        close = {"rtol": 0.0, "atol": 1e-4 * float(alone.std())}
        torch.testing.assert_close(several.samples[number], lies.lay_back(alone), **close)
    assert several.std.amax() > 0
    as_it_lies = BridgeSampling(nfe=1, samples=3, turned=False)
    with pytest.raises(ValueError, match=r"one call \(nfe=1\) gives the same each time"):
        system.restore(inputs, asked(2), [5, 6], as_it_lies)


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


def test_a_model_is_exported_with_what_it_has_seen_and_one_of_before_draws_as_the_input_lies(tmp_path):
    data = turned_data(reflection=False)
    system = awake(fitted(tmp_path / "fit", data))
    system.save_pretrained(tmp_path / "out")
    read = LatentBridge.from_pretrained(tmp_path / "out")
    assert read.orientations == system.orientations == Orientations(180.0, False)
    inputs, sampling = data.test_set[[0, 1]].input, BridgeSampling(nfe=2, samples=2)
    new, old = read.restore(inputs, asked(2), [5, 6], sampling), fitted(tmp_path / "fit2", TinyPairs())
    torch.testing.assert_close(new.mean, system.restore(inputs, asked(2), [5, 6], sampling).mean)
    assert old.orientations == Orientations()
    config = tmp_path / "out/config.json"
    said = json.loads(config.read_text())
    del said["orientations"]
    config.write_text(json.dumps(said))
    assert LatentBridge.from_pretrained(tmp_path / "out").orientations == Orientations()
