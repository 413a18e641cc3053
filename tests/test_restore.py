"""``allpet predict`` on a user's folder: what comes in is kept, what comes out says where it is from."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import TinyPairs
from tiny_pet import GEOMETRY

import callbacks
from allpet import AttentionUse, Autoencoder, Denoiser, LatentBridge, Radon, TransparentMedicalAttention, fbp
from allpet.cli import main
from allpet.conditions import LABEL_SIZE
from allpet.io import Scan, read_scan, write_scan
from callbacks.attention_overlay import attention_overlay, tinted_areas
from data_modules import SinogramsToRestore

RESTORE = ["predict", "-c", str(Path(__file__).parents[1] / "experiments" / "restore.yaml")]


@pytest.fixture(scope="module", autouse=True)
def _alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["allpet"])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A bridge that attends, hardly trained."""
    torch.manual_seed(0)
    settings = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8, "label_size": LABEL_SIZE}
    denoiser = Denoiser(4, 5, (8, 16), **settings)
    torch.nn.init.normal_(denoiser.unet.conv_out.weight, std=0.3)
    system = LatentBridge(Autoencoder((8, 16)), denoiser, attention=AttentionUse())
    system.autoencoder.scaling.set_scale(500.0)
    system.geometry = GEOMETRY
    folder = tmp_path_factory.mktemp("model") / "pretrained"
    system.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def slices() -> np.ndarray:
    data = TinyPairs()
    data.setup()
    return data.train_set[list(range(5))].input[:, 0].numpy()


@pytest.fixture
def folder(slices, tmp_path) -> Path:
    """Two patients: one file that says much of itself, one that says nothing."""
    table = {"patient": ["p7"] * 3, "tracer": ["FDG"] * 3, "region": ["abdomen", "pelvis", "pelvis"]}
    state, provenance = ("randoms_subtracted", "attenuation_corrected"), {"scanner": "of mine"}
    scan = Scan(slices[:3], "sinogram", GEOMETRY, units="SUV x mm", state=state, table=table, provenance=provenance)
    write_scan(tmp_path / "mine" / "p7" / "scan.h5", scan)
    (tmp_path / "mine" / "p8").mkdir()
    np.save(tmp_path / "mine" / "p8" / "bare.npy", slices[3:])
    return tmp_path / "mine"


def restore(model: Path, folder: Path, *options: str) -> Path:
    root = folder.parent / "restored"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--run.root", str(root)]
    small = ["--model.sampling.nfe", "2", "--model.sampling.samples", "3"]
    words = ["--model.folder", str(model), "--data.folder", str(folder), "--data.dose", "0.1"]
    main([*RESTORE, *quiet, *small, *words, *options])
    return max(root.iterdir())


def test_a_folder_is_restored_file_by_file(model, folder, slices, capsys):
    run = restore(model, folder, "--data.gain", "1.0", "--data.batch_size", "2")
    out = capsys.readouterr().out
    assert "Wrote 5 restored slice(s) of 2 file(s), gallery.png, attention.png to" in out
    found = {path.relative_to(run).as_posix() for path in run.rglob("*.h5")}
    parts = ("sinograms", "images", "sinograms_std", "images_std")
    assert found == {f"{part}/{name}" for part in parts for name in ("p7/scan.h5", "p8/bare.h5")}
    for name in ("gallery.png", "attention.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200

    # the same as by hand
    system = LatentBridge.from_pretrained(model)
    data = SinogramsToRestore(str(folder), dose=0.1, gain=1.0)
    data.setup()
    batch = data.batch(range(5))
    assert batch.input[:, 0].numpy().tolist() == slices.tolist()
    assert batch.condition.prompt.names() == ["FDG:abdomen", "FDG:pelvis", "FDG:pelvis", "open:open", "open:open"]
    assert batch.origin == [
        ("p7/scan.h5", 0),
        ("p7/scan.h5", 1),
        ("p7/scan.h5", 2),
        ("p8/bare.npy", 0),
        ("p8/bare.npy", 1),
    ]
    sampling = type(system.sampling)(nfe=2, samples=3, data_consistency=4)  # as the file says
    by_hand = system.restore(batch.input, batch.condition, range(5), sampling)
    written = [read_scan(run / part / "p7/scan.h5") for part in parts]
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(by_hand.mean.max())}
    torch.testing.assert_close(torch.from_numpy(written[0].values), by_hand.mean[:3, 0], **tolerance)
    torch.testing.assert_close(torch.from_numpy(written[2].values), by_hand.std[:3, 0], **tolerance)
    images = torch.stack([fbp(Radon(GEOMETRY), sample) for sample in by_hand.samples[:, :3]])
    torch.testing.assert_close(torch.from_numpy(written[3].values), images.std(0)[:, 0], rtol=1e-2, atol=0.1)
    assert written[1].values.shape == (3, *GEOMETRY.image_shape)

    # what was known is still known, and that a model has been at work is said
    sinograms, image = written[0], written[1]
    assert sinograms.table["region"] == ["abdomen", "pelvis", "pelvis"]
    assert sinograms.geometry == GEOMETRY
    assert sinograms.units == "SUV x mm"
    assert set(sinograms.state) == {"randoms_subtracted", "attenuation_corrected", "synthetic"}
    assert sinograms.provenance["processed_by_model"]
    assert sinograms.provenance["input_provenance"]["scanner"] == "of mine"
    assert sinograms.provenance["task"] == "low_dose"
    assert image.kind == "image"
    assert image.pixel_mm == GEOMETRY.pixel_mm


def test_values_of_unknown_units_are_brought_to_the_models_and_back(model, folder, slices, tmp_path):
    counts = tmp_path / "counts"
    counts.mkdir()
    for factor in (1, 1000):
        np.save(counts / "x.npy", factor * slices[:2])
        run = restore(model, counts)
        if factor == 1:
            first = read_scan(run / "sinograms/x.h5").values
    np.testing.assert_allclose(read_scan(run / "sinograms/x.h5").values, 1000 * first, rtol=1e-2)


def test_a_region_of_interest_changes_what_comes_out(model, folder, tmp_path):
    mask = np.zeros((1, 16, 16), np.float32)
    mask[0, 4:8, 5:9] = 1
    np.save(tmp_path / "mask.npy", mask)
    few = ["--model.sampling.samples", "1", "--model.sampling.nfe", "1"]
    asked = ["--data.roi", str(tmp_path / "mask.npy")]
    runs = [restore(model, folder, *few), restore(model, folder, *few, *asked)]
    values = [read_scan(run / "sinograms/p7/scan.h5") for run in runs]
    assert values[1].provenance["region_of_interest"]
    assert not np.allclose(values[1].values, values[0].values, rtol=1e-3)
    assert not (runs[0] / "images_std").exists()  # of one sample there is no deviation


def test_two_targets_follow_one_another(model, folder):
    options = ["--data.task", "separation", "--data.target_tracers", "[FDG, PSMA]"]
    run = restore(model, folder, *options, "--model.sampling.samples", "1")
    scan = read_scan(run / "sinograms/p7/scan.h5")
    assert len(scan.values) == 6
    assert scan.table["target"] == ["FDG", "PSMA"] * 3
    assert scan.table["region"] == ["abdomen"] * 2 + ["pelvis"] * 4


def test_bad_input_is_one_sentence(model, folder, slices, tmp_path):
    np.save(tmp_path / "masks.npy", np.ones((3, 16, 16), np.float32))
    np.save(tmp_path / "odd.npy", np.ones((1, 9, 9), np.float32))
    (tmp_path / "wide").mkdir()
    np.save(tmp_path / "wide" / "a.npy", np.concatenate([slices, slices], axis=2))
    (tmp_path / "empty").mkdir()
    images = Scan(np.abs(slices[:1]), "image", pixel_mm=20.0, slice_mm=20.0)
    write_scan(tmp_path / "images" / "a.h5", images)
    system, wide = LatentBridge.from_pretrained(model), "holds 16 x 32 sinograms (views x bins), but the model was"
    cases = [
        (folder, {"roi": str(tmp_path / "masks.npy")}, "holds 3 masks for the 5 slices"),
        (folder, {"roi": str(tmp_path / "odd.npy")}, "its mask has 9 x 9 pixels, the image 16 x 16"),
        (tmp_path / "wide", {}, wide),
        (tmp_path / "empty", {}, "cannot be used: it holds no .mat"),
        (tmp_path / "images", {}, "holds images (a.h5), but models restore sinograms"),
    ]
    for given, options, sentence in cases:
        data = SinogramsToRestore(str(given), dose=0.1, **options)
        data.trainer = SimpleNamespace(lightning_module=system)
        with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
            data.setup("predict")
        assert "\n" not in str(refused.value)
    # Before a run is made, and after, the command says the same without a traceback.
    commands = [
        (folder, ["--data.dose", "null"], "low_dose needs the share of the normal dose that the scans have: DOSE=0.05"),
        (tmp_path / "wide", [], wide),
    ]
    for given, words, sentence in commands:
        with pytest.raises(SystemExit) as stop:
            restore(model, given, *words)
        assert str(stop.value).startswith("allpet: ")
        assert sentence in str(stop.value)
        assert "\n" not in str(stop.value)
        assert not list((tmp_path / "restored").glob("*")), "what was refused leaves no run"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"task": "low_dose"}, "low_dose needs the share of the normal dose"),
        ({"task": "delayed"}, "delayed needs the minutes"),
        ({"task": "separation", "target_tracers": ["FDG"]}, r"separation takes 2 target tracer\(s\), but got 1"),
        ({"task": "delayed", "delay_min": 60.0, "target_tracers": ["FDG"]}, "leave them out"),
        ({"task": "low_dose", "dose": 20.0}, r"give a delay >= 0 and a dose in \(0, 1\]"),
        ({"task": "conversion", "target_tracers": ["XYZ"]}, "Unknown tracer 'XYZ'"),
        ({"task": "attenuation", "gain": 0.0}, "gain is 0.0"),
        ({"task": "guess"}, "Unknown task 'guess'"),
        ({"task": "attenuation", "tracer": "XYZ"}, "Unknown tracer 'XYZ'"),
    ],
)
def test_what_the_task_needs_is_asked_for(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        SinogramsToRestore("somewhere", **wrong).setup()


def test_pictures_show_areas_where_they_are():
    attention = TransparentMedicalAttention(Radon(GEOMETRY), smooth_mm=20.0)
    x, y = GEOMETRY.pixel_centers
    given = Radon(GEOMETRY).project(((x**2 + y**2) < 110**2).float()[None, None])
    roi = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    roi[..., 5:8, 9:12] = True
    picture = tinted_areas(attention.quick_image(given)[0, 0], attention.areas(given, roi), 0)
    coloured = (picture.amax(-1) - picture.amin(-1)) > 0.05
    assert torch.equal(coloured, roi[0, 0])
    figure = attention_overlay(attention, given.expand(2, -1, -1, -1), roi, 1.0, ["a", "b"])
    assert len(figure.axes) == 10
    shown = np.asarray(figure.axes[4].images[0].get_array())
    np.testing.assert_allclose(shown, attention(given, roi)[0, 0].numpy(), rtol=1e-5)


def test_the_writer_refuses_what_restores_nothing():
    with pytest.raises(ValueError, match="image is 'x'"):
        callbacks.RestorationWriter("x")
    with pytest.raises(TypeError, match="restores nothing"):
        callbacks.RestorationWriter().setup(None, torch.nn.Linear(1, 1), "predict")
