from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

import allpet
import callbacks
import data_modules

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_packages_are_imported_from_this_checkout():
    for package, folder in ((allpet, "src/allpet"), (callbacks, "callbacks"), (data_modules, "data_modules")):
        assert Path(package.__file__).parent == ROOT / folder


def test_the_packages_listed_are_those_there():
    listed = set(SETUP["options"]["packages"].split())
    roots = {"allpet": ROOT / "src", "callbacks": ROOT, "data_modules": ROOT}
    there = {
        path.parent.relative_to(parent).as_posix().replace("/", ".")
        for name, parent in roots.items()
        for path in (parent / name).rglob("__init__.py")
    }
    assert listed == there


def test_every_module_is_in_a_package():
    for folder in (ROOT / "src" / "allpet", ROOT / "callbacks", ROOT / "data_modules"):
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path} would be left out"


def test_every_data_file_is_packaged():
    for path in (ROOT / "src" / "allpet").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT / "src").parts)
            patterns = SETUP["options.package_data"].get(package, "").replace(",", " ").split()
            assert any(path.match(pattern) for pattern in patterns), f"{path} would be left out"


def test_every_public_name_imports():
    for name in allpet.__all__:
        assert getattr(allpet, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = allpet.Nothing


def test_what_is_pinned_is_allowed():
    lower = dict(re.findall(r"^([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)$", SETUP["options"]["install_requires"], re.MULTILINE))
    pinned = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pinned) > 10
    for name, version in pinned:
        assert _numbers(version) >= _numbers(lower.get(name, "0"))
    unpinned = set(lower) - {name for name, _ in pinned} - {"tqdm", "filelock", "pillow"}
    assert not unpinned, "tested versions of these belong into constraints.txt"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_make_lists_every_target():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    assert [line.split()[0] for line in listed.splitlines()] == targets


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["train-vae", "DATA=my data", "KIND=image"], '--data.folder "my data" --data.kind image'),
        (["train-ldm", "SCALE=gpu24", "ARGS=--trainer.devices 2"], "scale/gpu24.yaml"),
        (["sample", "N=3", "PROMPT=FDG:brain", "VIEWS=96"], "--data.n_samples 3 --data.prompts '[\"FDG:brain\"]'"),
        (["validate-data", "DATA=here"], 'data_modules.validate "here" --kind auto'),
    ],
)
def test_make_hands_on_what_was_set(target, expected):
    shown = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert expected in shown


def test_nothing_that_is_tracked_is_generated():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not [name for name in tracked.stdout.splitlines() if name.startswith(("outputs/", ".venv/", "wandb/"))]
