"""Semi-real attenuation pairs: fine-tune on some slices, try on the others, and show what came out.

    python experiments/attenuation_demo.py pairs.h5 [--prompt FDG:brain] [--start outputs/ldm]
    (make attenuation-demo DATA=pairs.h5 PROMPT=FDG:brain)

The file is one that ``allpet-data attenuation-pairs`` has made. Slices of one patient are split into blocks of
neighbours with a gap between them. A latent bridge, begun from the newest stage 2, and a regression U-Net on sinograms
without one are fine-tuned as ``make finetune`` does it, on the first block, and judged on the last, beside the input
itself; what they give by one call is also fitted to the input. Of one patient that is a demonstration, which the page
and the numbers say.

Leaves ``outputs/reports/attenuation_demo.json`` (means over the slices tried, nothing of a single one), ``.md``,
``.png`` and ``.html``, one page that needs no other file, and the trainings in ``outputs/attenuation_demo/``. Given
again, the command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from evaluation_page import picture, write_document
from scipy import ndimage
from studies.downstream_plan import load
from studies.training import HERE, scale_file
from torch import Tensor

from allpet import BridgeSampling, Condition
from allpet.cli import main as allpet
from allpet.metrics import moment_residuals, relative_l2, standard_image, suv_bias
from allpet.nac_inversion import BODY_MU
from allpet.reports import FOLDER, table, write_report
from allpet.runs import newest_pretrained, weights_hash
from allpet.simulation.tasks import PairedBatch
from allpet.systems.paired import PairedSystem
from allpet.systems.simple_methods import Identity
from allpet.systems.starting import load_stages
from callbacks.figures import DIFFERENCE, Tile, draw_grid, save_figure, top
from data_modules import PairedFiles

METHODS = {"bridge": (1, 5), "regression": (1,), "regression_pixels": (1,)}
"""What can be fine-tuned, with numbers of network calls that it is tried with; names of experiments/finetune/methods,
but for the bridge."""
WORDS = {
    "identity": "the input times one number",
    "bridge": "latent bridge, begun from stage 2",
    "regression": "regression in latents, begun from stage 2",
    "regression_pixels": "regression U-Net on sinograms, without stages 1 and 2",
    "target": "the target itself",
}
UPDATES = 32
"""By which results of one call are also fitted to the input, as ``make restore`` does it."""
REGIONS = ("head", "centre", "rim")
DRAWN = 4
_FAINT = 0.05  # pixels of less than this share of a slice's maximum have no bias worth a percentage
_WHAT_IT_IS = (
    "The pairs are semi-real: anatomy and attenuation are those of images, both sinograms are re-simulated from them "
    "(allpet.nac_inversion), so no scatter, no randoms and no scanner's own corrections are learned. Images are OSEM, "
    "3 iterations of 14 subsets, 4 mm. l2: relative L2 difference to the target. bias: mean over the slices tried of "
    "the uptake of a region over that of the target, less 1; centre and rim are the inner and the outer third of the "
    "head by depth; worst: the largest of one slice. updates: of the fit to the input, with attenuation and scatter "
    "that it finds between the two (allpet.attenuation); no CT is used. hl0: share of Helgason-Ludwig moment 0 that no "
    "image could have caused, 0 for consistent sinograms."
)


class Trial(NamedTuple):
    """What everything is judged by: the slices that nothing was trained on.

    Attributes:
        data: the pairs, set up.
        pairs: those tried.
        areas: the regions, ``(slices, 1, rows, columns)`` bool each.
        image: what the targets reconstruct to.
    """

    data: PairedFiles
    pairs: PairedBatch
    areas: dict[str, Tensor]
    image: Tensor

    @classmethod
    def of(cls, data: PairedFiles) -> Trial:
        """Take the test slices of pairs with attenuation."""
        pairs = everything(data.test_set)
        areas = regions(data.attenuation(pairs.sample_id))
        return cls(data, pairs, areas, standard_image(data.radon, pairs.expected))

    def score(self, result: Tensor) -> dict[str, float]:
        """Return the numbers of results, ``(slices, 1, views, bins)``."""
        image = standard_image(self.data.radon, result)
        shown = self.image > _FAINT * self.image.amax((1, 2, 3), keepdim=True)
        biases = {name: suv_bias(image, self.image, area & shown) for name, area in self.areas.items()}
        worst = torch.stack(list(biases.values())).abs()
        return {
            "l2": float(relative_l2(result, self.pairs.expected).mean()),
            "l2_image": float(relative_l2(image, self.image).mean()),
            **{f"bias_{name}": float(bias.nanmean()) for name, bias in biases.items()},
            "worst_bias": float(worst[~worst.isnan()].max()),
            "hl0": float(moment_residuals(result, self.data.geometry, 1)[:, 0].mean()),
        }


def everything(pairs: Any) -> PairedBatch:
    """Return a whole set as one batch."""
    batch: PairedBatch = pairs[list(range(len(pairs)))]
    return batch


def regions(attenuation: Tensor) -> dict[str, Tensor]:
    """Return the head, its inner and its outer third by depth below the surface.

    Args:
        attenuation: 1/mm, ``(slices, 1, rows, columns)``.

    Returns:
        ``REGIONS``, ``(slices, 1, rows, columns)`` bool each; the head is the largest piece that attenuates, holes
        filled.

    Raises:
        ValueError: if a slice shows nothing that attenuates.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in REGIONS}
    for slice_ in (attenuation[:, 0] > BODY_MU).numpy():
        pieces, n = ndimage.label(slice_)
        if not n:
            raise ValueError("A slice shows no attenuation above air: check the pairs with allpet-data info --verify.")
        sizes = ndimage.sum_labels(slice_, pieces, range(1, n + 1))
        head = ndimage.binary_fill_holes(pieces == 1 + int(sizes.argmax()))
        depth = ndimage.distance_transform_edt(head)
        for name, area in (
            ("head", head),
            ("centre", depth >= 2 / 3 * depth.max()),
            ("rim", head & (depth <= depth.max() / 3)),
        ):
            found[name].append(torch.from_numpy(area)[None])
    return {name: torch.stack(areas) for name, areas in found.items()}


def finetune(method: str, options: argparse.Namespace, data: dict[str, Any], key: str, start: Path) -> PairedSystem:
    """Fine-tune as ``make finetune TASK=attenuation DATA=...`` does, or continue; return the result.

    Args:
        method: of ``METHODS``.
        options: of the command line.
        data: arguments of the pairs.
        key: of the pairs' content.
        start: pretrained folder of stage 2.
    """
    files = [HERE / f"{name}.yaml" for name in ("defaults", "finetune/bridge", "finetune/own_pairs")]
    files += [HERE / "finetune/attenuation.yaml", scale_file(options.scale)]
    files += [HERE / f"finetune/methods/{method}.yaml"] if method != "bridge" else []
    words = [word for file in files for word in ("-c", str(file))]
    words += [f"--seed_everything={options.seed}", f"--model.seed={options.seed}"]
    words += [f"--data.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in data.items()]
    words += [] if method == "regression_pixels" else [f"--model.autoencoder={start}"]
    words += [f"--trainer.max_steps={options.steps}", *options.more]
    # A folder for each training: the newest in it is that which was asked for.
    asked = hashlib.blake2b("\x1f".join([*words, key, weights_hash(start)]).encode(), digest_size=4).hexdigest()
    root = options.output / f"{method}-{asked}"
    allpet(["fit", *words, f"--run.root={root}"])
    return load(root)


def restore(system: PairedSystem, pairs: PairedBatch, nfe: int, updates: int) -> Tensor:
    """Return what a system makes of the inputs."""
    sampling = BridgeSampling(nfe=nfe, data_consistency=updates)
    restored = system.restore(pairs.input, Condition.of_pairs(pairs), pairs.sample_id.tolist(), sampling)
    return restored.mean.float().cpu()


def draw(trial: Trial, results: dict[str, Tensor], path: Path) -> Any:
    """Draw some of the slices tried: sinograms above their OSEM images, then what is left to the target."""
    count = len(trial.pairs.input)
    rows, labels = [], []
    for i in torch.linspace(0, count - 1, min(DRAWN, count)).round().long().unique().tolist():
        given, target = trial.pairs.input[i : i + 1], trial.pairs.expected[i : i + 1]
        made = {name: result[i : i + 1] for name, result in results.items()}
        for kind in ("sinogram", "OSEM image"):
            if kind == "OSEM image":
                given, target, *others = (standard_image(trial.data.radon, x) for x in (given, target, *made.values()))
                made = dict(zip(made, others, strict=True))
            high = top(target)
            tiles = [Tile(given[0, 0], (0, top(given)), f"input, to {top(given):.3g}")]
            tiles += [Tile(x[0, 0], (0, high), name.replace("_", " ")) for name, x in made.items()]
            tiles += [Tile(target[0, 0], (0, high), f"target, to {high:.3g}")]
            tiles += [
                Tile((x - target)[0, 0], (-high / 2, high / 2), f"{name.replace('_', ' ')}\n- target", DIFFERENCE)
                for name, x in made.items()
            ]
            rows.append(tiles)
            labels.append(f"slice {i + 1} of {count}\n{kind}")
    figure = draw_grid(rows, labels, "Slices that nothing was trained on; differences to half of the target's maximum")
    save_figure(figure, path)
    return figure


def statement(data: PairedFiles) -> str:
    """Say how far the results carry: of how many patients, and how they were split."""
    train, test = everything(data.train_set), everything(data.test_set)
    tried = f"fine-tuned on {len(train.input)} slices, tried on {len(test.input)} others"
    if data.summary()["split"] == "by patient":
        patients = len(torch.cat([train.patient_id, test.patient_id]).unique())
        return f"A demonstration on {patients} patients, {tried} of other patients: no study, and no clinical evidence."
    between = int((test.sample_id[:, None] - train.sample_id).abs().min()) - 1
    return (
        f"A demonstration on one patient (or on slices whose patients nothing tells apart): {tried} of the same "
        f"patient, with at least {between} slices between. It says nothing about other patients, and nothing about "
        "clinical use."
    )


def take_data(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Part what is said of the data from the rest: what is tried must be split as what is trained on.

    Raises:
        SystemExit: if an option of the data is not written with ``=``.
    """
    said: dict[str, Any] = {}
    for word in (word for word in words if word.startswith("--data.")):
        name, sign, value = word.removeprefix("--data.").partition("=")
        if not sign:
            raise SystemExit(f"{word} is an option of the data: write it with its value, {word}=VALUE.")
        said[name] = yaml.safe_load(value)
    return said, [word for word in words if not word.startswith("--data.")]


def main(words: Sequence[str] | None = None) -> Path:
    """Fine-tune, try, write; return the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="made by allpet-data attenuation-pairs")
    parser.add_argument("--prompt", default="open:open", help="tracer:region of all slices")
    parser.add_argument("--start", type=Path, default=Path("outputs/ldm"), help="stage 2: pretrained folder or root")
    parser.add_argument("--scale", default="laptop", help="name in experiments/scale, or a file of one's own")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["bridge", "regression_pixels"])
    parser.add_argument("--steps", type=int, help="of every fine-tuning; default: the scale's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and draws")
    parser.add_argument("--output", type=Path, default=Path("outputs/attenuation_demo"), help="folder of the trainings")
    parser.add_argument("--reports", type=Path, default=FOLDER, help="folder to write to")
    options, options.more = parser.parse_known_args(words)
    scale = yaml.safe_load(scale_file(options.scale).read_text(encoding="utf-8"))["scale"]
    options.steps = options.steps or scale["bridge"]["steps"]
    tracer, _, region = options.prompt.partition(":")
    start = newest_pretrained(options.start)
    autoencoder, geometry, _, _ = load_stages(start)
    said_of_data, options.more = take_data(options.more)
    given: dict[str, Any] = {"folder": str(options.pairs), "tracer": tracer, "region": region or "open"}
    given |= {"test_share": 0.2, **said_of_data}  # a fifth, where there is but one patient
    data = PairedFiles(**given, geometry=geometry)
    data.setup()
    # One number for all methods, so that their results are in the same units.
    gain = 1.0 if data.in_suv else float(autoencoder.scaling.scale) / data.scale
    given |= {"geometry": data.geometry.to_dict(), "seed": options.seed}
    given.setdefault("gain", gain)
    data = PairedFiles(**{**given, "geometry": data.geometry})
    data.setup()
    if not len(data.test_set):
        raise SystemExit(f"{options.pairs} leaves no slices to try: set --data.test_share, or give more patients.")
    trial, train = Trial.of(data), everything(data.train_set)

    results = {"identity": Identity().fit(train.input, train.expected).restore(trial.pairs.input).mean}
    rows = [{"method": "identity", "nfe": 0, "updates": 0, **trial.score(results["identity"])}]
    for method in options.methods:
        system = finetune(method, options, given, data.data_hash, start)
        for nfe, updates in [*((nfe, 0) for nfe in METHODS[method]), (1, UPDATES)]:
            calls = "" if len(METHODS[method]) == 1 else f", nfe {nfe}"
            name = f"{method}{calls}{', fitted' * bool(updates)}"
            results[name] = restore(system, trial.pairs, nfe, updates)
            rows.append({"method": method, "nfe": nfe, "updates": updates, **trial.score(results[name])})
    rows.append({"method": "target", "nfe": 0, "updates": 0, **trial.score(trial.pairs.expected)})

    said = statement(data)
    methods = "; ".join(f"{name}: {WORDS[name]}" for name in ("identity", *options.methods, "target"))
    report = write_report(
        "attenuation_demo",
        rows,
        [options.seed],
        options.reports,
        title="Semi-real attenuation pairs: a demonstration",
        remarks=f"{said} {_WHAT_IT_IS} {methods}; hl0 of identity is that of the input.",
        slices={"train": len(train.input), "test": len(trial.pairs.input)},
        split=data.summary()["split"],
        geometry=data.geometry.to_dict(),
        own_geometry=data.own_geometry.to_dict(),
        steps=options.steps,
    )
    figure = draw(trial, results, report.with_suffix(".png"))
    page = report.with_suffix(".html")
    parts = [
        "<h1>Semi-real attenuation pairs</h1>",
        f"<p><b>{html.escape(said)}</b></p>",
        f"<p>{html.escape(_WHAT_IT_IS)}</p>",
        f"<pre>{html.escape(table(rows))}</pre>",
        f"<p>{html.escape(methods)}; hl0 of identity is that of the input.</p>",
        picture(figure, "inputs, results, targets and differences of held-out slices"),
    ]
    write_document(page, "Semi-real attenuation pairs: a demonstration", parts)
    print(said, table(rows), f"Page: {page}. Numbers: {report}.", sep="\n")
    return page


if __name__ == "__main__":
    main()
