"""The folder to share: ``config.json`` (what to build), ``model.safetensors`` (weights), ``README.md`` (the card).

Nothing in it is executed: the configuration names no class paths and safetensors holds tensors only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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
        for path in scratch.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            # moved aside in one step: at no moment is half an export in its place
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(scratch, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
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
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}): export the model again, or download it anew.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is damaged (config.json is no table): export the model again, or download it anew.")
    if config.get("class") != kind:
        raise ValueError(f"{folder} holds a {config.get('class')}, but a {kind} is needed: name its folder.")
    version = config.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {version}, newer than {FORMAT_VERSION}: update allpet.")
    return config, weights


def pretrained_class(folder: str | Path) -> str | None:
    """Return the name of the class that a folder says it holds; None where it says nothing that can be read."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = config.get("class") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


@contextlib.contextmanager
def building(folder: str | Path) -> Iterator[None]:
    """Turn what a configuration and weights that do not belong together cause into one sentence.

    Raises:
        ValueError: if a key is missing or unknown, or weights have other names or shapes.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} cannot be used: config.json and model.safetensors do not make a model of this version ({said}); "
            "export it again, or download it anew."
        ) from error
