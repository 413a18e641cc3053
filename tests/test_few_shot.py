"""Splits and few-shot subsets: nested, balanced, and never across patients."""

from __future__ import annotations

from collections import Counter

import pytest

from data_modules.few_shot import nested_subset, patient_order, split_blocks, split_patients

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
