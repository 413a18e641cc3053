"""The page of further settings: every command on it is one that the programs take."""

import re

import pytest
from commands import ROOT, project_copy, run_here

PAGE = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(make .*?)(?:  +#.*)?$", PAGE, flags=re.MULTILINE)
TINY = (
    "--trainer.max_steps=2 --data.num_scans=16 --data.val_patients=2 --data.test_patients=2 --data.batch_size=8 "
    "--trainer.accelerator=cpu --model.warmup_steps=1"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return project_copy(tmp_path_factory.mktemp("project"), small=True)


def test_every_command_is_understood(place):
    assert len(COMMANDS) == PAGE.count("\nmake ")
    for command in COMMANDS:
        said = run_here(place, command, "--print_config")
        for key, value in re.findall(r"--model\.[a-z_.]*?(\w+)=(\w+)", command):
            assert re.search(rf"\b{key}: {value}\b", said), f"{command} sets {key}"


@pytest.mark.slow
def test_every_command_runs(place):
    for command in COMMANDS:
        run_here(place, command, "--model.sampling.steps=2" if "sample" in command else TINY)
    assert len(list((place / "outputs" / "samples").iterdir())) == sum("sample" in command for command in COMMANDS)
