"""What a page says of a run, put together from its folder; its scales are read by its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wavelet_lm.config import CHANGES, read_json_object
from wavelet_lm.errors import UserError
from wavelet_lm.report.page import LOG_LINES, RunOnPage
from wavelet_lm.report.runs import curves_of, environment_of, figures_of, samples_of
from wavelet_lm.scope.scope import scope_run
from wavelet_lm.training.run_folder import RunFolder

SCOPE_TOKENS = 160  # the last ones of a text, that are drawn


def on_page(
    run: RunFolder,
    *,
    scopes: bool = True,
    text: str | None = None,
    device: str = "auto",
    log: Callable[[str], object] = lambda line: None,
) -> RunOnPage:
    """Read a run's folder.

    Args:
        scopes: whether its model reads a text and is watched.
        text: that it reads; None = the last sample that it wrote.
        device: where it reads.
        log: gets lines about what is going on.

    Raises:
        UserError: its config.json is damaged.
    """
    config = read_json_object(run.config_file)
    samples = samples_of(run)
    found = RunOnPage(
        figures=figures_of(run),
        config=config,
        environment=environment_of(run),
        curves=curves_of(run),
        samples=samples,
        log=_last_lines(run),
        changes=config.get(CHANGES, []),
    )
    if scopes:
        if text is None and samples:
            text = samples[-1].get("prompt", "") + samples[-1].get("text", "")
        found.scope, found.no_scope = _scope(run, text, device, log)
    return found


def _scope(
    run: RunFolder, text: str | None, device: str, log: Callable[[str], object]
) -> tuple[dict[str, Any] | None, str]:
    """The picture, or the reason why there is none."""
    if not run.best.is_file() and not run.last.is_file():
        return None, "it has saved no weights yet"
    if not text:
        return None, "it has written no sample yet; give a text with --text or --prompt"
    log(f"{run.name}: reading a text")
    try:
        return scope_run(run.path, text, last=SCOPE_TOKENS, device=device, log=log), ""
    except UserError as error:
        return None, str(error)


def _last_lines(run: RunFolder) -> list[str]:
    file = run.path / "log.txt"
    if not file.is_file():
        return []
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
