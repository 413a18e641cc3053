"""The folder to share: ``config.json`` (what to build), ``model.safetensors`` (weights), ``README.md`` (the card).

Nothing in it is executed: the configuration names no class paths and safetensors holds tensors only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1


def save_pretrained(folder: str | Path, config: dict[str, Any], weights: dict[str, Tensor], card: str = "") -> None:
    """Write a pretrained folder, whole or not at all; an older one at the same place is replaced.

    Args:
        folder: where to.
        config: JSON values, with ``class``.
        weights: name to tensor.
        card: Markdown text on what the model is and was trained on.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        text = json.dumps({"format_version": FORMAT_VERSION, **config}, indent=2)
        (scratch / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()}, scratch / "model.safetensors"
        )
        (scratch / "README.md").write_text(card or f"# {config['class']}\n", encoding="utf-8")
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def load_pretrained(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a pretrained folder.

    Args:
        folder: written by ``save_pretrained``.
        kind: the class it must hold.

    Returns:
        its configuration and its weights.

    Raises:
        FileNotFoundError: if config.json or model.safetensors is missing.
        ValueError: if it holds another class, a newer format or damaged files.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: name a folder that holds config.json and model.safetensors, such as the "
                "pretrained/ folder of a finished run."
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}): export the model again.") from error
    if config.get("class") != kind:
        raise ValueError(f"{folder} holds a {config.get('class')}, but a {kind} is needed: name its folder.")
    if config.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {config['format_version']}, newer than {FORMAT_VERSION}: update allpet.")
    return config, weights
