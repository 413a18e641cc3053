"""Scaling, prompts, keyed randomness and pretrained folders."""

import json

import pytest
import torch

from allpet.pretrained import load_pretrained, save_pretrained
from allpet.prompts import REGIONS, TRACERS, Prompt, count_prompts, draw_open, unseen
from allpet.randomness import keyed_generator
from allpet.scaling import Scaling


def test_scaling_is_linear_and_inverted():
    scaling = Scaling(250.0)
    positive, negative = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaling(positive) + scaling(negative), scaling(positive + negative))
    torch.testing.assert_close(scaling.inverse(scaling(positive)), positive)
    assert scaling(torch.zeros(1)) == 0
    assert Scaling().load_state_dict(scaling.state_dict())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match="must be positive"):
        Scaling(scale)


def test_prompts_read_as_they_are_written():
    names = ["FDG:brain", "PSMA:open", "open:trunk"]
    assert Prompt.of(names).names() == names
    assert Prompt.of([("18F-FDG", "Brain"), ("68Ga-PSMA-11", "any")]).names() == ["FDG:brain", "PSMA:open"]
    assert TRACERS[0] == REGIONS[0] == "open"


def test_unknown_prompts_are_refused():
    with pytest.raises(ValueError, match="Unknown tracer 'FGD'; choose one of open, FDG, DOPA, PSMA"):
        Prompt.of(["FGD:brain"])
    with pytest.raises(ValueError, match="A prompt is tracer:region"):
        Prompt.of(["FDG"])


def test_open_halves_are_drawn_as_often_as_slices_have_them():
    counts = count_prompts(Prompt.of(["FDG:brain"] * 2 + ["FDG:chest"] * 2 + ["PSMA:chest"] * 4))

    def draw(asked, n=2000):
        drawn = draw_open(Prompt.of([asked] * n), counts, [keyed_generator(i, asked) for i in range(n)]).names()
        return {name: drawn.count(name) / n for name in set(drawn)}

    assert draw("open:open") == pytest.approx({"FDG:brain": 0.25, "FDG:chest": 0.25, "PSMA:chest": 0.5}, abs=0.04)
    assert draw("FDG:open") == pytest.approx({"FDG:brain": 0.5, "FDG:chest": 0.5}, abs=0.04)
    assert draw("open:chest") == pytest.approx({"FDG:chest": 1 / 3, "PSMA:chest": 2 / 3}, abs=0.04)
    assert draw("open:trunk") == pytest.approx({"FDG:trunk": 1 / 3, "PSMA:trunk": 2 / 3}, abs=0.04), "chests answer it"
    assert draw("DOPA:open", 10) == {"DOPA:open": 1}, "no slice could say"
    assert draw("DOPA:pelvis", 10) == {"DOPA:pelvis": 1}, "nothing is open"


def test_prompts_that_no_slice_answers_are_named():
    counts = count_prompts(Prompt.of(["FDG:brain", "PSMA:chest"]))
    asked = ["FDG:brain", "PSMA:trunk", "open:open", "DOPA:open", "FDG:chest", "DOPA:open", "open:pelvis"]
    assert unseen(Prompt.of(asked), counts) == ["DOPA:open", "FDG:chest", "open:pelvis"]


def test_keyed_draws_depend_on_the_key_alone():
    def draw(*key):
        return torch.rand(4, generator=keyed_generator(*key))

    state = torch.random.get_rng_state()
    torch.testing.assert_close(draw(1, 2, "mask"), draw(1, 2, "mask"))
    assert torch.equal(torch.random.get_rng_state(), state)
    others = [draw(1, 2, "noise"), draw(2, 1, "mask"), draw(12, "mask"), draw(1, 3, "mask")]
    assert all(not torch.allclose(draw(1, 2, "mask"), other) for other in others)
    numbers = torch.stack([draw(0, index) for index in range(5000)])
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.var() - 1 / 12) < 0.002


def test_a_pretrained_folder_comes_back_and_is_replaced_whole(tmp_path):
    folder = tmp_path / "pretrained"
    save_pretrained(folder, {"class": "Thing", "width": 3}, {"w": torch.arange(3.0)}, "# A card\n")
    save_pretrained(folder, {"class": "Thing", "width": 4}, {"w": torch.arange(4.0)})
    config, weights = load_pretrained(folder, "Thing")
    assert config["width"] == 4
    assert torch.equal(weights["w"], torch.arange(4.0))
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained"]


def test_a_failed_export_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "pretrained"
    save_pretrained(folder, {"class": "Thing"}, {"w": torch.zeros(1)})
    with pytest.raises(TypeError):
        save_pretrained(folder, {"class": "Thing", "bad": object()}, {"w": torch.ones(1)})
    assert load_pretrained(folder, "Thing")[1]["w"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained"]


def test_a_folder_that_is_not_what_was_asked_for_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained(tmp_path, "Thing")
    folder = tmp_path / "pretrained"
    save_pretrained(folder, {"class": "Other"}, {"w": torch.zeros(1000)})
    with pytest.raises(ValueError, match="holds a Other, but a Thing is needed"):
        load_pretrained(folder, "Thing")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        load_pretrained(folder, "Other")
    save_pretrained(folder, {"class": "Thing"}, {"w": torch.zeros(1)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="newer than"):
        load_pretrained(folder, "Thing")
