"""What a run has written, kept beside it: `generations.txt`."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

from wavelet_lm.atomic_files import append_line
from wavelet_lm.inference.rows import Completion
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.text.metrics import format_metrics

RECORD = "generations.txt"
# Of a longer prompt the record keeps the end: it is there to tell texts apart, not to hold books.
RECORDED_PROMPT = 2000


def record(
    path: Path, command: str, prompt: str, completion: Completion, sampling: SamplingOptions
) -> None:
    """Append a completion to a run's `generations.txt`, with its command, options and metrics.

    It is one write, so that the entries of two processes do not mix.
    """
    options = {
        **dataclasses.asdict(sampling),
        "seed": completion.seed,
        "tokens": len(completion.tokens),
        "reason": completion.reason,
    }
    if len(prompt) > RECORDED_PROMPT:
        prompt = f"[… the last of {len(prompt)} characters] {prompt[-RECORDED_PROMPT:]}"
    entry = (
        f"=== {datetime.now().astimezone().isoformat(timespec='seconds')} {json.dumps(options)}\n"
        f"--- command\n{command}\n"
        f"--- metrics\n{format_metrics(completion.metrics)}\n"
        f"--- prompt\n{prompt}\n--- text\n{completion.text}\n"
    )
    # A command may hold bytes that are no text, such as the name of a file.
    append_line(path, entry.encode(errors="replace").decode())
