"""Splits and few-shot subsets: nested, balanced, and never across patients; and which rows the study has of them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from allpet import Autoencoder
from data_modules.few_shot import nested_subset, patient_order, split_blocks, split_patients

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from studies import few_shot
from studies.training import HERE, Budget, Recipe

# 40 patients of 1 to 7 slices in 3 groups of different sizes.
PATIENTS = [f"p{i:02}" for i in range(40) for _ in range(1 + i % 7)]
GROUPS = ["brain" if int(p[1:]) % 4 == 0 else "chest" if int(p[1:]) % 4 == 1 else "abdomen" for p in PATIENTS]


def test_subsets_are_nested_and_cut_only_the_last_patient() -> None:
    everything = nested_subset(PATIENTS, GROUPS, None)
    assert sorted(everything) == list(range(len(PATIENTS)))
    size = Counter(PATIENTS)
    for n in range(1, len(PATIENTS) + 1):
        chosen = nested_subset(PATIENTS, GROUPS, n)
        assert chosen == everything[:n]
        counts = Counter(PATIENTS[i] for i in chosen)
        cut = [patient for patient, count in counts.items() if count < size[patient]]
        assert cut in ([], [PATIENTS[chosen[-1]]])


def test_every_subset_is_balanced_until_a_group_runs_out() -> None:
    smallest = min(Counter(GROUPS).values())
    for n in range(1, 3 * (smallest - 7)):
        counts = Counter(GROUPS[i] for i in nested_subset(PATIENTS, GROUPS, n))
        assert max(counts.values()) - min(counts.get(group, 0) for group in set(GROUPS)) <= 7


def test_order_does_not_depend_on_how_slices_are_listed() -> None:
    backwards = patient_order(PATIENTS[::-1], GROUPS[::-1])
    assert backwards == patient_order(PATIENTS, GROUPS)
    assert backwards != sorted(backwards)


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_impossible_numbers_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"num_scans is {n}, but there are"):
        nested_subset(PATIENTS, GROUPS, n)


@pytest.mark.parametrize("n_patients", [2, 3, 5, 40])
def test_no_patient_is_in_two_splits(n_patients: int) -> None:
    patients = [p for p in PATIENTS if int(p[1:]) < n_patients]
    split = split_patients(patients)
    assert sorted([*split.train, *split.val, *split.test]) == list(range(len(patients)))
    parts = [{patients[i] for i in part} for part in split]
    assert sum(map(len, parts)) == n_patients
    assert parts[0]
    assert parts[1]
    assert bool(parts[2]) == (n_patients > 2)


def test_adding_a_patient_moves_no_few_shot_neighbour() -> None:
    order = patient_order(PATIENTS, ["x"] * len(PATIENTS))
    more = patient_order([*PATIENTS, "new"], ["x"] * (len(PATIENTS) + 1))
    assert [patient for patient in more if patient != "new"] == order


@pytest.mark.parametrize("n", [3, 9, 10, 40, 500])
def test_blocks_are_contiguous_with_gaps(n: int) -> None:
    split = split_blocks(n)
    for part in split:
        assert part == list(range(part[0], part[-1] + 1))
    gap = 0 if n < 10 else max(1, round(n / 50))
    assert split.val[0] - split.train[-1] == gap + 1
    assert split.test[0] - split.val[-1] == gap + 1
    assert split.train[0] == 0
    assert split.test[-1] == n - 1


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 slice\(s\) cannot be split"):
        split_blocks(2)
    with pytest.raises(ValueError, match=r"1 patient\(s\) cannot be split"):
        split_patients(["only"] * 9)
    with pytest.raises(ValueError, match="lower the shares"):
        split_patients(PATIENTS, 0.6, 0.5)


# ------------------------------------------------------------------------------------------------- rows of the study


def test_whether_symmetries_in_stage_2_prevent_copies_is_asked_early_and_where_there_are_copies() -> None:
    found = {key: recipe for key, _, recipe in few_shot.recipes([3, 4])}
    first = list(found)[:12]
    for n in (50, 100):
        plain, told = (found[f"n{n}-{name}-seed3"] for name in ("both", "conditioned"))
        assert (plain.conditioned, told.conditioned) == (False, True)
        for name in ("nothing", "both", "conditioned"):
            assert f"n{n}-{name}-seed3" in first
    assert ("conditioned", "both") in few_shot.INGREDIENTS["Symmetries in stage 2, too"]


def test_what_is_compared_are_settings_of_the_study() -> None:
    settings = few_shot.AUGMENTATIONS | few_shot.VARIANTS
    pairs = [pair for pairs in few_shot.INGREDIENTS.values() for pair in pairs]
    assert {name for pair in pairs for name in pair} == set(settings)
    assert all(has != without for has, without in pairs)


def test_continued_layers_are_compared_with_bins_that_are_not_folded_either() -> None:
    settings = few_shot.AUGMENTATIONS | few_shot.VARIANTS
    continued = {name for name, changes in settings.items() if changes.get("padding", "zero") != "zero"}
    assert continued == {"moebius", "symmetric"}
    for pairs in few_shot.INGREDIENTS.values():
        for names in pairs:
            if continued & set(names):
                plain, other = sorted((settings[name] for name in names), key=len)
                assert plain == {key: value for key, value in other.items() if key != "padding"}
    ours = yaml.safe_load((HERE / "scale" / "laptop.yaml").read_text())["scale"]["vae"]
    folded = Autoencoder(ours["channels"], patch=ours["patch"], seam=ours["seam"])
    for name in ("patch_1", *continued):
        recipe = Recipe(500, 0, **settings[name])
        words = recipe.words("vae", Budget(1, 1), Path("nowhere"), "none")
        assert "--model.autoencoder.patch=1" in words
        assert "--model.autoencoder.channels=[32, 64, 128]" in words
        seam = 0 if name in continued else ours["seam"]
        assert any("autoencoder.seam" in word for word in words) == (name in continued)
        network = Autoencoder(recipe.channels, patch=1, padding=recipe.padding, seam=seam)
        assert network.factor == folded.factor, "stage 2 is the same"
