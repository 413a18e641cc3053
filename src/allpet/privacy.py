"""What may be written into files that people share: no passwords, no keys, no home folder that names its owner."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # shorter values, such as "1" or "true", stand in texts by chance


def without_secrets(value: Any) -> Any:
    """Replace values of secret environment variables by ``***`` and the home folder by ``~``.

    Args:
        value: text, or lists and dictionaries of it, nested at will; all else is returned as it is.
    """
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if _SECRET.search(name) and len(secret) >= _SHORTEST:
                value = value.replace(secret, "***")
        return _home_pattern().sub("~", value) if _home() != "/" else value
    if isinstance(value, Mapping):
        return {key: without_secrets(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(one) for one in value]
    if isinstance(value, Path):
        return without_secrets(str(value))
    return value


def with_home(value: Any) -> Any:
    """Undo what ``without_secrets`` does to the home folder: texts that are ``~`` or begin with ``~/``."""
    if isinstance(value, str):
        return _home() + value[1:] if value == "~" or value.startswith("~/") else value
    if isinstance(value, Mapping):
        return {key: with_home(one) for key, one in value.items()}
    return [with_home(one) for one in value] if isinstance(value, list) else value


def _home() -> str:
    return str(Path.home())


def _home_pattern() -> re.Pattern[str]:
    # a whole path component: /home/ann is not the beginning of /home/anna
    return re.compile(rf"(?<![\w./-]){re.escape(_home())}(?![\w.-])")
