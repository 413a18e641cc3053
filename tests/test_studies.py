"""Studies: rows that are kept, continued and listed, and recipes that differ in what they say."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from allpet.evaluation.suite import Evaluation, Spectrum

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from studies import baselines, few_shot
from studies.rows import Outcome, Row, collect, run_rows
from studies.training import HERE, Budget, Recipe, batch_size, power


def counting(calls: list[str], name: str):
    def measure(folder: Path) -> dict[str, float]:
        calls.append(name)
        return {"value": len(name)}

    return measure


def rows(calls: list[str], names=("a", "bb", "ccc")) -> list[Row]:
    return [Row(name, {"n": 100}, counting(calls, name)) for name in names]


def test_a_study_that_was_stopped_runs_what_is_missing_alone(tmp_path):
    calls: list[str] = []

    def stopping(folder: Path) -> dict[str, float]:
        raise KeyboardInterrupt

    study = rows(calls)
    study[1] = Row("bb", {"n": 100}, stopping)
    with pytest.raises(KeyboardInterrupt):
        run_rows(study, tmp_path)
    assert collect(study, tmp_path).not_run == ["bb", "ccc"]
    seen = []
    outcome = run_rows(rows(calls), tmp_path, after_each=lambda so_far: seen.append(len(so_far.done)))
    assert calls == ["a", "bb", "ccc"]
    assert seen == [2, 3]
    assert [row["value"] for row in outcome.done] == [1, 2, 3]
    assert not outcome.not_run
    assert [path.suffix for path in (tmp_path / "rows").iterdir()] == [".json"] * 3


def test_rows_there_was_no_time_for_are_listed(tmp_path):
    calls: list[str] = []
    outcome = run_rows(rows(calls), tmp_path, minutes=0)
    assert not calls
    assert outcome.not_run == ["a", "bb", "ccc"]


def test_rows_of_another_study_are_refused(tmp_path):
    calls: list[str] = []
    run_rows(rows(calls), tmp_path)
    changed = [Row("a", {"n": 200}, counting(calls, "a"))]
    with pytest.raises(ValueError, match="was measured with another n: remove"):
        run_rows(changed, tmp_path)
    with pytest.raises(ValueError, match="the same key"):
        run_rows([*rows(calls), *rows(calls)], tmp_path)


def test_recipes_change_what_they_name_and_nothing_else():
    budget = Budget(10, 20)

    def words(**changes) -> set[str]:
        recipe = Recipe(500, 0, **changes)
        return {word for stage in ("vae", "ldm") for word in recipe.words(stage, budget, Path("x"), "cache")}

    base = words()
    assert words(mask="binary") ^ base == {"--data.augmentation.mask=soft", "--data.augmentation.mask=binary"}
    assert words(range_order=None) ^ base == {
        "--model.autoencoder.range_order=20",
        "--model.autoencoder.range_order=null",
    }
    assert words(symmetries=False) ^ base == {"--data.symmetry=null"}
    assert {Path(word).name for word in words(linear=True) - base} == {"linear_start.yaml", "--model.linear_turned=8"}
    assert "--data.augmentation=null" in words(masks=False)
    seams = {"--model.autoencoder.padding=moebius", "--model.autoencoder.seam=0"}
    assert words(padding="moebius") - base == seams
    assert words(seam=False) - base == {"--model.autoencoder.padding=zero", "--model.autoencoder.seam=0"}


def test_batches_are_those_of_the_scale_that_a_recipe_names(tmp_path):
    other = tmp_path / "small.yaml"
    other.write_text("scale:\n  vae: {batch_size: 3}\n  gan: {batch_size: 5}\n")
    assert [batch_size(str(other), stage) for stage in ("vae", "gan")] == [3, 5]
    config = yaml.safe_load((HERE / "scale/laptop.yaml").read_text())["scale"]
    for stage in ("vae", "ldm", "gan", "score"):
        assert batch_size(Recipe(500, 0).scale, stage) == config[stage]["batch_size"]


def test_the_order_of_worth_begins_with_all_ingredients_and_none_and_holds_every_required_row():
    found = few_shot.recipes([0, 1, 2])
    keys = [key for key, _, _ in found]
    assert keys[:2] == ["n500-both-seed0", "n500-nothing-seed0"]
    assert len(set(keys)) == len(keys)
    required = {
        f"n{n}-{name}-seed{seed}" for n in (100, 500, 2000) for name in few_shot.AUGMENTATIONS for seed in (0, 1, 2)
    }
    assert required <= set(keys)
    assert all("n50-" in key or "n200-" in key for key in keys[-11:])


def test_a_missing_row_is_said_to_be_missing(tmp_path):
    (tmp_path / "rows").mkdir()
    study = [Row("n500-both-seed0", {"n": 500, "augmentation": "both", "seed": 0}, counting([], "a"))]
    kept = {"n": 500, "augmentation": "both", "seed": 0, "kid_conv": 0.1, "kid_conv_floor": 0.0, "seconds": 1.0}
    (tmp_path / "rows" / "n500-both-seed0.json").write_text(json.dumps(kept))
    outcome = collect(study, tmp_path)
    assert "are missing" in few_shot.data_efficiency(None, tmp_path, outcome)["said"]
    lines = few_shot.summary(outcome)
    assert lines[0]["kid_conv"] == "0.1"
    assert lines[-1]["augmentation"] == "real slices (floor)"


# ------------------------------------------------------------------------------------------------------- conclusions


def judged(n, name, seed, error=0.01, **numbers):
    values = dict.fromkeys(few_shot.JUDGED, 0.5) | numbers
    return {"n": n, "augmentation": name, "seed": seed, **values, **{f"{k}_std": error for k in few_shot.JUDGED}}


def test_an_ingredient_is_judged_by_rows_that_differ_in_it_alone():
    rows = [
        judged(
            n, name, seed, kid_conv=0.1 + 0.01 * seed + 0.1 * (name == "nothing"), coverage_conv=0.5 + 0.1 * (n > 100)
        )
        for n in (100, 500)
        for seed in (0, 1)
        for name in ("nothing", "masks")
    ]
    rows.append(judged(500, "symmetries", 2, kid_conv=0.3))  # nothing to be compared with
    lines = {line["ingredient"]: line for line in few_shot.contributions(Outcome(rows, [], 0.0))}
    assert lines["RMAS with DMM"]["pairs"] == 4
    assert lines["RMAS with DMM"]["kid_conv"].startswith("-0.1 ")
    assert "better" in lines["RMAS with DMM"]["kid_conv"]
    assert "no difference" in lines["RMAS with DMM"]["coverage_conv"]
    assert lines["Symmetries"]["pairs"] == 0
    text = few_shot.said(list(lines.values()))
    assert "RMAS with DMM: better in kid_conv." in text
    assert "Symmetries" not in text


def test_one_pair_is_judged_by_its_own_errors():
    def word(error):
        rows = [judged(500, "both", 0, error, coverage_conv=0.4), judged(500, "binary", 0, error, coverage_conv=0.5)]
        lines = {line["ingredient"]: line for line in few_shot.contributions(Outcome(rows, [], 0.0))}
        return lines["Soft masks instead of binary ones"]["coverage_conv"]

    assert "worse" in word(0.01)
    assert "no difference" in word(0.1)


def baseline(method, **numbers):
    looks = ["raw", "bow_tie", "helgason_ludwig", "reproject", "96x168", "180x128", "256x400"]
    names = ("row_sum_cv", "centre_residual", "hl_residual")
    values = dict.fromkeys(names, 0.001) | {f"{name}_{look}": 0.001 for name in names for look in looks}
    values |= {"power_min_30mm": 0.9, "power_max_30mm": 1.1, "power_min_20mm": 0.6, "power_max_20mm": 1.1}
    values |= {"kid_conv": 0.01, "sw_conv": 0.2, "copy_rate": 0.0, "prompt_obeyed": 0.96}
    values |= {"open_distance": 0.1, "open_limit": 0.2}
    return {"method": method, "seed": 0, **values, **numbers}


def test_limits_and_baselines_are_read_from_the_rows():
    rows = [baseline("ours"), baseline("gan", kid_conv=0.3, sw_conv=0.1), baseline("score", hl_residual=0.0001)]
    said = baselines.conclusion(rows)
    assert "prompt_obeyed 0.96 (at least 0.95: holds)" in said
    assert "kid_conv is lower than that of gan; not than that of score." in said
    assert "sw_conv is lower than that of none; not than that of gan, score." in said
    assert "score is as consistent or more so in row_sum_cv, centre_residual, hl_residual." in said
    assert "96x168 0.001 (at most 0.01: holds)" in said
    rows[0] |= {"power_min_20mm": 0.4, "hl_residual_256x400": 0.02}
    said = baselines.conclusion(rows)
    assert "power_min_20mm 0.4 (at least 0.5: does not hold)" in said
    assert "0.02 (at most 0.012: does not hold)" in said
    assert baselines.conclusion(rows[1:]) == "Ours was not run."


def test_power_is_that_of_whole_sets():
    frequency = torch.tensor([0.0, 1 / 60, 1 / 30, 1 / 25, 1 / 15])
    spectrum = Spectrum(frequency, torch.ones(5), torch.tensor([9, 0.9, 1.1, 0.5, 0.1]))
    found = Evaluation({}, {"image": spectrum}, *[None] * 3)
    expected = {"power_min_30mm": 0.9, "power_max_30mm": 1.1, "power_min_20mm": 0.5, "power_max_20mm": 1.1}
    assert power(found) == pytest.approx(expected)
