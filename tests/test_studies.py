"""Studies: rows that are kept, continued and listed, and recipes that differ in what they say."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from studies import few_shot
from studies.rows import Row, collect, run_rows
from studies.training import HERE, Budget, Recipe, batch_size


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
