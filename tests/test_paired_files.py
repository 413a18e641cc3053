"""Pairs of one's own: what belongs together is found, split and brought to a model; what does not fit is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scipy.io import savemat
from tiny_pet import GEOMETRY

from allpet import Autoencoder, Denoiser, LatentBridge, ParallelBeam, Radon
from allpet.conditions import LABEL_SIZE, Condition
from allpet.io import Scan, read_scan, write_scan
from allpet.models.pixel_space import PixelSpace
from allpet.prompts import TRACERS
from allpet.simulation.tasks import TASKS
from allpet.symmetry import resample
from data_modules import PairedFiles, SinogramsToRestore
from data_modules.base import fixed_scale

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import attenuation_demo

MU = 0.0096


def bodies(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinograms of discs that brighten from slice to slice, and their correction factors, ``(n, views, bins)``."""
    x, y = GEOMETRY.pixel_centers
    disc = (torch.hypot(x, y) < 105).float()
    radon = Radon(GEOMETRY)
    activity = disc + 2 * (torch.hypot(x - 20, y) < 45)
    brighter = 1 + torch.arange(n)[:, None, None] / 10
    return brighter * radon.project(activity[None, None])[0], radon.project(MU * disc[None, None])[0].exp().expand(
        n, -1, -1
    )


def corrected(place: Path, n: int = 20, **more: Any) -> Path:
    """Write a file with correction factors, its slices out of order; return it."""
    target, acf = (part.numpy() for part in bodies(n))
    order = [i for i in range(n) if i % 2] + [i for i in range(n) if not i % 2]
    table = {"file": [f"{i}.mat" for i in order], "slice": [0] * n, **more.pop("table", {})}
    scan = Scan((target / acf)[order], "sinogram", GEOMETRY, acf=acf[order], table=table, **more)
    write_scan(place / "pairs.h5", scan)
    return place / "pairs.h5"


def two_folders(place: Path) -> Path:
    """Write inputs and targets of three patients, two slices each."""
    for patient in range(3):
        for number, target in enumerate(bodies(2)[0].numpy()):
            for side, values in (("input", 0.5 * target), ("target", target)):
                (place / "mine" / side / f"p{patient}").mkdir(parents=True, exist_ok=True)
                np.save(place / "mine" / side / f"p{patient}" / f"{number}.npy", (1 + patient) * values)
    return place / "mine"


def loaded(folder: Path, **given: Any) -> PairedFiles:
    data = PairedFiles(str(folder), **given)
    data.setup()
    return data


def everything(part: Any) -> Any:
    return part[list(range(len(part)))]


def test_factors_make_pairs_and_neighbours_are_split_into_blocks_with_gaps(tmp_path: Path) -> None:
    data = loaded(corrected(tmp_path), tracer="FDG", region="brain", test_share=0.2, gap=3)
    target, acf = bodies(20)
    rows = [list(range(8)), [11, 12], [16, 17, 18, 19]]
    train, val, test = (everything(part) for part in (data.train_set, data.val_set, data.test_set))
    assert sorted(train.sample_id.tolist()) == rows[0]
    assert [part.sample_id.tolist() for part in (val, test)] == rows[1:]
    for part in (train, val, test):
        torch.testing.assert_close(part.noisy[:, 0], target[part.sample_id])  # in order of their numbers, not names
        torch.testing.assert_close(part.input[:, 0], (target / acf)[part.sample_id])
        assert torch.equal(part.expected, part.noisy)
        assert part.prompt.names() == ["FDG:brain"] * len(part.input)
        assert part.target_tracer.unique().tolist() == [TRACERS.index("FDG")]
        assert {TASKS[i] for i in part.task.tolist()} == {"attenuation"}
    assert data.geometry == GEOMETRY
    mu = data.attenuation(test.sample_id)
    assert mu.shape == (4, 1, 16, 16)
    assert float(mu[:, 0, 6:10, 6:10].mean()) == pytest.approx(MU, rel=0.1)


def test_a_corrected_set_with_factors_is_the_target(tmp_path: Path) -> None:
    target, acf = (part.numpy() for part in bodies(5))
    scan = Scan(target, "sinogram", GEOMETRY, acf=acf, state=("attenuation_corrected",))
    write_scan(tmp_path / "pairs.npz", scan)
    batch = everything(loaded(tmp_path / "pairs.npz", gap=0).train_set)
    torch.testing.assert_close(batch.noisy[:, 0], torch.from_numpy(target)[batch.sample_id])
    torch.testing.assert_close(batch.input[:, 0], torch.from_numpy(target / acf)[batch.sample_id])


def test_folders_of_the_same_names_are_pairs_and_no_patient_is_in_two_splits(tmp_path: Path) -> None:
    data = loaded(two_folders(tmp_path), task="conversion", tracer="FDG", target_tracer="PSMA", bin_mm=20.0)
    parts = [everything(part) for part in (data.train_set, data.val_set, data.test_set)]
    owners = [set(part.patient_id.tolist()) for part in parts]
    assert [len(owner) for owner in owners] == [1, 1, 1]
    assert len(set.union(*owners)) == 3
    for part in parts:
        torch.testing.assert_close(part.noisy, 2 * part.input)
        assert part.target_tracer.flatten().tolist() == [TRACERS.index("PSMA")] * 2
    with pytest.raises(ValueError, match="no attenuation-correction factors"):
        data.attenuation(parts[0].sample_id)
    few = loaded(tmp_path / "mine", task="low_dose", dose=0.1, num_scans=1)
    assert len(few.train_set) == 1
    assert float(few.train_set[[0]].dose) == pytest.approx(0.1)


def test_a_public_layout_says_which_is_which(tmp_path: Path) -> None:
    for number, target in enumerate(bodies(12)[0].double().numpy()):
        savemat(tmp_path / f"{number}.mat", {"gt": target, "lq": 0.25 * target})
    batch = everything(loaded(tmp_path, task="low_dose", dose=0.25).train_set)
    torch.testing.assert_close(batch.noisy, 4 * batch.input)


def bridge(autoencoder: Any, channels: int, geometry: ParallelBeam | None) -> LatentBridge:
    denoiser = Denoiser(channels, channels, (8, 16), 1, 1, (False, False), 8, label_size=LABEL_SIZE)
    system = LatentBridge(autoencoder, denoiser, warmup_steps=1)
    system.geometry = geometry
    return system


def fit(system: LatentBridge, data: PairedFiles, place: Path) -> None:
    Trainer(
        max_steps=1, default_root_dir=place, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    ).fit(system, datamodule=data)  # fmt: skip


def test_pairs_are_brought_to_the_model_that_they_are_given_to(tmp_path: Path) -> None:
    autoencoder = Autoencoder(channels=(8, 16), latent_channels=4, layers_per_block=1, patch=1, seam=0)
    autoencoder.scaling.set_scale(7.0)
    coarse = ParallelBeam(8, 12, 24.0, 12, 24.0)
    own = loaded(corrected(tmp_path))
    data = loaded(tmp_path / "pairs.h5")  # as the command line has it: before there is a model
    fit(bridge(autoencoder, 4, coarse), data, tmp_path)
    assert data.geometry == coarse
    assert data.data_hash == own.data_hash
    assert data.scale == pytest.approx(7.0, rel=1e-2)
    gain = data.summary()["gain"]
    before, after = everything(own.train_set), everything(data.train_set)
    for name in ("input", "noisy"):
        wanted = gain * resample(getattr(before, name), GEOMETRY, coarse)
        torch.testing.assert_close(getattr(after, name), wanted, rtol=1e-4, atol=1e-4)
    # What is asked for is kept, SUV are SUV, and sinograms themselves need nothing.
    asked = loaded(tmp_path / "pairs.h5", gain=3.0, geometry=GEOMETRY)
    fit(bridge(autoencoder, 4, GEOMETRY), asked, tmp_path)
    assert torch.equal(asked.train_set[[0]].input, 3.0 * own.train_set[[0]].input)
    suv = loaded(corrected(tmp_path, units="SUV x mm"))
    fit(bridge(autoencoder, 4, GEOMETRY), suv, tmp_path)
    assert suv.scale == own.scale
    plain = loaded(tmp_path / "pairs.h5")
    fit(bridge(PixelSpace(), 1, None), plain, tmp_path)
    assert plain.scale == own.scale == fixed_scale(own.train_set.sinogram)


def test_identity_follows_content_and_what_was_asked(tmp_path: Path) -> None:
    first = loaded(corrected(tmp_path)).data_hash
    (tmp_path / "elsewhere").mkdir()
    assert loaded(corrected(tmp_path / "elsewhere"), seed=3, batch_size=1).data_hash == first
    changes: list[dict[str, Any]] = [{"gap": 0}, {"num_scans": 4}, {"tracer": "FDG"}, {"gain": 2.0}]
    assert len({first, *(loaded(tmp_path / "pairs.h5", **change).data_hash for change in changes)}) == 5


def _drop(name: str) -> Callable[[Path], object]:
    return lambda place: (place / "mine" / name).unlink()


def _write(name: str, values: np.ndarray) -> Callable[[Path], object]:
    return lambda place: np.save(place / "mine" / name, values)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_drop("target/p0/1.npy"), r"1 file\(s\) have no partner, the first is p0/1: input without target"),
        (_drop("input/p0/1.npy"), r"the first is p0/1: target without input"),
        (_write("target/p0/1.npy", bodies(2)[0].numpy()), r"has 1 slice\(s\) as input and 2 as target"),
        (_write("target/p0/1.npy", np.full((16, 16), np.nan)), "NaN"),
        (_write("target/p0/1.npy", np.ones((16, 15))), "slices of 16 x 15 where 5 other"),
        (lambda place: [np.save(p, np.ones((12, 16)) + np.eye(12, 16)) for p in (place / "mine/target").rglob("*.npy")],
         r"in input are 16 x 16 .* in target 12 x 16 .*bring both to the same"),
        (lambda place: (place / "mine/target").rename(place / "mine/wanted"), "a folder input, but none called target"),
        (lambda place: [path.unlink() for side in ("input", "target")
                        for path in [*(place / "mine" / side).glob("p[12]/*"), place / "mine" / side / "p0/1.npy"]],
         r"1 slice\(s\) cannot be split .* add slices"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, spoil: Callable[[Path], object], sentence: str) -> None:
    place = two_folders(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        loaded(place, task="low_dose", dose=0.1)


def test_files_without_targets_or_with_impossible_factors_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "alone.npy", bodies(4)[0].numpy())
    with pytest.raises(ValueError, match=r"alone\.npy: an input without a target.*attenuation-pairs"):
        loaded(tmp_path / "alone.npy")
    corrected(tmp_path)
    with pytest.raises(ValueError, match="make pairs for attenuation, but the task is delayed"):
        loaded(tmp_path / "pairs.h5", task="delayed", delay_min=60.0)
    with pytest.raises(ValueError, match=r"cannot be split .* with 9 left out between them"):
        loaded(tmp_path / "pairs.h5", gap=9)
    target, acf = (part.numpy() for part in bodies(4))
    write_scan(tmp_path / "less.h5", Scan(target, "sinogram", GEOMETRY, acf=1 / acf))
    with pytest.raises(ValueError, match=r"go from 0\.\d+ to 1, but none is below 1"):
        loaded(tmp_path / "less.h5")
    write_scan(tmp_path / "images.h5", Scan(target, "image", pixel_mm=20.0))
    with pytest.raises(ValueError, match="it holds images, but pairs are learned from sinograms"):
        loaded(tmp_path / "images.h5")
    with pytest.raises(ValueError, match="there is no such folder"):
        loaded(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"task": "fusion"}, "Unknown task 'fusion'; choose one of low_dose"),
        ({"task": "low_dose"}, r"low_dose needs dose, which files do not say: give DOSE=0\.05 \(--data\.dose\)"),
        ({"task": "delayed"}, "delayed needs delay_min"),
        ({"task": "conversion"}, "conversion needs target_tracer"),
        (
            {"task": "conversion", "target_tracer": "FDG,PSMA"},
            r"conversion takes 1 target tracer\(s\), but got 2; name",
        ),
        ({"task": "separation", "target_tracer": "PSMA"}, r"separation takes 2 .* got 1; name those: TARGETS=FDG,PSMA"),
        ({"task": "separation", "target_tracer": "FDG,water"}, "Unknown tracer 'water'"),
        ({"task": "low_dose", "dose": 0.1, "target_tracer": "FDG"}, "target_tracer is FDG, but the task is low_dose"),
        ({"delay_min": 60.0}, r"delay_min is 60\.0, but the task is attenuation: leave it out"),
        ({"task": "low_dose", "dose": 1.5}, "dose is 1.5, but must be a share of the normal dose"),
        ({"tracer": "water"}, "Unknown tracer 'water'"),
        ({"gain": 0.0}, r"gain is 0\.0, but must be a positive number"),
        ({"gap": -1}, "gap is -1"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PairedFiles("pairs.h5", **given)


# ------------------------------------------------------------------------------------------------ two tracers


def mixed(place: Path, **said: list[str]) -> Path:
    """Write mixes, a little noisy, and their two parts, of three patients of one file each; tables where said."""
    n = 3
    first, second = bodies(n)[0].numpy(), bodies(n)[0].flip(2).numpy()  # turned by half a turn
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(first.shape)
    for patient in range(3):
        parts = {"target/first": (1 + patient) * first, "target/second": (3 - patient) * second}
        for side, values in {"input": noise * sum(parts.values()), **parts}.items():
            table = {"tracer": said[side[7:]] * n} if said.get(side[7:]) else {}
            (place / "mine" / side).mkdir(parents=True, exist_ok=True)
            scan = Scan(values.astype(np.float32), "sinogram", GEOMETRY, table=table)
            write_scan(place / "mine" / side / f"p{patient}.h5", scan)
    return place / "mine"


SEPARATE: dict[str, Any] = {"task": "separation", "target_tracer": "FDG,PSMA"}


def test_two_tracers_are_targets_in_the_order_of_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = loaded(mixed(tmp_path), region="chest", **SEPARATE)
    assert "WARN" not in capsys.readouterr().out
    first, second = bodies(3)[0], bodies(3)[0].flip(2)
    seen = set()
    for batch in (everything(part) for part in (data.train_set, data.val_set, data.test_set)):
        patient, number = batch.sample_id // 3, batch.sample_id % 3
        seen |= set(patient.tolist())
        assert torch.equal(patient, batch.patient_id)
        torch.testing.assert_close(batch.noisy[:, 0], (1 + patient)[:, None, None] * first[number])
        torch.testing.assert_close(batch.noisy[:, 1], (3 - patient)[:, None, None] * second[number])
        torch.testing.assert_close(batch.input, batch.noisy.sum(1, keepdim=True), rtol=0.1, atol=1e-3)
        assert torch.equal(batch.expected, batch.noisy)
        # Of both, the first is what is prompted, and shares are those of the activity: as simulated pairs have it.
        assert batch.prompt.names() == ["FDG:chest"] * 3
        assert batch.target_tracer.tolist() == [[TRACERS.index("FDG"), TRACERS.index("PSMA")]] * 3
        torch.testing.assert_close(batch.share.sum(1), torch.ones(3))
        torch.testing.assert_close(batch.share[:, 0] / batch.share[:, 1], (1 + patient) / (3 - patient))
        # A finished model is asked the same of the inputs alone.
        alone = SinogramsToRestore(
            str(tmp_path / "mine" / "input"), "separation", "FDG", "chest", target_tracers=["FDG", "PSMA"]
        )
        alone.setup()
        asked, learned = alone.batch(batch.sample_id.tolist()).condition, Condition.of_pairs(batch)
        for one, other in zip(asked, learned, strict=True):
            torch.testing.assert_close(one, other)
    assert seen == {0, 1, 2}


def test_tables_may_say_both_tracers_and_matter_to_the_identity(tmp_path: Path) -> None:
    said = loaded(mixed(tmp_path, first=["DOPA"], second=["FDG"]), task="separation")
    batch = everything(said.train_set)
    assert batch.target_tracer.tolist() == [[TRACERS.index("DOPA"), TRACERS.index("FDG")]] * 3
    assert batch.prompt.names() == ["DOPA:open"] * 3
    asked = loaded(tmp_path / "mine", task="separation", target_tracer="DOPA, FDG", tracer="DOPA")
    assert asked.data_hash == said.data_hash
    (tmp_path / "other").mkdir()
    other = loaded(mixed(tmp_path / "other"), **SEPARATE)
    assert other.data_hash != said.data_hash


def test_mix_and_parts_are_brought_to_a_model_alike(tmp_path: Path) -> None:
    autoencoder = Autoencoder(channels=(8, 16), latent_channels=4, layers_per_block=1, patch=1, seam=0)
    autoencoder.scaling.set_scale(7.0)
    coarse = ParallelBeam(8, 12, 24.0, 12, 24.0)
    own, data = loaded(mixed(tmp_path), **SEPARATE), loaded(tmp_path / "mine", **SEPARATE)
    fit(bridge(autoencoder, 4, coarse), data, tmp_path)
    gain, before, after = data.summary()["gain"], everything(own.train_set), everything(data.train_set)
    for name in ("input", "noisy"):
        wanted = gain * resample(getattr(before, name), GEOMETRY, coarse)
        torch.testing.assert_close(getattr(after, name), wanted, rtol=1e-4, atol=1e-4)
    assert fixed_scale(after.noisy.sum(1)) == pytest.approx(7.0, rel=1e-2)  # both together are one scan's activity
    assert data.data_hash == own.data_hash


def test_what_a_model_separates_adds_up(tmp_path: Path) -> None:
    data = loaded(mixed(tmp_path), **SEPARATE)
    system = bridge(PixelSpace(), 1, None)
    fit(system, data, tmp_path)
    batch = everything(data.test_set)
    result = system.restore(batch.input, Condition.of_pairs(batch), batch.sample_id.tolist(), n_targets=2).mean
    assert result.shape == batch.noisy.shape
    total = result.sum(1, keepdim=True)
    drawn = total > 0  # of what a network of one step has drawn nothing of, nothing can be shared out
    assert drawn[batch.input > 1].float().mean() > 0.9
    torch.testing.assert_close(total[drawn], batch.input[drawn], rtol=1e-4, atol=1e-3)
    wrong = Condition.of("separation", ["FDG:open"] * 2, ["FDG", "DOPA"])
    with pytest.raises(ValueError, match="DOPA"):  # it knows which tracers it has learned
        system.restore(batch.input[:1], wrong, [0], n_targets=2)


@pytest.mark.parametrize(("factor", "said"), [(1.5, "50% more"), (0.5, "50% less"), (1.05, "")])
def test_targets_that_do_not_add_up_to_the_input_are_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, said: str
) -> None:
    place = mixed(tmp_path)
    for path in (place / "target").rglob("*.h5"):
        scan = read_scan(path)
        write_scan(path, Scan(factor * scan.values, "sinogram", GEOMETRY))
    loaded(place, **SEPARATE)
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARN" in line]
    assert len(warned) == bool(said)
    assert all(f"add up to {said} than the inputs in total" in line for line in warned)


def _cut(name: str, **scan: Any) -> Callable[[Path], object]:
    values = bodies(3)[0].numpy()
    return lambda place: write_scan(
        place / name, Scan(values[: scan.get("n", 3), :, : scan.get("bins", 16)], "sinogram")
    )


@pytest.mark.parametrize(
    ("spoil", "given", "sentence"),
    [
        (lambda place: shutil.rmtree(place / "target/second"), {}, "a folder input, but none called target/second"),
        (lambda place: shutil.rmtree(place / "target"), {}, "none called target/first or target/second; put the partn"),
        (lambda place: [shutil.rmtree(place / side) for side in ("input", "target")], {},
         "lie in folders input, target/first, target/second, of which it has none; put sinograms of both tracers"),
        (lambda place: (place / "target/second/p1.h5").unlink(), {},
         r"1 file\(s\) have no partner, the first is p1: input without target/second"),
        (lambda place: (place / "input/p1.h5").unlink(), {}, "the first is p1: target/first without input"),
        (_cut("target/second/p1.h5", n=2), {}, r"p1\.h5 has 3 slice\(s\) as input and 2 as target/second"),
        (lambda place: [_cut(f"target/first/p{i}.h5", bins=12)(place) for i in range(3)], {},
         r"in target/first 16 x 12 \(views x bins\); bring both"),
        (lambda place: None, {"target_tracer": None}, "the tracer of target/first is not known; name both as TARGETS="),
        (lambda place: None, {"target_tracer": "FDG,open"}, "the tracer of target/second is not known; name both"),
        (lambda place: None, {"target_tracer": "FDG,FDG"}, "the tracers to separate are both FDG; name two that diff"),
        (lambda place: mixed(place.parent, first=["PSMA"], second=["FDG"]), {},
         "FDG is asked for as target/first, whose files say PSMA; name the tracers in the order of the folders"),
        (lambda place: mixed(place.parent, second=["water"]), {}, r"p0\.h5 \(unknown tracer 'water'\)"),
        (lambda place: None, {"tracer": "PSMA"}, "the inputs' tracer is PSMA, .* is the first of them; say FDG, or op"),
    ],
)  # fmt: skip
def test_mixes_and_parts_that_do_not_fit_are_refused(
    tmp_path: Path, spoil: Callable[[Path], object], given: dict[str, Any], sentence: str
) -> None:
    place = mixed(tmp_path)
    spoil(place)
    with pytest.raises(ValueError, match=sentence):
        loaded(place, **{**SEPARATE, **given})


# ------------------------------------------------------------------------------------------------ what files say


def test_counts_with_scatter_and_randoms_are_refused(tmp_path: Path) -> None:
    additive = np.ones((20, *GEOMETRY.sinogram_shape), np.float32)
    with pytest.raises(ValueError, match=r"scatter and randoms come with it \(additive\).*subtract them first"):
        loaded(corrected(tmp_path, additive=additive))


def test_slices_may_be_numbered_in_any_way_that_is_a_number(tmp_path: Path) -> None:
    names = ["one.mat"] * 20
    backwards = [f"{20 - i}.0" for i in range(20)]
    data = loaded(corrected(tmp_path, table={"file": names, "slice": backwards}), gap=3)
    first = everything(data.train_set).noisy[:, 0]
    target = bodies(20)[0]
    torch.testing.assert_close(first[0], target[18])  # the last in the file, where even slices come last
    with pytest.raises(ValueError, match="column slice holds something that is no number"):
        loaded(corrected(tmp_path, table={"file": names, "slice": ["third"] * 20}))


# ------------------------------------------------------------------------------------------------ the demonstration


def test_regions_are_the_head_without_what_lies_beside_it() -> None:
    axis = torch.arange(41) - 20.0
    radius = torch.hypot(axis, axis[:, None])
    mu = MU * ((radius < 15) & (radius > 3)).float()
    mu[1:3, 1:6] = MU  # a head rest
    areas = attenuation_demo.regions(mu[None, None])
    assert torch.equal(areas["head"][0, 0], radius < 15)
    assert not (areas["rim"] & areas["centre"]).any()
    assert float(radius[areas["rim"][0, 0]].min()) > 9
    assert float(radius[areas["centre"][0, 0]].max()) < 6
    with pytest.raises(ValueError, match="no attenuation above air"):
        attenuation_demo.regions(torch.zeros(1, 1, 8, 8))


def test_the_target_is_without_error_and_the_input_is_not(tmp_path: Path) -> None:
    data = loaded(corrected(tmp_path), test_share=0.2, gap=3)
    trial = attenuation_demo.Trial.of(data)
    perfect, weak = trial.score(trial.pairs.expected), trial.score(0.9 * trial.pairs.expected)
    for name in ("l2", "l2_image", "bias_head", "bias_centre", "bias_rim", "worst_bias"):
        assert perfect[name] == 0
        assert abs(weak[name]) == pytest.approx(0.1, rel=1e-3)
    given = trial.score(trial.pairs.input)
    assert given["bias_centre"] < given["bias_rim"] < 0  # the way to the centre is the longest
    assert "one patient" in attenuation_demo.statement(data)
    assert "tried on 4 others of the same patient, with at least 8 slices between" in attenuation_demo.statement(data)


def test_what_is_said_of_the_data_holds_for_what_is_tried() -> None:
    words = ["--data.val_share=.05", "--trainer.precision=32-true", "--data.patient=a(.)"]
    assert attenuation_demo.take_data(words) == (
        {"val_share": 0.05, "patient": "a(.)"},
        ["--trainer.precision=32-true"],
    )
    with pytest.raises(SystemExit, match=r"write it with its value, --data\.gap=VALUE"):
        attenuation_demo.take_data(["--data.gap", "3"])
