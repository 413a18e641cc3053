"""Virtual patients: deterministic, distinct, inside the field of view, labelled as they are painted."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from allpet.geometry import ParallelBeam
from allpet.simulation import LABELS, SlicePhantom, patient_slices, tracer_table
from allpet.simulation.canvas import Canvas
from allpet.simulation.fields import Curve, Draw, Field
from allpet.simulation.phantoms import REGIONS, Scan, draw_patient, paint_patient, slice_heights
from allpet.simulation.solids import Solid
from allpet.simulation.trunk import Trunk

GEOMETRY = ParallelBeam.preset("laptop")
FINE = ParallelBeam(n_views=8, n_bins=144, bin_mm=3.0, image_size=144, pixel_mm=3.0)


def mean_in(phantom: SlicePhantom, tissue: str) -> float:
    inside = phantom.labels == LABELS[tissue]
    assert inside.any(), tissue
    return phantom.activity[inside].mean().item()


def rasters(seed: int, threads: int) -> list[bytes]:
    torch.set_num_threads(threads)
    phantoms = [patient_slices(seed, region, "FDG", 2, GEOMETRY) for region in ("brain", "abdomen")]
    return [
        x.numpy().tobytes() for phantom in phantoms for x in (phantom.activity, phantom.attenuation, phantom.labels)
    ]


def test_same_seed_is_bit_identical_in_any_process() -> None:
    here = rasters(11, torch.get_num_threads())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        others = list(pool.map(rasters, [11, 11], [1, 2]))
    assert others == [here, here]


@pytest.mark.parametrize("region", REGIONS)
def test_neighbouring_seeds_and_slices_differ(region: str) -> None:
    first, second = (patient_slices(seed, region, "FDG", 6, GEOMETRY) for seed in (20, 21))
    apart = (first.activity - second.activity).norm() / first.activity.norm()
    assert apart > 0.2
    steps = (first.activity[1:] - first.activity[:-1]).norm(dim=(1, 2)) / first.activity.norm(dim=(1, 2))[1:]
    assert (steps > 0.02).all()
    # Organs vary smoothly: slices a millimetre apart are nearly the same.
    patient = draw_patient(20, region, GEOMETRY.field_of_view_mm)
    z = slice_heights(20, region, 6)
    near = np.array([z[2], z[2] + 1.0])
    close = paint_patient(patient, near, GEOMETRY, [Scan(tracer_table("FDG"))])[0][0]
    assert (close[1] - close[0]).norm() < 0.35 * steps.mean() * close[0].norm()


def test_slices_spread_over_the_region_and_do_not_depend_on_each_other() -> None:
    z = slice_heights(3, "abdomen", 10)
    np.testing.assert_allclose(np.diff(z), np.diff(z)[0])
    assert -95 <= z[0] < z[-1] <= 60
    patient = draw_patient(3, "abdomen", GEOMETRY.field_of_view_mm)
    scan = [Scan(tracer_table("FDG"))]
    together, alone = (paint_patient(patient, heights, GEOMETRY, scan) for heights in (z, z[4:5]))
    torch.testing.assert_close(together[0][:, 4:5], alone[0], rtol=0, atol=1e-5)
    assert torch.equal(together[2][4:5], alone[2])


def test_hemispheres_differ_although_the_template_is_symmetric() -> None:
    phantom = patient_slices(5, "brain", "FDG", 5, FINE)
    brain = phantom.activity * (phantom.labels >= LABELS["grey_matter"]) * (phantom.labels <= LABELS["cerebellum"])
    best = torch.inf
    x = FINE.pixel_centers[0].float()
    for image in brain:
        middle = (image * x).sum() / image.sum() / FINE.pixel_mm
        mirrored = image.flip(-1).roll(int(torch.round(2 * middle)), -1)
        best = min(best, ((image - mirrored).norm() / image.norm()).item())
    assert best > 0.1


@pytest.mark.parametrize("region", REGIONS)
def test_nothing_is_truncated(region: str) -> None:
    x, y = GEOMETRY.pixel_centers
    outside = torch.hypot(x, y) > GEOMETRY.field_of_view_mm - GEOMETRY.pixel_mm / 2
    for seed in range(100, 130):
        phantom = patient_slices(seed, region, "FDG", 3, GEOMETRY)
        assert phantom.activity[:, outside].max() == 0, seed
        assert phantom.attenuation[:, outside].max() < 1e-4, seed
        assert phantom.activity.amax((1, 2)).min() > 0.2, seed
        assert phantom.activity.min() >= 0, seed


def test_arms_hang_down_only_where_they_fit() -> None:
    wide = ParallelBeam(n_views=8, n_bins=64, bin_mm=10.0, image_size=64, pixel_mm=10.0)
    x, _ = wide.pixel_centers
    bodies = [draw_patient(seed, "abdomen", wide.field_of_view_mm) for seed in range(40)]
    assert all(isinstance(body.anatomy, Trunk) for body in bodies)
    wide_seen = sum(
        bool((patient_slices(seed, "abdomen", "FDG", 1, wide).attenuation[0][x.abs() > 230] > 0.005).any())
        for seed in range(40)
    )
    assert 4 <= wide_seen <= 22


def test_labels_agree_with_activity_and_attenuation() -> None:
    phantom = patient_slices(2, "abdomen", "FDG", 8, FINE)
    assert set(phantom.labels.unique().tolist()) <= set(LABELS.values())
    # In the middle of the liver the activity is the liver's up to its texture.
    liver = phantom.labels == LABELS["liver"]
    core = -torch.nn.functional.max_pool2d(-liver[:, None].float(), 5, 1, 2)[:, 0] > 0
    values = phantom.activity[core]
    assert 0.02 < values.std() / values.mean() < 0.09
    assert phantom.attenuation[core].mean().item() == pytest.approx(0.00977, rel=0.02)
    air = phantom.labels == LABELS["air"]
    assert phantom.activity[air].mean() < 0.02
    assert mean_in(phantom, "kidney") > mean_in(phantom, "muscle") > mean_in(phantom, "fat")


def test_partial_volume_does_not_depend_on_the_grid() -> None:
    totals = []
    for size in (72, 144, 288):
        g = ParallelBeam(n_views=8, n_bins=size, bin_mm=432.0 / size, image_size=size, pixel_mm=432.0 / size)
        phantom = patient_slices(4, "brain", "FDG", 2, g)
        totals.append((phantom.activity.sum((1, 2)) * g.pixel_mm**2, phantom.activity, g))
    for total, _, _ in totals[1:]:
        torch.testing.assert_close(total, totals[0][0], rtol=0.01, atol=0)
    coarse = totals[1][1].unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    assert (coarse - totals[0][1]).norm() / coarse.norm() < 0.06


def ellipse_area(size: int, a: float, b: float, angle: float) -> float:
    g = ParallelBeam(n_views=8, n_bins=size, bin_mm=200.0 / size, image_size=size, pixel_mm=200.0 / size)
    flat = Field(np.zeros((4, 4, 4), np.float32), 10.0)
    canvas = Canvas(g, np.zeros(1), [{"liver": 2.0}], flat)
    fixed = [Curve((0.0,), (value,)) for value in (12.3, -7.7, a, b, angle)]
    canvas.draw(Solid("liver", fixed[0], fixed[1], fixed[2], fixed[3], angle=fixed[4]))
    activity, _ = canvas.averaged()
    return float(activity.sum()) * g.pixel_mm**2 / 2.0


@pytest.mark.parametrize(("a", "b"), [(40.0, 25.0), (30.0, 8.0), (12.0, 12.0)])
def test_a_painted_ellipse_has_its_area(a: float, b: float) -> None:
    for size in (40, 100, 200):
        assert ellipse_area(size, a, b, 0.7) == pytest.approx(math.pi * a * b, rel=0.02)


def test_fields_are_smooth_periodic_and_of_unit_variance() -> None:
    field = Field.draw(torch.Generator().manual_seed(0), 24, 6.0)
    axis = np.arange(0, 144.0, 1.5)
    values = field.on_grid(axis, axis, axis)
    assert values.std() == pytest.approx(1.0, abs=0.05)
    assert abs(values.mean()) < 0.05
    np.testing.assert_allclose(field.on_grid(axis + 144, axis - 288, axis), values, atol=1e-5)
    near, far = ((values[..., :-lag] * values[..., lag:]).mean() for lag in (1, 16))
    assert near > 0.9
    assert abs(far) < 0.05


def test_curves_pass_their_knots_and_vary_as_told() -> None:
    z = np.linspace(-100, 100, 41)
    exact = Draw(torch.Generator().manual_seed(0)).curve([(-50, 1.0), (50, 3.0)])
    np.testing.assert_allclose(exact(np.array([-80.0, -50.0, 0.0, 80.0])), [1, 1, 2, 3])
    varied = [Draw(torch.Generator().manual_seed(seed)).curve(0.0, 5.0, 40.0)(z) for seed in range(200)]
    assert 3.5 < np.std(varied) < 7.0
    assert np.abs(np.diff(varied, axis=1)).max() < 3.0


def test_tracers_show_what_they_should() -> None:
    dopa, fdg = (patient_slices(6, "brain", tracer, 12, FINE) for tracer in ("DOPA", "FDG"))
    assert torch.equal(dopa.attenuation, fdg.attenuation)
    assert mean_in(dopa, "caudate") > 1.3 * mean_in(dopa, "grey_matter")
    assert mean_in(fdg, "grey_matter") > 2 * mean_in(fdg, "white_matter")
    assert mean_in(dopa, "grey_matter") < 1.6 * mean_in(dopa, "white_matter")
    psma = patient_slices(6, "abdomen", "PSMA", 10, FINE)
    means = {name: mean_in(psma, name) for name in ("kidney", "liver", "spleen", "muscle", "fat")}
    assert max(means, key=lambda name: means[name]) == "kidney"
    assert means["liver"] > 3 * means["muscle"]
    chest = patient_slices(6, "chest", "FDG", 8, FINE)
    assert chest.attenuation[chest.labels == LABELS["lung"]].median().item() == pytest.approx(0.0026, rel=0.1)


def test_only_men_are_given_psma() -> None:
    for seed in range(12):
        labels = patient_slices(seed, "pelvis", "PSMA", 6, GEOMETRY).labels.unique().tolist()
        assert LABELS["uterus"] not in labels


def test_two_scans_share_one_anatomy() -> None:
    fdg, psma = tracer_table("FDG"), tracer_table("PSMA")
    patient = draw_patient(7, "abdomen", GEOMETRY.field_of_view_mm)
    z = slice_heights(7, "abdomen", 3)
    activity, _, _ = paint_patient(patient, z, GEOMETRY, [Scan(fdg), Scan(psma), Scan(fdg, 120.0)])
    single = paint_patient(patient, z, GEOMETRY, [Scan(fdg)])[0]
    assert torch.equal(activity[0], single[0])
    assert (activity[1] - activity[0]).abs().max() > 1
    assert 0.01 < (activity[2] - activity[0]).norm() / activity[0].norm() < 0.6


def test_some_patients_have_lesions_and_they_are_hot() -> None:
    phantoms = [patient_slices(seed, "chest", "FDG", 6, GEOMETRY) for seed in range(20)]
    counts = torch.stack([(phantom.labels == LABELS["lesion_hot"]).sum() for phantom in phantoms])
    assert 5 < (counts > 0).sum() < 20
    most = phantoms[int(counts.argmax())]
    assert mean_in(most, "lesion_hot") > 1.3 * mean_in(most, "mediastinum")


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of brain, chest, abdomen, pelvis"):
        patient_slices(0, "knee", "FDG", 1, GEOMETRY)
    with pytest.raises(ValueError, match="at least one slice"):
        patient_slices(0, "brain", "FDG", 0, GEOMETRY)
