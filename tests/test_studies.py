"""Studies: rows that are kept, continued and listed, and recipes that differ in what they say."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from allpet import Autoencoder, ParallelBeam, Prompt, SinogramGAN, symmetry
from allpet.batches import unmasked_stack
from allpet.consistency import Correction, consistency_numbers
from allpet.evaluation.classifier import PromptClassifier
from allpet.evaluation.features import EncoderFeatures
from allpet.evaluation.suite import Evaluation, Spectrum
from allpet.io import read_scan
from allpet.metrics import relative_l2
from allpet.models.autoencoder import Decoded
from allpet.systems.baselines.base import SinogramSystem
from allpet.systems.sampling import Samples, Sampling
from data_modules import SimulatedPET

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import held_out
from studies import baselines, compute, few_shot, layers, steps
from studies.intervals import Difference, resampled
from studies.rows import Outcome, Row, collect, run_rows
from studies.training import HERE, Bench, Budget, Recipe, batch_size, data_of_run, power, renoise, system_of_run


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
    done = len(calls)
    changed = [Row("new", {"n": 200}, counting(calls, "new")), Row("a", {"n": 200}, counting(calls, "a"))]
    with pytest.raises(ValueError, match="was measured with another n: remove"):
        run_rows(changed, tmp_path)
    assert len(calls) == done, "nothing runs before"
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


def test_the_system_of_a_run_is_whole_where_what_it_exports_is_not(tmp_path):
    size = {"n_views": 16, "n_bins": 16, "channels": [16, 8], "patch": 2}
    parts = {
        "generator": {"class_path": "allpet.models.generator.Generator", "init_args": size},
        "discriminator": {"class_path": "allpet.models.discriminator.PromptDiscriminator", "init_args": size},
    }
    model = {"class_path": "allpet.SinogramGAN", "init_args": {**parts, "penalty": 3.0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": None}))
    system = system_of_run(tmp_path, SinogramSystem)
    assert isinstance(system, SinogramGAN)
    assert system.discriminator is not None
    assert system.penalty == 3.0


def test_held_out_slices_of_a_run_are_those_of_its_data(tmp_path, monkeypatch, capsys):
    run = tmp_path / "ldm" / "001"
    (run / "pretrained").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "pretrained" / "config.json").write_text("{}")
    options = {"prompts": ["FDG:brain"], "num_scans": 4, "val_patients": 2, "test_patients": 2, "cache": None}
    data = {"class_path": "data_modules.SimulatedPET", "init_args": options}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    monkeypatch.chdir(tmp_path)
    for words, name in ((["ldm"], "test.h5"), (["ldm/001", "--noisy"], "test_noisy.h5")):
        path = held_out.main(words)
        assert path == Path("outputs/held_out") / name
        scan = read_scan(path)
        known = data_of_run(run, SimulatedPET)
        batch = known.test_set[list(range(len(known.test_set)))]
        wanted = batch.sinogram if "noisy" in name else batch.expected
        torch.testing.assert_close(torch.from_numpy(scan.values), wanted[:, 0])
        assert scan.geometry == known.geometry
        assert len(set(scan.table["patient"])) == 2
        assert set(scan.table["tracer"]) == {"FDG"}
    assert "with noise" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="make train-ldm"):
        held_out.main(["nowhere"])


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
    assert all("n50-" in key or "n200-" in key for key in keys[-10:])


def test_a_missing_row_is_said_to_be_missing(tmp_path):
    (tmp_path / "rows").mkdir()
    study = [Row("n500-both-seed0", {"n": 500, "augmentation": "both", "seed": 0}, counting([], "a"))]
    kept = {"n": 500, "augmentation": "both", "seed": 0, "kid_conv": 0.1, "kid_conv_floor": 0.0, "seconds": 1.0}
    (tmp_path / "rows" / "n500-both-seed0.json").write_text(json.dumps(kept))
    outcome = collect(study, tmp_path)
    assert "are missing" in few_shot.data_efficiency(None, tmp_path, outcome)["said"]
    lines = few_shot.summary(outcome, {"power_min_30mm": 0.9})
    assert lines[0]["kid_conv"] == "0.1"
    assert lines[-1]["augmentation"] == "real slices (floor)"
    assert lines[-1]["power_min_30mm"] == "0.9"


# ------------------------------------------------------------------------------------------------------- conclusions


def judged(n, name, seed, **numbers):
    values = dict.fromkeys(few_shot.JUDGED, 0.5) | {f"{name}_floor": 0.1 for name in few_shot.JUDGED} | numbers
    return {"n": n, "augmentation": name, "seed": seed, **values}


def words(rows):
    return {(line["ingredient"], line["n"]): line for line in few_shot.contributions(Outcome(rows, [], 0.0))}


def trainings(n, effects, number="kid_conv", scatter=(0.0, 0.0, 0.0), seed_effect=0.3):
    """Rows of all settings and seeds: an effect of each setting, one of each seed, and what is left by chance."""
    return [
        judged(n, name, seed, **{number: effect + seed_effect * seed + (-1) ** i * scatter[seed]})
        for i, (name, effect) in enumerate(effects.items())
        for seed in range(3)
    ]


NONE = dict.fromkeys(few_shot.AUGMENTATIONS, 0.5)


def test_an_ingredient_is_judged_by_rows_that_differ_in_it_alone_and_at_each_n():
    better = NONE | {"masks": 0.3, "both": 0.3}
    rows = trainings(500, better, scatter=(0.01, -0.01, 0.0)) + trainings(100, NONE, scatter=(0.01, -0.01, 0.0))
    rows.append(judged(50, "symmetries", 2, kid_conv=0.3))  # nothing to be compared with
    lines = words(rows)
    found = lines["RMAS with DMM", 500]
    assert found["pairs"] == 6
    # what is left: (-1)^i times .01, -.01, 0 in four settings: 8e-4 over 6 degrees of freedom; what seeds share is out
    assert found["kid_conv"] == f"-0.2 ± {(2 * 8e-4 / 6 / 6) ** 0.5:.2g} (better)"
    assert "no difference" in lines["RMAS with DMM", 100]["kid_conv"]
    assert "no difference" in lines["Symmetries", 500]["kid_conv"]
    assert ("Symmetries", 50) not in lines
    assert "no verdict" in found["coverage_conv"], "all rows are equal"
    text = few_shot.said(list(lines.values()))
    assert "RMAS with DMM (500 slices): better in kid_conv." in text
    assert "Symmetries (100 slices): no difference to be told from chance." in text


def test_a_single_pair_is_judged_by_how_seeds_differ_in_other_settings():
    name = ("Soft masks instead of binary ones", 500)
    pair = [judged(500, "binary", 0, coverage_conv=0.6)]
    assert "no verdict" in words([*pair, judged(500, "both", 0)])[name]["coverage_conv"]
    assert few_shot.said([words([*pair, judged(500, "both", 0)])[name]]) == ""
    for scatter, word in ((0.01, "worse"), (0.2, "no difference")):
        elsewhere = trainings(500, NONE, "coverage_conv", (scatter, -scatter, 0.0), seed_effect=0.0)
        rows = [row | ({"coverage_conv": 0.4} if row["seed"] == 0 and row["augmentation"] == "both" else {})
                for row in elsewhere]  # fmt: skip
        assert word in words(pair + rows)[name]["coverage_conv"]


def test_chance_is_called_a_difference_in_one_case_of_twenty():
    generator = torch.Generator().manual_seed(0)

    def drawn():
        return {k: float(torch.randn((), generator=generator)) for k in few_shot.LOWER}

    told = total = 0
    for _ in range(200):
        seeds = [drawn() for _ in range(3)]
        rows = [
            judged(500, name, seed, **{k: 3 * seeds[seed][k] + x for k, x in drawn().items()})
            for name in few_shot.AUGMENTATIONS
            for seed in range(3)
        ]
        rows += [judged(2000, "nothing", seed, **{k: 50 * x for k, x in drawn().items()}) for seed in range(3)]
        lines = words(rows)
        for ingredient in ("RMAS with DMM", "Symmetries"):
            told += sum("no difference" not in lines[ingredient, 500][k] for k in few_shot.LOWER)
            total += len(few_shot.LOWER)
    assert 0.03 < told / total < 0.07


def test_numbers_of_real_slices_are_what_is_aimed_at():
    elsewhere = trainings(500, NONE, "seam_jump", (0.001, -0.001, 0.0))
    pair = [
        judged(500, "both", 0, seam_jump=0.09, copy_rate=0.1),
        judged(500, "no_seam", 0, seam_jump=0.05, copy_rate=0),
    ]
    line = words([row for row in elsewhere if row["augmentation"] != "both"] + pair)[
        "A seam instead of zeros beyond the half turn", 500
    ]
    assert "better" in line["seam_jump from real"], "real ones have .1"
    assert line["copy_rate beyond real"].startswith("+0 "), "so many real slices look like copies"


def baseline(method, **numbers):
    looks = ["raw", "bow_tie", "helgason_ludwig", "reproject", "96x168", "180x128", "256x400"]
    names = ("row_sum_cv", "centre_residual", "hl_residual", "seam_jump")
    values = dict.fromkeys(names, 0.001) | {f"{name}_{look}": 0.001 for name in names for look in looks}
    values |= {"power_min_30mm": 0.9, "power_max_30mm": 1.1, "power_min_20mm": 0.6, "power_max_20mm": 1.1}
    values |= {"kid_conv": 0.01, "sw_conv": 0.2, "copy_rate": 0.0, "prompt_obeyed": 0.96}
    values |= {"open_distance": 0.1, "open_limit": 0.2, "open_unconditional": 0.3}
    return {"method": method, "seed": 0, **values, **numbers}


def test_limits_and_baselines_are_read_from_the_rows():
    rows = [baseline("ours"), baseline("gan"), baseline("score", hl_residual=0.0001)]
    kid = {"gan": Difference(-0.3, -0.4, -0.2), "score": Difference(-0.01, -0.03, 0.01)}
    sw = {"gan": Difference(0.1, 0.05, 0.2), "score": Difference(0.2, 0.1, 0.3)}
    apart = {"kid_conv": {"ours": kid}, "sw_conv": {"ours_plain": sw}}
    said = baselines.conclusion(rows, apart)
    assert "prompt_obeyed 0.96 (at least 0.95: holds)" in said
    assert "lower than gan -0.3 (-0.4 to -0.2); higher than none; not told apart from score" in said
    assert "ours_plain minus the other" in said
    assert "lower than none; higher than gan +0.1 (+0.05 to +0.2), score +0.2 (+0.1 to +0.3); not" in said
    assert "score is as consistent or more so in row_sum_cv, centre_residual, hl_residual, seam_jump." in said
    assert "after corrections and at other sizes: all hold." in said
    assert "from it: as near it does not hold." in said
    lines = {line["samples"]: line for line in baselines.looks(rows)}
    assert lines["96 x 168"]["row_sum_cv"] == lines["as the decoder leaves them"]["row_sum_cv"] == "0.001"
    assert len(lines) == 8
    rows[0] |= {"power_min_20mm": 0.4, "hl_residual_256x400": 0.02, "open_distance": 0.3, "seam_jump": 2.0}
    said = baselines.conclusion(rows, apart)
    assert "power_min_20mm 0.4 (at least 0.5: does not hold)" in said
    assert "beyond them are as sampled (power restored): seam_jump 2; 256 x 400: hl_residual 0.02." in said
    assert "seam_jump 2 (at most 1.5: does not hold)" in said
    assert "within 0.2: it does not hold" in said
    assert baselines.conclusion(rows[1:], {}) == "Ours was not run."


def test_power_is_that_of_whole_sets():
    frequency = torch.tensor([0.0, 1 / 60, 1 / 30, 1 / 25, 1 / 15])
    spectrum = Spectrum(frequency, torch.ones(5), torch.tensor([9, 0.9, 1.1, 0.5, 0.1]))
    found = Evaluation({}, {"image": spectrum}, *[None] * 3)
    expected = {"power_min_30mm": 0.9, "power_max_30mm": 1.1, "power_min_20mm": 0.5, "power_max_20mm": 1.1}
    assert power(found) == pytest.approx(expected)


def sampled(sampler, steps_, **numbers):
    values = {"kid_conv": 0.05, "sw_conv": 0.2, "sw_raw": 0.1}
    floors = {f"{name}_floor_std": 0.01 for name in values}
    return {"sampler": sampler, "steps": steps_, **values, **floors, **numbers}


def test_ten_steps_can_fail_against_a_thousand():
    many = sampled("ddpm", 1000)
    good = sampled("dpm++2m", 10, kid_conv=0.069, sw_conv=0.21, sw_raw=0.02)
    said = steps.conclusion([good, many])
    assert "the larger of 5 % and two standard deviations of the floor" in said
    assert "kid_conv 0.069 against 0.05 (allowed 0.02 more: holds)" in said
    assert "does not hold" not in said
    assert "single step" not in said
    bad = {"kid_conv": 1.2, "sw_conv": 0.6, "sw_raw": 0.5}
    said = steps.conclusion([sampled("dpm++2m", 10, **bad), many])
    assert said.count("does not hold") == 3
    # 5 % where the floor is sharper than that
    sharp = dict.fromkeys((f"{name}_floor_std" for name in bad), 0.0)
    said = steps.conclusion([sampled("dpm++2m", 10, sw_conv=0.211), many | sharp])
    assert "sw_conv 0.211 against 0.2 (allowed 0.01 more: does not hold)" in said
    one = sampled("dpm++2m", 1, **bad)
    assert steps.conclusion([good, many, one]).endswith("a single step fails in kid_conv, sw_conv, sw_raw.")
    # a floor that excuses a single step excuses anything
    wide = {"kid_conv_floor_std": 0.6, "sw_conv_floor_std": 0.3}
    said = steps.conclusion([good, many | wide, one])
    assert "a single step fails in sw_raw; in kid_conv, sw_conv the rule cannot tell even that." in said
    assert "not both been run" in steps.conclusion([good])


def option(words, name):
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found


def test_training_compute_is_stage_2_for_a_share_of_the_steps_on_the_stage_1_of_its_recipe(monkeypatch, tmp_path):
    class Measures:
        cache, data = "cache", MagicMock()

        def generate(self, model, seed):
            return model, seed

        def judge(self, fake, prompt, n):
            return Evaluation({"kid_conv": 0.1, "n": n}, {}, *[None] * 3)

        def copy_control(self, model, n):
            return {"copy_control": 0.9}

    trained = []
    monkeypatch.setattr(compute, "allpet", trained.append)
    monkeypatch.setattr(compute, "newest_pretrained", lambda folder: folder)
    monkeypatch.setattr(compute, "training_flops", lambda model, batch: 1e9)
    monkeypatch.setattr(compute.LatentDiffusion, "from_pretrained", lambda folder, sampling: folder)
    study = compute.rows(Measures(), Budget(300, 400), tmp_path, 3, Sampling())
    assert len(study) == 2 * len(compute.SHARES)
    for row, (name, share) in zip(study, [(n, s) for n in ("both", "nothing") for s in compute.SHARES], strict=True):
        assert row.key == f"{name}-{share:g}x"
        trained.clear()
        measured = row.measure(tmp_path / row.key)
        first, second = trained
        shared = tmp_path / f"{name}-vae" / "vae"
        assert option(first, "run.root") == option(second, "model.autoencoder") == str(shared)
        assert option(second, "run.root") == str(tmp_path / row.key / "ldm")
        assert int(option(first, "trainer.max_steps")) == row.facts["vae_steps"] == 300
        # the schedule of the learning rate ends where the training does
        assert int(option(second, "trainer.max_steps")) == row.facts["ldm_steps"] == share * 400
        for words in trained:
            assert ("--data.augmentation=null" in words) == (name == "nothing")
            assert option(words, "data.seed") == str(row.facts["seed"]) == "3"
            assert option(words, "data.num_scans") == str(measured["n"]) == "500"
        assert ("--data.symmetry=null" in first) == (name == "nothing")
        per_step = 1e9 * batch_size("laptop", "ldm")
        assert measured["training_petaflop"] == pytest.approx(share * 400 * per_step / 1e15)
        assert {"kid_conv", "copy_control"} < measured.keys()


def test_layers_are_compared_seed_by_seed():
    def of(kind, seed, **numbers):
        return {"kind": kind, "seed": seed, **dict.fromkeys(layers.JUDGED, 0.2), **numbers}

    rows = [
        of("seam", 0),
        of("no_seam", 0, edge_l2=0.4),
        of("seam", 1),
        of("no_seam", 1, edge_l2=0.25),
        of("moebius", 0),
    ]
    said = layers.conclusion(rows)
    assert "seam against no_seam: relative_l2 +0.0 % (+0.0, +0.0), edge_l2 -35.0 % (-50.0, -20.0)" in said
    assert "moebius against" not in said
    assert layers.conclusion(rows[:1]) == "No two have been run that are compared."


def test_the_error_of_a_view_is_relative_to_the_slice():
    expected = torch.ones(2, 1, 4, 3) * torch.tensor([1.0, 5.0])[:, None, None, None]
    drawn = expected.clone()
    drawn[:, :, 3] *= 1.5
    torch.testing.assert_close(layers.view_errors(drawn, expected), torch.tensor([0.0, 0.0, 0.0, 0.5]))


# ---------------------------------------------------------------------------------------------------- measurements

GEOMETRY = ParallelBeam(32, 40, 10.8, 40, 10.8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Measures with few and small slices, and a classifier that knows the training slices."""
    folder = tmp_path_factory.mktemp("bench")
    data = SimulatedPET(
        GEOMETRY,
        prompts=("FDG:brain", "FDG:abdomen"),
        num_scans=40,
        slices_per_patient=2,
        val_patients=2,
        test_patients=8,
        augmentation=None,
        cache=None,
    )
    data.setup()
    made = Bench(folder, "unused", samples=14)
    made.data = lambda n: data

    known = data.train_set[list(range(len(data.train_set)))]

    class Nearest(PromptClassifier):
        def name(self, sinogram):
            nearest = torch.cdist(sinogram.flatten(1), known.expected.flatten(1)).argmin(1)
            return Prompt(*(index[nearest] for index in known.prompt))

    made.classifier = Nearest(GEOMETRY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Autoencoder((8, 16))
    network.scaling.set_scale(float(known.expected.square().mean().sqrt()))
    made.encoder = EncoderFeatures(network)
    return made


class Gives:
    """A generator that hands out known slices, as decoded stacks and as sinograms."""

    def __init__(self, known: torch.Tensor) -> None:
        self.known, self.sampling = known, Sampling()

    def sample(self, prompt, seeds, **options):
        sinogram = self.known[torch.arange(len(seeds)) % len(self.known)]
        return Samples(sinogram, unmasked_stack(sinogram), prompt, torch.tensor(list(seeds)), GEOMETRY)


def test_held_out_slices_themselves_have_their_own_power_with_and_without_noise(bench):
    test = bench.held_out.test_set
    expected = test[list(range(len(test)))].expected
    found = bench.judge_twice(expected, test.prompt, 0)
    assert found["power_min_30mm"] == found["power_max_30mm"] == pytest.approx(1)
    assert 0.9 < found["renoised_power_min_30mm"] <= found["renoised_power_max_30mm"] < 1.1
    noisy = bench.judge_twice(test[list(range(len(test)))].sinogram, test.prompt, 0, noisy=True)
    assert noisy["renoised_power_max_20mm"] == noisy["renoised_power_min_20mm"] == pytest.approx(1)
    assert noisy["power_max_20mm"] > 1
    assert abs(found["kid_conv"]) < 0.5 * bench.judge_twice(expected * 0.5, test.prompt, 0)["kid_conv"]


def test_the_power_of_training_slices_is_that_which_the_suite_finds(bench):
    train = bench.held_out.train_set[list(range(len(bench.held_out.train_set)))]
    found = power(bench.judge(train.expected, train.prompt, 0))
    assert bench.real_power == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("features", ["conv", "encoder"])
@pytest.mark.parametrize("distance", ["kid", "sw"])
def test_intervals_hold_no_difference_between_sets_of_one_kind_and_find_a_blurred_one(distance, features, bench):
    extract = bench.encoder if features == "encoder" else None
    test, train = bench.held_out.test_set, bench.held_out.train_set
    real, known = test[list(range(len(test)))], train[list(range(len(train)))].expected
    blurred = torch.nn.functional.avg_pool2d(known, (1, 15), 1, (0, 7))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    some, others = order.chunk(2)
    sets = {"a": known[some], "b": known[others], "blurred": blurred[some], "more": known[others].repeat(3, 1, 1, 1)}
    found = resampled(real.expected, real.patient_id, sets, distance, draws=40, extract=extract)
    same, worse = Difference.of(found["a"], found["b"]), Difference.of(found["a"], found["blurred"])
    assert same.low < 0 < same.high
    assert worse.high < 0
    assert Difference.of(found["a"], found["a"]) == (0, 0, 0)
    number = Difference.of(found["b"], found["more"])
    assert number.low < 0 < number.high, "that there are more of the same samples is no merit"


def test_noise_is_as_strong_as_that_of_real_slices_and_leaves_empty_ones_empty(bench):
    test = bench.held_out.test_set
    batch = test[list(range(len(test)))]
    noisy = renoise(batch.expected, batch.sinogram, batch.expected)
    strength = [(x - batch.expected).square().sum().sqrt() for x in (noisy, batch.sinogram)]
    assert 0.8 < strength[0] / strength[1] < 1.25
    empty = renoise(torch.zeros(1, 1, *GEOMETRY.sinogram_shape), batch.sinogram, batch.expected)
    assert not empty.any()


def test_noisy_methods_are_compared_among_noisy_slices(bench, tmp_path):
    train = bench.held_out.train_set[list(range(len(bench.held_out.train_set)))]
    rows = []
    for name, sinogram in (("ours", train.expected), ("vae_gaussian", train.expected), ("gan", train.sinogram)):
        for seed in (0, 1) if name == "ours" else (0,):
            row = f"{name}-seed{seed}"
            (tmp_path / row).mkdir()
            torch.save({"sinogram": sinogram * (1 + 9 * seed)}, tmp_path / row / "samples.pt")
            rows.append({"row": row, "method": name, "seed": seed})
    found = baselines.whole_sets(bench, tmp_path, rows)
    for distance in ("kid_conv", "kid_encoder"):
        same = found.apart[distance]["ours"]["vae_gaussian"]
        assert same.value == 0, "of the seed that both have"
        assert same.low < 0 < same.high
        noise = found.apart[distance]["ours"]["gan"]
        assert noise.low < 0 < noise.high, "noise is added where it is missing"
    lines = {(line["slices"], line["method"]): line for line in found.lines}
    assert lines["expected", "vae_gaussian"]["kid_conv"] == lines["expected", "real training slices"]["kid_conv"]
    assert lines["noisy", "gan"]["sw_encoder"] == lines["noisy", "real training slices"]["sw_encoder"]
    assert lines["expected", "ours"]["seeds"] == 2
    assert "±" in lines["expected", "ours"]["kid_conv"]
    others = baselines.whole_sets(bench, tmp_path, rows[2:])
    assert others.apart == {}
    assert ("noisy", "gan") in {(line["slices"], line["method"]) for line in others.lines}


def test_trainings_are_compared_one_by_one(bench, tmp_path):
    """Two that each show half of what there is are not as near as one that shows it all."""
    train = bench.held_out.train_set[list(range(len(bench.held_out.train_set)))]
    halves = [train.expected[train.prompt.region == region] for region in train.prompt.region.unique()]
    rows = []
    for n, name, sets in ((500, "both", halves), (2000, "nothing", [train.expected]), (50, "nothing", halves[:1])):
        for seed, sinogram in enumerate(sets):
            key = f"n{n}-{name}-seed{seed}"
            (tmp_path / key).mkdir()
            torch.save({"sinogram": sinogram}, tmp_path / key / "samples.pt")
            rows.append({"row": key, "n": n, "augmentation": name, "seed": seed, "kid_conv": 0.1})
    found = few_shot.data_efficiency(bench, tmp_path, Outcome(rows, [], 0.0), draws=20)
    assert found["difference"] == pytest.approx(found["kid_few"] - found["kid_many"])
    assert found["kid_few"] > 0.5 * found["kid_fewest"]
    assert "means of 2 and 1 trainings" in found["said"]
    assert "it does not hold" in found["said"]


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (-3, -2, -1, "holds"),
        (-3, -2, 1, "holds in the mean, though the interval reaches beyond it"),
        (-1, 2, 3, "does not hold in the mean, though the interval allows it"),
        (1, 2, 3, "does not hold"),
    ],
)
def test_a_limit_is_kept_by_the_mean_or_by_the_whole_interval(low, value, high, words):
    assert few_shot._verdict(Difference(value, low, high), 0.0) == words


def test_ours_are_looked_at_raw_corrected_resized_and_with_open_prompts(bench):
    train = bench.held_out.train_set
    slices = train[list(range(len(train)))]
    fake, prompt = bench.generate(Gives(slices.expected), 0)
    found = baselines.look_closer(bench, Gives(slices.expected), fake, prompt, 40, 0)
    looks = ["raw", *get_args(Correction), *(f"{views}x{bins}" for views, bins in baselines.SIZES)]
    assert {f"row_sum_cv_{look}" for look in looks} < found.keys()
    assert max(found[f"row_sum_cv_{look}"] for look in looks) < 0.01
    real = consistency_numbers(fake, GEOMETRY)
    assert found["hl_residual_raw"] == pytest.approx(float(real["hl_residual"].median()))
    assert found["open_distance"] < found["open_limit"]
    brains = slices.expected[slices.prompt.region == 1]
    assert baselines.open_prompts(bench, Gives(brains), 40, 0)["open_distance"] == pytest.approx(0.5, abs=0.1)


def test_layers_are_judged_by_what_stage_1_makes_of_held_out_slices(bench, tmp_path, monkeypatch):
    trained = []
    system = SimpleNamespace(autoencoder=Stage1(0))
    system.train = system.eval = lambda: system
    monkeypatch.setattr(layers, "allpet", trained.append)
    monkeypatch.setattr(layers, "newest_pretrained", lambda folder: folder)
    monkeypatch.setattr(layers.AutoencoderSystem, "from_pretrained", lambda folder: system)
    monkeypatch.setattr(layers, "training_flops", lambda model, batch: 1e9 * len(batch.sinogram))
    rows = {row.key: row for row in layers.rows(bench, Budget(100, 0), 40, [0, 1])}
    assert len(rows) == 2 * len(layers.KINDS)
    found = rows["symmetric-seed1"].measure(tmp_path)
    (words,) = trained
    assert {"--model.autoencoder.padding=symmetric", "--model.autoencoder.patch=1", "--seed_everything=1"} < set(words)
    test = bench.real_set[list(range(len(bench.real_set)))]
    noise = float(relative_l2(test.sinogram.clamp_min(0), test.expected).mean())
    assert found["relative_l2"] == pytest.approx(noise, rel=0.05), "a stage 1 that loses nothing leaves the noise"
    assert found["hl_residual"] > found["hl_residual_floor"]
    assert found["training_tflop"] == pytest.approx(100 * batch_size("laptop", "vae") * 4e9 / 1e12)
    picture = layers.draw(tmp_path.parent, [{"row": tmp_path.name, "kind": "symmetric"}], tmp_path / "views.png")
    assert picture.stat().st_size > 0


class Stage1(Autoencoder):
    """Decodes what it encodes, blurred, mm."""

    def __init__(self, fwhm_mm: float) -> None:
        super().__init__((8, 16))
        self.fwhm_mm = fwhm_mm

    def encode_mean(self, stack):
        return stack[:, 1:2]

    def decode(self, latent, shape):
        full = symmetry.blur(latent, GEOMETRY, self.fwhm_mm) if self.fwhm_mm else latent
        return Decoded(unmasked_stack(full), torch.zeros_like(full))


def test_the_copy_test_finds_perfect_copies_but_not_what_a_decoder_blurs(bench):
    def control(fwhm_mm, **sampling):
        how = Sampling(**{"restore_power": False, **sampling})
        return bench.copy_control(SimpleNamespace(autoencoder=Stage1(fwhm_mm), geometry=GEOMETRY, sampling=how), 40)

    faithful, heavy = control(0), control(150)
    assert faithful["copy_control"] > 0.9
    assert faithful["copy_control"] >= faithful["copy_control_third"] > heavy["copy_control_third"]
    assert heavy["copy_control"] < 0.5
    # samples are finished as generated ones are
    assert control(0, counts=300.0)["copy_control"] < faithful["copy_control"]
    assert bench.copy_control(Gives(torch.zeros(1)), 40) == {}


def test_copies_are_reported_beside_what_the_test_finds_of_perfect_ones(bench):
    train = bench.held_out.train_set[list(range(len(bench.held_out.train_set)))]
    model = SimpleNamespace(autoencoder=Stage1(0), geometry=GEOMETRY)
    found = bench.judge_twice(train.expected, train.prompt, 40, generator=model)
    assert found["copy_rate"] == 1
    assert found["copy_control"] == bench.copy_control(model, 40)["copy_control"]
    assert "copy_control" not in bench.judge_twice(train.expected, train.prompt, 40)
    assert "copy_control" not in bench.judge_twice(train.expected, train.prompt, 0, generator=model)
