"""Runs as one HTML document that needs nothing from outside.

What is text stands in it as text; `report.js` draws the curves, and `scope.js` the scales.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from wavelet_lm.config import CHANGES, FIELDS, show
from wavelet_lm.report.runs import Figures
from wavelet_lm.report.words import amount, duration, figure
from wavelet_lm.scope import page as scope_page

DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="soft">{made}</p></header>
<main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""
ENDINGS = {
    "ended": "ended",
    "running": "running",
    "stopped": "stopped, to be gone on with",
    "died": "died",
}
LOG_LINES = 15


@dataclass
class RunOnPage:
    """All that the page says of a run.

    curves: of `curves_of`; samples: of `samples_of`; log: its last lines; scope: a picture of
    `scope.picture`, None where there is none, for which `no_scope` has the reason.
    """

    figures: Figures
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    curves: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    log: Sequence[str] = ()
    scope: Mapping[str, Any] | None = None
    no_scope: str = ""
    changes: Sequence[Mapping[str, Any]] = field(default_factory=list)


def page_of(runs: Sequence[RunOnPage], made: str) -> str:
    """The document, for light and dark, pointer and keys, wide and narrow.

    Args:
        made: a line below the title: when, from what.
    """
    names = [run.figures.name for run in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    data = [{**asdict(run.figures), "curves": run.curves, "scope": run.scope} for run in runs]
    # No text of the data may end the element that holds it.
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    body = "\n".join(
        [
            _section("runs", "Runs", _overview(runs)),
            _section("curves", "Curves", '<div id="charts"></div>'),
            _section("config", "Configs", _configs(runs)),
            _section("samples", "Samples over time", _samples(runs)),
            _section("scopes", "What each scale sees", _scopes(runs)),
            _section("environment", "Environment", _environments(runs)),
            _section("logs", "Last lines of the logs", _logs(runs)),
        ]
    )
    style = _asset("report.css") + scope_page.style()
    script = scope_page.script() + _asset("report.js")
    return DOCUMENT.format(
        title=html.escape(title),
        made=html.escape(made),
        style=style,
        body=body,
        data=text,
        script=script,
    )


def _section(name: str, title: str, inner: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>\n{inner}\n</section>'


def _overview(runs: Sequence[RunOnPage]) -> str:
    heads = ["run", "state", "model", "parameters", "steps", "of", "valid", "test", "time"]
    heads += ["speed", "memory"]
    rows = []
    for i, run in enumerate(runs):
        f = run.figures
        steps = f"{f.step:,}" + (f" of {f.total_steps:,}" if f.total_steps else "")
        name = (
            f'<label class="swatch c{i % 8}"><input type="checkbox" checked data-run="{i}">'
            f"<i></i>{html.escape(f.name)}</label>"
        )
        state = f'<span class="state {f.state}">{ENDINGS[f.state]}</span>'
        if f.best_score is None:
            bits = f.best_bits_per_byte
            valid = f"{figure(bits)} bits/byte" if bits else f"{figure(f.best_loss)} nats"
        else:
            valid = f"score {figure(f.best_score)}"
        test = f.test_bits_per_byte
        memory = None if f.memory_bytes is None else f.memory_bytes / 2**30
        cells = [
            name,
            state,
            html.escape(f.model),
            amount(f.n_params),
            steps,
            f"{amount(f.amount)} {f.unit}",
            valid,
            "-" if test is None else f"{figure(test)} bits/byte",
            duration(f.seconds),
            f"{figure(f.per_second, 0)} {f.unit}/s",
            "-" if memory is None else f"{figure(memory, 2)} GiB",
        ]
        rows.append(cells)
    return _table(heads, rows, escape=False)


def _configs(runs: Sequence[RunOnPage]) -> str:
    keys = [key for key in FIELDS if any(key in run.config for run in runs)]
    values = {key: [_shown(run.config.get(key)) for run in runs] for key in keys}
    defaults = {key: _shown(FIELDS[key].default) for key in keys}
    names = [run.figures.name for run in runs]
    if len(runs) == 1:
        words = "What is not the default."
        differ = [[k, *values[k], defaults[k]] for k in keys if values[k][0] != defaults[k]]
        table = _table(["key", names[0], "default"], differ)
    else:
        words = "What differs between the runs."
        differ = [[key, *values[key]] for key in keys if len(set(values[key])) > 1]
        table = _table(["key", *names], differ) if differ else "<p>Nothing.</p>"
    every = _table(["key", *names], [[key, *values[key]] for key in keys])
    changes = "".join(
        f"<li>{html.escape(run.figures.name)}, from step {change.get('step', '?')} on: "
        + html.escape(
            ", ".join(
                f"{key} {_shown(pair[1])} (was {_shown(pair[0])})"
                for key, pair in change.items()
                if isinstance(pair, list) and len(pair) == 2
            )
        )
        + "</li>"
        for run in runs
        for change in run.changes
    )
    changed = f"<p>Changed where a run was resumed:</p><ul>{changes}</ul>" if changes else ""
    return (
        f'<p class="soft">{words}</p>{table}{changed}'
        f"<details><summary>All {len(keys)} keys</summary>{every}</details>"
    )


def _samples(runs: Sequence[RunOnPage]) -> str:
    parts = []
    for run in runs:
        if not run.samples:
            continue
        texts = []
        for i, sample in enumerate(run.samples):
            best = sample.get("best_step")
            words = f"step {sample['step']:,}" if best is None else f"best weights, step {best:,}"
            is_open = " open" if i == len(run.samples) - 1 else ""
            texts.append(
                f"<details{is_open}><summary>{words}</summary><pre>"
                f"<b>{_written(sample.get('prompt', ''))}</b>"
                f"{_written(sample.get('text', ''))}</pre></details>"
            )
        parts.append(f"<h3>{html.escape(run.figures.name)}</h3>{''.join(texts)}")
    return "".join(parts) or (
        "<p>None: a run writes one at its end, and more with --sample_interval.</p>"
    )


def _written(text: object) -> str:
    """What a model wrote, in which any byte may stand; a document may have all but the zero."""
    return html.escape(str(text)).replace("\0", "\ufffd")


def _scopes(runs: Sequence[RunOnPage]) -> str:
    parts = []
    for i, run in enumerate(runs):
        name = html.escape(run.figures.name)
        if run.scope is not None:
            parts.append(
                f'<details data-scope="{i}"><summary>{name}</summary><div></div></details>'
            )
        elif run.no_scope:
            parts.append(f"<p>{name}: {html.escape(run.no_scope)}</p>")
    return "".join(parts) or "<p>Not asked for.</p>"


def _environments(runs: Sequence[RunOnPage]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    rows = [[key, *(_shown(run.environment.get(key)) for run in runs)] for key in keys]
    heads = ["", *(run.figures.name for run in runs)]
    return _table(heads, rows, marks=[len(set(row[1:])) > 1 for row in rows])


def _logs(runs: Sequence[RunOnPage]) -> str:
    return "".join(
        f"<details><summary>{html.escape(run.figures.name)}</summary>"
        f"<pre>{html.escape(chr(10).join(run.log[-LOG_LINES:]))}</pre></details>"
        for run in runs
    )


def _table(
    heads: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    escape: bool = True,
    marks: Sequence[bool] = (),
) -> str:
    """A table that scrolls by itself where it is too wide; `marks`: rows to look at."""
    words = html.escape if escape else str
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heads)
    lines = []
    for i, (first, *others) in enumerate(rows):
        mark = ' class="differs"' if i < len(marks) and marks[i] else ""
        cells = "".join(f"<td>{words(cell)}</td>" for cell in others)
        lines.append(f'<tr{mark}><th scope="row">{words(first)}</th>{cells}</tr>')
    return (
        f'<div class="table" tabindex="0" role="group" aria-label="table"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else show(value)


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items() if key != CHANGES}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _asset(name: str) -> str:
    return resources.files("wavelet_lm.report").joinpath(name).read_text(encoding="utf-8")
