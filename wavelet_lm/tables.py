"""Evaluation results as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any

PROTOCOLS = ("non_overlapping", "sliding")
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
    """The rows of `evaluate` with aligned columns; a dash where a figure does not exist.

    Those of a quantized model stand below, with what it costs.
    """
    rows = [["windows", *(title for title, _ in COLUMNS.values())], *_rows(results)]
    quantized = results.get("quantized")
    if quantized is None:
        return aligned(rows)
    lines = aligned([*rows, *_rows(quantized)]).splitlines()
    lines.insert(len(rows), f"{quantized['scheme']}:")
    costs = []
    for name in PROTOCOLS:
        unit = "nll" if quantized[name]["bits_per_byte"] is None else "bits_per_byte"
        cost = quantized[name][unit] - results[name][unit]
        costs.append(f"{cost:+.5f} {COLUMNS[unit][0]} {name.replace('_', '-')}")
    return "\n".join([*lines, f"quantizing costs {', '.join(costs)}"])


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name in PROTOCOLS:
        row = results[name]
        label = f"{name.replace('_', '-')}, {row['block_size']} by {row['stride']}"
        cells = (
            "-" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()
        )
        rows.append([label, *cells])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells as columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )
