"""Files of results, each with the machine and the code that they come from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.training.provenance import environment


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """`{"machine": …, "commit": …, "date": …, …, "rows": […]}` as JSON."""
    about = environment()
    results = {"machine": about, "commit": about["commit"], "date": about["date"], **more}
    write_text(path, json.dumps({**results, "rows": rows}, indent=1) + "\n")


IMAGES = (".png", ".svg", ".pdf")


def check_plot(path: str, flag: str = "--plot") -> None:
    """Raise `UserError` before a long measurement that could not be drawn."""
    if Path(path).suffix.lower() not in IMAGES:
        allowed = f"{', '.join(IMAGES[:-1])} or {IMAGES[-1]}"
        raise UserError(f"{flag} {path}: the name must end in {allowed}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra(flag, "matplotlib", "bench") from None


def check_targets(paths: Iterable[str | None]) -> None:
    """Raise `UserError` before a long measurement whose results could not be written."""
    for path in paths:
        if path is not None:
            check_writable(path)
