"""Which of a user's sinograms belong together: inputs and targets of a downstream task.

Three shapes are known: folders ``input/`` and ``target/`` with files of the same names, in *separation* ``input/``,
``target/first/`` and ``target/second/``; a public data set whose layout tells inputs from targets
(``data_modules.layouts``); files with attenuation-correction factors (``acf``) beside their sinograms, such as
``allpet-data attenuation-pairs`` makes, which are pairs of *attenuation* by themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from allpet.io import DataError
from allpet.prompts import OPEN
from data_modules.checks import by
from data_modules.files import say
from data_modules.folder import FoundFile, find_files
from data_modules.layouts import choose_layout
from data_modules.validate import Report, inspect_folder

SIDES = ("input", "target")
SEPARATE = ("input", "target/first", "target/second")
"""The folders of *separation*, which has two targets; those of all other tasks are ``SIDES``."""
_OFF = 0.1  # of the inputs, by which the sum of two targets may differ without being mentioned
_LEAST = 0.999  # of correction factors, which are at least 1 but for rounding


class FoundPairs(NamedTuple):
    """Pairs of a folder.

    Attributes:
        files: the inputs; their slices, one file after another, are what all below counts.
        target: ``(slices, targets, views, bins)`` float32, in the units of the files; two targets in *separation*.
        tracers: of each target, what the tables of its files say of each slice; ``open`` where they say nothing.
        acf: attenuation-correction factors, ``(slices, views, bins)``; None where they are not known.
        order: the slices' numbers, sorted by file and slice, numbers in names as numbers: neighbours stand together.
        report: on the inputs.
    """

    files: list[FoundFile]
    target: np.ndarray
    tracers: list[list[str]]
    acf: np.ndarray | None
    order: list[int]
    report: Report


def find_pairs(
    folder: str | Path,
    task: str,
    key: str | None = None,
    slices: Literal["auto", "first", "last"] = "auto",
    full_turn: bool = False,
    patient: str | None = None,
    layout: str = "auto",
) -> FoundPairs:
    """Read and check pairs; warnings are printed.

    Args:
        folder: the folder, or one file.
        task: that the pairs are for.
        key: name of the array in each file, where files hold several.
        slices: axis that counts slices in three-dimensional arrays.
        full_turn: sinograms cover 360 degrees and are folded to 180.
        patient: pattern that finds the patient in a file's name.
        layout: name of a public data set's layout; ``auto`` looks for one, ``none`` not.

    Raises:
        ValueError: if the folder cannot be used, or something has no partner or not one that fits.
    """
    place = Path(folder)

    def read(where: Path, role: str | None, asked: str) -> tuple[Report, list[FoundFile]]:
        report, files = inspect_folder(where, "auto", key, None, slices, full_turn, patient, asked, role)
        report.raise_errors()
        if report.kind == "image":
            remedy = "project them, or make pairs from PET and CT with allpet-data attenuation-pairs"
            raise DataError(where, "it holds images, but pairs are learned from sinograms", remedy)
        for row in report.warnings:
            # what is to be corrected is no fault here
            if task != "attenuation" or "not corrected for attenuation" not in row.finding:
                say(f"WARN  {where}, {row.file}: {row.finding}; {row.remedy}.")
        return report, files

    wanted = SEPARATE if task == "separation" else SIDES
    there = [side for side in wanted if (place / side).is_dir()]
    if there and len(there) < len(wanted):
        others = " or ".join(side for side in wanted if side not in there)
        raise DataError(place, f"it has a folder {there[0]}, but none called {others}", "put the partners there")
    if there:
        sides = {side: read(place / side, None, "none") for side in wanted}
        return _matched(place, sides, [[_without_suffix(found.name) for found in files] for _, files in sides.values()])
    if task == "separation" and place.exists():
        finding = f"pairs for separation lie in folders {', '.join(SEPARATE)}, of which it has none"
        raise DataError(place, finding, "put sinograms of both tracers and of each alone there, under the same names")
    chosen = choose_layout(place, *find_files(place), layout) if place.exists() else None
    if chosen is not None and chosen.layout is not None and set(SIDES) <= set(chosen.layout.roles):
        name = chosen.layout.name
        sides = {side: read(place, side, name) for side in SIDES}
        return _matched(place, sides, [[found.column("pair")[0] for found in files] for _, files in sides.values()])
    report, files = read(place, None, layout)
    return _corrected(place, task, report, files)


def _matched(place: Path, sides: dict[str, tuple[Report, list[FoundFile]]], keys: list[list[str]]) -> FoundPairs:
    """Put inputs, which come first, and targets of the same key together, in the inputs' order."""
    for side, names in zip(sides, keys, strict=True):
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            finding = f"{names.count(twice[0])} files of {side} belong to the pair {twice[0]}"
            raise DataError(place, finding, "give each input one target")
    named = [set(names) for names in keys]
    if missing := sorted(named[0].union(*named) - named[0].intersection(*named)):
        has = {side: missing[0] in names for side, names in zip(sides, named, strict=True)}
        of, other = (next(side for side in has if has[side] == there) for there in (True, False))
        finding = f"{len(missing)} file(s) have no partner, the first is {missing[0]}: {of} without {other}"
        raise DataError(place, finding, "give input and target of a pair the same name, or remove it")
    (report, inputs), *others = sides.values()
    targets, tracers = [], []
    for side, names, (theirs, files) in zip(list(sides)[1:], keys[1:], others, strict=True):
        if report.shape != theirs.shape or (report.geometry and theirs.geometry and report.geometry != theirs.geometry):
            said = [one.geometry or f"{by(one.shape or ())} (views x bins)" for one in (report, theirs)]
            finding = f"sinograms in input are {said[0]}, in {side} {said[1]}"
            raise DataError(place, finding, "bring both to the same views and bins")
        partner = dict(zip(names, files, strict=True))
        partners = [partner[key] for key in keys[0]]
        for found, target in zip(inputs, partners, strict=True):
            if len(found.slices) != len(target.slices):
                finding = f"{found.name} has {len(found.slices)} slice(s) as input and {len(target.slices)} as {side}"
                raise DataError(place, finding, "store the same slices in both")
        targets.append(np.concatenate([target.slices for target in partners]))
        tracers.append([entry for one in partners for entry in one.column("tracer") or [OPEN] * len(one.slices)])
    if len(targets) == 2:
        _compare_sum(place, inputs, targets)
    return FoundPairs(inputs, np.stack(targets, 1), tracers, None, _order(inputs), report)


def _compare_sum(place: Path, inputs: list[FoundFile], targets: list[np.ndarray]) -> None:
    """Say by how much two targets do not add up to the inputs, to which results of a model are made to add up."""
    given = sum(float(found.slices.sum(dtype=np.float64)) for found in inputs)
    wanted = sum(float(target.sum(dtype=np.float64)) for target in targets)
    off = wanted / given - 1 if given > 0 else np.inf
    if abs(off) > _OFF:
        say(
            f"WARN  {place}: the targets add up to {abs(off):.0%} {'more' if off > 0 else 'less'} than the inputs in "
            "total, but a model's results add up to the input; check that units and decay correction of all are alike."
        )


def _corrected(place: Path, task: str, report: Report, files: list[FoundFile]) -> FoundPairs:
    """Make pairs of sinograms and their attenuation-correction factors."""
    inputs, targets, factors, tracers = [], [], [], []
    for found in files:
        acf = None if found.scan is None else found.scan.acf
        where = place if place.is_file() else place / found.name
        if found.scan is None or acf is None:
            raise DataError(
                where,
                "an input without a target: it holds no attenuation-correction factors (acf), nor are there folders "
                "input and target",
                "make pairs with allpet-data attenuation-pairs, or put files of the same names in two such folders",
            )
        if task != "attenuation":
            finding = f"correction factors (acf) make pairs for attenuation, but the task is {task}"
            raise DataError(where, finding, "put inputs and targets in folders input and target")
        check_factors(where, found.slices, acf)
        if found.scan.additive is not None:
            finding = "scatter and randoms come with it (additive), which correction factors would multiply"
            raise DataError(where, finding, "subtract them first, and store what is left with its factors")
        done = "attenuation_corrected" in found.scan.state
        inputs.append(found._replace(slices=found.slices / acf) if done else found)
        targets.append(found.slices if done else found.slices * acf)
        factors.append(acf)
        tracers += found.column("tracer") or [OPEN] * len(acf)
    target = np.concatenate(targets)[:, None]
    return FoundPairs(inputs, target, [tracers], np.concatenate(factors), _order(inputs), report)


def check_factors(where: str | Path, slices: np.ndarray, acf: np.ndarray) -> None:
    """Refuse attenuation-correction factors that do not fit their sinograms, both ``(slices, views, bins)``.

    Raises:
        DataError: naming *where* they are from.
    """
    if acf.shape != slices.shape:
        finding = f"its correction factors have {by(acf.shape[1:])} bins, its sinograms {by(slices.shape[1:])}"
        raise DataError(where, finding, "store both over 180 degrees")
    if not (np.isfinite(acf) & (acf >= _LEAST)).all():
        finding = f"its correction factors go from {acf.min():.3g} to {acf.max():.3g}, but none is below 1"
        raise DataError(where, finding, "store factors that sinograms are multiplied by")


def _order(files: list[FoundFile]) -> list[int]:
    places: list[tuple[list[str | int], int]] = []
    for found in files:
        n = len(found.slices)
        names, numbers = found.column("file") or [found.name] * n, found.column("slice") or [str(i) for i in range(n)]
        try:
            places += [
                (_numbers_as_numbers(name), int(float(number))) for name, number in zip(names, numbers, strict=True)
            ]
        except ValueError as error:
            finding = f"its table's column slice holds something that is no number ({error})"
            raise DataError(found.name, finding, "number the slices, or leave the column out") from error
    return sorted(range(len(places)), key=lambda i: places[i])


def _numbers_as_numbers(name: str) -> list[str | int]:
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"([0-9]+)", name))]


def _without_suffix(name: str) -> str:
    folder, mark, file = name.rpartition("/")
    return folder + mark + file.partition(".")[0]
