from __future__ import annotations

import copy
import json
import math
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from analytic import CENTRES, HEIGHTS, SIGMAS, ellipse_sinogram, gaussian_sinogram, relative_error

from allpet import SYMMETRY_LABEL_SIZE, ParallelBeam, Radon, RadonMaskAugmentation, SymmetryAugmentation, symmetry
from allpet.augmentation import SymmetryParameters
from allpet.consistency import helgason_ludwig_residual
from allpet.masks import image_mask
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet

GEOMETRY = ParallelBeam(64, 80, 5.4, 80, 5.4)
ODD = ParallelBeam(37, 51, 3.3, 45, 4.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def radon() -> Radon:
    return Radon(GEOMETRY)


@pytest.mark.parametrize("geometry", [GEOMETRY, ODD])
@pytest.mark.parametrize("mask", ["soft", "binary"])
def test_positive_and_negative_add_up_to_the_last_bit(geometry: ParallelBeam, mask: str) -> None:
    augmentation = RadonMaskAugmentation(Radon(geometry), mask=mask)  # type: ignore[arg-type]
    sinogram = torch.rand(40, 1, *geometry.sinogram_shape, generator=generator()) * 1000 - 100
    stack, shown, cells = augmentation(sinogram, generator(1))
    assert stack.shape == (40, 3, *geometry.sinogram_shape)
    assert cells.shape == (40, 4)
    positive, full, negative = stack.unbind(1)
    assert torch.equal(positive + negative, full)
    assert torch.equal(full, sinogram[:, 0])
    # Exactness costs no more than rounding of the full sinogram.
    assert ((positive - shown[:, 0] * full).abs() <= 2**-23 * full.abs()).all()
    if mask == "binary":
        assert (positive * negative).abs().max() == 0


def test_the_image_domain_gives_true_sinograms(radon: Radon) -> None:
    sinogram = ellipse_sinogram(GEOMETRY).float()
    cells = torch.tensor([[27, 36, 20, -1]])
    stacks = {
        domain: RadonMaskAugmentation(radon, mask="soft", domain=domain).apply(sinogram, cells)  # type: ignore[arg-type]
        for domain in ("sinogram", "image")
    }
    positive, full, negative = stacks["image"].stack.unbind(1)
    assert (positive + negative - full).abs().max() <= 1e-6 * full.max()
    residual = {d: helgason_ludwig_residual(s.stack[:, :1], GEOMETRY).item() for d, s in stacks.items()}
    assert residual["image"] < 5e-3
    assert residual["sinogram"] > 10 * residual["image"]


def test_the_image_domain_keeps_the_activity_in_the_mask() -> None:
    geometry = ParallelBeam(96, 64, 4.0, 64, 4.0)
    radon = Radon(geometry)
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20:28, 30:38] = 1
    inside, outside = torch.tensor([[8 * 2 + 3, 8 * 2 + 4, 8 * 3 + 3, 8 * 3 + 4]]), torch.tensor([[8 * 6 + 3]])
    assert (image * image_mask(inside, geometry, 8)).sum() == image.sum()
    augmentation = RadonMaskAugmentation(radon, domain="image")
    sinogram = radon.project(image)
    kept = augmentation.apply(sinogram, inside).stack[:, 0].sum() / sinogram.sum()
    hidden = augmentation.apply(sinogram, outside).stack[:, 0].sum() / sinogram.sum()
    assert kept == pytest.approx(1, abs=0.03)
    assert abs(hidden) < 0.02


def test_masks_are_drawn_in_the_field_of_view(radon: Radon) -> None:
    augmentation = RadonMaskAugmentation(radon, n_cells=(1, 4))
    cells = augmentation.draw(2000, generator())
    drawn = set(cells[cells >= 0].tolist())
    assert len(drawn) == 52
    assert not drawn & {0, 7, 56, 63}


def test_drawing_sample_by_sample_does_not_depend_on_the_batch(radon: Radon) -> None:
    augmentation = RadonMaskAugmentation(radon)
    symmetries = SymmetryAugmentation(GEOMETRY, translation_mm=10)
    for module in (augmentation, symmetries):
        first = [module.draw(1, keyed_generator(0, 0, sample, "mask")) for sample in (1, 2, 3)]
        again = [module.draw(1, keyed_generator(0, 0, sample, "mask")) for sample in (3, 1)]
        if module is augmentation:
            assert torch.equal(first[2], again[0])
            assert torch.equal(first[0], again[1])
        else:
            assert all(torch.equal(a, b) for a, b in zip(first[2], again[0], strict=True))


def test_a_curriculum_draws_more_cells_epoch_by_epoch(radon: Radon) -> None:
    augmentation = RadonMaskAugmentation(radon, n_cells=(1, 6), curriculum_epochs=10)
    most = []
    for epoch in (0, 4, 9, 10, 50, None):
        cells = augmentation.draw(500, generator(), epoch)
        assert cells.shape == (500, 6)
        numbers = (cells >= 0).sum(dim=1)
        assert numbers.min() == 1
        most.append(int(numbers.max()))
    assert most == [1, 3, 5, 6, 6, 6]
    plain = RadonMaskAugmentation(radon, n_cells=(1, 6))
    assert torch.equal(augmentation.draw(500, generator(), 10), plain.draw(500, generator(), 0))


def test_training_follows_the_curriculum_by_its_epoch_and_evaluation_does_not() -> None:
    class Four(SinogramDataModule):
        def load(self) -> LoadedData:
            ids = torch.arange(4)
            part = SinogramSet(torch.ones(4, *GEOMETRY.sinogram_shape), None, Prompt(ids * 0, ids * 0), ids, ids)
            return LoadedData(GEOMETRY, part, part, part, "of ones")

    data = Four(augmentation=lambda radon: RadonMaskAugmentation(radon, n_cells=(2, 9), curriculum_epochs=7))
    data.setup()
    batch = data.train_set[list(range(4))]
    for epoch in (0, 3, 100, None):
        number = (data.augment(batch, epoch).stack.cells >= 0).sum(dim=1)  # as after resuming: nothing came before
        assert number.max() <= (9 if epoch is None else min(9, 2 + epoch))
        assert number.max() > 2 or epoch == 0


def test_sizes_mix(radon: Radon) -> None:
    augmentation = RadonMaskAugmentation(radon, grid=(4, 8, 16))
    sinogram = torch.rand(60, 1, *GEOMETRY.sinogram_shape, generator=generator())
    stack, _, cells = augmentation(sinogram, generator())
    positive, full, negative = stack.unbind(1)
    assert torch.equal(positive + negative, full)
    shares = image_mask(cells, GEOMETRY, (4, 8, 16)).mean(dim=(1, 2, 3)) * 256 / (cells >= 0).sum(dim=1)
    assert set(shares.round().int().tolist()) == {1, 4, 16}  # area of a cell, in the smallest


def test_modules_can_live_inside_models(radon: Radon) -> None:
    model = torch.nn.Sequential(RadonMaskAugmentation(radon), SymmetryAugmentation(GEOMETRY))
    visited = []
    model.apply(visited.append)
    assert len(visited) == 3
    assert not model.state_dict()
    cells = torch.tensor([[20, -1, -1, -1]])
    sinogram = torch.rand(1, 1, *GEOMETRY.sinogram_shape, generator=generator())
    expected = model[0].apply(sinogram, cells).stack
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin[0].apply(sinogram, cells).stack, expected)


def test_masking_is_differentiable(radon: Radon) -> None:
    sinogram = torch.rand(2, 1, *GEOMETRY.sinogram_shape, generator=generator()).requires_grad_()
    stack, mask, _ = RadonMaskAugmentation(radon)(sinogram, generator())
    (gradient,) = torch.autograd.grad(stack[:, 0].sum(), sinogram)
    torch.testing.assert_close(gradient, mask)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"domain": "latent"}, "domain is 'latent'"),
        ({"mask": "grey"}, "mask is 'grey'"),
        ({"n_cells": (1, 60)}, "most <= 52"),
        ({"grid": 100}, "grid is 100"),
        ({"grid": (8, 100)}, "grid is 100"),
        ({"grid": ()}, "grid is empty"),
        ({"curriculum_epochs": -1}, "curriculum_epochs is -1"),
    ],
)
def test_bad_mask_arguments_are_named(radon: Radon, arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RadonMaskAugmentation(radon, **arguments)


def test_a_sinogram_of_another_shape_is_refused(radon: Radon) -> None:
    with pytest.raises(ValueError, match="shape is \\(2, 1, 64, 64\\)"):
        RadonMaskAugmentation(radon)(torch.zeros(2, 1, 64, 64), generator())


def test_symmetries_are_those_of_the_image() -> None:
    sinogram = gaussian_sinogram(GEOMETRY)
    augmentation = SymmetryAugmentation(
        GEOMETRY, rotation="any", translation_mm=15, dilation=(0.9, 1.1), gain=(0.5, 2.0), blur_mm=10
    )
    parameters = augmentation.draw(12, generator(5))
    augmented = augmentation.apply(sinogram.expand(12, -1, -1, -1), parameters)
    for i in range(12):
        gain, dilation, mirrored, angle, translation, blur = (value[i] for value in parameters)
        centres = CENTRES * dilation
        if mirrored:
            centres = centres * torch.tensor([-1.0, 1.0])
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        centres = centres @ turn.T + translation
        wider = ((SIGMAS * dilation) ** 2 + blur**2 / (8 * math.log(2))).sqrt()
        expected = gaussian_sinogram(GEOMETRY, centres, wider, HEIGHTS * gain * (SIGMAS * dilation / wider) ** 2)[0]
        assert relative_error(augmented[i], expected) < 6e-3
    assert 0 < parameters.mirrored.sum() < 12


def test_default_symmetries_permute_bins() -> None:
    counts = torch.poisson(20 * torch.ones(16, 1, *GEOMETRY.sinogram_shape), generator=generator())
    moved, parameters = SymmetryAugmentation(GEOMETRY)(counts, generator(1))
    assert torch.equal(moved.flatten(1).sort().values, counts.flatten(1).sort().values)
    assert not torch.equal(moved, counts)
    views = parameters.angle_rad * GEOMETRY.n_views / math.pi
    torch.testing.assert_close(views, views.round(), atol=1e-4, rtol=0)


def test_a_largest_rotation_is_kept_and_every_view_within_is_as_likely() -> None:
    step = 180 / GEOMETRY.n_views
    drawn = SymmetryAugmentation(GEOMETRY, largest_rotation_deg=3.5 * step).draw(7000, generator(3))
    views = torch.rad2deg(drawn.angle_rad) / step
    torch.testing.assert_close(views, views.round(), atol=1e-4, rtol=0)
    assert views.round().unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert all(900 < int((views.round() == k).sum()) < 1100 for k in range(-3, 4))
    turned = SymmetryAugmentation(GEOMETRY, reflection=False, largest_rotation_deg=step)
    sinogram = gaussian_sinogram(GEOMETRY).expand(30, -1, -1, -1)
    moved, drawn = turned(sinogram, generator(4))
    for k in (-1, 0, 1):
        chosen = (torch.rad2deg(drawn.angle_rad) / step).round() == k
        assert chosen.any()
        assert torch.equal(moved[chosen], symmetry.roll_views(sinogram[chosen], torch.full((int(chosen.sum()),), k)))
    free = SymmetryAugmentation(GEOMETRY, rotation="any", largest_rotation_deg=20).draw(2000, generator(5))
    degrees = torch.rad2deg(free.angle_rad)
    assert 19 < float(degrees.max()) <= 20
    assert -20 <= float(degrees.min()) < -19


def test_channels_share_their_symmetry() -> None:
    pair = torch.rand(8, 1, *GEOMETRY.sinogram_shape, generator=generator()).expand(-1, 2, -1, -1)
    moved, _ = SymmetryAugmentation(GEOMETRY, rotation="any", translation_mm=10)(pair, generator(2))
    assert torch.equal(moved[:, 0], moved[:, 1])


def test_the_label_of_the_identity_is_zero() -> None:
    augmentation = SymmetryAugmentation(GEOMETRY, translation_mm=20, dilation=(0.8, 1.2), probability=0, blur_mm=9)
    sinogram = torch.rand(5, 1, *GEOMETRY.sinogram_shape, generator=generator())
    same, parameters = augmentation(sinogram, generator())
    assert torch.equal(same, sinogram)
    assert parameters.label().shape == (5, SYMMETRY_LABEL_SIZE)
    assert parameters.label().abs().max() == 0


def test_labels_tell_augmentations_apart() -> None:
    augmentation = SymmetryAugmentation(
        GEOMETRY, "any", translation_mm=20, dilation=(0.8, 1.2), gain=(0.5, 2), blur_mm=9
    )
    label = augmentation.draw(64, generator()).label()
    assert torch.isfinite(label).all()
    assert (torch.cdist(label, label) + torch.eye(64)).min() > 1e-3
    assert (label.std(0) > 1e-2).all()


def test_probability_is_the_share_of_samples_touched() -> None:
    augmentation = SymmetryAugmentation(GEOMETRY, reflection=False, translation_mm=5, probability=0.3)
    parameters = augmentation.draw(4000, generator())
    assert (parameters.angle_rad != 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert not parameters.mirrored.any()
    moved = (parameters.translation_mm != 0).any(1).float().mean()
    assert moved == pytest.approx(0.3, abs=0.03)
    assert not parameters.blur_mm.any()


def test_a_blur_is_drawn_beside_the_others() -> None:
    without = SymmetryAugmentation(GEOMETRY, probability=0.3).draw(4000, generator())
    blurred = SymmetryAugmentation(GEOMETRY, probability=0.3, blur_mm=8).draw(4000, generator()).blur_mm
    assert not without.blur_mm.any()
    assert (blurred != 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert blurred[blurred != 0].mean() == pytest.approx(4, abs=0.3)
    assert blurred.max() <= 8


def test_the_noise_changes_as_is_said() -> None:
    """What the documentation of SymmetryAugmentation says of the variance of noise."""
    noise = torch.randn(64, 1, *GEOMETRY.sinogram_shape, generator=generator())
    cases = {
        "turned by half a view": (symmetry.rotate(noise, 0.5 * math.pi / GEOMETRY.n_views), 1.0),
        "moved by half a bin": (symmetry.translate(noise, GEOMETRY, 0.5 * GEOMETRY.bin_mm, 0.0), 1.0),
        "dilated by 1.1": (symmetry.dilate(noise, GEOMETRY, 1.1), 1.1**2),
        "dilated by 0.9": (symmetry.dilate(noise, GEOMETRY, 0.9), 0.9**3),
        "blurred by a bin": (symmetry.blur(noise, GEOMETRY, GEOMETRY.bin_mm), 0.627),
    }
    for name, (changed, expected) in cases.items():
        assert float(changed[..., 8:-8].var()) == pytest.approx(expected, rel=0.02), name


def test_parameters_concatenate_field_by_field() -> None:
    augmentation = SymmetryAugmentation(GEOMETRY)
    parts = [augmentation.draw(1, generator(seed)) for seed in range(3)]
    batch = SymmetryParameters(*(torch.cat(values) for values in zip(*parts, strict=True)))
    assert batch.label().shape == (3, SYMMETRY_LABEL_SIZE)
    sinogram = torch.rand(3, 1, *GEOMETRY.sinogram_shape, generator=generator())
    together = augmentation.apply(sinogram, batch)
    apart = torch.cat([augmentation.apply(sinogram[i : i + 1], part) for i, part in enumerate(parts)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rotation": "some"}, "rotation is 'some'"),
        ({"largest_rotation_deg": 200}, r"largest_rotation_deg is 200, but must lie in \[0, 180\]"),
        ({"dilation": (0.0, 1.0)}, "dilation is"),
        ({"gain": (2.0, 1.0)}, "gain is"),
        ({"probability": 1.5}, "probability is 1.5"),
        ({"blur_mm": -1.0}, "blur_mm is -1.0"),
        ({"translation_mm": 1000.0}, "radius of the field of view, 216 mm"),
    ],
)
def test_bad_symmetry_arguments_are_named(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SymmetryAugmentation(GEOMETRY, **arguments)


def test_the_rate_is_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "experiments" / "benchmarks" / "rmas_rate.py"
    output = tmp_path / "reports" / "rmas_rate.json"
    threads = str(torch.get_num_threads())
    arguments = ["--stacks", "700", "--geometry", "laptop", "--threads", threads, "--output", str(output)]
    monkeypatch.setattr("sys.argv", [script.name, *arguments, "--mask", "soft", "binary"])
    runpy.run_path(str(script), run_name="__main__")
    report = json.loads(output.read_text())
    assert {"command", "date", "versions", "hardware", "seeds", "rows"} <= set(report)
    assert [row["mask"] for row in report["rows"]] == ["soft", "binary"]
    for row in report["rows"]:
        assert row["stacks"] >= 700
        assert row["rate"] == pytest.approx(row["stacks"] / row["seconds"])
        assert row["largest_error_of_the_sum"] == 0
    assert "per second" in capsys.readouterr().out
