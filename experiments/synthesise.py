r"""Generate pairs of a downstream task beside few real ones (arXiv 2509.09130, fig. 3), for a fine-tuning to train on.

    python experiments/synthesise.py low_dose --pairs 50 --count 450      (make synthesise TASK=low_dose PAIRS=50)
    make finetune TASK=low_dose PAIRS=50 ARGS="--data.generated=outputs/pairs/low_dose.safetensors"

Targets are drawn from stage 2. The input of a low dose follows by physics; that of any other task a *helper* makes,
which is trained on the real pairs first, the wrong way round (``allpet.systems.pair_synthesis``):

    make finetune TASK=conversion PAIRS=50 ARGS="-c experiments/finetune/methods/regression_pixels.yaml \
        --data.reverse=true --run.root=outputs/helpers/conversion"
    make synthesise TASK=conversion PAIRS=50

Of delayed scans the inputs are drawn, and the helper is trained the right way round: without ``--data.reverse=true``.

The real pairs, which prompts, doses, delays and the strength of noise are taken from, are the first of ``PairedTask``,
as ``make finetune`` trains on them, or of a folder of one's own (``--folder``, low dose alone).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from allpet import LatentBridge, LatentDiffusion, Sampling, synthesise_pairs
from allpet.io import DataError
from allpet.runs import newest_pretrained
from allpet.simulation.tasks import TASKS
from allpet.systems.pair_synthesis import FORWARD, PHYSICS
from data_modules import PairedFiles, PairedTask
from data_modules.paired_base import PairedDataModule
from data_modules.paired_set import write_pairs


def main(words: Sequence[str] | None = None) -> Path:
    """Generate, write and return the file; what cannot be done ends in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--pairs", type=int, help="real pairs (50 simulated ones, or all of a folder)")
    parser.add_argument("--count", type=int, default=450, help="pairs to generate (450)")
    parser.add_argument("--stage2", type=Path, default=Path("outputs/ldm"), help="run or root (outputs/ldm)")
    parser.add_argument("--helper", type=Path, help="run or root of the helper (outputs/helpers/TASK)")
    parser.add_argument("--folder", help="real pairs of one's own, as of make finetune DATA= (low_dose)")
    parser.add_argument("--tracer", default="open", help="of the folder's pairs (open: as the files say)")
    parser.add_argument("--region", default="open", help="of the folder's pairs")
    parser.add_argument("--dose", type=float, help="of the folder's inputs, a share of the normal one")
    parser.add_argument("--gain", type=float, help="what the folder's values are multiplied by, as of make finetune")
    parser.add_argument("--guidance", type=float, default=Sampling().guidance, help="of stage 2 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first pair; the next has one more (0)")
    parser.add_argument("--output", type=Path, help="default: outputs/pairs/TASK.safetensors")
    options = parser.parse_args(words)
    try:
        return run(options)
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"synthesise: {error}") from error


def run(options: argparse.Namespace) -> Path:
    """Generate pairs, write them, and return the file.

    Raises:
        ValueError: if a number is impossible or the folder's pairs are of a task that needs a helper.
        FileNotFoundError: if a model is not there.
    """
    if options.pairs is None and options.folder is None:
        options.pairs = 50
    if options.count < 1 or (options.pairs is not None and options.pairs < 1):
        raise ValueError(f"pairs is {options.pairs} and count {options.count}, but both must be at least 1.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = LatentDiffusion.from_pretrained(newest_pretrained(options.stage2)).to(device)
    helper = None
    if options.task not in PHYSICS:
        if options.folder is not None:
            raise ValueError(f"Pairs of one's own are generated for {', '.join(PHYSICS)}, not for {options.task}.")
        place = options.helper or Path("outputs/helpers") / options.task
        try:
            helper = LatentBridge.from_pretrained(newest_pretrained(place)).to(device)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{place} holds no finished helper, which {options.task} needs: train it first with make "
                f"finetune TASK={options.task} PAIRS={options.pairs} "
                'ARGS="-c experiments/finetune/methods/regression_pixels.yaml '
                f'{"" if options.task in FORWARD else "--data.reverse=true "}--run.root={place}".'
            ) from error
    data = _real(options, prior)
    pairs = data.train_set[list(range(len(data.train_set)))]
    seeds = range(options.seed, options.seed + options.count)
    made = synthesise_pairs(prior, pairs, seeds, helper, Sampling(guidance=options.guidance))  # type: ignore[arg-type]
    gain = float(data.summary().get("gain", 1.0))
    path = write_pairs(options.output or Path("outputs/pairs") / f"{options.task}.safetensors", made, gain)
    print(f"Wrote {path}: {options.count} pairs for {options.task}, generated beside {len(pairs.input)} real ones.")
    return path


def _real(options: argparse.Namespace, prior: LatentDiffusion) -> PairedDataModule:
    if options.folder is None:
        data: PairedDataModule = PairedTask(
            options.task, prior.geometry, num_scans=options.pairs, val_patients=1, test_patients=0
        )
    else:
        about = {"tracer": options.tracer, "region": options.region, "dose": options.dose, "gain": options.gain}
        data = PairedFiles(options.folder, options.task, num_scans=options.pairs, **about)
        # pairs are brought to the geometry and scale of the model that they are given to
        data.trainer = SimpleNamespace(lightning_module=prior)  # type: ignore[assignment]
    data.prepare_data()
    data.setup()
    return data


if __name__ == "__main__":
    main()
