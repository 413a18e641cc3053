from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import allpet
import callbacks
import data_modules

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def _requirements(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


INSTALLED = {canonicalize_name(need.name): need for need in _requirements(SETUP["options"]["install_requires"])}
DECLARED = INSTALLED | {
    canonicalize_name(need.name): need for need in _requirements(SETUP["options.extras_require"]["dev"])
}
PINS = _requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))
# Where the name of a module is not that of its package.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "astra": "astra-toolbox", "skimage": "scikit-image"}


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
        assert getattr(getattr(allpet, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = allpet.Nothing


def test_what_is_pinned_is_allowed():
    for pin in PINS:
        declared = DECLARED.get(canonicalize_name(pin.name))
        (version,) = (pinned.version for pinned in pin.specifier)
        assert declared is None or declared.specifier.contains(version), f"{pin} is outside {declared}"


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_every_direct_dependency_is_pinned(python):
    pinned = [
        canonicalize_name(pin.name)
        for pin in PINS
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert len(pinned) == len(set(pinned)), "pinned twice"
    assert set(DECLARED) <= set(pinned)


@pytest.mark.parametrize(
    ("folder", "declared"),
    [("src", INSTALLED), ("data_modules", INSTALLED), ("callbacks", INSTALLED), ("experiments", DECLARED)],
)
def test_what_is_imported_is_declared(folder, declared):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        beside = {other.stem for other in path.parent.glob("*.py")} if folder == "experiments" else set()
        beside |= {"studies"} if folder == "experiments" else set()
        for name in _imported(path) - sys.stdlib_module_names - {"allpet", "callbacks", "data_modules"} - beside:
            package = PACKAGES.get(name, canonicalize_name(name))
            assert package in declared, f"{path} imports {name}, but setup.cfg does not ask for {package}"


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_links_to_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in relative if not (ROOT / target).exists()]


def test_make_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets, variables = re.split(r"^ Variables: ", listed, flags=re.MULTILINE)
    assert [line.split()[0] for line in targets.splitlines()] == re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE)
    names = set(re.findall(r"\b[A-Z][A-Z_]*\b", variables))
    own = set(re.findall(r"^([A-Z_]+)\s*:?=", text, re.MULTILINE)) | {"MAKEFILE_LIST"}
    given = set(re.findall(r"\$\((?:if |or |filter \w+,)*\$?\(?([A-Z_]+)\b", text)) - own
    assert given <= names, "a user may set it and is not told"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["train-vae", "DATA=my data", "KIND=image"], '--data.folder "my data" --data.kind image'),
        (["train-ldm", "SCALE=gpu24", "ARGS=--trainer.devices 2"], "scale/gpu24.yaml"),
        (["sample", "N=3", "PROMPT=FDG:brain", "VIEWS=96"], "--data.n_samples 3 --data.prompts '[\"FDG:brain\"]'"),
        (
            ["sweep", "SWEEP=low_dose", "OFFLINE=1", "ARGS=--seeds 0"],
            "experiments/sweep.py low_dose --offline --seeds 0",
        ),
        (
            ["finetune", "TASK=low_dose", "DATA=my pairs", "DOSE=0.05", "PROMPT=FDG:brain", "PAIRS=9"],
            '--data.folder "my pairs" --data.dose 0.05  --data.tracer FDG --data.region brain  --data.num_scans 9',
        ),
        (
            ["restore", "TASK=low_dose", "DATA=a", "UPDATES=0"],
            "--model.sampling.data_consistency 0",
        ),
        (["restore", "TASK=low_dose", "DATA=a", "PROMPT=FDG"], "--data.tracer FDG --data.region open"),
        (["sample", "MODEL=outputs/ldm/001"], '--model.folder "outputs/ldm/001"'),
        (["restore", "TASK=attenuation", "DATA=a", "UPDATES=8"], "--model.sampling.data_consistency 8"),
        (["validate-data", "DATA=here"], 'data_modules.validate "here" --kind auto'),
        (["evaluate", "REAL=a b", "FAKE=c.h5", "TRAIN=d"], '--real "a b" --fake "c.h5" --train "d"'),
        (["gpu-check", "PYTHON=/opt/python"], "/opt/python experiments/benchmarks/gpu_check.py"),
        (["gpu-check"], ".venv/bin/python experiments/benchmarks/gpu_check.py"),
    ],
)
def test_make_hands_on_what_was_set(target, expected):
    shown = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert expected in shown


def test_make_refuses_what_only_pairs_of_ones_own_need():
    words = ["make", "READY=", f"BIN={Path(sys.executable).parent}", "finetune", "TASK=low_dose", "DOSE=0.05"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode
    assert "name them with DATA=" in run.stdout


def test_nothing_that_is_tracked_is_generated():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not [name for name in tracked.stdout.splitlines() if name.startswith(("outputs/", ".venv/", "wandb/"))]
