"""Judge generated sinograms: two sets in, a page with numbers and pictures out.

    python experiments/evaluate.py --real FOLDER --fake FOLDER [--train FOLDER] [--encoder PRETRAINED]
    (make evaluate REAL=... FAKE=... [TRAIN=...] [ENCODER=...])

Each is a folder of sinograms, or one file, such as ``outputs/samples/001/samples.h5`` or a set made by ``allpet-data
convert``. REAL should be slices that nothing was trained on; every number stands beside what one half of them scores
against the other. TRAIN, the slices trained on, adds the copy test; ENCODER, the ``pretrained/`` folder of a stage 1,
adds distances in its latents. Noisy slices belong with noisy samples, expected ones with expected ones.

Where the files' tables tell tracer and region (samples tell what they were asked for), halves are balanced by them, and
where REAL and FAKE share two prompts, classifiers tell whether prompts are obeyed and what FAKE is good for: what one
trained on FAKE names of REAL. What denoisers learn from samples needs slices both noisy and expected: the studies
measure it (``make study``), this command does not.

Leaves ``outputs/reports/evaluate.json``, ``evaluate.md`` and ``evaluate.html``, one page that needs no other file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from evaluation_page import write_page
from torch import Tensor

from allpet import AutoencoderSystem, ParallelBeam, Prompt
from allpet.evaluation import evaluate
from allpet.evaluation.naming import Labelled, naming_numbers
from allpet.io import content_hash
from allpet.randomness import keyed_generator
from allpet.reports import FOLDER, table, write_report
from allpet.runs import newest_pretrained
from allpet.symmetry import resample
from data_modules.files import prompts_of, sinogram_geometry
from data_modules.folder import FoundFile, patients_of
from data_modules.validate import inspect_folder

MOST = 512
"""Slices taken of a set that has more: numbers hardly change, memory and time do."""
STEPS = 200
"""Of each classifier's training: half a minute at 64 x 80 on one core."""


@dataclass(frozen=True)
class Slices:
    """Sinograms of one folder or file.

    Attributes:
        sinogram: ``(n, 1, views, bins)`` float32.
        geometry: of the sinograms.
        patients: number of each slice's patient, ``(n,)``; None where they cannot be told apart.
        found: what was found, a sentence.
        prompt: what each slice shows or was asked for; None where no file tells.
    """

    sinogram: Tensor
    geometry: ParallelBeam
    patients: Tensor | None
    found: str
    prompt: Prompt | None = None

    @property
    def whose(self) -> str:
        """In words, of how many patients."""
        if self.patients is None:
            return "patients unknown, each slice counted as one"
        count = len(self.patients.unique())
        return "1 patient" if count == 1 else f"{count} patients"

    def labelled(self) -> Labelled:
        """Return what ``naming_numbers`` takes."""
        return Labelled(self.sinogram, self.prompt, self.patients)


def read_slices(place: Path, bin_mm: float | None = None) -> Slices:
    """Read a folder of sinograms, or one file.

    Args:
        place: the folder or file.
        bin_mm: bin width where files do not say it.

    Raises:
        ValueError: if it cannot be used, or holds images.
    """
    report, files = inspect_folder(place, "auto")
    report.raise_errors()
    if report.kind != "sinogram":
        raise ValueError(
            f"{place} holds images, but sinograms are compared: project them first, as allpet.Radon(geometry).project "
            "does."
        )
    values = torch.from_numpy(np.concatenate([file.slices for file in files]))[:, None]
    geometry, lengths = sinogram_geometry(None, tuple(values.shape[2:]), bin_mm)
    if report.geometry is not None:
        geometry, lengths = report.geometry, f"bins of {report.geometry.bin_mm:g} mm as the files say"
    owners = patients_of(files)
    patients = None
    if owners.known:
        names = sorted(set(owners.names))
        patients = torch.tensor([names.index(name) for name in owners.names])
    prompt, shown = read_prompts(files)
    found = f"{place}: {len(values)} sinograms of {geometry.n_views} x {geometry.n_bins}, {lengths}, {shown}"
    return Slices(values, geometry, patients, found, prompt)


def read_prompts(files: Sequence[FoundFile]) -> tuple[Prompt | None, str]:
    """Return what the files' tables say of each slice, by the columns tracer and region, or prompt, and that in words.

    Raises:
        ValueError: if a name is not in the vocabularies.
    """
    shown = prompts_of(files, Prompt.of(["open:open"]))
    asked = Prompt.of([entry for file in files for entry in file.column("prompt") or ["open:open"] * len(file.slices)])
    prompt = Prompt(*(torch.where(half > 0, half, other) for half, other in zip(shown, asked, strict=True)))
    names = sorted(set(prompt.names()) - {"open:open"})
    return (prompt, ", ".join(names)) if names else (None, "prompts unknown")


def thinned(slices: Slices, most: int, seed: int) -> Slices:
    """Take a random part of a set that is too large."""
    n = len(slices.sinogram)
    if n <= most:
        return slices
    chosen = torch.randperm(n, generator=keyed_generator(seed, "slices to compare"))[:most].sort().values
    part = slices.labelled().take(chosen)
    found = f"{slices.found}, {most} of them"
    return replace(slices, sinogram=part.sinogram, patients=part.patients, prompt=part.prompt, found=found)


def fitted(slices: Slices, geometry: ParallelBeam) -> Slices:
    """Bring a set to the real set's geometry, and say so."""
    ours = slices.geometry
    if (ours.sinogram_shape, ours.bin_mm) == (geometry.sinogram_shape, geometry.bin_mm):
        return replace(slices, geometry=geometry)
    found = (
        f"{slices.found}, resampled to the real set's {geometry.n_views} x {geometry.n_bins} bins of "
        f"{geometry.bin_mm:g} mm"
    )
    return replace(slices, sinogram=resample(slices.sinogram, ours, geometry), geometry=geometry, found=found)


def _doubts(real: Slices, fake: Slices, train: Slices | None) -> list[str]:
    """Say what makes a comparison mean little: the same slices on both sides, or other prompts."""
    said = []
    ours = {content_hash(one) for one in real.sinogram.numpy()}
    for name, other in (("generated", fake), ("trained-on", train)):
        same = 0 if other is None else sum(content_hash(one) in ours for one in other.sinogram.numpy())
        if same:
            said.append(f"WARN  {same} of the {name} slices are real ones, so real and {name} are no two sets.")
    if real.prompt is not None and fake.prompt is not None:
        names, theirs = (set(one.prompt.names()) for one in (real, fake))  # type: ignore[union-attr]
        if names != theirs:
            other = ", ".join(sorted(names ^ theirs))
            said.append(
                f"WARN  Real and generated slices show different prompts ({other}), and what these differ by counts as "
                "the generator's fault: compare those of the same prompts."
            )
    return said


def main(words: Sequence[str] | None = None) -> Path:
    """Read, measure, write; return the page. What cannot be compared ends in one sentence."""
    try:
        return run(words)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"evaluate: {error}") from error


def run(words: Sequence[str] | None) -> Path:
    """Read, measure, write; return the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="held-out real sinograms: folder or file")
    parser.add_argument("--fake", type=Path, required=True, help="generated sinograms: folder or file")
    parser.add_argument("--train", type=Path, help="sinograms that were trained on, for the copy test")
    parser.add_argument("--encoder", type=Path, help="a stage 1, run or pretrained/ folder, for its latents")
    parser.add_argument("--bin-mm", type=float, help="bin width where files do not say it")
    parser.add_argument("--most", type=int, default=MOST, help="slices taken of a set that has more (not of --train)")
    parser.add_argument("--seed", type=int, default=0, help="keys the choice of slices, splits and pictures")
    parser.add_argument("--reports", type=Path, default=FOLDER, help="folder to write to")
    arguments = parser.parse_args(words)
    real = thinned(read_slices(arguments.real, arguments.bin_mm), arguments.most, arguments.seed)
    fake = thinned(read_slices(arguments.fake, arguments.bin_mm), arguments.most, arguments.seed)
    fake = fitted(fake, real.geometry)
    train = None
    if arguments.train is not None:
        train = fitted(read_slices(arguments.train, arguments.bin_mm), real.geometry)
    found = [f"Real: {real.found}, {real.whose}.", f"Fake: {fake.found}."]
    if train is not None:
        found.append(f"Trained on: {train.found}, {train.whose}.")
    if train is not None and train.patients is None:
        found.append(
            "Patients of the training slices are unknown: slices beside a copied one may be taken for those of another "
            "patient and hide the copy, so more may be copied than copy_rate says."
        )
    if real.patients is None:
        found.append("Real patients are unknown: halves may share them, and the floor is then too low.")
    found += _doubts(real, fake, train)
    print(*found, sep="\n")
    encoder = None
    if arguments.encoder is not None:
        encoder = AutoencoderSystem.from_pretrained(newest_pretrained(arguments.encoder)).autoencoder
    evaluation = evaluate(
        real.sinogram,
        fake.sinogram,
        real.geometry,
        patients=real.patients,
        training=None if train is None else train.sinogram,
        training_patients=None if train is None else train.patients,
        encoder=encoder,
        fake_prompts=fake.prompt,
        real_prompts=real.prompt,
        seed=arguments.seed,
    )
    known = None if train is None else train.labelled()
    named, said = naming_numbers(real.labelled(), fake.labelled(), real.geometry, known, STEPS, arguments.seed)
    evaluation = replace(evaluation, numbers=evaluation.numbers | named)
    print(*evaluation.said, said, sep="\n")
    found += [*evaluation.said, said]
    rows = evaluation.rows()
    report = write_report(
        "evaluate",
        rows,
        [arguments.seed],
        arguments.reports,
        title="Generated sinograms beside held-out ones",
        sets=found,
        geometry=real.geometry.to_dict(),
        numbers=evaluation.numbers,
    )
    training = None if train is None else train.sinogram
    page = report.with_suffix(".html")
    write_page(page, evaluation, real.sinogram, fake.sinogram, real.geometry, training, found, arguments.seed)
    print(table(rows))
    print(f"Page: {page}. Numbers: {report}.")
    return page


if __name__ == "__main__":
    main()
