"""Nothing that is read runs a program, nothing is sent, and nothing that is kept tells a secret."""

from __future__ import annotations

import json
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_tools import HERE, Trap, fit, stopped

from allpet import AutoencoderSystem, LatentBridge, LatentDiffusion, disk_cache
from allpet.pretrained import pretrained_class
from allpet.privacy import with_home, without_secrets
from allpet.run_files import AtomicCheckpointIO
from data_modules import SinogramFiles

SECRET = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step, made while the environment held a key and the data were named with the home folder."""
    root = tmp_path_factory.mktemp("home") / "ann" / "vae"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["allpet"])
        patch.setenv("HOME", str(root.parent))
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setattr(socket.socket, "connect", _only_here(socket.socket.connect))
        patch.setattr(socket, "getaddrinfo", _no_names)
        scale = json.dumps({"widths": [8, 16], "note": SECRET})
        data = ["--data", "tiny_pet.StoredPET", "--data.folder", str(root.parent / "data")]
        fit(root, *data, "--run.name", "001", "--trainer.max_steps", "1", "--scale", scale)
    return root / "001"


def _only_here(connect: Any) -> Any:
    """Refuse connections that leave this machine."""

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(
            ("127.", "::1", "localhost")
        ):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    return guarded


def _no_names(host: Any, *_: Any, **__: Any) -> Any:
    raise AssertionError(f"the address of {host} was asked for")


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["allpet"])


@pytest.fixture
def trap(tmp_path):
    """What leaves a trace if it is unpickled, and the check that it has not been."""
    trace = tmp_path / "trace"
    yield Trap(trace)
    assert not trace.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_is_a_pickle(zipped, tmp_path, trap):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "evil": trap}, path) if zipped else path.write_bytes(pickle.dumps(trap))
    said = stopped(tmp_path / "runs", "--trainer.max_steps", "1", "--ckpt_path", str(path))
    assert "evil.ckpt is damaged, or holds more than tensors and plain values, which is never run: use another." in said


@pytest.mark.parametrize("words", [["--weights_only", "false"], ["--ckpt_path", "https://example.org/evil.ckpt"]])
def test_checkpoints_that_might_run_are_refused_even_when_asked_for(words, tmp_path):
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {}}, path)
    words = words if "--ckpt_path" in words else [*words, "--ckpt_path", str(path)]
    said = stopped(tmp_path / "runs", "--trainer.max_steps", "1", *words)
    assert "could run programs are never read" in said or "is no file: download it" in said


def test_a_checkpoint_that_is_none(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.ckpt")
    for name, expected in (("other.ckpt", "is no checkpoint of a training"), ("gone.ckpt", "There is no checkpoint")):
        with pytest.raises(ValueError, match=expected):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.mat", "a.h5"])
def test_data_that_are_pickles(name, tmp_path, trap):
    folder = tmp_path / "data"
    folder.mkdir()
    if name == "a.npy":
        np.save(folder / name, np.array([[trap, 1], [2, 3]], dtype=object), allow_pickle=True)
    elif name == "a.npz":
        np.savez(folder / name, sinogram=np.array([[trap, 1], [2, 3]], dtype=object), allow_pickle=True)
    else:
        (folder / name).write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match=r"cannot be used: [^\n]+; [^\n]+\.$"):
        SinogramFiles(str(folder), kind="sinogram").load()


def test_a_cached_table_that_is_a_pickle(tmp_path, trap, monkeypatch):
    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path / "cache"))
    path = disk_cache.cache_file("table", {})
    path.parent.mkdir()
    np.save(path.with_suffix(".npy"), np.array([trap], dtype=object), allow_pickle=True)
    path.with_suffix(".npy").rename(path)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert disk_cache.load("table", {}) is None


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [TRACE]]\n",
        "run: !!python/object/new:os.system [touch TRACE]\n",
        None,
    ],
)
def test_a_configuration_that_would_run(text, tmp_path, trap, capsys):
    path = tmp_path / "evil.yaml"
    path.write_bytes(pickle.dumps(trap)) if text is None else path.write_text(text.replace("TRACE", str(trap.trace)))
    with pytest.raises(SystemExit):
        fit(tmp_path / "runs", "-c", str(path))
    assert not (tmp_path / "runs").exists()


KINDS = [AutoencoderSystem, LatentDiffusion, LatentBridge]
CHANGES: list[dict[str, Any]] = [
    {"autoencoder": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "TRACE"]}}},
    {"autoencoder": "pathlib.Path.touch"},
    {"geometry": {"class_path": "os.system", "init_args": {"command": "touch TRACE"}}},
]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, {"class": name}) for kind in KINDS for name in ("os.system", ["subprocess.Popen"])]
    + [(AutoencoderSystem, changes) for changes in CHANGES]
    + [(AutoencoderSystem, {"format_version": "1"})],
)
def test_a_pretrained_folder_names_no_classes(kind, changes, finished, tmp_path, trap):
    """What is built is fixed by the class that is asked for: its name must be said, and nothing else is a name."""
    config = json.loads((finished / "pretrained" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}).replace("TRACE", str(trap.trace)))
    (tmp_path / "model.safetensors").write_bytes((finished / "pretrained" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"^{tmp_path} (holds a|cannot be used:|has format) [^\n]*\.$"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "{", "\0"])
def test_a_pretrained_folder_without_a_table(text, finished, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((finished / "pretrained" / "model.safetensors").read_bytes())
    assert pretrained_class(tmp_path) is None
    with pytest.raises(ValueError, match=r"is damaged \("):
        AutoencoderSystem.from_pretrained(tmp_path)


def test_weights_that_are_a_pickle(finished, tmp_path, trap):
    (tmp_path / "config.json").write_bytes((finished / "pretrained" / "config.json").read_bytes())
    torch.save({"weights": trap}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        AutoencoderSystem.from_pretrained(tmp_path)


def test_a_training_sends_nothing(finished):
    """Made where every connection that leaves the machine was refused."""
    assert (finished / "pretrained" / "model.safetensors").is_file()


def test_a_run_keeps_no_key_and_no_home_folder(finished):
    home = str(finished.parents[1])
    for path in finished.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".json", ".csv", ".md", ".safetensors"):
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert home.encode() not in content, path
    config = (finished / "config.yaml").read_text()
    assert "folder: ~/data" in config
    assert "***" in config


def test_secrets_and_home_are_left_out_and_paths_come_back(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("SOME_KEY", "1")
    given = {
        "a": "/home/ann/data",
        "b": ["/home/anna", 1, None, f"x{SECRET}"],
        "c": Path("/home/ann"),
        "d": "/x/home/ann",
    }
    kept = without_secrets(given)
    assert kept == {"a": "~/data", "b": ["/home/anna", 1, None, "x***"], "c": "~", "d": "/x/home/ann"}
    assert with_home(kept)["a"] == "/home/ann/data"
    assert with_home({"b": ["~", "~x", 1]}) == {"b": ["/home/ann", "~x", 1]}
    assert HERE.is_absolute()
