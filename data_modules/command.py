"""``allpet-data``: bring data in, look at them, split them, and take sinograms out to other tools.

allpet-data check FOLDER                 is it fit for training? exit code 1 if not
allpet-data convert FOLDER SET.h5        one file with geometry, table and provenance
allpet-data split SET.h5                 patient-wise train, val and test
allpet-data info FILE                    what a file says of itself
allpet-data export FILE OUT.hs           sinograms for STIR, MATLAB, NumPy; images as NIfTI or DICOM
allpet-data attenuation-pairs PET CT OUT.h5   sinograms before and after correction from NAC-PET and CT images
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from allpet.io import DataError, Scan, odd_bins, read_scan, write_scan
from allpet.io.containers import read_about
from allpet.io.formats import IMAGE_SUFFIXES, suffix_of
from data_modules import validate


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0 if all is well, 1 for what cannot be used, 130 when interrupted."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except ValueError as error:  # DataError among them: one sentence
        print(f"ERROR  {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command continues a conversion.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allpet-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="say whether a folder is fit for training")
    validate.add_arguments(check)
    check.set_defaults(run=validate.run)

    convert = commands.add_parser("convert", help="turn a folder into one HDF5 file; the same command resumes")
    convert.add_argument("folder", help="folder of files, or one file")
    convert.add_argument("out", metavar="SET.h5", help="the data set to write")
    convert.add_argument("--kind", choices=["auto", "sinogram", "image"], default="auto", help="what the slices are")
    convert.add_argument("--bin-mm", type=float, help="bin width of sinograms")
    convert.add_argument("--pixel-mm", type=float, help="pixel width of images")
    convert.add_argument("--full-turn", action="store_true", help="sinograms cover 360 degrees: fold them")
    convert.add_argument("--key", help="name of the array, where files hold several")
    convert.add_argument("--slices", choices=["auto", "first", "last"], default="auto", help="axis that counts slices")
    convert.add_argument("--patient", help="pattern that finds the patient in a file's name")
    convert.add_argument("--tracer", help="tracer of all slices: FDG, DOPA or PSMA")
    convert.add_argument("--region", help="region of all slices: brain, trunk, chest, abdomen or pelvis")
    convert.add_argument("--layout", default="auto", help="layout of a public data set; none: read files as they are")
    convert.add_argument("--role", help="which files of the layout: input, target, all")
    convert.add_argument("--source", default="", help="where the data come from")
    convert.add_argument("--licence", default="", help="what may be done with them")
    convert.set_defaults(run=_convert)

    split = commands.add_parser("split", help="split a data set patient-wise")
    split.add_argument("file", metavar="SET.h5", help="a converted data set")
    split.add_argument("--val", type=float, default=0.1, help="share of the patients to validate on")
    split.add_argument("--test", type=float, default=0.1, help="share of the patients to test on")
    split.set_defaults(run=_split)

    info = commands.add_parser("info", help="print what a file says of itself")
    info.add_argument("file", help="any file that can be read")
    info.add_argument("--verify", action="store_true", help="also compare every slice with its hash")
    info.set_defaults(run=_info)

    export = commands.add_parser("export", help="write sinograms, or images, for other tools")
    export.add_argument("file", help="any file that can be read, such as samples.h5")
    export.add_argument("out", help="OUT.hs, OUT.npz, OUT.mat, OUT.h5; images: OUT.nii.gz, or a folder (DICOM)")
    export.add_argument("--rows", metavar="A:B", default=":", help="slices A to B, the end excluded")
    export.add_argument("--bin-mm", type=float, help="bin width of sinograms that do not say")
    export.add_argument("--pixel-mm", type=float, help="pixel width of images that do not say")
    export.add_argument(
        "--odd-bins", action="store_true", help="one bin more where even: STIR and scikit-image need it"
    )
    export.add_argument("--lors", action="store_true", help="lines of response of the bins beside (.npz)")
    export.set_defaults(run=_export)

    pairs = commands.add_parser("attenuation-pairs", help="semi-real attenuation pairs from NAC-PET and CT images")
    pairs.add_argument("nac", metavar="PET", help="folder of PET images without attenuation correction")
    pairs.add_argument("ct", metavar="CT", help="folder of CT images with the same names and centre")
    pairs.add_argument("out", metavar="OUT.h5", help="the data set to write: sinogram, and acf to multiply it with")
    pairs.add_argument("--nac-pixel-mm", type=float, required=True, help="pixel width of PET")
    pairs.add_argument("--ct-pixel-mm", type=float, required=True, help="pixel width of CT")
    pairs.add_argument(
        "--ct-units", choices=["auto", "hu", "stored", "scaled"], default="auto", help="stored: HU + 1024"
    )
    pairs.add_argument("--max-residual", type=float, default=0.1, help="slices explained less well are left out")
    pairs.add_argument("--picture", help="PNG of some slices, to look at")
    pairs.set_defaults(run=_pairs)
    return parser


def _convert(given: argparse.Namespace) -> int:
    from allpet.prompts import REGIONS, TRACERS, prompt_index
    from data_modules.native import NativeFile, convert

    columns = {}
    for name, said, vocabulary in (("tracer", given.tracer, TRACERS), ("region", given.region, REGIONS)):
        if said is not None:
            columns[name] = vocabulary[prompt_index(said, vocabulary, name)]
    there = Path(given.out).exists()
    path = convert(
        given.folder,
        given.out,
        given.kind,
        given.bin_mm,
        given.pixel_mm,
        given.full_turn,
        given.key,
        given.slices,
        given.patient,
        given.source,
        given.licence,
        columns,
        given.layout,
        given.role,
    )
    native = NativeFile(path)
    done = "Kept, for it was converted before," if there else "Wrote"
    print(f"{done} {path}: {len(native)} slices of {len(set(native.table['patient']))} patient(s).")
    scan = native.scan([0])
    if scan.kind == "sinogram" and scan.geometry is None:
        print("WARN  Nothing says how wide the bins are, so the data set does not, either: give --bin-mm if you know.")
    return 0


def _split(given: argparse.Namespace) -> int:
    from data_modules.few_shot import split_patients
    from data_modules.native import NativeFile, write_split

    patients = [str(name) for name in NativeFile(given.file).table.get("patient", [])]
    if len(set(patients)) < 2:
        raise DataError(given.file, "it has only one patient, or does not tell them apart", "convert with --patient")
    parts = split_patients(patients, given.val, given.test)
    uses = {patients[i]: use for use, rows in zip(("train", "val", "test"), parts, strict=True) for i in rows}
    write_split(given.file, uses)
    for use, rows in zip(("train", "val", "test"), parts, strict=True):
        if not len(rows) and {"train": 1, "val": given.val, "test": given.test}[use]:
            print(f"WARN  There are too few patients for {use}: name a larger share, or take more.")
        print(f"{use:5}  {len(rows)} slices of {len({patients[i] for i in rows})} patient(s)")
    return 0


def _info(given: argparse.Namespace) -> int:
    from data_modules.native import NativeFile

    native = NativeFile(given.file) if _is_native(given.file) else None  # read piece by piece: it may be large
    scan = read_scan(given.file) if native is None else native.scan([0])
    n = len(scan.values if native is None else native)
    table = scan.table if native is None else native.table
    parts = [scan.values] if native is None else (native.read(range(i, min(i + 64, n))) for i in range(0, n, 64))
    sums = [(float(part.min()), float(part.max()), float(part.sum(dtype=float))) for part in parts]
    low, high, total = min(one[0] for one in sums), max(one[1] for one in sums), sum(one[2] for one in sums)
    if not math.isfinite(total):
        raise DataError(given.file, "it holds NaN or infinite values", "remove or repair them")
    a, b = scan.values.shape[1:]
    print(f"{given.file}: {n} {scan.kind or 'unknown'} slice(s) of {a} x {b}")
    for name, value in {
        "axes": scan.about()["axes"],
        "geometry": scan.geometry,
        "pixel": f"{scan.pixel_mm:g} mm" if scan.pixel_mm else None,
        "slice distance": f"{scan.slice_mm:g} mm" if scan.slice_mm else None,
        "units": scan.units,
        "state": ", ".join(scan.state),
        "values": f"{low:.4g} to {high:.4g}, sum {total:.6g}",
        "beside": ", ".join(name for name in ("additive", "acf") if getattr(scan, name) is not None),
        **{f"provenance, {name}": value for name, value in scan.provenance.items()},
    }.items():
        print(f"  {name}: {value if value not in (None, '') else 'not stated'}")
    for name, column in table.items():
        counts = Counter(map(str, column))
        some = ", ".join(f"{value} ({n})" for value, n in counts.most_common(4))
        print(f"  column {name}: {len(counts)} value(s): {some}{', ...' if len(counts) > 4 else ''}")
    for note in scan.notes:
        print(f"  note: {note}")
    if given.verify:
        if native is None or "hash" not in table:
            raise DataError(given.file, "it holds no hashes", "convert it with allpet-data convert")
        wrong = native.verify()
        if wrong:
            finding = f"{len(wrong)} slice(s) are not those converted, the first is {wrong[0]}"
            raise DataError(given.file, finding, "convert it again")
        print(f"  every slice is the one converted ({n} hashes)")
    return 0


def _export(given: argparse.Namespace) -> int:
    scan = _read_rows(given.file, given.rows)
    if scan.kind != "image" and (scan.geometry is None or given.bin_mm is not None):
        from data_modules.files import sinogram_geometry

        geometry, said = sinogram_geometry(None, scan.values.shape[1:], given.bin_mm)
        print(f"{given.file}: {said}")
        scan = replace(scan, kind="sinogram", geometry=geometry)
    scan = replace(scan, provenance={**scan.provenance, "exported_from": Path(given.file).name})
    if scan.kind == "image" and given.pixel_mm is not None:
        scan = replace(scan, pixel_mm=given.pixel_mm)
    if suffix_of(given.out) in IMAGE_SUFFIXES:
        scan = _reconstruct(scan)
    if given.odd_bins:
        scan = odd_bins(scan)
    elif scan.geometry is not None and scan.geometry.n_bins % 2 == 0 and Path(given.out).suffix.lower() == ".hs":
        print("WARN  STIR puts bin n/2 on the axis of rotation, half a bin off for an even number; add --odd-bins.")
    if given.lors:
        if Path(given.out).suffix.lower() != ".npz":
            raise DataError(given.out, "lines of response are written to .npz only", "let its name end in .npz")
        from allpet.io.containers import write_npz

        write_npz(given.out, scan, lors=True)
    else:
        write_scan(given.out, scan)
    print(f"Wrote {given.out}: {len(scan.values)} slice(s) of {scan.values.shape[1]} x {scan.values.shape[2]}.")
    return 0


def _pairs(given: argparse.Namespace) -> int:
    from data_modules.nac_pairs import make_pairs

    pairs = make_pairs(
        given.nac,
        given.ct,
        given.out,
        given.nac_pixel_mm,
        given.ct_pixel_mm,
        given.ct_units,
        given.max_residual,
        picture=given.picture,
    )
    for i, (name, residual) in enumerate(zip(pairs.names, pairs.residuals, strict=True)):
        print(f"{name}: residual {residual:.1%}{'' if i in pairs.kept else ', left out'}")
    print(f"Wrote {given.out}: {len(pairs.kept)} of {len(pairs.names)} slices.")
    return 0


def _reconstruct(scan: Scan) -> Scan:
    """Turn sinograms into images by filtered backprojection, and say so; images stay."""
    if scan.geometry is None:
        return scan
    import torch

    from allpet import Radon, fbp

    sinograms = torch.from_numpy(scan.values).unsqueeze(1)
    images = torch.cat([fbp(Radon(scan.geometry), part) for part in sinograms.split(32)])
    print("Reconstructed by filtered backprojection (Hann).")
    return replace(
        scan,
        values=images.squeeze(1).numpy(),
        kind="image",
        geometry=None,
        pixel_mm=scan.geometry.pixel_mm,
        units=scan.units.replace(" x mm", ""),
        additive=None,
        acf=None,
        provenance={**scan.provenance, "reconstruction": "filtered backprojection (Hann)"},
    )


def _is_native(file: str) -> bool:
    return Path(file).suffix.lower() in (".h5", ".hdf5") and Path(file).is_file() and read_about(file) is not None


def _read_rows(file: str, text: str) -> Scan:
    """Read the slices ``A:B``, of HDF5 files no others."""
    from data_modules.native import NativeFile

    first, mark, last = text.partition(":")
    try:
        chosen = (
            slice(int(first) if first else None, int(last) if last else None)
            if mark
            else slice(int(first), int(first) + 1 or None)
        )
    except ValueError:
        raise ValueError(f"--rows is {text!r}; give it as A:B, such as 0:10.") from None
    source = NativeFile(file) if _is_native(file) else read_scan(file)
    n = len(source) if isinstance(source, NativeFile) else len(source.values)
    if not range(n)[chosen]:
        raise DataError(file, f"it has {n} slices, none of them in {text}", "choose others with --rows")
    if isinstance(source, NativeFile):
        return source.scan(range(n)[chosen])
    return replace(
        source,
        values=source.values[chosen],
        additive=None if source.additive is None else source.additive[chosen],
        acf=None if source.acf is None else source.acf[chosen],
        table={name: list(column)[chosen] for name, column in source.table.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
