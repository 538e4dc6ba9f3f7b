"""What `scope` draws as an image; the page to point into is `wavelet_lm/scope/page.py`'s."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wavelet_lm.atomic_files import atomic_path

WIDTH, DPI = 14.0, 110
MOST_LABELLED = 130  # tokens that can be written below their columns
# Inches of the panels' heights: of a scale's row, of what has no rows, and between two panels.
ROW, FREE, GAP = 0.24, 1.7, 0.55
MARKS = {"\n": "⏎", "\t": "⇥", " ": "␣", "\r": "␍"}


def plot_scope(path: str, picture: dict[str, Any]) -> None:
    """Draw the panels of a picture one below the other, over one axis of tokens."""
    from matplotlib.figure import Figure

    with_change = picture["blocks"][0]["scales"][0]["change"] is not None
    panels = [panel for block in picture["blocks"] for panel in _panels(block)]
    heights = [height for _, height, _ in panels] + [FREE / 1.4]
    figure = Figure(figsize=(WIDTH, sum(heights) + GAP * len(heights) + 0.6), layout="constrained")
    ratios = [10.0, 1.5, 1.5] if with_change else [10.0, 1.7]
    grid = figure.add_gridspec(
        len(heights), len(ratios), width_ratios=ratios, height_ratios=heights
    )
    bits = figure.add_subplot(grid[-1, 0])
    for number, (draw, _, block) in enumerate(panels):
        axes = figure.add_subplot(grid[number, 0], sharex=bits)
        image = draw(axes, block, picture)
        axes.tick_params(labelbottom=False, bottom=False)
        if draw is _energy:
            _delays(figure.add_subplot(grid[number, -1]), block)
            if with_change:
                _change(figure.add_subplot(grid[number, 1]), block)
        elif image is not None:
            place = axes.inset_axes((1.01, 0, 0.012, 1))
            figure.colorbar(image, cax=place)
    _bits(bits, picture)
    figure.suptitle(_title(picture), fontsize="medium")
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=DPI)


def _panels(block: dict[str, Any]) -> list[tuple[Any, float, dict[str, Any]]]:
    """What draws each panel of a block, and its height."""
    rows = max(0.8, ROW * len(block["scales"]))
    panels = [(_energy, rows, block)]
    if block["scales"][0]["openness"] is not None:
        panels.append((_openness, rows, block))
    if block["recall"] is not None:
        panels.append((_recall, FREE, block))
    panels += [(_slots(slots), FREE, block) for slots in block["slots"]]
    return panels


def _energy(axes: Any, block: dict[str, Any], picture: dict[str, Any]) -> None:
    axes.imshow(_rows(block, "shade"), vmin=0, vmax=1, **IMAGE)
    _name_rows(axes, [_label(scale) for scale in block["scales"]])
    axes.set_title(f"{block['name']}: log energy of the mixed band, each row by itself", **TITLE)


def _openness(axes: Any, block: dict[str, Any], picture: dict[str, Any]) -> Any:
    image = axes.imshow(_rows(block, "openness"), cmap="cividis", **IMAGE)
    _name_rows(axes, [scale["name"] for scale in block["scales"]])
    axes.set_title(f"{block['name']}: how far the gates are open", **TITLE)
    return image


def _recall(axes: Any, block: dict[str, Any], picture: dict[str, Any]) -> Any:
    n = len(picture["tokens"])
    found = np.zeros((n, n))
    for reader, reads in enumerate(block["recall"]["reads"]):
        for source, share in reads:
            found[source, reader] = share
    image = axes.imshow(found, cmap="OrRd", vmin=0, **IMAGE)
    axes.set_ylabel("token found")
    axes.set_title(
        f"{block['name']}: which earlier tokens the memory finds, share of the read", **TITLE
    )
    return image


def _slots(slots: dict[str, Any]) -> Any:
    def draw(axes: Any, block: dict[str, Any], picture: dict[str, Any]) -> None:
        points = [
            (reader, row, share)
            for reader, reads in enumerate(slots["reads"])
            for row, share in reads
        ]
        x, y, share = zip(*points, strict=True) if points else ((), (), ())
        axes.scatter(x, y, s=[2 + 30 * s for s in share], alpha=0.6, linewidths=0)
        axes.set_ylim(-0.5, slots["n_rows"] - 0.5)
        axes.set_ylabel("row")
        axes.set_title(f"{block['name']}: rows that the {slots['name']} reads", **TITLE)

    return draw


def _delays(axes: Any, block: dict[str, Any]) -> None:
    """The lags of every level, as large as they count."""
    for delay in block["delays"]:
        size = [90 * weight for weight in delay["weights"]]
        level = [delay["level"] + 0.2 * delay["basis"]] * len(size)
        axes.scatter(delay["lags"], level, s=size, color=f"C{delay['basis']}", linewidths=0)
    top = max(delay["level"] for delay in block["delays"])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yticks=range(top + 1), ylim=(-0.5, top + 0.7))
    axes.yaxis.tick_right()
    axes.tick_params(labelsize="x-small")
    axes.set_title("lags in tokens, by level", **TITLE)


def _change(axes: Any, block: dict[str, Any]) -> None:
    changes = [scale["change"] or 0.0 for scale in block["scales"]]
    rows = range(len(changes))
    axes.barh(rows, changes, color=["C3" if change > 0 else "C2" for change in changes])
    axes.set(yticks=[], ylim=(len(changes) - 0.5, -0.5))
    for row, change in zip(rows, changes, strict=True):
        axes.text(0, row, f" {change:+.3f}", va="center", fontsize="x-small")
    axes.tick_params(labelsize="x-small")
    axes.set_title("bits/byte if silenced", **TITLE)


def _bits(axes: Any, picture: dict[str, Any]) -> None:
    bits = [np.nan if value is None else value for value in picture["bits"]]
    places = range(len(bits))
    axes.bar(places, bits, width=1, align="center", color="C0")
    axes.set_xlim(-0.5, len(bits) - 0.5)
    axes.set_ylabel("bits/token")
    if len(bits) <= MOST_LABELLED:
        axes.set_xticks(places, map(_mark, picture["tokens"]), family="monospace", fontsize=7)
        longest = max(map(len, picture["tokens"]))
        axes.tick_params(axis="x", length=0, rotation=90 if longest > 2 else 0)
    else:
        axes.set_xlabel("token")


def _title(picture: dict[str, Any]) -> str:
    cost = picture["bits_per_byte"]
    return f"{picture['run']}" + ("" if cost is None else f", {cost:.3f} bits/byte")


def _rows(block: dict[str, Any], key: str) -> np.ndarray:
    return np.array([scale[key] for scale in block["scales"]], dtype=float)


def _label(scale: dict[str, Any]) -> str:
    lags = "+".join(f"{lag:.1f}" for lag in scale["lags"])
    return f"{scale['name']}  {f'lag {lags}, ' if lags else ''}reach {scale['reach']}"


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.tick_params(axis="y", length=0)


def _mark(token: str) -> str:
    return "".join(MARKS.get(c, c) for c in token).replace("$", r"\$")


IMAGE = {"aspect": "auto", "interpolation": "nearest", "origin": "upper"}
TITLE = {"fontsize": "small", "loc": "left"}
