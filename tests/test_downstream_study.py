"""The study of downstream tasks: what it measures, says and draws, on results that are known beforehand."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allpet import ParallelBeam, Radon
from allpet.metrics import standard_image
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS, PairedBatch, PairOptions, make_pairs
from allpet.simulation.tissues import LABELS
from allpet.systems.paired import PairedSampling

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from studies import downstream, downstream_plan, downstream_report
from studies.downstream_plan import Plan
from studies.downstream_scores import HeldOut, calibration, interval
from studies.rows import Outcome, run_rows
from studies.training import Budget

from data_modules.paired_set import write_pairs

GEOMETRY = ParallelBeam(32, 40, 10.8, 40, 10.8)


def disc(x: torch.Tensor, y: torch.Tensor, a: float, b: float, radius: float) -> torch.Tensor:
    return (x - a) ** 2 + (y - b) ** 2 < radius**2


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    """Bodies of liver with a hot lesion, at four places."""
    x, y = GEOMETRY.pixel_centers
    labels, activity = [], []
    for i in range(4):
        a, b = (torch.rand(2, generator=keyed_generator(i, "lesion")) * 80 - 40).tolist()
        label = torch.zeros(GEOMETRY.image_shape, dtype=torch.uint8)
        label[disc(x, y, 0, 0, 150)] = LABELS["liver"]
        label[disc(x, y, a, b, 30)] = LABELS["lesion_hot"]
        labels.append(label)
        activity.append((label > 0).float() + 4 * (label == LABELS["lesion_hot"]))
    image = torch.stack(activity)[:, None]
    sinogram = Radon(GEOMETRY).project(image)
    n = len(sinogram)
    pairs = PairedBatch(
        input=sinogram,
        expected=sinogram,
        noisy=sinogram,
        activity=image,
        labels=torch.stack(labels)[:, None],
        attenuation=None,
        task=torch.zeros(n, dtype=torch.int64),
        prompt=Prompt.of(["FDG:abdomen"] * n),
        target_tracer=torch.ones(n, 1, dtype=torch.int64),
        delay_min=torch.zeros(n),
        dose=torch.ones(n),
        share=torch.ones(n, 1),
        sample_id=torch.arange(n),
        patient_id=torch.arange(n) // 2,
    )
    return HeldOut(pairs, Radon(GEOMETRY))


# -------------------------------------------------------------------------------------------------------- scores


def test_the_truth_is_without_error_and_a_scaled_truth_has_that_bias(held_out):
    perfect = held_out.score(held_out.pairs.expected).numbers
    assert perfect["l2"] == perfect["l2_image"] == perfect["tissue_bias"] == perfect["lesion_max_bias"] == 0
    assert perfect["ssim"] == pytest.approx(1)
    assert perfect["lesion_recovery"] == pytest.approx(1)
    assert perfect["hl0"] < 2e-3
    weak = held_out.score(0.9 * held_out.pairs.expected).numbers
    for name in ("lesion_max_bias", "lesion_mean_bias"):
        assert weak[name] == pytest.approx(-0.1, abs=1e-3)
    assert weak["tissue_bias"] == weak["worst_bias"] == pytest.approx(0.1, abs=1e-3)
    assert weak["tissue_signed"] == pytest.approx(-0.1, abs=1e-3)
    assert weak["l2"] == pytest.approx(0.1)
    assert weak["lesion_recovery"] == pytest.approx(1, abs=1e-3), "contrast has no scale"


def test_biases_of_tissues_have_a_size_a_sign_and_a_spread(held_out):
    two = copy.copy(held_out)
    x, _ = GEOMETRY.pixel_centers
    two.labels = torch.where((held_out.labels == LABELS["liver"]) & (x > 0), LABELS["spleen"], held_out.labels)
    wrong = held_out.image * torch.where(x > 0, 0.8, 1.1)
    numbers = two._tissue_numbers(wrong)
    expected = {"tissues": 2, "tissue_bias": 0.15, "tissue_signed": -0.05, "tissue_sd": 0.15 * 2**0.5}
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    two.labels = 0 * held_out.labels
    assert math.isnan(two._tissue_numbers(wrong)["tissue_signed"])


def test_how_much_of_the_biases_is_chance_is_told_from_how_slices_differ(held_out):
    none = held_out._tissue_numbers(1.2 * held_out.image)
    assert none["tissue_bias"] == pytest.approx(0.2, abs=1e-3)
    assert none["tissue_chance"] < 1e-6, "all slices are off by the same"
    many = copy.copy(held_out)
    parts = ("image", "labels", "patient", "tracer")
    for name in parts:
        setattr(many, name, getattr(held_out, name).repeat_interleave(50, 0))
    biases, chances = [], []
    for seed in range(40):
        factors = 1 + 0.3 * torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
        numbers = many._tissue_numbers(many.image * factors)
        biases.append(numbers["tissue_bias"])
        chances.append(numbers["tissue_chance"])
    assert sum(chances) == pytest.approx(sum(biases), rel=0.3), "of unbiased results all is chance"


def test_biases_that_cancel_between_patients_are_seen_patient_by_patient(held_out):
    opposite = held_out.image * torch.tensor([0.8, 0.8, 1.2, 1.2])[:, None, None, None]
    numbers = held_out._tissue_numbers(opposite)
    assert abs(numbers["tissue_signed"]) < 0.02
    assert numbers["tissue_patients"] == pytest.approx(0.2, abs=1e-3)


def test_lesions_left_out_are_lost_contrast_and_nothing_else(held_out):
    liver = (held_out.pairs.labels > 0).float()
    scores = held_out.score(held_out.radon.project(liver))
    assert len(held_out.lesions) == 4
    assert all(lesion.contrast > 3 for lesion in held_out.lesions)
    assert scores.numbers["lesion_recovery"] == pytest.approx(0, abs=0.05)
    assert scores.numbers["lesion_mean_bias"] < -0.6
    assert scores.numbers["tissue_bias"] < 0.1
    assert scores.numbers["l2_elsewhere"] < 0.3 * scores.numbers["l2_image"]
    assert (scores.lesions["patient"] == torch.tensor([0, 0, 1, 1])).all()


def test_what_leaks_into_the_other_tracer_is_measured(held_out):
    """A lesion that one tracer shows alone: a result that shares the sum out evenly puts half of it into the other."""
    one = held_out.pairs
    liver = held_out.radon.project((one.labels > 0).float())
    both = torch.cat([one.expected, liver], dim=1)
    pairs = one._replace(expected=both, target_tracer=torch.tensor([[1, 2]] * len(both)))
    two = HeldOut(pairs, held_out.radon)
    assert len(two.discordant) == len(two.lesions) == 4
    assert two.score(both).numbers["lesion_leak"] == 0
    evenly = both.mean(1, keepdim=True).expand_as(both)
    uptake = [float(two.image[lesion.row, 0][lesion.area].mean()) for lesion in two.lesions]
    known = [float(two.image[row, 0][lesion.area].mean()) for lesion, row in two.discordant]
    wanted = sum((u - k) / 2 / u for u, k in zip(uptake, known, strict=True)) / 4
    assert two.score(evenly).numbers["lesion_leak"] == pytest.approx(wanted, rel=0.05)
    assert "lesion_leak" not in held_out.score(one.expected).numbers


def test_targets_that_show_nothing_are_left_out():
    """Of two tracers, one of which is not there."""
    radon = Radon(GEOMETRY)
    options = PairOptions()
    pairs = make_pairs("separation", radon, 3, "abdomen", ("FDG", "PSMA"), 2, options)
    empty = pairs._replace(expected=pairs.expected * torch.tensor([1.0, 0.0])[None, :, None, None])
    held_out = HeldOut(empty, radon)
    assert len(held_out.truth) == 2
    assert held_out.score(empty.expected).numbers["l2"] == 0
    both = HeldOut(pairs, radon)
    assert {name.split()[0] for name in _tissues(both)} == {"FDG", "PSMA"}, "tissues are judged tracer by tracer"
    with pytest.raises(ValueError, match=r"The results have shape \(2, 1, 32, 40\), the targets \(2, 2, 32, 40\)"):
        both.score(pairs.input)


def _tissues(held_out: HeldOut) -> list[str]:
    """Return the worst tissue when the first, then when the second tracer is doubled."""
    found = []
    for target in (0, 1):
        factor = torch.ones(2)
        factor[target] = 2
        numbers = held_out.score(held_out.pairs.expected * factor[None, :, None, None]).numbers
        assert numbers["worst_bias"] == pytest.approx(1, abs=1e-2)
        found.append(str(numbers["worst_tissue"]))
    return found


def test_intervals_of_a_gaussian_hold_what_they_promise():
    truth = torch.zeros(1, 1, 40, 100) + 10
    draws = torch.randn(101, 1, 1, 40, 100, generator=keyed_generator("draws"))
    truth = truth + torch.randn(truth.shape, generator=keyed_generator("truth"))
    curve = calibration(10 + draws, truth)
    for point in curve:
        assert point["gauss"] == pytest.approx(point["level"], abs=0.03)
        assert point["quantile"] == pytest.approx(point["level"], abs=0.04)
    narrow = calibration(10 + 0.5 * draws, truth)
    assert narrow[-2]["gauss"] == pytest.approx(0.589, abs=0.03)  # P(|z| < 1.645 / 2)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        calibration(draws[:1], truth)


def test_intervals_of_differences_are_over_patients():
    values = torch.randn(400, generator=keyed_generator("values")) + 1
    middle, low, high = interval([values], [torch.arange(400)])
    assert middle == pytest.approx(float(values.mean()), rel=1e-6)
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.2)
    alike = torch.randn(20, generator=keyed_generator("patients"))[torch.arange(400) // 20] + 1
    _, low, high = interval([alike, torch.full((3,), torch.nan)], [torch.arange(400) // 20, torch.zeros(3)])
    assert (high - low) / 2 > 0.25, "slices of a patient are no independent evidence"


# ---------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("task", TASKS)
def test_every_required_row_is_there_and_what_matters_most_comes_first(task):
    rows = downstream.rows(Plan(task=task))
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "identity"
    methods = {row.facts["method"] for row in rows}
    assert {
        "identity",
        "identity_reprojected",
        "regression",
        "bridge",
        "stage1",
        "multi_task",
        "regression_synthetic",
    } <= methods
    low_dose = {"gauss_oracle", "regression_pixels", "conditional", "ddbm", "attention", "prior", "bridge_scratch"}
    assert (low_dose <= methods) == (task == "low_dose")
    for seed in (0, 1, 2):
        assert {f"bridge-n500-seed{seed}", f"regression-n500-seed{seed}"} <= set(keys)
    if task == "low_dose":
        for pairs in (50, 100, 200, 500):
            assert {f"bridge-n{pairs}-seed1", f"bridge_scratch-n{pairs}-seed1"} <= set(keys)
    assert keys.index("bridge-n500-seed0") < keys.index("bridge-n500-seed1") < keys.index("multi_task-n500-seed0")
    steps = {row.key: row.facts["steps"] for row in rows}
    for method in downstream.LONGER:
        assert steps[f"{method}-n500-seed0"] == 4 * steps["bridge-n500-seed0"]


def test_rows_know_by_which_recipe_they_were_trained():
    """A kept row is refused after the files of its method have changed, see ``run_rows``."""
    recipes = {row.facts["method"]: row.facts.get("recipe") for row in downstream.rows(Plan(task="low_dose"))}
    assert {name for name, recipe in recipes.items() if recipe is None} == {*downstream.UNTRAINED, "stage1", "prior"}
    trained = {name: recipe for name, recipe in recipes.items() if recipe is not None}
    assert trained["regression_synthetic"] == trained["regression"] != trained["bridge"]
    assert (trained["regression_longer"], trained["bridge_longer"]) == (trained["regression"], trained["bridge"])
    assert len({trained[name] for name in ("bridge", "multi_task", *downstream.OVERLAYS)}) == 7


def test_trainings_of_other_settings_are_refused(tmp_path, monkeypatch):
    """Stages and the bridge of all tasks are shared by studies, and found by folders that do not say all of them."""
    began = []

    def finish(folder: Path, about: Any) -> None:
        began.append(about)
        (folder / "001" / "pretrained").mkdir(parents=True)
        for name, text in (("run.json", "{}"), ("pretrained/config.json", "{}")):
            (folder / "001" / name).write_text(text)

    monkeypatch.setattr(downstream_plan, "train", lambda recipe, budget, folder, cache: finish(folder / "ldm", budget))
    monkeypatch.setattr(
        downstream_plan,
        "allpet",
        lambda words: finish(Path(next(word for word in words if "run.root" in word).partition("=")[2]), words),
    )
    monkeypatch.setattr(downstream_plan, "load", lambda folder: folder)

    def plan(vae: int = 10, **given: Any) -> Plan:
        return Plan("low_dose", stages=Budget(vae, 20), output=tmp_path, **given)

    stage2 = plan().stage2(0)
    assert plan().stage2(0) == stage2
    assert began == [Budget(10, 20)], "trained once"
    for other in (plan(vae=11), plan(slices=17)):
        with pytest.raises(ValueError, match=r"was trained with another (vae|slices): remove it to train"):
            other.stage2(0)
    shared = tmp_path / "multi_task"
    for _ in range(2):
        assert plan().finetune(shared, 0, 50, task="multi_task", steps=30) == shared
    assert len(began) == 2
    with pytest.raises(ValueError, match="multi_task was trained with another steps"):
        plan().finetune(shared, 0, 50, task="multi_task", steps=31)
    with pytest.raises(ValueError, match="multi_task was trained with another files, options, pairs, steps"):
        plan().finetune(shared, 0, 51, more=["--model.initialise=false"])
    (tmp_path / "silent" / "001").mkdir(parents=True)
    with pytest.raises(ValueError, match="silent holds a training that does not say with which settings: remove it"):
        plan(vae=11).finetune(tmp_path / "silent", 0, 50)  # before stages 1 and 2 are looked at


def test_untrained_rows_run_and_are_reported(tmp_path, held_out):
    plan = _plan(tmp_path, held_out)
    untrained = [row for row in downstream.rows(plan) if row.key in downstream.UNTRAINED]
    outcome = run_rows(untrained, plan.folder)
    lines = downstream.expanded(outcome.done)
    assert [line["method"] for line in lines] == ["identity", "identity_reprojected", "gauss_oracle", "osem_oracle"]
    assert lines[0]["l2"] == 0, "here the input is the target"
    assert 0 < lines[1]["l2"] < 0.2, "whose image is less sharp"
    assert lines[2]["l2"] == 0, "and needs no filter"
    assert (tmp_path / "downstream_low_dose/identity/scores.pt").exists()
    said = downstream_report.conclusions(plan, outcome)
    assert said.pop() == "Lesions: 4 that can be seen, of 2 patients."
    assert all("been run" in sentence for sentence in said), "nothing is concluded from rows that are missing"
    written = downstream_report.draw(plan, outcome, tmp_path / "page.png")
    assert [path.name for path in written] == ["page.png"]
    assert written[0].stat().st_size > 10_000
    generated = row("regression_synthetic")
    write_pairs(downstream.generated_file(plan, generated["pairs"], plan.folder / generated["row"]), held_out.pairs)
    generated["lines"][0]["calibration"] = calibration(torch.rand(3, 1, 1, 4, 4), torch.rand(1, 1, 4, 4))
    more = Outcome([*outcome.done, generated], [], 0.0)
    written = downstream_report.draw(plan, more, tmp_path / "page.png")
    assert [path.name for path in written] == ["page.png", "page_pairs.png", "page_calibration.png"]


def test_calibration_curves_are_of_one_method_and_way_each():
    curve, other = ([{"level": 0.9, "gauss": share, "quantile": share}] for share in (0.5, 0.8))
    rows = [row("bridge", seed, samples=16, turned=True, calibration=curve) for seed in (0, 1)]
    rows += [row("regression", samples=16, turned=True, calibration=other), row("bridge", nfe=5, calibration=other)]
    found = downstream_report.curves(rows)
    assert found == {
        "bridge, 1 call, turned": [curve, curve],
        "regression, 1 call, turned": [other],
        "bridge, 5 calls": [other],
    }


def test_rows_of_several_orientations_need_a_model_that_says_how_pairs_were_turned(monkeypatch, tmp_path):
    class Regression:
        """Stands for a trained model; says in how many orientations it was asked."""

        def __init__(self, ways: int) -> None:
            self.known, self.asked = ways, []

        def ways(self, sampling) -> int:
            return self.known if sampling.turned else 1

    def way(plan, system, sampling):
        system.asked.append((sampling.nfe, sampling.samples))
        return downstream.Line(downstream.facts_of(sampling), torch.zeros(1), {})

    for name in ("_line", "_many"):
        monkeypatch.setattr(downstream, name, way)
    for ways, samples in ((14, 14), (128, 16)):
        system = Regression(ways)
        monkeypatch.setattr(downstream, "_train", lambda *given, system=system: system)
        lines = list(downstream._lines(Plan(task="delayed"), "regression", 500, 0, tmp_path))
        assert system.asked == [*[(1, 1)] * 4, (1, samples)], "not fitted, fitted in three ways, and turned"
        assert [line.facts["turned"] for line in lines] == [*[False] * 4, True]
    monkeypatch.setattr(downstream, "_train", lambda *given: Regression(1))
    with pytest.raises(ValueError, match="does not say how its training pairs were turned, as those of earlier"):
        next(downstream._lines(Plan(task="delayed"), "regression", 500, 0, tmp_path))
    assert len(list(downstream._lines(Plan(task="delayed"), "regression", 50, 0, tmp_path))) == 1
    facts = {row.key: row.facts for row in downstream.rows(Plan(task="delayed"))}
    assert facts["bridge-n500-seed0"]["several"] == "turned"
    assert "several" not in facts["regression-n50-seed0"]
    synthetic = facts["regression_synthetic-n50-seed0"]
    assert (synthetic["guidance"], synthetic["generated"]) == (downstream.SAMPLING.guidance, 450)


def _plan(folder: Path, held_out: HeldOut) -> Plan:
    plan = Plan("low_dose", output=folder)
    vars(plan)["held_out"] = held_out
    vars(plan)["data"] = SimpleNamespace(geometry=GEOMETRY)
    vars(plan)["training_pairs"] = lambda pairs: held_out.pairs
    return plan


# ---------------------------------------------------------------------------------------------------- conclusions


def row(method: str, seed: int = 0, pairs: int = 500, **lines: Any) -> dict[str, Any]:
    """A finished row of one line."""
    shown: dict[str, Any] = {"nfe": 1, "samples": 1, "turned": False, "attention": "", "updates": 0}
    shown |= {"neighbourhood_mm": 0.0}
    shown |= {"psnr": 30.0, "ssim": 0.9, "tissue_bias": 0.01, "hl0": 0.01}
    shown |= {
        "worst_bias": 0.05,
        "lesion_max_bias": -0.05,
        "lesion_max_bias_abs": 0.12,
        "lesion_mean_bias": -0.05,
        "lesion_mean_bias_abs": 0.06,
    }
    facts = {"row": f"{method}-{seed}", "method": method, "pairs": pairs, "seed": seed}
    return {**facts, "lines": [{**shown, **lines}]}


def said(task: str, *rows: dict[str, Any]) -> str:
    return " ".join(downstream_report.conclusions(Plan(task=task), Outcome(list(rows), [], 0.0)))


def test_conclusions_follow_from_the_numbers():
    ours, oracle = [row("bridge", s, psnr=33.0 + s) for s in (0, 1)], row("gauss_oracle", nfe=0, psnr=31.0)
    good = said("low_dose", *ours, oracle, row("regression", psnr=33.2), row("ddbm", psnr=33.0, nfe=119))
    assert "our best, bridge, 1 call (2 seeds), 33.50 dB, best-Gauss oracle 31.00 dB: +2.50 dB" in good
    assert "where +2 is expected: holds." in good
    image = said("low_dose", *ours, oracle, row("osem_oracle", nfe=0, psnr=34.0))
    assert "which is told the truth, too, has 34.00 dB: ours -0.50 dB" in image
    assert "+0.30 dB; at least as good holds" in good
    assert (
        "mean tissue bias 1 % (at most 2 %: holds); lesion SUVmax bias -5 % in the mean (at most 10 %: holds)" in good
    )
    assert ", 12 % in size (does not hold)" in good
    assert "Not all of bridge, ddbm have been run" in good, "the mean that one call returns is no sample"
    signed = said("low_dose", row("bridge", tissue_signed=-0.004, tissue_sd=0.011))
    assert "mean tissue bias 1 % (at most 2 %: holds, with its sign -0.4 ± 1.1 %)" in signed
    chance = said("low_dose", *ours, row("identity", tissue_bias=0.054, tissue_chance=0.034))
    assert "The input has a mean tissue bias of 5.4 %, and would have 3.4 % by chance alone." in chance
    poor = said("low_dose", row("bridge", psnr=32.0, tissue_bias=0.03), oracle, row("regression", psnr=33.0))
    assert "+1.00 dB where +2 is expected: does not hold" in poor
    assert "-1.00 dB; at least as good does not hold" in poor
    assert "mean tissue bias 3 % (at most 2 %: does not hold)" in poor
    assert "Not all of bridge, ddbm have been run" in poor


def test_what_data_consistency_brings_is_said_for_each_method_and_against_all_that_is_expected():
    fitted = {0: (33.0, -0.3), 4: (33.6, -0.25), 8: (34.0, -0.2), 16: (33.5, -0.08)}
    rows = [row(name) for name in ("bridge", "regression")]
    for one, gain in zip(rows, (0.0, 0.5), strict=True):
        one["lines"] = [
            {
                **one["lines"][0],
                "updates": n,
                "psnr": psnr + gain,
                "lesion_max_bias": bias,
                "neighbourhood_mm": 24.0 * (n > 4),
            }
            for n, (psnr, bias) in fitted.items()
        ]
    rows += [row("gauss_oracle", nfe=0, psnr=31.0), row("ddbm", psnr=33.0, nfe=119)]
    text = said("low_dose", *rows)
    assert "our best, bridge, 1 call, 8 updates of data consistency (1 seed), 34.00 dB" in text
    assert "-0.50 dB; at least as good does not hold" in text, "regression may fit its results, too"
    assert (
        "Of neither fitted to the input: bridge, 1 call (1 seed) against regression, 1 call (1 seed) -0.50 dB." in text
    )
    assert (
        "bridge 33.00 dB, lesions -30.0 %, tissues 1.0 %; 33.60 dB, lesions -25.0 %, tissues 1.0 %; 34.00 dB, lesions"
        in text
    )
    assert "regression 33.50 dB, lesions -30.0 %" in text
    least = (
        "least biased lesions has bridge, 1 call, 16 updates of data consistency (1 seed): 33.50 dB, +2.50 dB to the "
    )
    assert least + "best-Gauss oracle (+2: holds), -1.00 dB to the regression U-Net's best" in text
    assert "lesion SUVmax bias -8 % in the mean (at most 10 %: holds), 12 % in size (does not hold)" in text
    rows[1]["lines"][2]["tissue_bias"] = 0.03
    apart = said("separation", *rows)
    assert "Data consistency, 0 updates, 4 with every pixel alone, and 8, 16 after one call" in apart
    assert (
        "beside regression, 1 call, 8 updates of data consistency (1 seed): sinogram PSNR 34.00 dB against 34.50 dB: "
        "not better; mean tissue bias 1.0 % against 3" in apart
    )
    carried = (
        "Data consistency carried over from the input, 0 updates, 4 with every pixel alone, and 8, 16 after one call"
    )
    assert carried in said("delayed", *rows)
    assert carried in said("conversion", *rows)


def test_conclusions_of_the_other_tasks_and_of_what_helps():
    text = said("attenuation", row("bridge", hl0=0.04), row("regression", psnr=29.0))
    assert "worst tissue 5 % (at most 10 %: holds); Helgason-Ludwig moment 0 0.04 (at most 0.03: does not hold)" in text
    text = said("delayed", row("bridge"), row("identity", nfe=0, tissue_bias=0.2), row("regression", tissue_bias=0.005))
    alike = "sinogram PSNR 30.00 dB against 30.00 dB: not better; mean tissue bias 1.0 % against"
    assert f"beside identity (1 seed): {alike} 20.0 %: better" in text
    assert f"beside regression, 1 call (1 seed): {alike} 0.5 %: not better" in text
    noisy = said("delayed", row("bridge"), row("identity_reprojected", nfe=0, psnr=29.0))
    assert "beside identity_reprojected (1 seed): sinogram PSNR 30.00 dB against 29.00 dB: better; mean" in noisy
    more = [row("multi_task", psnr=29.0), row("bridge_longer", psnr=34.0, tissue_bias=0.005)]
    text = said("attenuation", row("bridge"), *more)
    assert "One bridge for all tasks and the task's own, one call" in text
    assert "bias): 29.00 dB, lesions -5.0 %, tissues 1.0 %; 30.00 dB, lesions" in text
    assert "600 steps and 4 times as many, one call" in text
    assert "bias): bridge 30.00 dB, lesions -5.0 %, tissues 1.0 %; 34.00 dB, lesions -5.0 %, tissues 0.5 %." in text
    fitted = [row("regression"), row("regression_longer", psnr=31.0)]
    for one in fitted:
        one["lines"] += [{**one["lines"][0], "updates": n, "psnr": one["lines"][0]["psnr"] + n / 16} for n in (16, 32)]
    text = said("attenuation", *fitted)
    assert "Data consistency, 0 updates, 16, 32 with every pixel alone after one call" in text
    assert "regression 30.00 dB, lesions -5.0 %, tissues 1.0 %; 31.00 dB" in text
    assert "regression, 32 updates, 32.00 dB, lesions -5.0 %, tissues 1.0 %; 33.00 dB, lesions" in text
    assert "32 updates" not in said("low_dose", *fitted), "by 16 are fitted what measures low doses"
    covered = row("bridge", samples=16, coverage_90=0.8, coverage_90_quantile=0.7)
    covered["lines"].append({**covered["lines"][0], "nfe": 20, "coverage_90": 0.9, "coverage_90_quantile": 0.8})
    text = said("low_dose", covered)
    assert "1 call, mean of 16 samples (1 seed) 80.0 % (70.0 %; 85 to 95 %: does not hold)" in text
    assert "20 calls, mean of 16 samples (1 seed) 90.0 % (80.0 %; 85 to 95 %: holds)" in text
    assert "Not all of bridge with several samples have been run." in text
    lying, turned = ({"nfe": 5, "samples": 16, "turned": way, "coverage_90": 0.7 + 0.1 * way} for way in (False, True))
    once = {"nfe": 1, "samples": 16, "turned": True, "psnr": 34.0}
    drawn = [
        row("bridge", coverage_90_quantile=0.6, **given) for given in (lying, turned, {**once, "coverage_90": 0.5})
    ]
    text = said("conversion", row("bridge"), *drawn, row("regression"))
    assert "bridge, one call, 30.00 dB, lesions -5.0 %, tissues 1.0 %; one call in 16 orientations, 34.00 dB" in text
    assert "mean of 16 samples (1 seed), 30.00 dB, lesions -5.0 %, tissues 1.0 %, 90 % intervals hold 70.0 %" in text
    assert "turned samples (1 seed), 30.00 dB, lesions -5.0 %, tissues 1.0 %, they hold 80.0 %." in text


def test_gains_are_those_of_the_same_slices_with_an_interval(tmp_path):
    plan = Plan(task="low_dose", output=tmp_path)
    rows = []
    noise = torch.randn(60, generator=keyed_generator("slices"))
    methods = {"regression": 27.0, "regression_synthetic": 28.0, "bridge": 30.0, "bridge_scratch": 30.0}
    for method, level in methods.items():
        one = row(method, pairs=50)
        own = torch.randn(60, generator=keyed_generator(method))
        targets = {"psnr": level + 5 * noise + 0.2 * own, "patient": torch.arange(60) // 3}
        (plan.folder / one["row"]).mkdir(parents=True)
        torch.save({"1-1-": {"targets": targets}}, plan.folder / one["row"] / "scores.pt")
        rows.append(one)
    text = " ".join(downstream_report.conclusions(plan, Outcome(rows, [], 0.0)))
    assert re.search(r"beside 50 real ones: .* changes by \+(0\.9|1\.0)\d dB .* 1 seeds\): it helps", text)
    assert re.search(r"50 pairs [+-]0\.[01]\d dB \(-0\.\d+ to \+0\.\d+, 1 seeds\)", text)
    parts = [{**one, "pairs": 500} for one in rows[2:]]
    parts[1]["method"] = "bridge_without_symmetries"
    text = " ".join(downstream_report.conclusions(plan, Outcome(parts, [], 0.0)))
    assert re.search(
        r"one call and 95 % interval over patients: symmetries [+-]0\.[01]\d dB \(-0\.\d+ to \+0\.\d+, 1 seeds\)\.",
        text,
    )
    other = {"regression": "regression_synthetic", "regression_synthetic": "regression"}
    swapped = [{**one, "method": other[one["method"]]} for one in rows[:2]]
    assert "it harms" in " ".join(downstream_report.conclusions(plan, Outcome(swapped, [], 0.0)))


def test_attention_is_judged_by_lesions_and_by_harm_elsewhere_of_network_and_fit(tmp_path):
    plan, one = Plan(task="low_dose", output=tmp_path), row("attention")
    patient, kept = torch.arange(40) // 4, {}
    lines = [(name, n) for n in (0, 16) for name in ("0", "1", "2", "roi", "roi 2", "roi moved")]
    for name, updates in lines:
        gain = 0.1 * (updates > 0) * name.startswith("roi")
        lesions = {"lesion_recovery": torch.full((40,), 0.5 + gain), "lesion_max_bias": torch.full((40,), gain - 0.3)}
        targets = {"l2_elsewhere": 0.2 + 0.01 * (name == "1") * torch.ones(40), "patient": patient}
        label = downstream.label_of(downstream.facts_of(PairedSampling(nfe=1, data_consistency=updates), name))
        kept[label] = {"lesions": {**lesions, "patient": patient}, "targets": targets}
    (plan.folder / one["row"]).mkdir(parents=True)
    torch.save(kept, plan.folder / one["row"] / "scores.pt")
    changed = {"change_in_roi": 0.02, "change_outside_roi": 0.001}
    one["lines"] = [{**one["lines"][0], "attention": name, "updates": n, **changed} for name, n in lines]
    network, fit = " ".join(downstream_report.conclusions(plan, Outcome([one], [], 0.0))).split("Where ")[1:3]
    assert network.startswith("the network alone attends")
    assert "lesions drawn as ROI, contrast recovery +0 (+0 to +0)" in network
    assert fit.startswith("the network and 16 updates of the fit attend")
    assert "lesions drawn as ROI, contrast recovery +0.1 (+0.1 to +0.1)" in fit
    assert "size of the SUVmax bias -0.1 (-0.1 to -0.1)" in fit
    assert "hot and cold areas, relative error elsewhere +0.01 (+0.01 to +0.01)" in network
    assert "lesions drawn as ROI, relative error elsewhere +0 (+0 to +0)" in fit
    assert "changes the image by 2 % of its mean inside and 0.1 % outside." in fit


def test_many_samples_cost_their_calls():
    lines = row("bridge", psnr=31.0, nfe=5), row("bridge", psnr=35.0, nfe=5, samples=16)
    text = said("low_dose", *lines, row("ddbm", psnr=32.0, nfe=119), row("gauss_oracle", psnr=30.0))
    assert (
        "as published, 119 calls (at most .1 dB, .005 and .2 points worse): bridge, 5 calls (1 seed): PSNR -1.00"
        in (text)
    )
    assert "points (does not hold)" in text
    assert "our best, bridge, 5 calls, mean of 16 samples (1 seed), 35.00 dB" in text


def test_the_summary_is_over_seeds():
    table = downstream_report.summary([row("bridge", s, psnr=30.0 + s, tissue_bias=0.01 * s) for s in (0, 1, 2)])
    assert len(table) == 1
    assert table[0]["psnr"] == "31 ± 1"
    assert table[0]["tissue_bias_%"] == "1 ± 1"
    json.dumps(table)


def test_images_are_those_of_the_one_reconstruction(held_out):
    torch.testing.assert_close(held_out.image, standard_image(held_out.radon, held_out.truth))
