"""``allpet predict`` on a user's folder: what comes in is kept, what comes out says where it is from."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import TinyPairs
from tiny_pet import GEOMETRY

import callbacks
from allpet import (
    AttentionUse,
    Autoencoder,
    BridgeSampling,
    Denoiser,
    LatentBridge,
    LatentDiffusion,
    PixelSpace,
    PriorRestoration,
    Prompt,
    Radon,
    TransparentMedicalAttention,
    roi_box,
)
from allpet.attenuation import BONE
from allpet.cli import main
from allpet.conditions import LABEL_SIZE, Condition
from allpet.io import Scan, read_scan, write_scan
from allpet.metrics import standard_image
from allpet.orientations import Orientations
from allpet.prompts import count_prompts
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS
from allpet.simulation.tissues import LABELS
from allpet.systems.knowledge import Knowledge, TaskKnowledge, level
from allpet.systems.paired import PairedSampling, Restored
from callbacks.attention_overlay import attention_overlay, tinted_areas
from callbacks.restoration_writer import restoration_gallery
from data_modules import SinogramsToRestore
from data_modules.paired import PairedSet
from data_modules.paired_mix import MixedPairs

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
    sampling = type(system.sampling)(nfe=2, samples=3, data_consistency=16)  # as the file says
    # in the batches of the run: sixteen updates of what is hardly trained make much of rounding
    pieces = [data.batch(rows) for rows in (range(2), range(2, 4), range(4, 5))]
    parts_by_hand = [system.restore(one.input, one.condition, one.seed.tolist(), sampling) for one in pieces]
    by_hand = Restored.of(torch.cat([one.samples for one in parts_by_hand], dim=1))
    written = [read_scan(run / part / "p7/scan.h5") for part in parts]
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(by_hand.mean.max())}
    torch.testing.assert_close(torch.from_numpy(written[0].values), by_hand.mean[:3, 0], **tolerance)
    torch.testing.assert_close(torch.from_numpy(written[2].values), by_hand.std[:3, 0], **tolerance)
    images = torch.stack([standard_image(Radon(GEOMETRY), sample) for sample in by_hand.samples[:, :3]])
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
    assert sinograms.provenance["gain"] == 1
    assert "note" not in sinograms.provenance
    assert image.kind == "image"
    assert image.pixel_mm == GEOMETRY.pixel_mm


def test_values_of_unknown_units_are_brought_to_the_models_and_back(model, folder, slices, tmp_path):
    counts = tmp_path / "counts"
    counts.mkdir()
    few = ["--model.sampling.data_consistency", "4"]  # more updates of what is hardly trained make much of rounding
    for factor in (1, 1000):
        np.save(counts / "x.npy", factor * slices[:2])
        run = restore(model, counts, *few)
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


def test_the_picture_shows_what_the_fit_attended_to(model, folder, monkeypatch):
    """The areas of what the network drew before the fit, not those of the result."""
    shown = []
    overlay = callbacks.restoration_writer.attention_overlay
    monkeypatch.setattr(
        callbacks.restoration_writer, "attention_overlay", lambda *given: shown.append(given) or overlay(*given)
    )
    restore(model, folder, "--data.gain", "1.0")
    results, found = shown[0][-2:]
    system = LatentBridge.from_pretrained(model)
    data = SinogramsToRestore(str(folder), dose=0.1, gain=1.0)
    data.setup()
    batch = data.batch(range(5))
    drawn = system.restore(batch.input, batch.condition, batch.seed.tolist(), BridgeSampling(nfe=2, samples=3)).mean
    wanted = system.attention.areas(drawn)
    assert torch.equal(found.hot, wanted.hot)
    assert torch.equal(found.cold, wanted.cold)
    assert not torch.equal(wanted.cold, system.attention.areas(results).cold)


def test_what_is_noted_of_sampling_is_what_came_into_play(folder, tmp_path):
    settings = {"layers_per_block": 1, "attention": (False, False), "label_size": LABEL_SIZE}
    system = LatentBridge(PixelSpace(), Denoiser(1, 1, (8, 16), **settings))
    system.autoencoder.scaling.set_scale(500.0)
    system.geometry, system.orientations = GEOMETRY, Orientations(180.0, True)
    system.save_pretrained(tmp_path / "plain")
    bare = ["--data.dose", "null"]
    cases = {"low_dose": [], "attenuation": bare, "delayed": [*bare, "--data.delay_min", "60"]}
    cases["conversion"] = [*bare, "--data.target_tracers", "[PSMA]"]
    suiting = {"low_dose": 16, "attenuation": 32, "delayed": 16, "conversion": 0}  # the file leaves it to the task
    for task, more in cases.items():
        run = restore(tmp_path / "plain", folder / "p8", "--data.gain", "1", "--data.task", task, *more)
        noted = read_scan(run / "sinograms/bare.h5").provenance
        assert f"data_consistency={suiting[task]}," in noted["sampling"]
        assert noted["orientations"] == 3  # one for each sample, though there are many more
        assert (run / "attenuation").exists() == (task == "attenuation")
    asked = ["--data.task", "conversion", *cases["conversion"], "--model.sampling.data_consistency", "4"]
    run = restore(tmp_path / "plain", folder / "p8", "--data.gain", "1", *asked)
    assert "data_consistency=4," in read_scan(run / "sinograms/bare.h5").provenance["sampling"]


def test_the_attenuation_that_was_found_is_written_and_shown(model, folder, monkeypatch):
    """In 1/mm whatever the unit of the sinograms, and only where something was fitted."""
    shown = []
    gallery = callbacks.restoration_writer.restoration_gallery
    monkeypatch.setattr(
        callbacks.restoration_writer, "restoration_gallery", lambda *given: shown.append(given) or gallery(*given)
    )
    asked = ["--data.task", "attenuation", "--data.dose", "null", "--data.gain", "3.0", "--data.batch_size", "2"]
    write_scan(folder / "p7" / "scan.h5", replace(read_scan(folder / "p7" / "scan.h5"), state=("randoms_subtracted",)))
    run = restore(model, folder, *asked)
    scan = read_scan(run / "attenuation/p7/scan.h5")
    assert (scan.kind, scan.units, scan.pixel_mm) == ("image", "1/mm", GEOMETRY.pixel_mm)
    assert scan.provenance["content"] == "mean over 3 sample(s)"
    system = LatentBridge.from_pretrained(model)
    data = SinogramsToRestore(str(folder), task="attenuation")
    data.setup()
    batch = data.batch(range(2))
    sampling = BridgeSampling(nfe=2, samples=3, data_consistency=32)
    wanted = system.restore(3 * batch.input, batch.condition, batch.seed.tolist(), sampling).attenuation
    torch.testing.assert_close(torch.from_numpy(scan.values)[:2], wanted[:, 0], rtol=1e-2, atol=1e-4)
    assert 0.001 < float(wanted.max()) <= BONE
    parts = shown[0][0][0][1]
    through = torch.exp(-Radon(GEOMETRY).project(parts["attenuation"][None]))[0]
    torch.testing.assert_close(parts["attenuation factor"], through)
    assert not (restore(model, folder, *asked, "--model.sampling.data_consistency", "0") / "attenuation").exists()


def test_stage_2_alone_restores_a_low_dose(folder, tmp_path):
    torch.manual_seed(0)
    small = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8}
    stage2 = LatentDiffusion(Autoencoder((8, 16)), Denoiser(4, 0, (8, 16), **small))
    stage2.geometry = GEOMETRY
    stage2.autoencoder.scaling.set_scale(500.0)
    stage2._aside.levels = {"open:open": 40.0, "FDG:pelvis": 20.0}
    stage2.save_pretrained(tmp_path / "ldm")
    words = ["--model", "allpet.PriorRestoration.from_pretrained", "--model.folder", str(tmp_path / "ldm")]
    run = restore(tmp_path / "ldm", folder, "--data.gain", "2.0", *words, "--data.roi_box", "[-60,0,0,60]")
    assert (run / "attention.png").exists()
    data = SinogramsToRestore(str(folder), dose=0.1)
    data.setup()
    batch = data.batch(range(5))  # as the run does
    method = PriorRestoration.from_pretrained(tmp_path / "ldm")
    sampling = PairedSampling(nfe=2, samples=3, data_consistency=16)
    roi = roi_box(GEOMETRY, (-60, 0), (0, 60)).expand(5, -1, -1, -1)
    seeds = batch.seed.tolist()
    by_hand = method.restore(2 * batch.input, batch.condition, seeds, sampling, roi=roi).mean[:3, 0] / 2
    written = torch.from_numpy(read_scan(run / "sinograms/p7/scan.h5").values)
    torch.testing.assert_close(written, by_hand, rtol=1e-3, atol=1e-3 * float(by_hand.max()))
    data.trainer = SimpleNamespace(lightning_module=method)
    ours = level(torch.from_numpy(np.concatenate([found.slices for found in data.files])))
    data.setup()
    wanted = torch.tensor([40.0, 20.0, 20.0, 40.0, 40.0]) / ours
    assert data.gain == pytest.approx(float(wanted.median()), rel=1e-3), "as strong as what stage 2 was trained on"
    later = ["--data.task", "delayed", "--data.dose", "null", "--data.delay_min", "60"]
    with pytest.raises(SystemExit, match="Stage 2 alone restores low doses, but is asked for delayed"):
        restore(tmp_path / "ldm", folder, *words, *later)


def test_two_targets_follow_one_another(model, folder):
    options = ["--data.task", "separation", "--data.target_tracers", "[FDG, PSMA]", "--data.dose", "null"]
    run = restore(model, folder, *options, "--model.sampling.samples", "1")
    scan = read_scan(run / "sinograms/p7/scan.h5")
    assert len(scan.values) == 6
    assert scan.table["tracer"] == ["FDG", "PSMA"] * 3
    assert scan.table["region"] == ["abdomen"] * 2 + ["pelvis"] * 4
    assert scan.provenance["note"].startswith("two tracers in one static scan cannot be told apart by physics")


def test_what_has_to_be_said_of_a_task_stands_above_its_pictures():
    parts = {name: torch.rand(1, 4, 4) for name in ("input", "sinograms", "input image", "images")}
    for task, said in (("conversion", "conversion: hypothetical"), ("attenuation", "not given but inferred")):
        title = " ".join(restoration_gallery([("a", parts, None)], 3, task).get_suptitle().split())
        assert said in title
        assert "not for diagnosis" in title
    assert "inferred" not in restoration_gallery([("a", parts, None)], 3, "low_dose").get_suptitle()


# ----------------------------------------------------------------------------------------------- gain and prompts


def pairs_of(names: list[str], task: str = "low_dose") -> PairedSet:
    """Noisy pairs of heads, small and hot, and of bellies, wide, some with a hot spot, 10 slices of each prompt."""
    x, y = GEOMETRY.pixel_centers
    images, prompts = [], [name for name in names for _ in range(10)]
    for i, name in enumerate(prompts):
        a, b, brightness, spot = torch.rand(4, generator=keyed_generator(task, i, "body")).tolist()
        head = name.endswith("brain")
        body = (torch.hypot(x - 20 * a, y - 20 * b) < (70 if head else 130)).float()
        hot = 0.0 if head or spot < 0.7 else 12 * (torch.hypot(x, y + 10) < 20)
        images.append((0.9 + 0.2 * brightness) * ((6 if head else 1) * body + hot))
    target = Radon(GEOMETRY).project(torch.stack(images)[:, None])
    noise = target.mean() * torch.randn(target.shape, generator=keyed_generator(task, "noise"))
    n, targets = len(prompts), 2 if task == "separation" else 1
    one, share = torch.ones(n), torch.tensor([0.4, 0.6][:targets])[:, None, None] if targets == 2 else 1.0
    arrays = {"input": target + 0.3 * noise, "expected": share * target, "noisy": share * (target + 0.1 * noise)}
    arrays |= {"delay_min": 0 * one, "dose": 0.1 * one, "share": one[:, None].expand(-1, targets)}
    tracers = torch.tensor([[1, 3][:targets]] * n)
    return PairedSet(arrays, task, tracers, Prompt.of(prompts), torch.arange(n), torch.arange(n) // 2)


def taught(pairs: PairedSet | MixedPairs) -> LatentBridge:
    """A system that has measured pairs, as it does when its training starts."""
    settings = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8, "label_size": LABEL_SIZE}
    system = LatentBridge(PixelSpace(), Denoiser(1, 1, (8, 16), **settings))
    system.geometry = GEOMETRY
    data = SimpleNamespace(train_set=pairs, scale=1000.0)
    system._trainer = SimpleNamespace(datamodule=data, precision_plugin=SimpleNamespace(forward_context=torch.no_grad))
    system.on_fit_start()
    return system.eval()


def ready(folder: Path, system: LatentBridge, **given) -> SinogramsToRestore:
    data = SinogramsToRestore(
        str(folder), **({"dose": 0.1} if given.get("task", "low_dose") == "low_dose" else {}), **given
    )
    data.trainer = SimpleNamespace(lightning_module=system)
    data.setup("predict")
    return data


def written(place: Path, values: torch.Tensor) -> Path:
    place.mkdir(exist_ok=True)
    np.save(place / "scan.npy", values[:, 0].numpy())
    return place


def test_images_are_refused_though_they_fit(tmp_path):
    x, y = GEOMETRY.pixel_centers
    discs = torch.stack([(x**2 + y**2 < radius**2).float() for radius in (80, 120)])[:, None]
    folder, system = written(tmp_path / "images", discs), taught(pairs_of(["FDG:brain"]))
    assert discs.shape[2:] == GEOMETRY.sinogram_shape
    with pytest.raises(
        ValueError, match=r"images seems to hold images \(2 of 2 slices .*\), but models restore sinograms"
    ):
        ready(folder, system)


def test_files_of_different_units_are_told_of(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    system, given = taught(pairs_of(["FDG:abdomen"])), pairs_of(["FDG:abdomen"]).arrays["input"]
    written(tmp_path / "x", given[:3])
    ready(tmp_path / "x", system)
    np.save(tmp_path / "x" / "p2.npy", 1.5 * given[3:6, 0].numpy())
    ready(tmp_path / "x", system)
    assert "one gain serves the folder" not in caplog.text
    np.save(tmp_path / "x" / "p2.npy", 40 * given[3:6, 0].numpy())
    ready(tmp_path / "x", system)
    assert "scan.npy would need" in caplog.text
    assert "times the gain of p2.npy" in caplog.text
    assert "bring all files to one unit" in caplog.text


def test_the_gain_is_that_of_the_tracer_and_the_region_and_follows_units_exactly(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = ["FDG:brain", "FDG:abdomen"]
    system, fresh = taught(pairs_of(names)), pairs_of(names[::-1]).arrays["input"]
    for region, given in (("abdomen", fresh[:6]), ("brain", fresh[10:16])):
        gains = [
            ready(written(tmp_path / "x", factor * given), system, tracer="FDG", region=region).gain
            for factor in (1.0, 1000.0)
        ]
        assert gains[0] == pytest.approx(1, abs=0.25), region
        assert gains[1] == pytest.approx(gains[0] / 1000, rel=1e-5)
    both = torch.cat([fresh[:6], fresh[10:16]])
    table = {"tracer": ["FDG"] * 12, "region": ["abdomen"] * 6 + ["brain"] * 6}
    write_scan(tmp_path / "both/scan.h5", Scan(both[:, 0].numpy(), "sinogram", GEOMETRY, table=table))
    assert ready(tmp_path / "both", system).gain == pytest.approx(1, abs=0.25)
    # without prompts there is one number for all of them
    assert ready(tmp_path / "x", system).gain * 1000 != pytest.approx(1, abs=0.25)
    assert "6 of 6 slices do not say their tracer and region, without which a model restores worse" in caplog.text
    assert "do not say how wide their bins are, so 20 mm are assumed" in caplog.text
    assert "does not say how strong" not in caplog.text
    # models of before do as before, and say how to do better
    caplog.clear()
    system.knowledge = None
    old = ready(tmp_path / "x", system, tracer="FDG", region="brain").gain
    assert old == pytest.approx(ready(tmp_path / "x", system).gain)
    assert "give it with --data.gain, 1 for values in SUV x mm" in caplog.text
    assert ready(tmp_path / "x", system, gain=2.0).gain == 2


def test_the_warnings_are_for_what_is_not_said_alone(folder, model, caplog):
    caplog.set_level(logging.INFO)
    ready(folder, LatentBridge.from_pretrained(model), tracer="FDG")
    assert "2 of 5 slices do not say their region, without which a model restores worse" in caplog.text
    assert "bins" not in caplog.text, "one of the files says how wide they are"
    caplog.clear()
    ready(folder, LatentBridge.from_pretrained(model), tracer="FDG", region="abdomen")
    assert "do not say their" not in caplog.text


def test_the_gain_of_a_sum_of_two_tracers_does_not_depend_on_how_pairs_are_dealt_with(tmp_path):
    names = ["FDG:abdomen"]
    parts = [pairs_of(names, task) for task in ("separation", "low_dose")]
    for system in (taught(MixedPairs(parts)), taught(parts[0])):
        folder = written(tmp_path / "x", parts[0].arrays["input"][:6])
        asked = {"task": "separation", "target_tracers": ["FDG", "PSMA"], "tracer": "FDG", "region": "abdomen"}
        assert ready(folder, system, **asked).gain == pytest.approx(1, abs=0.1)
    assert float(taught(MixedPairs(parts)).input_ratio[TASKS.index("separation")]) == pytest.approx(2, rel=0.05)


def test_what_a_model_never_learned_is_refused_before_anything_is_restored(tmp_path):
    folder = written(tmp_path / "x", pairs_of(["FDG:abdomen"]).arrays["input"][:2])
    system = taught(pairs_of(["FDG:abdomen"]))
    with pytest.raises(ValueError, match="was trained for low_dose, but is asked for attenuation: use a model"):
        ready(folder, system, task="attenuation")
    system.knowledge = Knowledge({"conversion": TaskKnowledge(("PSMA",))})
    with pytest.raises(ValueError, match="trained to give PSMA in conversion, but is asked for DOPA: ask for what"):
        ready(folder, system, task="conversion", target_tracers=["DOPA"])
    system.knowledge, system.sampling = None, BridgeSampling(nfe=1, samples=8)
    with pytest.raises(ValueError, match=r"one call \(nfe=1\) gives the same each time"):
        ready(folder, system, task="attenuation")
    system.sampling = BridgeSampling(nfe=1, samples=8, data_consistency=2)
    ready(folder, system)  # samples of what is fitted differ


def test_what_no_training_pair_showed_is_doubted(tmp_path, caplog, model):
    caplog.set_level(logging.INFO)
    system = taught(pairs_of(["FDG:abdomen", "FDG:brain"]))
    folder = written(tmp_path / "x", pairs_of(["FDG:abdomen"]).arrays["input"][:2])
    ready(folder, system, tracer="FDG", region="abdomen", gain=1.0)
    assert "nothing in training" not in caplog.text
    assert "training pairs had" not in caplog.text
    ready(folder, system, tracer="PSMA", region="pelvis", gain=1.0)
    assert "said to show PSMA:pelvis, so results mean little; there are FDG:abdomen, FDG:brain." in caplog.text
    assert "does not know how strong" not in caplog.text, "where the gain is given"
    ready(folder, system, tracer="PSMA", region="pelvis")
    assert "the model does not know how strong scans of PSMA:pelvis are, so the level of all" in caplog.text
    caplog.clear()
    ready(folder, system, tracer="FDG")  # left open: not doubted, but told
    assert "nothing in training" not in caplog.text

    # in Python, too; and what is exported knows the same
    asked = Condition.of("low_dose", ["FDG:trunk"], dose=0.3)
    sentences = ["nothing in training was said to show FDG:trunk", "dose is 0.3, but training pairs had 0.1 to 0.1"]
    found = system.knowledge.doubts(asked)
    assert [one.startswith(two) for one, two in zip(found, sentences, strict=True)] == [True, True]
    assert Knowledge.from_dict(json.loads(json.dumps(system.knowledge.to_dict()))) == system.knowledge
    given = torch.rand(1, 1, *GEOMETRY.sinogram_shape)
    with pytest.warns(UserWarning, match="nothing in training was said to show FDG:trunk") as warned:
        system.restore(given, asked, [0], BridgeSampling(nfe=1))
    assert {Path(one.filename).name for one in warned} == {Path(__file__).name}, "of who asked"
    late = Knowledge({"delayed": TaskKnowledge(delay_min=(30.0, 120.0))})
    assert not late.doubts(Condition.of("delayed", ["FDG:abdomen"], delay_min=60.0))
    assert late.doubts(Condition.of("delayed", ["FDG:abdomen"], delay_min=600.0)) == [
        "delay_min is 600, but training pairs had 30 to 120"
    ]
    own = Knowledge({"low_dose": TaskKnowledge((), {"open:open": 9.0, "FDG:open": 8.0}, ("FDG:open",))})
    assert not own.doubts(Condition.of("low_dose", ["FDG:brain"], dose=0.1)), "pairs did not say their region"
    assert own.doubts(Condition.of("low_dose", ["PSMA:brain"], dose=0.1))
    lacks = [own.tasks["low_dose"].lacks_level(name) for name in ("FDG:brain", "PSMA:brain", "PSMA:open", "FDG:open")]
    assert lacks == [False, True, False, False]
    before = Knowledge.from_dict({"low_dose": {"targets": [], "levels": {}}})  # as exports of before say
    assert not before.doubts(asked)


def test_stage_2_alone_doubts_what_it_never_saw():
    small = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8}
    stage2 = LatentDiffusion(Autoencoder((8, 16)), Denoiser(4, 0, (8, 16), **small))
    stage2.geometry, stage2._aside.levels = GEOMETRY, {"open:open": 40.0}
    method = PriorRestoration(stage2)
    assert not method.knowledge.doubts(Condition.of("low_dose", ["PSMA:pelvis"], dose=0.1)), "it does not say"
    stage2._aside.prompts = count_prompts(Prompt.of(["FDG:brain", "FDG:abdomen"]))
    for prompt, doubts in (("FDG:brain", 0), ("FDG:trunk", 0), ("open:brain", 0), ("FDG:pelvis", 1)):
        assert len(method.knowledge.doubts(Condition.of("low_dose", [prompt], dose=0.1))) == doubts, prompt
    given = torch.rand(1, 1, *GEOMETRY.sinogram_shape)
    with pytest.warns(UserWarning, match="nothing in training was said to show FDG:pelvis"):
        method.restore(given, Condition.of("low_dose", ["FDG:pelvis"], dose=0.1), [0])


def test_draws_follow_file_and_slice_wherever_they_stand(folder):
    def seeds(seed: int = 0) -> dict[tuple[str, int], int]:
        data = SinogramsToRestore(str(folder), dose=0.1, gain=1.0, seed=seed)
        data.setup()
        batch = data.batch(range(data.n_slices))
        return dict(zip(batch.origin, batch.seed.tolist(), strict=True))

    before = seeds()
    assert len(set(before.values())) == 5
    np.save(folder / "a.npy", np.random.default_rng(0).random((2, 16, 16), np.float32))  # the first in order
    after = seeds()
    assert {key: after[key] for key in before} == before
    assert not set(seeds(1).values()) & set(after.values())


# ------------------------------------------------------------------------------------------ state of what is given


def test_what_was_corrected_is_not_corrected_again(slices, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def read(task: str = "attenuation", **given) -> SinogramsToRestore:
        write_scan(tmp_path / "x/scan.h5", Scan(slices, "sinogram", GEOMETRY, **given))
        data = SinogramsToRestore(str(tmp_path / "x"), task=task, dose=0.1 if task == "low_dose" else None)
        data.setup()
        return data

    corrected, acf = ("attenuation_corrected",), np.full_like(slices, 4.0)
    with pytest.raises(ValueError, match=r"its correction factors go from 0\.4 to 0\.4, but none is below 1"):
        read(state=corrected, acf=0.1 * acf)
    with pytest.raises(ValueError, match="its state is attenuation_corrected, and a second correction would be wrong"):
        read(state=corrected)
    data = read(state=corrected, acf=acf)
    np.testing.assert_allclose(data.batch([0]).input[0, 0].numpy(), data.gain * slices[0] / 4)
    np.testing.assert_allclose(read(acf=acf).batch([0]).input[0, 0].numpy(), slices[0])
    np.testing.assert_allclose(read("low_dose", state=corrected, acf=acf).batch([0]).input[0, 0].numpy(), slices[0])
    for task in ("attenuation", "low_dose"):
        with pytest.raises(ValueError, match=r"scatter and randoms come with it \(additive\).*subtract them first"):
            read(task, additive=0.1 * acf)
    counts = np.abs(slices)
    write_scan(tmp_path / "x/scan.h5", Scan(counts, "sinogram", GEOMETRY, state=("prompts",)))
    SinogramsToRestore(str(tmp_path / "x"), dose=0.1).setup()
    assert "its state is prompts, with randoms in them; subtract those first" in caplog.text


# ------------------------------------------------------------------------------------------------------- regions


def test_a_region_is_a_mask_labels_of_it_or_a_box(folder, model, tmp_path):
    system = LatentBridge.from_pretrained(model)
    labels = np.zeros((1, 16, 16), np.float32)
    labels[0, 4:8, 5:9], labels[0, 10:12, 3:5], labels[0, 13, 2] = 7, LABELS["liver"], 3
    np.save(tmp_path / "labels.npy", labels)
    mask = {"roi": str(tmp_path / "labels.npy")}

    def marked(**given) -> np.ndarray:
        return ready(folder, system, **given).roi[0, 0].numpy()

    assert np.array_equal(marked(**mask), labels[0] > 0)
    assert np.array_equal(marked(**mask, roi_label=7), labels[0] == 7)
    assert np.array_equal(marked(**mask, roi_label=[7, "liver"]), (labels[0] == 7) | (labels[0] == LABELS["liver"]))
    x, y = (values.numpy() for values in GEOMETRY.pixel_centers)
    box = marked(roi_box=(-60.0, 20.0, 0.0, 80.0))
    assert np.array_equal(box, (abs(x + 20) <= 40) & (abs(y - 40) <= 40))
    batch = ready(folder, system, roi_box=(-60.0, 20.0, 0.0, 80.0)).batch([0, 3])
    assert batch.roi.shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"labels\.npy: it holds no label 9, but 0, 3, 7, 20; name a label that it"):
        marked(**mask, roi_label=9)
    with pytest.raises(ValueError, match="There is no tissue 'knee'"):
        marked(**mask, roi_label="knee")
    with pytest.raises(ValueError, match="holds no pixel"):
        marked(roi_box=(500.0, 600.0, 0.0, 80.0))


def test_a_box_is_given_on_the_command_line(model, folder):
    few = ["--model.sampling.samples", "1", "--model.sampling.nfe", "1", "--data.roi_box", "[-60, 20, 0, 80]"]
    run = restore(model, folder, *few)
    assert read_scan(run / "sinograms/p7/scan.h5").provenance["region_of_interest"]


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
        (
            {"task": "low_dose", "dose": 20.0},
            "dose is 20, but must be a share of the normal dose, above 0 and at most 1",
        ),
        (
            {"task": "delayed", "delay_min": float("nan")},
            "delay_min is nan, but must be finite and not negative, in minutes",
        ),
        ({"task": "attenuation", "dose": 0.1}, "dose is 0.1, but the task is attenuation: leave it out"),
        ({"task": "low_dose", "dose": 0.1, "delay_min": 60.0}, "delay_min is 60.0, but the task is low_dose: leave"),
        ({"task": "separation", "target_tracers": ["FDG", "18F-FDG"]}, "but must be two that differ"),
        ({"roi": "a.npy", "roi_box": (0.0, 1.0, 0.0, 1.0)}, r"Both a mask \(roi\) and a box \(roi_box\) are given"),
        ({"roi_label": 3}, "speak of a mask, but there is none: name its file"),
        ({"roi_box": (1.0, 0.0, 0.0, 1.0)}, r"roi_box is \[1.0, 0.0, 0.0, 1.0\], but must be left, right"),
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
    spot = Radon(GEOMETRY).project(roi.float())
    figure = attention_overlay(attention, given, results=given, fitted=attention.areas(given + 5 * spot))
    before, after = (np.asarray(figure.axes[k].images[0].get_array()) for k in (1, 5))
    red = [(picture[..., 0] - picture[..., 2] > 0.05)[roi[0, 0].numpy()].any() for picture in (before, after)]
    assert red == [False, True], "areas that the fit attended to are drawn on the result"


def test_the_writer_refuses_what_restores_nothing():
    with pytest.raises(ValueError, match="image is 'x'"):
        callbacks.RestorationWriter("x")
    with pytest.raises(TypeError, match="restores nothing"):
        callbacks.RestorationWriter().setup(None, torch.nn.Linear(1, 1), "predict")
