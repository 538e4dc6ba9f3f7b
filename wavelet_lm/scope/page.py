"""A picture as one HTML document that needs nothing from outside."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

DOCUMENT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ margin: 1rem auto; max-width: 78rem; padding: 0 1rem; }}
{style}</style>
<main id="scope"></main>
<script type="application/json" id="picture">{picture}</script>
<script>
{script}
drawScope(document.getElementById("scope"),
  JSON.parse(document.getElementById("picture").textContent));
</script>
</html>
"""


def page_of(picture: dict[str, Any]) -> str:
    """The document of a `picture`, readable in light and dark, by pointer and by keys."""
    # No text of the picture may end the element that holds it.
    data = json.dumps(picture, ensure_ascii=False).replace("<", "\\u003c")
    title = html.escape(f"Scales of {picture['run'] or 'a text'}")
    return DOCUMENT.format(title=title, style=style(), picture=data, script=script())


def script() -> str:
    """JavaScript with `drawScope(element, picture)`."""
    return _asset("scope.js")


def style() -> str:
    """CSS of what `drawScope` makes."""
    return _asset("scope.css")


def _asset(name: str) -> str:
    return resources.files("wavelet_lm.scope").joinpath(name).read_text(encoding="utf-8")
