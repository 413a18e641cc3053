"""The evaluation suite as a whole, its classifier, and the command with its page."""

from __future__ import annotations

import base64
import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from test_evaluation import GEOMETRY, discs
from torch import Tensor

from allpet import Autoencoder, AutoencoderSystem, ParallelBeam, Prompt, Radon, symmetry
from allpet.evaluation import Evaluation, evaluate, verdict
from allpet.evaluation.classifier import train_classifier
from allpet.evaluation.naming import LEAST, Labelled, common_prompts, naming_numbers
from allpet.evaluation.verdicts import FEW
from allpet.io import Scan, write_scan
from allpet.prompts import answers, matches
from allpet.randomness import keyed_generator

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def faults(rows: list[dict]) -> set[str]:
    fine = ("", "as real", "below real", "above real", FEW)
    return {row["number"] for row in rows if row["verdict"] not in fine}


def test_real_slices_are_as_real_and_blurred_ones_are_not() -> None:
    real, other, training = discs(48, "real"), discs(40, "more"), discs(40, "training")
    same = evaluate(real, other, GEOMETRY, training=training, training_patients=torch.arange(40) // 2)
    assert len(faults(same.rows())) <= 3  # by chance, one number in twenty
    assert same.numbers["copy_rate_third"] == 0
    assert abs(same.numbers["kid_conv"]) < 3 * same.numbers["kid_conv_floor_std"]
    assert same.numbers["spectrum_image_30mm"] == pytest.approx(1, abs=0.3)
    blurred = evaluate(real, symmetry.blur(other, GEOMETRY, 20.0), GEOMETRY)
    assert {"spectrum_image_30mm", "spectrum_worst_30mm", "spectrum_bins_30mm", "spectrum_angle_16"} <= faults(
        blurred.rows()
    )
    # A blurred sinogram is a sinogram, and its activity is what it was.
    assert not {"hl_residual", "activity_ratio"} & faults(blurred.rows())
    assert "copy_rate" not in blurred.numbers


def test_copies_brightness_and_broken_views_are_found() -> None:
    real, training = discs(40, "real"), discs(40, "training")
    copied = symmetry.roll_views(symmetry.reflect_x(training[:16]), 5) * 1.5
    found = evaluate(real, torch.cat([copied, discs(16, "fresh")]), GEOMETRY, training=training)
    assert found.numbers["copy_rate"] == pytest.approx(0.5, abs=0.1)
    assert found.numbers["copy_rate_third"] == pytest.approx(0.5, abs=0.1)
    assert {"copy_rate", "copy_rate_third", "near_rate"} <= faults(found.rows())
    assert found.nearest is not None
    assert found.nearest.first[:16].tolist() == list(range(16))
    gains = 1 + torch.arange(24).remainder(2)[None, None, :, None]
    broken = evaluate(real, 2 * discs(32, "fresh") * gains, GEOMETRY)
    assert {"row_sum_cv", "activity_ratio", "activity_distance", "kid_conv", "sw_raw"} <= faults(broken.rows())
    assert broken.numbers["activity_ratio"] == pytest.approx(3, rel=0.1)


def test_the_floor_is_by_patient_and_may_come_from_a_second_set() -> None:
    real = discs(12, "real").repeat_interleave(4, dim=0)  # twelve patients of four equal slices
    patients = torch.arange(12).repeat_interleave(4)
    by_slice = evaluate(real, real, GEOMETRY).numbers
    by_patient = evaluate(real, real, GEOMETRY, patients=patients).numbers
    # Halves that share patients seem closer than new patients would be.
    assert by_slice["sw_raw_floor"] < by_patient["sw_raw_floor"]
    assert by_slice["precision_conv_floor"] > by_patient["precision_conv_floor"]
    dim = evaluate(real, real, GEOMETRY, reference=0.5 * discs(24, "second"), patients=patients)
    assert dim.numbers["activity_ratio_floor"] == pytest.approx(0.5, rel=0.1)


def patients_of_two_prompts(n: int, *key: int | str) -> tuple[Tensor, Prompt, Tensor]:
    """Two bright and narrow slices of each brain, two faint and wide ones of each pelvis; every third is a brain."""
    x, y = GEOMETRY.pixel_centers
    images, names = [], []
    for i in range(n):
        brain = i % 3 == 0
        for j in range(2):
            draw = torch.rand(5, generator=keyed_generator(*key, i, j)).tolist()
            size, level = (45 + 12 * draw[0], 3.0) if brain else (85 + 20 * draw[0], 1.0)
            body = (torch.hypot(x, y) < size).float() * level
            spot = torch.hypot(x - size * (draw[1] - 0.5), y - size * (draw[2] - 0.5)) < 14
            images.append(body + 2 * (0.5 + draw[3]) * spot)
            names.append("FDG:brain" if brain else "PSMA:pelvis")
    return Radon(GEOMETRY).project(torch.stack(images)[:, None]), Prompt.of(names), torch.arange(n).repeat_interleave(2)


def test_a_set_of_two_prompts_has_a_floor_that_bad_samples_do_not_reach() -> None:
    """Samples copy the set's prompts, so halves that have more brains by chance would excuse anything."""
    real, prompt, patients = patients_of_two_prompts(36, "real")
    fake, asked, _ = patients_of_two_prompts(36, "fake")
    blurred = symmetry.blur(fake, GEOMETRY, 20.0)
    # as a single step leaves samples: halfway to the mean of their prompt
    means = torch.stack([fake[asked.region == k].mean(0) for k in (1, 5)])
    vague = 0.5 * (fake + means[(asked.region == 5).long()])

    def judged(samples: Tensor, known: bool = True) -> Evaluation:
        prompts = {"real_prompts": prompt, "fake_prompts": asked} if known else {}
        return evaluate(real, samples, GEOMETRY, patients=patients, **prompts)

    itself, good, by_chance = judged(real), judged(fake), judged(fake, known=False)
    assert abs(itself.numbers["kid_conv_floor"]) < 0.1 * by_chance.numbers["kid_conv_floor"]
    assert itself.numbers["kid_conv_floor_std"] < 0.5 * by_chance.numbers["kid_conv_floor_std"]
    assert len(faults(good.rows())) <= 3
    names = {"kid_conv", "sw_conv", "spectrum_image_30mm", "precision_conv"}
    for samples, least in ((blurred, {"kid_conv", "sw_conv"}), (vague, {"sw_conv", "spectrum_image_30mm"})):
        worse = faults(judged(samples).rows()) & names
        assert least <= worse
        assert faults(judged(samples, known=False).rows()) & names < worse


def test_samples_of_one_prompt_alone_are_not_as_real() -> None:
    real, prompt, patients = patients_of_two_prompts(24, "real")
    fake, asked, _ = patients_of_two_prompts(36, "fake")
    rows = (asked.region == 5).nonzero()[:, 0]
    one = evaluate(
        real,
        fake[rows],
        GEOMETRY,
        patients=patients,
        real_prompts=prompt,
        fake_prompts=Prompt(*(h[rows] for h in asked)),
    )
    assert {"kid_conv", "coverage_conv", "recall_conv"} <= faults(one.rows())


def test_an_encoder_adds_its_distances_and_the_result_is_the_same_again() -> None:
    torch.manual_seed(0)
    encoder = Autoencoder((8, 16)).train()
    real, fake = discs(24, "real"), discs(24, "fake")
    first, second = (evaluate(real, fake, GEOMETRY, encoder=encoder, repeats=4) for _ in range(2))
    assert encoder.training
    assert first.numbers == second.numbers
    assert {"kid_encoder", "sw_encoder", "precision_encoder", "coverage_encoder"} <= set(first.names())
    assert first.numbers != evaluate(real, fake, GEOMETRY, encoder=encoder, repeats=4, seed=1).numbers


def test_bad_sets_are_named() -> None:
    real = discs(12, "real")
    with pytest.raises(ValueError, match="There are 5 fake sinograms, but at least 12 are compared"):
        evaluate(real, real[:5], GEOMETRY)
    with pytest.raises(ValueError, match="real sinograms have the shape"):
        evaluate(real.squeeze(1), real, GEOMETRY)
    with pytest.raises(ValueError, match="3 patients are given for 12 real slices"):
        evaluate(real, real, GEOMETRY, patients=[1, 2, 3])
    with pytest.raises(ValueError, match="2 prompts are given for 12 fake slices; give one for each"):
        evaluate(real, real, GEOMETRY, fake_prompts=Prompt.of(["FDG:brain"] * 2))
    with pytest.raises(ValueError, match="12 prompts are given for 24 real slices"):
        evaluate(real, real, GEOMETRY, reference=real, real_prompts=Prompt.of(["FDG:brain"] * 12))


def test_verdicts_say_which_way() -> None:
    assert verdict("kid_conv", 0.1, 0.0, 0.1) == "as real"
    assert verdict("kid_conv", 4.0, 0.5, 0.1) == "8.0 x real (35 sd)"
    assert verdict("precision_conv", 0.4, 0.8, 0.1) == "50% below real (4 sd)"
    assert verdict("precision_conv", 0.99, 0.8, 0.05) == "above real"
    assert verdict("spectrum_image_30mm", 0.25, 1.0, 0.1) == "75% too little"
    assert verdict("copy_rate", 0.2, 0.0, 0.01) == "above a floor of about 0 (20 sd)"
    assert verdict("hl_residual", 0.001, 0.004, 0.001) == "below real"
    assert verdict("diversity", 1.2, 0.8, 0.1) == "50% above real (4 sd)"
    # where nothing at all would pass, too
    assert verdict("coverage_encoder", 0.0, 0.4, 0.25) == verdict("spectrum_bins_30mm", 0.1, 1.2, 0.6) == FEW
    assert verdict("coverage_encoder", 0.3, 0.4, 0.1) == "as real"


def labelled(n: int, seed: str) -> tuple[Tensor, Prompt]:
    """Small discs are brains and large ones abdomens; FDG is bright in the middle, PSMA beside it."""
    x, y = GEOMETRY.pixel_centers
    images, names = [], []
    for i in range(n):
        brain, fdg = i % 2 == 0, i // 2 % 2 == 0
        grown = 1 + 0.1 * torch.rand((), generator=torch.Generator().manual_seed(1000 * len(seed) + i))
        body = (torch.hypot(x, y) < grown * (55 if brain else 95)).float()
        spots = torch.hypot(x.abs() - (0 if fdg else 35), y) < 12
        images.append(body + 4 * spots)
        names.append(f"{'FDG' if fdg else 'PSMA'}:{'brain' if brain else 'trunk' if i % 3 else 'abdomen'}")
    return Radon(GEOMETRY).project(torch.stack(images)[:, None]), Prompt.of(names)


def test_a_classifier_names_tracer_and_region() -> None:
    sinogram, prompt = labelled(48, "train")
    network, again = (train_classifier(sinogram, prompt, GEOMETRY, steps=60, batch_size=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    held_out, asked = labelled(24, "test")
    assert network.obeyed(held_out, asked).float().mean() > 0.9
    wrong = Prompt(torch.where(asked.tracer == 1, 3, 1), asked.region)
    assert network.obeyed(held_out, wrong).float().mean() < 0.1
    found = evaluate(
        sinogram, held_out, GEOMETRY, classifier=network, real_prompts=prompt, fake_prompts=wrong, repeats=2
    )
    assert found.numbers["prompt_obeyed"] < 0.1
    assert found.numbers["prompt_obeyed_floor"] > 0.9
    with pytest.raises(ValueError, match="pass fake_prompts and real_prompts"):
        evaluate(sinogram, held_out, GEOMETRY, classifier=network)
    with pytest.raises(ValueError, match="48 slices come with 24 prompts"):
        train_classifier(sinogram, asked, GEOMETRY)
    with pytest.raises(ValueError, match="nothing to learn"):
        train_classifier(sinogram, ["open:open"] * 48, GEOMETRY)


def four_prompts(n: int, seed: str) -> Labelled:
    sinogram, prompt = labelled(n, seed)
    return Labelled(sinogram, Prompt(prompt.tracer, torch.where(prompt.region == 2, 4, prompt.region)))


def test_what_classifiers_name_tells_useful_samples_and_obeyed_prompts() -> None:
    real, training, fake = (four_prompts(n, name) for n, name in ((80, "r"), (48, "tr"), (48, "fak")))
    numbers, said = naming_numbers(real, fake, GEOMETRY, training, steps=40)
    assert "as many of TRAIN" in said
    assert numbers["utility"] > 0.9
    assert numbers["prompt_obeyed"] > 0.9
    assert numbers["utility_floor"] == numbers["prompt_obeyed_floor"] > 0.9
    # halves of the real patients do where nothing is known of the training
    patients = torch.arange(80) // 4
    halved, said = naming_numbers(real._replace(patients=patients), fake, GEOMETRY, training._replace(prompt=None), 40)
    assert "as many of one half of REAL" in said
    assert halved["utility"] > 0.8
    # samples of another tracer than asked for
    swapped = fake._replace(prompt=Prompt(torch.where(fake.prompt.tracer == 1, 3, 1), fake.prompt.region))
    wrong, _ = naming_numbers(real, swapped, GEOMETRY, training, steps=40)
    assert wrong["utility"] < 0.2
    assert wrong["prompt_obeyed"] < 0.2
    for name in ("utility", "prompt_obeyed"):
        assert verdict(name, numbers[name], numbers[f"{name}_floor"], numbers[f"{name}_floor_std"]) == "as real"
        assert "below real" in verdict(name, wrong[name], wrong[f"{name}_floor"], wrong[f"{name}_floor_std"])


def test_what_classifiers_need_is_said() -> None:
    prompt = Prompt.of(["FDG:brain"] * LEAST + ["PSMA:chest"] * LEAST)
    assert common_prompts({"REAL": prompt, "FAKE": prompt}) == (["FDG:brain", "PSMA:chest"], "")
    names, missing = common_prompts({"REAL": prompt, "FAKE": Prompt(*(half[:-1] for half in prompt))})
    assert not names
    assert f"FAKE has FDG:brain {LEAST}, PSMA:chest {LEAST - 1}" in missing
    silent = Prompt.of(["open:open"] * 20)
    for sets in ({"REAL": prompt, "FAKE": silent}, {"REAL": prompt, "FAKE": None}):
        assert "FAKE does not tell tracer or region" in common_prompts(sets)[1]
    real = Labelled(discs(16, "real"), prompt)
    numbers, said = naming_numbers(real, Labelled(discs(16, "fake"), None), GEOMETRY)
    assert not numbers
    assert said.startswith("Utility and obeyed prompts are left out: FAKE does not tell")


def test_trunk_and_open_are_answered_by_what_they_hold() -> None:
    shown = Prompt.of(["FDG:chest", "FDG:brain", "PSMA:pelvis", "PSMA:abdomen", "DOPA:brain"])
    asked = Prompt.of(["FDG:trunk", "FDG:trunk", "open:pelvis", "FDG:open", "open:open"])
    right = [True, False, True, False, True]
    assert matches(asked, shown).tolist() == right
    for i, pair in enumerate(zip(*(half.tolist() for half in asked), strict=True)):
        assert answers(pair, shown)[i] == right[i], "one prompt asked of all"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("evaluate")


def test_the_command_compares_two_folders(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for patient in range(6):
        (tmp_path / f"real/p{patient}").mkdir(parents=True)
        np.save(tmp_path / f"real/p{patient}/slices.npy", discs(4, patient)[:, 0].numpy())
    finer = ParallelBeam(32, 40, 6.4, 40, 6.4)  # the same field of view in more bins
    samples = Scan(discs(14, "fake", geometry=finer)[:, 0].numpy(), "sinogram", finer, state=("synthetic",))
    write_scan(tmp_path / "fake.h5", samples)
    table = {"patient": [f"q{i // 2}" for i in range(20)]}
    write_scan(tmp_path / "train.h5", Scan(discs(20, "train")[:, 0].numpy(), "sinogram", GEOMETRY, table=table))
    torch.manual_seed(0)
    AutoencoderSystem(Autoencoder((8, 16))).save_pretrained(tmp_path / "encoder")
    words = ["--real", f"{tmp_path}/real", "--fake", f"{tmp_path}/fake.h5", "--train", f"{tmp_path}/train.h5"]
    words += ["--encoder", f"{tmp_path}/encoder", "--reports", str(tmp_path), "--bin-mm", "8"]
    page = command.main(words)
    said = capsys.readouterr().out
    assert "resampled to the real set's 24 x 32 bins" in said
    assert "6 patients" in said
    assert "Utility and obeyed prompts are left out: REAL does not tell tracer or region" in said
    text = page.read_text(encoding="utf-8")
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert len(pictures) == 3
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in pictures)
    assert "<script" not in text
    report = json.loads((tmp_path / "evaluate.json").read_text(encoding="utf-8"))
    measured = {row["number"] for row in report["rows"]}
    assert {"kid_encoder", "copy_rate", "spectrum_image_40mm", "hl_residual", "energy_distance"} <= measured
    assert all(f"<td>{name}</td>" in text for name in measured)
    assert (tmp_path / "evaluate.md").is_file()


def test_the_command_balances_by_prompts_and_trains_classifiers(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "STEPS", 40)
    given = []
    monkeypatch.setattr(command, "evaluate", lambda *a, **k: given.append(k) or evaluate(*a, **{**k, "repeats": 2}))
    real, fake = four_prompts(96, "real"), four_prompts(48, "fakes")
    assert real.prompt is not None
    assert fake.prompt is not None
    tracers, regions = zip(*(name.split(":") for name in real.prompt.names()), strict=True)
    table = {"patient": [f"p{i // 4}" for i in range(96)], "tracer": tracers, "region": regions}
    write_scan(tmp_path / "real.h5", Scan(real.sinogram[:, 0].numpy(), "sinogram", GEOMETRY, table=table))
    table = {"prompt": fake.prompt.names()}
    write_scan(tmp_path / "fake.h5", Scan(fake.sinogram[:, 0].numpy(), "sinogram", GEOMETRY, table=table))
    words = ["--real", f"{tmp_path}/real.h5", "--fake", f"{tmp_path}/fake.h5", "--reports", str(tmp_path)]
    page = command.main([*words, "--most", "88"]).read_text(encoding="utf-8")
    assert given[0]["fake_prompts"].names() == fake.prompt.names()
    assert len(given[0]["real_prompts"].tracer) == 88
    assert "one on as many of one half of REAL" in page
    assert "one on as many of one half of REAL" in capsys.readouterr().out
    rows = {row["number"]: row for row in json.loads((tmp_path / "evaluate.json").read_text())["rows"]}
    for name in ("utility", "prompt_obeyed"):
        assert f"<td>{name}</td>" in page
        assert rows[name]["fake"] > 0.8
        assert rows[name]["floor"] > 0.8


def test_what_makes_a_comparison_mean_little_is_said(command: ModuleType, tmp_path: Path) -> None:
    sets = {}
    for name, prompts in (
        ("real", ["FDG:brain", "FDG:chest"]),
        ("fake", ["FDG:brain"] * 2),
        ("again", ["FDG:brain"] * 2),
    ):
        scan = Scan(discs(2, name)[:, 0].numpy(), "sinogram", GEOMETRY, table={"prompt": prompts})
        write_scan(tmp_path / f"{name}.h5", scan)
        sets[name] = command.read_slices(tmp_path / f"{name}.h5")
    assert command._doubts(sets["again"], sets["fake"], None) == []
    (said,) = command._doubts(sets["real"], sets["fake"], sets["again"])
    assert "Real and generated slices show different prompts (FDG:chest)" in said
    (said,) = command._doubts(sets["fake"], sets["fake"], None)
    assert said == "WARN  2 of the generated slices are real ones, so real and generated are no two sets."
    (said,) = command._doubts(sets["fake"], sets["again"], sets["fake"])
    assert "2 of the trained-on slices are real ones" in said


def test_one_patient_stays_one_patient(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "write_page", lambda *a: None)
    table = {"patient": ["p"] * 12}
    write_scan(tmp_path / "one.h5", Scan(discs(12, "one")[:, 0].numpy(), "sinogram", GEOMETRY, table=table))
    one = command.read_slices(tmp_path / "one.h5")
    assert one.patients is not None
    assert one.patients.tolist() == [0] * 12
    assert one.prompt is None
    words = ["--real", f"{tmp_path}/one.h5", "--fake", f"{tmp_path}/one.h5", "--reports", str(tmp_path)]
    with pytest.raises(SystemExit, match="training slices are of one; add more"):
        command.main([*words, "--train", f"{tmp_path}/one.h5"])
    said = capsys.readouterr().out
    assert "1 patient." in said
    assert "prompts unknown" in said
    (tmp_path / "many").mkdir()
    for i, slice_ in enumerate(discs(12, "many")):
        np.save(tmp_path / "many" / f"s{i}.npy", slice_[0].numpy())
    words[1] = f"{tmp_path}/many"
    command.main([*words, "--train", f"{tmp_path}/many", "--bin-mm", "8"])
    said = capsys.readouterr().out
    assert "Patients of the training slices are unknown" in said
    assert "Real patients are unknown" in said


def test_the_command_refuses_images_and_missing_folders(command: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no such folder"):
        command.main(["--real", f"{tmp_path}/none", "--fake", f"{tmp_path}/none"])
    write_scan(tmp_path / "images.h5", Scan(np.arange(192, dtype=np.float32).reshape(3, 8, 8), "image", pixel_mm=2.0))
    with pytest.raises(ValueError, match="holds images, but sinograms are compared"):
        command.read_slices(tmp_path / "images.h5")
