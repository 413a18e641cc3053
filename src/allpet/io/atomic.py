"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from allpet.io.scans import DataError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside the file to write to, and move it there at the end; after any error nothing is left.

    The folder is made if it is not there; the suffix stays, since many libraries go by it.

    Raises:
        DataError: if the system refuses to write: a full disk, a read-only folder.
    """
    path = Path(path)
    unfinished = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:120]
        raise DataError(path, f"it cannot be written ({reason})", "free space, or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
