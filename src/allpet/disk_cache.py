"""Arrays that are slow to make, kept on disk between runs.

One file holds a header (the key and a checksum) and the arrays, written beside its place and moved there in one step:
a reader, or a second writer, sees a whole file or none. A file that is damaged counts as absent.

The folder is ``$ALLPET_CACHE``, else ``$XDG_CACHE_HOME/allpet``, else ``~/.cache/allpet``; deleting it is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cache_folder() -> Path:
    """Return the folder that cached arrays are kept in."""
    if own := os.environ.get("ALLPET_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allpet"


def cache_file(name: str, key: Mapping[str, Any]) -> Path:
    """Return where the arrays of a key are kept.

    Args:
        name: start of the file's name, for people.
        key: everything the arrays depend on, as JSON can hold it.
    """
    digest = hashlib.blake2b(_text(key).encode(), digest_size=8).hexdigest()
    return cache_folder() / f"{name}-{digest}.arrays"


def load(name: str, key: Mapping[str, Any]) -> list[NDArray[Any]] | None:
    """Return the arrays stored under a key, or None if there are none or the file is damaged (which warns)."""
    path = cache_file(name, key)
    try:
        with path.open("rb") as file:
            header = json.loads(np.load(file, allow_pickle=False).tobytes())
            if header["key"] != json.loads(_text(key)):
                raise ValueError("it belongs to another key")
            arrays = [np.load(file, allow_pickle=False) for _ in range(header["arrays"])]
            if _checksum(arrays) != header["checksum"]:
                raise ValueError("its checksum does not match")
            return arrays
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a damaged file makes the readers raise, its content can be made again
        warnings.warn(f"The cached file {path} cannot be used ({error}) and is made anew.", stacklevel=2)
        return None


def store(name: str, key: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
    """Store arrays under a key. A folder that cannot be written costs time in later runs, not this one: it warns."""
    path = cache_file(name, key)
    header = json.dumps({"key": key, "arrays": len(arrays), "checksum": _checksum(arrays)}).encode()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            for array in (np.frombuffer(header, dtype=np.uint8), *arrays):
                np.save(file, array, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}); set ALLPET_CACHE to a writable folder.", stacklevel=2)
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _checksum(arrays: Sequence[NDArray[Any]]) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, checksum)
    return checksum
