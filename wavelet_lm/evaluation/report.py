"""Evaluation results as people read them."""

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "nll": ("nats/token", "{:.4f}"),
    "perplexity": ("perplexity/token", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "word_perplexity": ("perplexity/word", "{:.2f}"),
    "tokens": ("tokens", "{:,}"),
    "bytes": ("bytes", "{:,}"),
    "seconds": ("seconds", "{:.1f}"),
}


def table(results: Mapping[str, Any]) -> str:
    """The rows of `evaluate` with aligned columns; a dash where a figure does not exist."""
    rows = [["windows", *(title for title, _ in COLUMNS.values())]]
    for name in ("non_overlapping", "sliding"):
        row = results[name]
        label = f"{name.replace('_', '-')}, {row['block_size']} by {row['stride']}"
        cells = (
            "-" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()
        )
        rows.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )
