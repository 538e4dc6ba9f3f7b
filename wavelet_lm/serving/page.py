"""The page to write on: one document that needs nothing from outside."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from wavelet_lm.scope import page as scope


@cache
def page() -> str:
    """The document, with what draws the scales in it."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    for mark, part in (("scope.css", scope.style()), ("scope.js", scope.script())):
        text = text.replace(f"/* {mark} */", part)
    return text
