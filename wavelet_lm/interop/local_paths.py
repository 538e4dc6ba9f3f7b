"""The paths in a config, which are of one machine alone, and no matter of others who read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wavelet_lm.config import CHANGES, FIELDS

NAMED = ("dataset", "init_from", "benchmark_run_dir")  # of a path the last part is left
PLACES = ("cache_dir", "out_dir", "runs_file")  # a path becomes the default


def without_local_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json, its record of changes among them, without this machine's paths.

    Local is what begins at the root or at somebody's home, and what is there: names of the hub and
    of built-in data sets stay.

    Examples:
        >>> without_local_paths({"dataset": "/home/ann/letters.txt", "out_dir": "logs"})
        {'dataset': 'letters.txt', 'out_dir': 'logs'}
    """
    return {key: _elsewhere(key, value) for key, value in values.items()}


def _elsewhere(key: str, value: Any) -> Any:
    """The value of a key as another machine may have it."""
    if key == CHANGES:
        return [without_local_paths(row) for row in value]
    if key not in (*NAMED, *PLACES):
        return value
    if isinstance(value, list):  # in the record: before and after
        return [_elsewhere(key, one) for one in value]
    if not isinstance(value, str) or not _is_local(value):
        return value
    if key in NAMED:
        return Path(value).expanduser().resolve().name
    default = FIELDS[key].default
    return value if value == default else default


def _is_local(value: str) -> bool:
    path = Path(value).expanduser()
    return bool(value) and (path.is_absolute() or path.exists())
