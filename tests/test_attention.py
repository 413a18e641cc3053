"""Transparent medical attention: what it finds, what it cannot see, and that areas project as Radon says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from allpet import ParallelBeam, Radon, TransparentMedicalAttention, roi_box, roi_from_file, roi_from_labels, symmetry
from allpet.io import DataError, Scan, write_scan
from allpet.simulation.tissues import LABELS

GEOMETRY = ParallelBeam(32, 40, 10.8, 40, 10.8)
RADON = Radon(GEOMETRY)


def disc(x_mm: float, y_mm: float, radius_mm: float) -> Tensor:
    x, y = GEOMETRY.pixel_centers
    return ((x - x_mm).square() + (y - y_mm).square() < radius_mm**2).float()[None, None]


BODY, HOT, COLD = disc(0, 0, 150), disc(60, 40, 25), disc(-60, -20, 36)


@pytest.fixture(scope="module")
def attention() -> TransparentMedicalAttention:
    return TransparentMedicalAttention(RADON, smooth_mm=11.0)


def test_nothing_in_it_can_learn(attention):
    assert not list(attention.parameters())
    assert not list(attention.buffers())
    assert not attention.state_dict()
    given = RADON.project(BODY + 3 * HOT).requires_grad_()
    assert not attention(given).requires_grad


@pytest.mark.parametrize("reconstruction", ["osem", "fbp"])
def test_hot_and_cold_discs_are_found_where_they_are(reconstruction):
    attention = TransparentMedicalAttention(RADON, smooth_mm=11.0, reconstruction=reconstruction)
    areas = attention.areas(RADON.project(BODY + 3 * HOT - COLD))
    for area, truth in ((areas.hot, HOT > 0), (areas.cold, COLD > 0)):
        assert (area & truth).sum() > 0.6 * truth.sum()
        assert not (area & (torch.nn.functional.max_pool2d(truth.float(), 5, 1, 2) == 0)).any()
    assert (areas.body & (BODY > 0)).sum() == (BODY > 0).sum()
    assert areas.body.sum() < 1.25 * BODY.sum()


@pytest.mark.parametrize("radius", [60.0, 100.0, 150.0, 190.0])
def test_a_uniform_disc_gives_nothing(attention, radius):
    assert torch.equal(attention(RADON.project(disc(5, -8, radius))), torch.ones(1, 1, 32, 40))


def test_hot_is_what_is_hotter_than_what_is_around_it(attention):
    """In the faint half of a body a lesion is hot that would be cold in the warm half, which is hot nowhere."""
    x, _ = GEOMETRY.pixel_centers
    faint, warm = (BODY * (x < 0)), (BODY * (x >= 0))
    lesion = disc(-80, 0, 25)
    image = faint + 4 * warm + 2 * lesion
    assert float(image[lesion > 0].mean()) < 1.6 * float(image[BODY > 0].mean())
    hot = attention.areas(RADON.project(image)).hot
    assert (hot & (lesion > 0)).sum() > 0.5 * (lesion > 0).sum()
    assert not (hot & (x > 50)).any()


def test_an_image_is_taken_as_well_and_units_do_not_matter(attention):
    image = BODY + 3 * HOT
    from_image, from_sinogram = attention(image), attention(RADON.project(image))
    assert (from_image - 1).flatten() @ (from_sinogram - 1).flatten() > 0.9 * (from_image - 1).norm() ** 2
    torch.testing.assert_close(attention(1000 * image), from_image)
    assert torch.equal(attention(torch.zeros(2, 1, 32, 40)), torch.ones(2, 1, 32, 40))


def test_it_is_linear_in_strength(attention):
    given = RADON.project(torch.cat([BODY + 3 * HOT - COLD, BODY + 2 * HOT]))
    once = attention(given) - 1
    assert once.flatten(1).amax(1).gt(0.5).all()
    torch.testing.assert_close(attention(given, strength=2.5) - 1, 2.5 * once)
    each = attention(given, strength=torch.tensor([0.0, 3.0])) - 1
    torch.testing.assert_close(each, torch.stack([0 * once[0], 3 * once[1]]))


def test_shares_are_of_the_longest_ray_or_of_the_way_through_the_body():
    given, roi = RADON.project(BODY), COLD > 0
    share = TransparentMedicalAttention(RADON)(given, roi) - 1
    torch.testing.assert_close(share, RADON.project(COLD) / RADON.project(COLD).max())
    path = TransparentMedicalAttention(RADON, normalise="path")(given, roi) - 1
    assert 0.2 < path.max() < 0.5  # 72 mm of some 290 mm
    everything = TransparentMedicalAttention(RADON, normalise="path")(given, torch.ones_like(roi)) - 1
    assert set(everything.unique().tolist()) <= {0.0, 1.0}


def test_an_empty_roi_attends_to_nothing_and_a_roi_replaces_or_adds(attention):
    given = RADON.project(BODY + 3 * HOT)
    empty, roi = torch.zeros(1, 1, 40, 40, dtype=torch.bool), COLD > 0
    assert torch.equal(attention(given, empty), torch.ones(1, 1, 32, 40))
    replaced = attention(given, roi) - 1
    torch.testing.assert_close(replaced, attention(RADON.project(BODY), roi) - 1)
    added = TransparentMedicalAttention(RADON, smooth_mm=11.0, with_roi="add")
    torch.testing.assert_close(added(given, roi) - 1, replaced + attention(given) - 1)
    torch.testing.assert_close(added(given, empty), attention(given))


def test_moving_a_roi_moves_its_attention_as_the_symmetries_say(attention):
    """Quarter turns and reflections of the pixel grid are exact on both sides."""
    given, roi = RADON.project(BODY), (HOT > 0) | (disc(-20, 90, 20) > 0)
    attended = attention(given, roi)
    turned = attention(given, roi.rot90(1, (2, 3)))
    mirrored = attention(given, roi.flip(3))
    torch.testing.assert_close(turned, symmetry.roll_views(attended, GEOMETRY.n_views // 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored, symmetry.reflect_x(attended), rtol=0, atol=1e-5)
    assert not torch.allclose(turned, attended, atol=0.1)


def test_so_do_the_areas_that_it_finds(attention):
    given = RADON.project(BODY + 3 * HOT - COLD)
    attended = attention(given)
    torch.testing.assert_close(
        attention(symmetry.roll_views(given, GEOMETRY.n_views // 2)),
        symmetry.roll_views(attended, GEOMETRY.n_views // 2),
        rtol=0,
        atol=2e-2,
    )


@pytest.mark.parametrize("name", ["mask.npy", "mask.npz", "mask.h5", "mask.nii.gz"])
def test_a_roi_comes_from_a_file(name, tmp_path):
    values = (HOT[0] > 0).float().numpy()
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, values)
    else:
        write_scan(path, Scan(values, "image", pixel_mm=10.8, slice_mm=10.8))
    assert torch.equal(roi_from_file(path, GEOMETRY), HOT > 0)


def test_a_mask_on_other_pixels_is_brought_to_the_grid(tmp_path):
    fine = HOT[0, 0].repeat_interleave(3, 0).repeat_interleave(3, 1).numpy()
    np.save(tmp_path / "fine.npy", fine[None])
    assert torch.equal(roi_from_file(tmp_path / "fine.npy", GEOMETRY, pixel_mm=3.6), HOT > 0)
    with pytest.raises(DataError, match=r"its mask has 120 x 120 pixels, the image 40 x 40; give its pixel width"):
        roi_from_file(tmp_path / "fine.npy", GEOMETRY)
    np.save(tmp_path / "empty.npy", 0 * fine[None])
    with pytest.raises(DataError, match="zero everywhere"):
        roi_from_file(tmp_path / "empty.npy", GEOMETRY)


def test_boxes_are_in_mm_with_y_up():
    box = roi_box(GEOMETRY, (20.0, 60.0), (100.0, 150.0))
    x, y = (values[box[0, 0]] for values in GEOMETRY.pixel_centers)
    assert x.min() >= 20 > x.min() - 10.8
    assert y.max() <= 150 < y.max() + 10.8
    assert box[0, 0].nonzero()[:, 0].max() < 20  # up is the upper half of the rows
    with pytest.raises(ValueError, match="holds no pixel"):
        roi_box(GEOMETRY, (0.0, 1.0), (0.0, 1.0))


def test_labels_have_names():
    labels = torch.zeros(2, 1, 40, 40, dtype=torch.uint8)
    labels[0, 0, 3, 4], labels[0, 0, 5, 6], labels[1, 0, 7, 8] = LABELS["liver"], LABELS["spleen"], LABELS["liver"]
    assert roi_from_labels(labels, ["liver", "spleen"]).nonzero()[:, 2:].tolist() == [[3, 4], [5, 6], [7, 8]]
    assert roi_from_labels(labels, "lesion_hot").sum() == 0
    with pytest.raises(ValueError, match="There is no tissue 'knee'"):
        roi_from_labels(labels, "knee")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"hot": -1.0}, "hot is -1.0"),
        ({"hot_ratio": 0.9}, "below and above 1"),
        ({"smooth_mm": 200.0}, "the second larger"),
        ({"body_share": 1.0}, "between 0 and 1"),
        ({"with_roi": "both"}, "choose replace or add"),
    ],
)
def test_impossible_settings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        TransparentMedicalAttention(RADON, **wrong)


def test_what_does_not_fit_is_refused(attention):
    given = RADON.project(BODY)
    for roi, sentence in ((torch.ones(1, 1, 8, 8, dtype=torch.bool), "image grid"), (BODY, "must be bool")):
        with pytest.raises(ValueError, match=sentence):
            attention(given, roi)
    with pytest.raises(ValueError, match="must not be negative"):
        attention(given, strength=-1.0)
    with pytest.raises(ValueError, match=r"strength is -1\.0, but must not be negative"):
        attention.emphasise(attention.areas(given), -1.0)
    with pytest.raises(ValueError, match="What is attended to has shape"):
        attention(torch.zeros(1, 1, 8, 8))
