"""Where views, bins and pixels lie."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from allpet import ParallelBeam

BEAM = ParallelBeam(n_views=12, n_bins=9, bin_mm=2.5, image_size=8, pixel_mm=3.0)


def test_views_cover_half_a_turn_without_its_end():
    steps = torch.diff(BEAM.angles)
    assert torch.allclose(steps, torch.full_like(steps, math.pi / 12))
    assert BEAM.angles[0] == 0
    # One more step would be the first view again, seen from the other side.
    assert BEAM.angles[-1] + steps[0] == pytest.approx(math.pi)


@pytest.mark.parametrize("n_bins", [8, 9])
def test_bins_lie_symmetrically_about_the_axis(n_bins):
    centers = ParallelBeam(4, n_bins, 2.5, 8, 3.0).bin_centers
    assert torch.equal(centers, -centers.flip(0))
    assert torch.allclose(torch.diff(centers), torch.full((n_bins - 1,), 2.5, dtype=torch.float64))


def test_row_zero_is_the_top_and_column_zero_the_left():
    x, y = BEAM.pixel_centers
    assert y[0, 0] > y[-1, 0]
    assert x[0, 0] < x[0, -1]
    assert torch.equal(x, -x.flip(1))
    assert torch.equal(y, -y.flip(0))
    assert x[0, 1] - x[0, 0] == pytest.approx(3.0)


def test_field_of_view_is_the_smaller_of_bins_and_image():
    assert BEAM.field_of_view_mm == pytest.approx(min(9 * 2.5, 8 * 3.0) / 2)
    assert ParallelBeam(4, 20, 2.5, 8, 3.0).field_of_view_mm == pytest.approx(12.0)


def test_shapes():
    assert BEAM.sinogram_shape == (12, 9)
    assert BEAM.image_shape == (8, 8)


def test_equality_printing_pickling_and_dictionary_round_trip():
    assert eval(repr(BEAM)) == BEAM
    assert pickle.loads(pickle.dumps(BEAM)) == BEAM
    assert ParallelBeam(**BEAM.to_dict()) == BEAM
    assert len({BEAM, ParallelBeam(**BEAM.to_dict())}) == 1
    assert ParallelBeam(12, 9, 2, 8, 3) == ParallelBeam(12, 9, 2.0, 8, 3.0)


@pytest.mark.parametrize("name", ParallelBeam.presets())
def test_presets_are_distances_a_scanner_could_have(name):
    preset = ParallelBeam.preset(name)
    assert 100 < preset.field_of_view_mm < 700
    assert preset.n_bins >= preset.image_size


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="'nope'; choose one of laptop"):
        ParallelBeam.preset("nope")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_views": 0}, "n_views is 0"),
        ({"n_bins": 2.5}, "n_bins is 2.5"),
        ({"image_size": True}, "image_size is True"),
        ({"bin_mm": -1.0}, "bin_mm is -1.0"),
        ({"pixel_mm": math.nan}, "pixel_mm is nan"),
        ({"pixel_mm": "2"}, "pixel_mm is '2'"),
    ],
)
def test_impossible_geometries_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ParallelBeam(**{**BEAM.to_dict(), **change})
