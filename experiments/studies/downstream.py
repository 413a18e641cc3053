"""A downstream task: our bridge, what it is compared with, and what helps it, on the same pairs, steps and network.

Stages 1 and 2 are trained once per seed on single slices of all tracers and regions and serve every task. Each row
fine-tunes one method (a file of ``experiments/finetune/methods``, or none: the bridge) and is judged on patients that
nothing was trained on; one training gives a line for each way to sample it. A row leaves ``scores.pt``, with the
numbers of every slice and lesion, and ``pictures.pt``, the results for the slices that are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allpet import (
    AutoencoderSystem,
    BridgeSampling,
    Condition,
    ConditionalSampling,
    LatentDiffusion,
    Sampling,
    roi_from_labels,
)
from allpet.batches import unmasked_stack
from allpet.metrics import standard_image
from allpet.runs import newest_pretrained
from allpet.simulation.tasks import TASKS
from allpet.systems.pair_synthesis import FORWARD, PHYSICS, synthesise_pairs
from allpet.systems.paired import PairedSampling, PairedSystem, Restored
from allpet.systems.prior_restoration import PriorRestoration
from allpet.systems.simple_methods import GaussOracle, Identity, OsemOracle, ReprojectedIdentity
from data_modules.paired_set import write_pairs
from studies.downstream_plan import UPDATES, Plan
from studies.downstream_scores import calibration
from studies.rows import Row
from studies.training import GUIDANCE

FEW = (50, 100, 200)
"""Numbers of pairs at which starting from stage 2 is compared with starting from nothing, besides the study's own."""
OVERLAYS = ("regression", "regression_pixels", "conditional", "ddbm", "attention")
"""Methods that are a file of experiments/finetune/methods."""
WITHOUT = {
    "bridge_without_reprojection": ["--model.reproject=0", "--model.denoiser.condition_channels={channels}"],
    "bridge_without_symmetries": ["--data.symmetry=null"],
    "bridge_without_sinogram_loss": ["--model.sinogram_weight=0"],
}
"""The bridge without one of its parts each; low dose alone has these rows."""
UNDECODED = ("stage1", "prior", "regression_pixels", "conditional", "ddbm", "bridge_without_sinogram_loss")
"""Methods that do not train on the error of what their predictions decode to, besides those that do not train."""
LONGER = {"bridge_longer": "bridge", "regression_longer": "regression"}
"""What is trained ``TIMES`` as long as all others, and what it is otherwise."""
TIMES = 4
SEVERAL = ("bridge", "regression", "regression_pixels")
"""Methods of which the mean of several one-call samples is judged, too, each in an orientation of its own."""
UNTRAINED = ("identity", "identity_reprojected", "gauss_oracle", "osem_oracle")
IDENTITIES = UNTRAINED[:2]
_NONE = {"nfe": 0, "samples": 1, "turned": False, "attention": "", "updates": 0, "neighbourhood_mm": 0.0}  # no network
SAMPLING = Sampling("dpm++2m", 20, guidance=GUIDANCE)
"""How the targets of generated pairs are drawn."""


class Line(NamedTuple):
    """One way to sample what a row has trained.

    Attributes:
        facts: what tells it from the row's other lines, see ``facts_of``.
        result: ``(slices, targets, views, bins)``.
        more: further numbers.
    """

    facts: dict[str, Any]
    result: Tensor
    more: dict[str, Any]


def rows(plan: Plan) -> list[Row]:
    """Return the rows of a task, in order of worth."""
    found: dict[str, Row] = {}

    def add(method: str, seed: int, pairs: int = plan.pairs) -> None:
        key = method if method in UNTRAINED else f"{method}-n{pairs}-seed{seed}"
        facts = plan.facts(method, pairs, seed)
        if method not in (*UNTRAINED, "stage1", "prior"):
            file = {"regression_synthetic": "regression", **LONGER}.get(method, method)
            overlay = file if file in OVERLAYS else None
            facts["recipe"] = plan.recipe(overlay, "multi_task" if method == "multi_task" else None)
        if method not in (*UNTRAINED, *UNDECODED):
            facts["decoded_error"] = "relative to what is drawn"  # of rows of before: to the targets
        if method in LONGER:
            facts["steps"] *= TIMES
        if method in SEVERAL and pairs == plan.pairs:
            facts["several"] = "turned"  # rows of before have no such lines
        if method == "regression_synthetic":
            facts |= {"guidance": SAMPLING.guidance, "generated": _generated(plan, pairs), "noise": "of view sums"}
        if method in UNTRAINED:
            facts["told"] = "training pairs" if method in IDENTITIES else "each slice"
        found.setdefault(key, Row(key, facts, partial(_measure, plan, method, pairs, seed)))

    low_dose = plan.task == "low_dose"
    main = ["bridge", "regression"]
    if low_dose:
        main += ["regression_pixels", "ddbm", "attention", "conditional"]
    for method in UNTRAINED if low_dose else IDENTITIES:
        add(method, plan.seeds[0])
    for seed in plan.seeds:
        for method in ("stage1", *main):
            add(method, seed)
    if low_dose:
        for seed in plan.seeds:
            add("prior", seed)
        for method in WITHOUT:
            add(method, plan.seeds[0])
    few = min(FEW[0], plan.pairs)
    for seed in plan.seeds:
        add("regression", seed, few)
        add("regression_synthetic", seed, few)
    if low_dose:
        for seed in plan.seeds:
            for pairs in (plan.pairs, *FEW):
                add("bridge_scratch", seed, pairs)
                add("bridge", seed, pairs)
    for seed in plan.seeds:
        add("multi_task", seed)
    for method in LONGER:
        add(method, plan.seeds[0])
    return list(found.values())


def _measure(plan: Plan, method: str, pairs: int, seed: int, folder: Path) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    lines: list[dict[str, Any]] = []
    began = time.perf_counter()
    for line in _lines(plan, method, pairs, seed, folder):
        scores = plan.held_out.score(line.result)
        label = label_of(line.facts)
        kept[label] = {"facts": line.facts, "targets": scores.targets, "lesions": scores.lesions}
        pictures[label] = line.result[plan.drawn()].half()
        spent = {"line_seconds": round(time.perf_counter() - began, 1)}
        lines.append({**line.facts, **scores.numbers, **line.more, **spent})
        began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(kept, folder / "scores.pt")
    torch.save(pictures, folder / "pictures.pt")
    return {"lines": lines}


def label_of(facts: dict[str, Any]) -> str:
    """Return the name of a line in ``scores.pt`` and ``pictures.pt``."""
    updates = f"-{facts['updates']}" + "-alone" * (not facts["neighbourhood_mm"]) if facts["updates"] else ""
    return f"{facts['nfe']}-{facts['samples']}-{facts['attention']}{updates}" + "-turned" * facts["turned"]


def _lines(plan: Plan, method: str, pairs: int, seed: int, folder: Path) -> Iterator[Line]:
    """Make a method ready and return its results for the held-out inputs, one way to sample after the other."""
    if method in UNTRAINED:
        yield _untrained(plan, method)
        return
    if method == "stage1":
        yield Line(_NONE, _through_stage1(plan, seed), {})
        return
    if method == "prior":
        prior = PriorRestoration(LatentDiffusion.from_pretrained(newest_pretrained(plan.stage2(seed))))
        for sampling in (PairedSampling(nfe=1), PairedSampling(nfe=5), *_fitted(plan, PairedSampling(nfe=1))):
            yield _line(plan, prior, sampling)
        return
    system = _train(plan, method, pairs, seed, folder)
    if method == "attention":
        yield from _attending(plan, system)
    elif method == "ddbm":
        yield _line(plan, system, BridgeSampling(sampler="heun", nfe=119))
        for nfe in (5, 10):  # its training, sampled as ours is
            yield _line(plan, system, BridgeSampling(nfe=nfe))
    elif method == "conditional":
        for nfe in (20, 5):
            yield _line(plan, system, ConditionalSampling(nfe=nfe))
    else:
        once = BridgeSampling(nfe=1)
        several, ways = method in SEVERAL and pairs == plan.pairs, system.ways(once)
        if several and ways == 1:
            raise ValueError(
                f"The model in {folder} does not say how its training pairs were turned, as those of earlier versions "
                "do not: remove the folder, and it is trained anew."
            )
        yield _line(plan, system, once)
        if not method.startswith("regression"):
            yield _line(plan, system, BridgeSampling(nfe=5))
            yield _line(plan, system, BridgeSampling(nfe=20))
        if pairs == plan.pairs and method in ("bridge", "regression", "regression_pixels", *LONGER):
            for fitted in _fitted(plan, once):
                yield _line(plan, system, fitted)
        if several:
            yield _many(plan, system, replace(once, samples=min(plan.samples, ways)))
        if pairs == plan.pairs and method == "bridge":
            for sampling in _several(plan):
                yield _many(plan, system, sampling)


def _train(plan: Plan, method: str, pairs: int, seed: int, folder: Path) -> PairedSystem:
    run = folder / "train"
    if method in OVERLAYS:
        return plan.finetune(run, seed, pairs, method)
    if method == "multi_task":
        # One training serves the studies of all tasks.
        shared = plan.output / "downstream_stages" / f"multi_task-n{pairs}-{Path(plan.scale).stem}-seed{seed}"
        return plan.finetune(shared, seed, pairs, task="multi_task", steps=len(TASKS) * plan.steps)
    if method == "regression_synthetic":
        file = synthesise(plan, pairs, seed, folder)
        return plan.finetune(folder / f"train-{file.stem}", seed, pairs, "regression", [f"--data.generated={file}"])
    if method in LONGER:
        overlay = LONGER[method] if LONGER[method] in OVERLAYS else None
        return plan.finetune(run, seed, pairs, overlay, steps=TIMES * plan.steps)
    more = ["--model.initialise=false"] if method == "bridge_scratch" else WITHOUT.get(method, [])
    return plan.finetune(run, seed, pairs, more=[word.format(channels=plan.latent_channels) for word in more])


def generated_file(plan: Plan, pairs: int, folder: Path) -> Path:
    """Return where a row keeps its generated pairs: by number and guidance, as they are used again."""
    return folder / f"generated-{_generated(plan, pairs)}-guided-{SAMPLING.guidance:g}.safetensors"


def _generated(plan: Plan, pairs: int) -> int:
    return max(plan.pairs - pairs, pairs)


def synthesise(plan: Plan, pairs: int, seed: int, folder: Path) -> Path:
    """Generate pairs that bring few real ones to the study's number, and return their file; keep it if it is there."""
    file = generated_file(plan, pairs, folder)
    if file.exists():
        return file
    helper = None
    if plan.task not in PHYSICS:
        way = [] if plan.task in FORWARD else ["--data.reverse=true"]
        helper = plan.finetune(folder / "helper", seed, pairs, "regression_pixels", way)
    prior = LatentDiffusion.from_pretrained(newest_pretrained(plan.stage2(seed)))
    data = plan.training_pairs(pairs)
    seeds = range(1_000_000 * seed, 1_000_000 * seed + _generated(plan, pairs))
    return write_pairs(file, synthesise_pairs(prior, data, seeds, helper, SAMPLING))


def restore(plan: Plan, method: Callable[..., Restored], sampling: Any = None, **given: Any) -> Restored:
    """Give a method the held-out inputs.

    Args:
        plan: of the study.
        method: has the face of ``PairedSystem.restore``.
        sampling: how to.
        given: further arguments.
    """
    pairs = plan.held_out.pairs
    condition = Condition.of_pairs(pairs)
    return method(pairs.input, condition, pairs.sample_id.tolist(), sampling, pairs.expected.shape[1], **given)


def facts_of(sampling: PairedSampling, attention: str = "") -> dict[str, Any]:
    """Return what tells lines of a row apart."""
    near = sampling.width(uncorrected=False) if sampling.data_consistency else 0.0
    turned = sampling.turned and sampling.samples > 1
    kept = {"nfe": sampling.nfe, "samples": sampling.samples, "turned": turned, "attention": attention}
    return kept | {"updates": sampling.data_consistency, "neighbourhood_mm": near}


def _fitted(plan: Plan, sampling: PairedSampling) -> list[PairedSampling]:
    """Return the same with as many updates towards the input as are judged."""
    return [replace(sampling, data_consistency=n, neighbourhood_mm=width) for n, width in plan.fitting]


def _several(plan: Plan) -> list[PairedSampling]:
    """Return the ways whose intervals are judged; of low dose, where they are asked for, also with many calls."""
    few = BridgeSampling(nfe=5, samples=plan.samples)
    many = [replace(few, nfe=20)] if plan.task == "low_dose" else []
    return [replace(few, turned=False), few, *_fitted(plan, few)[-1:], *many]


def _line(plan: Plan, system: PairedSystem | PriorRestoration, sampling: PairedSampling) -> Line:
    return Line(facts_of(sampling), restore(plan, system.restore, sampling).mean, {})


@torch.no_grad()
def _through_stage1(plan: Plan, seed: int) -> Tensor:
    """Return what stage 1 makes of the expected targets themselves: what its latents lose, all that use them lose."""
    stage1 = AutoencoderSystem.from_pretrained(newest_pretrained(plan.stage2(seed).with_name("vae"))).eval()
    expected = plan.held_out.pairs.expected
    pieces = expected.flatten(0, 1)[:, None].split(64)
    return torch.cat([stage1(unmasked_stack(piece))[:, 1] for piece in pieces]).view_as(expected)


def _untrained(plan: Plan, method: str) -> Line:
    pairs = plan.held_out.pairs
    if method in IDENTITIES:
        known = plan.training_pairs(plan.pairs)
        identity = Identity() if method == "identity" else ReprojectedIdentity(plan.held_out.radon)
        identity.fit(known.input, known.expected, Condition.of_pairs(known))
        return Line(_NONE, restore(plan, identity.restore).mean, {})
    if method == "osem_oracle":
        reconstruction = OsemOracle(plan.held_out.radon).fit(pairs.input, pairs.expected)
        return Line(_NONE, restore(plan, reconstruction.restore).mean, {})
    oracle = GaussOracle(plan.data.geometry).fit(pairs.input, pairs.expected)
    return Line(_NONE, restore(plan, oracle.restore).mean, {})


def _many(plan: Plan, system: PairedSystem, sampling: PairedSampling) -> Line:
    """Return the mean of several samples, and how often their intervals hold the truth."""
    restored = restore(plan, system.restore, sampling)
    curve = calibration(restored.samples, plan.held_out.pairs.expected)
    at = next(point for point in curve if point["level"] == 0.9)
    more = {"coverage_90": at["gauss"], "coverage_90_quantile": at["quantile"], "calibration": curve}
    return Line(facts_of(sampling), restored.mean, more)


def _attending(plan: Plan, system: PairedSystem) -> Iterator[Line]:
    """Return results without, with and with strong attention, and with regions that a clinician would draw.

    These are the lesions, and, to see that nothing else follows, the same moved by a quarter of the image. First the
    network alone attends, then the fit to the input, too.
    """
    pairs, radon = plan.held_out.pairs, plan.held_out.radon
    assert pairs.labels is not None
    lesions = roi_from_labels(pairs.labels, "lesion_hot")
    regions = {"roi": (lesions, 1.0), "roi 2": (lesions, 2.0)}
    regions["roi moved"] = (lesions.roll(lesions.shape[-1] // 4, -1), 1.0)
    for sampling in (BridgeSampling(nfe=1), BridgeSampling(nfe=1, data_consistency=UPDATES[-1])):
        facts = partial(facts_of, sampling)
        none = restore(plan, system.restore, sampling, attention_strength=0.0).mean
        yield Line(facts(attention="0"), none, {})
        for strength in (1.0, 2.0):
            result = restore(plan, system.restore, sampling, attention_strength=strength).mean
            yield Line(facts(attention=f"{strength:g}"), result, {})
        before = standard_image(radon, none[:, :1])
        for name, (roi, strength) in regions.items():
            result = restore(plan, system.restore, sampling, roi=roi, attention_strength=strength).mean
            change = (standard_image(radon, result[:, :1]) - before).abs() / before.mean()
            drawn = roi.flatten(1).any(1)[:, None, None, None]
            more = {
                "change_in_roi": float(change[roi].mean()),
                "change_outside_roi": float(change[drawn & ~roi & (pairs.labels > 0)].mean()),
            }
            yield Line(facts(attention=name), result, more)


def expanded(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one flat dictionary per line of the finished rows; what lines of before do not say is filled in."""
    shared = [{name: value for name, value in row.items() if name != "lines"} for row in done]
    later = {"turned": False, "neighbourhood_mm": 0.0}
    return [
        {**facts, **later, **{name: value for name, value in line.items() if name != "calibration"}}
        for facts, row in zip(shared, done, strict=True)
        for line in row["lines"]
    ]
