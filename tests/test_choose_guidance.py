"""The table that the weight of guidance was read from: measured on validation patients, and what is said of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from allpet import ParallelBeam, Prompt, Sampling
from allpet.batches import unmasked_stack
from allpet.evaluation.classifier import PromptClassifier
from allpet.systems.sampling import Samples

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import choose_guidance
import study
from studies import steps
from studies.training import HERE, Bench, Budget, Recipe

from data_modules import SimulatedPET

GEOMETRY = ParallelBeam(16, 32, 13.5, 32, 13.5)


class Scaled:
    """Stands for a trained stage 2: training slices, too faint by what guidance is below 1.5, too strong above."""

    def __init__(self, known: torch.Tensor, guidance: float) -> None:
        self.sinogram = known * (1 + 0.6 * (guidance - 1.5))

    def sample(self, prompt, seeds, **options):
        chosen = self.sinogram[torch.tensor(list(seeds)) % len(self.sinogram)]
        return Samples(chosen, unmasked_stack(chosen), prompt, torch.tensor(list(seeds)), GEOMETRY)


class Open(PromptClassifier):
    """Says of no slice what it is."""

    def name(self, sinogram):
        return Prompt(*torch.zeros(2, len(sinogram), dtype=torch.int64))


def test_the_table_is_of_validation_patients_and_says_which_weight_is_best(monkeypatch, tmp_path):
    data = SimulatedPET(
        GEOMETRY,
        prompts=("FDG:brain",),
        num_scans=24,
        slices_per_patient=2,
        val_patients=8,
        test_patients=1,
        augmentation=None,
        cache=None,
    )
    data.setup()
    known = data.train_set[list(range(len(data.train_set)))].expected
    trained, benches = [], []

    def bench(*given, **options):
        made = Bench(*given, **options)
        made.data = lambda n: data
        made.classifier = Open(GEOMETRY)
        benches.append(made)
        return made

    monkeypatch.setattr(choose_guidance, "Bench", bench)
    monkeypatch.setattr(choose_guidance, "WEIGHTS", (1.0, 1.5, 1.75))
    monkeypatch.setattr(choose_guidance, "train", lambda recipe, budget, folder, _: trained.append((folder, recipe)))
    monkeypatch.setattr(choose_guidance, "load", lambda folder, sampling: Scaled(known, sampling.guidance))
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports")]
    choose_guidance.main(["--budgets", "10/20", "--seeds", "3", "--samples", "16", *places])
    assert {folder for folder, _ in trained} == {tmp_path / "studies/guidance/10-20-seed3"}
    assert {recipe.seed for _, recipe in trained} == {3}
    assert benches[0].real_set is data.val_set
    report = json.loads((tmp_path / "reports/choose_guidance.json").read_text())
    assert [row["guidance"] for row in report["rows"]] == [1.0, 1.5, 1.75]
    low, right, high = (row["power_max_30mm"] for row in report["rows"])
    assert low == pytest.approx(0.7**2 * right, rel=1e-3)
    assert high == pytest.approx(1.15**2 * right, rel=1e-3)
    assert "10 and 20 steps: " in report["remarks"]
    assert " with 1.5, " in report["remarks"], "the best weight, and after it the default"
    assert report["summary"][-1]["vae_steps"] == "real slices (floor)"
    # where a seed lacks a weight, the others are compared
    rows = [*report["rows"], {**report["rows"][0], "seed": 4, "kid_conv": -1.0}]
    assert choose_guidance.said(rows) == choose_guidance.said(report["rows"])
    assert (
        choose_guidance.said([*report["rows"][:1], {**report["rows"][1], "seed": 4}]) == "No seed has all weights yet."
    )
    # given again, nothing is measured twice
    choose_guidance.main(["--budgets", "10/20", "--seeds", "3", "--samples", "16", *places])
    assert len(trained) == 3


def test_budgets_that_are_none_and_tables_without_rows_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        choose_guidance.main(["--budgets", "1000"])
    assert "--budgets is 1000, but must be steps of both stages, such as 1000/1200." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="No row has been run yet"):
        choose_guidance.main(["--minutes", "0", "--output", str(tmp_path)])


def test_the_file_that_users_sample_with_has_the_defaults():
    file = yaml.safe_load((HERE / "sample.yaml").read_text(encoding="utf-8"))
    assert Sampling(**file["model"]["init_args"]["sampling"]) == Sampling()


def test_a_label_makes_a_table_of_its_own(tmp_path):
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports"), "--minutes", "0"]
    study.main(["few_shot", "--label", "longer", *places])
    report = json.loads((tmp_path / "reports/study_longer_few_shot.json").read_text())
    assert report["title"].endswith("(longer)")
    assert "n500-both-seed0" in report["not_run"]
    assert not (tmp_path / "reports/study_few_shot.json").exists()
    done = tmp_path / "studies/longer_few_shot/rows/n500-both-seed0.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    with pytest.raises(ValueError, match="was measured with another"):
        study.main(["few_shot", "--label", "longer", *places])
    study.main(["few_shot", *places])
    assert not (tmp_path / "studies/few_shot").exists(), "no row was run"


def test_a_study_is_guided_as_asked_for_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(Bench, "rows", lambda self: torch.arange(3))
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports"), "--minutes", "0"]
    study.main(["steps", "--guidance", "3", *places])
    assert "guided by 3." in json.loads((tmp_path / "reports/study_steps.json").read_text())["remarks"]
    rows = steps.rows(Bench(tmp_path, ""), Budget(1, 1), tmp_path, Recipe(500, 0), guidance=3.0)
    assert {row.facts["guidance"] for row in rows} == {3.0}


def test_labels_that_would_mix_tables_up_are_refused(tmp_path, capsys):
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports"), "--minutes", "0"]
    for words, sentence in (
        (["few_shot", "--label", "a b"], "--label is 'a b', but must be of letters, digits and _"),
        (["few_shot", "--label", ""], "--label is '', but must be of letters"),
        (["few_shot", "--label", "steps_2"], "and begin with no study's name"),
        (["downstream", "--label", "longer"], "--label and --guidance are for the other studies"),
        (["downstream", "--guidance", "2"], "--label and --guidance are for the other studies"),
    ):
        with pytest.raises(SystemExit):
            study.main([*words, *places])
        assert sentence in capsys.readouterr().err
