"""Who is trained on: patient-wise splits and nested few-shot subsets.

Both depend on patients' names alone, never on a seed, so that every run and every study splits the same data the same
way, and n slices are always the first n of one fixed order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from data_modules.folder import Patients


class Split(NamedTuple):
    """Slices of a data set by what they are used for.

    Attributes:
        train: indices of the slices to train on, in their order in the data set.
        val: indices of the slices to validate on.
        test: indices of the slices to test on; may be empty.
    """

    train: list[int]
    val: list[int]
    test: list[int]


def patient_order(patients: Sequence[Hashable], groups: Sequence[Hashable]) -> list[Hashable]:
    """Put patients in a fixed order in which the groups take turns.

    The next patient always comes from the group that has the fewest slices so far, so that every beginning of the
    order is balanced to within one patient; a group that has run out is passed over. Within a group, patients are
    ordered by a hash of their names.

    Args:
        patients: patient of each slice.
        groups: group of each slice, for example its prompt; a patient belongs to the group of its first slice.

    Returns:
        Each patient once.
    """
    size: dict[Hashable, int] = {}
    members: dict[Hashable, list[Hashable]] = {}
    for patient, group in zip(patients, groups, strict=True):
        if patient not in size:
            members.setdefault(group, []).append(patient)
        size[patient] = size.get(patient, 0) + 1
    waiting = {group: _shuffled(members[group], "order") for group in sorted(members, key=str)}
    taken = dict.fromkeys(waiting, 0)
    order = []
    while waiting:
        group = min(waiting, key=lambda group: taken[group])
        order.append(waiting[group].pop(0))
        taken[group] += size[order[-1]]
        if not waiting[group]:
            del waiting[group]
    return order


def nested_subset(patients: Sequence[Hashable], groups: Sequence[Hashable], n: int | None) -> list[int]:
    """Choose n slices: whole patients in the order of ``patient_order``, the last one cut.

    Subsets are nested: the slices chosen for n are the first n of those chosen for any larger number.

    Args:
        patients: patient of each slice.
        groups: group of each slice.
        n: number of slices; None for all.

    Returns:
        Indices of the chosen slices, patient by patient, each patient's slices in their given order.

    Raises:
        ValueError: if n is not between 1 and the number of slices.
    """
    if n is not None and not 1 <= n <= len(patients):
        raise ValueError(
            f"num_scans is {n}, but there are {len(patients)} training slices; ask for 1 to {len(patients)} of them, "
            "or leave num_scans empty to use all."
        )
    slices: dict[Hashable, list[int]] = {}
    for index, patient in enumerate(patients):
        slices.setdefault(patient, []).append(index)
    return [index for patient in patient_order(patients, groups) for index in slices[patient]][:n]


def split_patients(patients: Sequence[Hashable], val_share: float = 0.1, test_share: float = 0.1) -> Split:
    """Split slices so that no patient is in two parts.

    Args:
        patients: patient of each slice; at least two different ones.
        val_share: share of the patients to validate on, at least one patient.
        test_share: share of the patients to test on, at least one patient; none if there are only two.

    Raises:
        ValueError: if there is only one patient, or the shares leave nobody to train on.
    """
    names = _shuffled(list(dict.fromkeys(patients)), "split")
    n_val = max(1, round(val_share * len(names)))
    n_test = max(1, round(test_share * len(names))) if len(names) > 2 else 0
    if n_val + n_test >= len(names):
        raise ValueError(
            f"{len(names)} patient(s) cannot be split into {n_val} for validation, {n_test} for the test and at least "
            "one for training; add patients or lower the shares."
        )
    part = {name: 1 if i < n_val else 2 if i < n_val + n_test else 0 for i, name in enumerate(names)}
    split = Split([], [], [])
    for index, patient in enumerate(patients):
        split[part[patient]].append(index)
    return split


def split_blocks(n: int, val_share: float = 0.1, test_share: float = 0.1, gap: int | None = None) -> Split:
    """Split slices of unknown or only one patient into contiguous blocks: first training, then validation, then test.

    A gap is left out between the blocks, because neighbouring slices nearly repeat each other.

    Args:
        n: number of slices.
        val_share: share of the slices to validate on, at least one.
        test_share: share of the slices to test on, at least one.
        gap: slices left out between two blocks; None: from ten slices on 2 % of them, at least one.

    Raises:
        ValueError: if there are fewer than three slices, or the shares and gaps leave nothing to train on.
    """
    if gap is None:
        gap = max(1, round(0.02 * n)) if n >= 10 else 0
    n_val, n_test = max(1, round(val_share * n)), max(1, round(test_share * n))
    n_train = n - n_val - n_test - 2 * gap
    if n_train < 1:
        raise ValueError(
            f"{n} slice(s) cannot be split into {n_val} for validation, {n_test} for the test and at least one for "
            f"training{f', with {gap} left out between them' if gap else ''}; add slices or lower the shares."
        )
    first_val = n_train + gap
    return Split(
        list(range(n_train)), list(range(first_val, first_val + n_val)), list(range(first_val + n_val + gap, n))
    )


def split_as_known(
    patients: Patients, uses: Sequence[str], val_share: float, test_share: float, gap: int | None = None
) -> tuple[Split, bool, str]:
    """Split as the data say, otherwise patient-wise if possible, otherwise into blocks.

    Args:
        patients: of the slices.
        uses: what each slice is used for (train, val, test), or empty.
        val_share: share of the patients (or slices) to validate on.
        test_share: share of the patients (or slices) to test on.
        gap: slices left out between two blocks, see ``split_blocks``.

    Returns:
        The split, whether it is one of patients, and how it was made, for the user.

    Raises:
        ValueError: as ``split_patients`` and ``split_blocks``.
    """
    owner = patients.names
    parts = {use: [i for i, one in enumerate(uses) if one == use] for use in ("train", "val", "test")}
    if parts["train"] and parts["val"]:
        return Split(parts["train"], parts["val"], parts["test"]), patients.known, "split as the data say"
    if parts["train"] and parts["test"]:
        train = parts["train"]
        rest = patients._replace(names=[owner[i] for i in train])
        inner, by_patient, _ = split_as_known(rest, [""] * len(train), val_share, test_share, gap)
        val = [train[i] for i in inner.val]
        chosen = [train[i] for i in sorted(inner.train + inner.test)]
        return Split(chosen, val, parts["test"]), by_patient, "test as the data say, the rest split for validation"
    if patients.known and len(set(owner)) > 1:
        split = split_patients(owner, val_share, test_share)
        return split, True, f"{len(set(owner))} patients told apart {patients.how}, none in two splits"
    split = split_blocks(len(owner), val_share, test_share, gap)
    who = "one patient" if patients.known else "patients cannot be told apart"
    how = (
        f"{who}, so slices {split.train[0] + 1} to {split.train[-1] + 1} are for training, {split.val[0] + 1} to "
        f"{split.val[-1] + 1} for validation, {split.test[0] + 1} to {split.test[-1] + 1} for the test"
    )
    return split, False, how


def _shuffled(names: list[Hashable], purpose: str) -> list[Hashable]:
    """Order names by a hash, so that adding or removing one moves no other."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{purpose}\x1f{name}".encode()).digest())
