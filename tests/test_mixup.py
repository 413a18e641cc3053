"""Mix-up: what is mixed with what, which noise it has, and that a model which generates is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from tiny_pet import TinyPET

from allpet import (
    MIXUP_LABEL_SIZE,
    SYMMETRY_LABEL_SIZE,
    Autoencoder,
    AutoencoderSystem,
    Denoiser,
    LatentDiffusion,
    MixupAugmentation,
    ParallelBeam,
    Prompt,
    ScoreModel,
    SymmetryAugmentation,
)
from allpet.mixup import blend
from allpet.randomness import keyed_generator
from callbacks import LatentStatistics
from data_modules import SinogramFiles
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet
from data_modules.few_shot import nested_subset
from data_modules.loading import collate

GEOMETRY = ParallelBeam(n_views=16, n_bins=24, bin_mm=4.0, image_size=24, pixel_mm=4.0)
PROMPTS = ("FDG:brain", "PSMA:chest", "FDG:trunk", "open:brain", "FDG:open")
ALWAYS = MixupAugmentation("plain", probability=1.0)


class Counted(SinogramDataModule):
    """Poisson counts of slices whose means differ, one prompt after the other; 40 to train on."""

    def __init__(self, prompts: tuple[str, ...] = PROMPTS[:2], flat: bool = False, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 8, **kwargs})
        self.prompts, self.flat = prompts, flat

    def load(self) -> LoadedData:
        generator = torch.Generator().manual_seed(0)
        level = torch.arange(60.0)[:, None, None] + 5
        expected = level.expand(60, *GEOMETRY.sinogram_shape).clone()
        if not self.flat:
            expected *= 0.5 + torch.rand(expected.shape, generator=generator)
        counts = expected if self.flat else torch.poisson(expected, generator=generator)
        ids = torch.arange(60)
        prompt = Prompt.of([self.prompts[i % len(self.prompts)] for i in range(60)])
        whole = SinogramSet(counts, expected, prompt, ids, ids)
        train = whole.subset(range(40))
        train = train.subset(nested_subset(train.patient_id.tolist(), train.prompt.names(), self.num_scans))
        return LoadedData(GEOMETRY, train, whole.subset(range(40, 50)), whole.subset(range(50, 60)), "counted")


def ready(mixup: MixupAugmentation | None, **kwargs: Any) -> Counted:
    data = Counted(mixup=mixup, **kwargs)
    data.setup()
    return data


def whole(data: Counted) -> Any:
    return data.train_set[range(len(data.train_set))]


# ---- draws and mixtures ----------------------------------------------------------------------------------------------


def test_shares_are_drawn_as_asked_and_told_as_nothing_where_nothing_is_mixed() -> None:
    drawn = MixupAugmentation("plain", probability=0.3, largest_share=0.4).draw(
        20_000, torch.Generator().manual_seed(4)
    )
    mixed = drawn.share > 0
    assert float(mixed.double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(drawn.share.max()) <= 0.4
    assert float(drawn.share[mixed].mean()) == pytest.approx(0.2, abs=0.005)
    assert float(drawn.partner.mean()) == pytest.approx(0.5, abs=0.01)
    label = drawn.label()
    assert label.shape == (20_000, MIXUP_LABEL_SIZE)
    assert torch.equal(label[:, 0] > 0, mixed)
    assert float(label.max()) <= 1
    assert not MixupAugmentation("plain", probability=0.0).draw(100, torch.Generator()).share.any()


@pytest.mark.parametrize("kind", ["thinning", "plain"])
def test_thinned_counts_keep_the_variance_of_counts_and_plain_ones_do_not(kind: str) -> None:
    data = ready(MixupAugmentation(kind, probability=1.0), augmentation=None)  # type: ignore[arg-type]
    batch = data.augment(whole(data), epoch=0)
    rows = batch.symmetry[:, 0] > 0.5  # a quarter of the other, or more
    assert int(rows.sum()) > 10
    found, mean = batch.sinogram[rows], batch.expected[rows]
    error = (found - mean) / mean.sqrt()
    assert float(error.mean()) == pytest.approx(0, abs=0.05)
    if kind == "thinning":
        assert torch.equal(found, found.round())
        assert float(error.square().mean()) == pytest.approx(1, abs=0.06)
        assert abs(float((error[..., 1:] * error[..., :-1]).mean())) < 0.05, "neighbours stay independent"
    else:
        assert float(error.square().mean()) < 0.7


@pytest.mark.parametrize("kind", ["thinning", "plain"])
def test_what_is_expected_of_the_mixture_is_the_mixture_of_what_is_expected(kind: str) -> None:
    # two slices of a prompt: each is the other's partner
    data = ready(MixupAugmentation(kind, probability=1.0), num_scans=4, augmentation=None)  # type: ignore[arg-type]
    given = whole(data)
    names = given.prompt.names()
    assert sorted(names) == ["FDG:brain"] * 2 + ["PSMA:chest"] * 2
    other = [next(j for j in range(4) if j != i and names[j] == names[i]) for i in range(4)]
    mixed = data.augment(given, epoch=2)
    share = mixed.symmetry[:, 0] / 2
    torch.testing.assert_close(mixed.expected, blend(given.expected, given.expected[other], share), rtol=0, atol=0)
    if kind == "plain":
        torch.testing.assert_close(mixed.sinogram, blend(given.sinogram, given.sinogram[other], share), rtol=0, atol=0)
    assert torch.equal(given.expected, whole(data).expected), "the set itself is left as it is"


def test_partners_have_the_same_prompt_and_slices_without_one_stay_as_they_are() -> None:
    data = ready(ALWAYS, prompts=PROMPTS, flat=True, augmentation=None, trunk_probability=0.0)
    given = whole(data)
    level, names, ids = given.sinogram[:, 0, 0, 0], given.prompt.names(), given.sample_id.tolist()
    partners: dict[int, set[int]] = {}
    for epoch in range(40):
        mixed = data.augment(given, epoch)
        assert mixed.prompt.names() == names
        share = mixed.symmetry[:, 0] / 2
        for i, name in enumerate(names):
            if name in PROMPTS[:2]:
                # (1 - b) v_1 + b v_2 tells the other's level, which no two slices share
                other = float((mixed.sinogram[i, 0, 0, 0] - (1 - share[i]) * level[i]) / share[i])
                if share[i] > 0.1:
                    partners.setdefault(i, set()).add(round(other) - 5)
            else:
                assert torch.equal(mixed.sinogram[i], given.sinogram[i]), "which part, or which tracer, is not known"
                assert float(share[i]) == 0
    for i, found in partners.items():
        assert {names[ids.index(j)] for j in found} == {names[i]}
        assert ids[i] not in found
    assert set().union(*partners.values()) == {ids[i] for i, name in enumerate(names) if name in PROMPTS[:2]}


def test_prompts_for_the_trunk_are_drawn_as_without() -> None:
    data, plain = (ready(mixup, trunk_probability=0.5) for mixup in (ALWAYS, None))
    mixed, alone = (one.augment(whole(one), epoch=1) for one in (data, plain))
    assert mixed.prompt.names() == alone.prompt.names()
    assert "PSMA:trunk" in mixed.prompt.names()
    chest = torch.tensor([name.startswith("PSMA") for name in mixed.prompt.names()])
    assert (mixed.symmetry[chest, 0] > 0).all(), "what is asked for as trunk is known to be a chest"


def test_few_shot_subsets_are_the_same_and_the_only_partners() -> None:
    few, plain = (ready(mixup, num_scans=6, flat=True, augmentation=None) for mixup in (ALWAYS, None))
    assert few.summary() == plain.summary()
    assert few.state_dict() == plain.state_dict()
    levels = few.train_set.sinogram[:, 0, 0]
    for epoch in range(20):
        mixed = few.augment(whole(few), epoch)
        share, found = mixed.symmetry[:, 0] / 2, mixed.sinogram[:, 0, 0, 0]
        other = (found - (1 - share) * levels) / share
        distance = (other[:, None] - levels).abs().amin(1)
        assert distance[share > 0.1].max() < 1e-3


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_off_is_what_the_other_augmentations_make_of_a_slice() -> None:
    data = ready(None, symmetry=SymmetryAugmentation)
    given = whole(data)
    batch = data.augment(given, epoch=3)
    keys = [(data.seed, 3, i) for i in given.sample_id.tolist()]
    drawn = collate([data.symmetry.draw(1, keyed_generator(*key, "symmetry")) for key in keys])
    cells = torch.cat([data.augmentation.draw(1, keyed_generator(*key, "mask"), 3) for key in keys])
    assert torch.equal(batch.sinogram, data.symmetry.apply(given.sinogram, drawn))
    assert torch.equal(batch.expected, data.symmetry.apply(given.expected, drawn))
    assert torch.equal(batch.symmetry, drawn.label())
    assert torch.equal(batch.stack.cells, cells)
    assert ready(None).augment(given, epoch=3).symmetry is None
    assert (data.label_size, ready(None).label_size) == (SYMMETRY_LABEL_SIZE, 0)


def test_mixing_comes_first_and_leaves_all_other_draws_alone() -> None:
    with_both = ready(ALWAYS, symmetry=SymmetryAugmentation)
    mixed_only = ready(ALWAYS, augmentation=None)
    turned_only = ready(None, symmetry=SymmetryAugmentation)
    both, mixed, turned = (one.augment(whole(one), epoch=1) for one in (with_both, mixed_only, turned_only))
    assert torch.equal(both.symmetry, torch.cat([turned.symmetry, mixed.symmetry], dim=1))
    assert both.symmetry.shape[1] == with_both.label_size == SYMMETRY_LABEL_SIZE + MIXUP_LABEL_SIZE
    assert torch.equal(both.stack.cells, turned.stack.cells)
    keys = [(0, 1, i) for i in mixed.sample_id.tolist()]
    drawn = collate([with_both.symmetry.draw(1, keyed_generator(*key, "symmetry")) for key in keys])
    assert torch.equal(both.sinogram, with_both.symmetry.apply(mixed.sinogram, drawn))
    assert torch.equal(both.stack.stack[:, 1:2], both.sinogram)
    assert torch.equal(both.expected, with_both.symmetry.apply(mixed.expected, drawn))


@pytest.mark.parametrize("kind", ["thinning", "plain"])
def test_mixtures_belong_to_seed_epoch_and_slice(kind: str) -> None:
    mixup = MixupAugmentation(kind)  # type: ignore[arg-type]
    data = ready(mixup)
    every = data.augment(whole(data), epoch=3)
    assert 10 < int((every.symmetry > 0).sum()) < 30, "half of them are mixed"
    row = int(every.symmetry[:, 0].argmax())
    alone = data.augment(data.train_set[[row]], epoch=3)
    assert torch.equal(alone.sinogram[0], every.sinogram[row])
    assert torch.equal(alone.symmetry[0], every.symmetry[row])
    assert torch.equal(ready(mixup).augment(whole(data), epoch=3).sinogram, every.sinogram)
    for other in (data.augment(whole(data), epoch=4), ready(mixup, seed=1).augment(whole(data), epoch=3)):
        assert not torch.equal(other.sinogram, every.sinogram)
    with data.unmixed():
        assert torch.equal(data.augment(whole(data), epoch=3).sinogram, whole(data).sinogram)
    assert torch.equal(data.augment(whole(data), epoch=3).sinogram, every.sinogram)


def test_evaluation_mixes_nothing() -> None:
    data = ready(ALWAYS)
    for slices in (data.train_set, data.val_set):
        batch = data.augment(slices[range(10)])
        assert batch.symmetry is None
        assert torch.equal(batch.sinogram, slices[range(10)].sinogram)
    strangers = data.augment(data.val_set[range(10)], epoch=0)
    assert torch.equal(strangers.sinogram, data.val_set[range(10)].sinogram), "their partners would be in another set"
    assert not strangers.symmetry.any()


# ---- what generates is told ------------------------------------------------------------------------------------------


def stage2(label_size: int) -> LatentDiffusion:
    autoencoder = Autoencoder(channels=(8,), patch=2)
    denoiser = Denoiser(4, 4, (8, 16), 1, attention=(False, False), label_size=label_size)
    return LatentDiffusion(autoencoder, denoiser, latent_views=2, linear_rank=8, linear_turned=1)


def tiny(mixup: MixupAugmentation | None) -> TinyPET:
    data = TinyPET()
    data.mixup = mixup
    return data


def fit(system: Any, data: TinyPET, *callbacks: Any) -> Any:
    trainer = Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(system, datamodule=data)
    return system


def test_stage_2_is_told_and_starts_from_patients_alone() -> None:
    data = tiny(ALWAYS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        system = fit(stage2(MIXUP_LABEL_SIZE), data)
        torch.manual_seed(0)
        plain = fit(stage2(0), tiny(None))
    labels = system._aside.labels
    views = [data.augment(data.train_set[range(len(data.train_set))], view) for view in range(2)]
    assert torch.equal(labels, torch.stack([view.symmetry for view in views], dim=1))
    assert (labels > 0).all()
    assert not torch.equal(system._aside.latents, plain._aside.latents)
    for name, value in plain.linear.state_dict().items():
        torch.testing.assert_close(system.linear.state_dict()[name], value, msg=name)


def test_what_generates_untold_is_refused() -> None:
    for size in (0, SYMMETRY_LABEL_SIZE):
        with pytest.raises(
            ValueError, match=f"label_size is {size}: give the denoiser label_size 1, or the data neither"
        ):
            fit(stage2(size), tiny(ALWAYS))
    score = ScoreModel(Denoiser(1, 0, (8, 16), 1, attention=(False, False)))
    score.trainer = SimpleNamespace(datamodule=SimpleNamespace(label_size=9, geometry=None))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="turns, mirrors or mixes slices, and the network's label_size is 0"):
        score.setup("fit")
    score.setup("predict")


def test_latents_are_measured_on_patients_alone() -> None:
    found = []
    for mixup in (ALWAYS, None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            system = AutoencoderSystem(Autoencoder(channels=(8,), patch=2), learning_rate=0.0)
            fit(system, tiny(mixup), LatentStatistics(tolerance=10.0))
        found.append(torch.stack([system.autoencoder.latent_mean, system.autoencoder.latent_std]))
    torch.testing.assert_close(found[0], found[1])


# ---- asking for it ---------------------------------------------------------------------------------------------------


def test_it_is_asked_for_by_class_path_and_is_off_by_default() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SinogramDataModule, "data")
    words = ["--data=data_modules.SinogramFiles", "--data.folder=mine"]
    assert parser.instantiate(parser.parse_args(words)).data.mixup is None
    words += ["--data.mixup=allpet.MixupAugmentation", "--data.mixup.kind=plain", "--data.mixup.largest_share=0.3"]
    data = parser.instantiate(parser.parse_args(words)).data
    assert isinstance(data, SinogramFiles)
    assert isinstance(data.mixup, MixupAugmentation)
    assert (data.mixup.kind, data.mixup.probability, data.mixup.largest_share) == ("plain", 0.5, 0.3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "mean"}, "kind is 'mean', but must be 'thinning'"),
        ({"probability": 2.0}, "probability is 2.0"),
        ({"largest_share": 0.7}, "largest_share is 0.7, but must be positive and at most 0.5"),
    ],
)
def test_bad_numbers_are_named(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MixupAugmentation(**arguments)


def test_data_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(ValueError, match="no two training slices are known to be alike: say tracer and region"):
        ready(ALWAYS, prompts=("FDG:open", "FDG:trunk"))
    data = ready(MixupAugmentation(probability=1.0))
    corrected = whole(data)._replace(sinogram=whole(data).sinogram + 0.5)
    with pytest.raises(ValueError, match=r"Thinning needs counts, .* \(kind: plain\)"):
        data.augment(corrected, epoch=0)
