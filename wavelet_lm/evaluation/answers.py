"""How many questions a model answers right, by how far behind the answer stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wavelet_lm.data.tasks.recall import Questions
from wavelet_lm.devices import reading

# Positions of a chunk of a streamed text; no power of two, so that chunks end anywhere in a
# wavelet.
CHUNK = 50
# Up to here distances are counted together, then up to twice as far, and so on.
NEAREST = 8


def logits_at(model: nn.Module, inputs: Tensor, at: Tensor, chunk: int | None = None) -> Tensor:
    """Logits [B, Q, vocab], float32 at least, after the positions `at` [B, Q] of texts [B, T].

    Args:
        model: `model.hidden(idx, state) -> [B, T, H], state` and `model.project`.
        chunk: read so many positions at once and carry the state; None = one window.
    """
    chosen: Tensor | None = None
    state, start = None, 0
    for part in inputs.split(chunk or inputs.shape[1], dim=1):
        x, state = model.hidden(part, state)
        if chosen is None:
            chosen = x.new_empty(*at.shape, x.shape[-1])
        rows, columns = ((at >= start) & (at < start + part.shape[1])).nonzero(as_tuple=True)
        chosen[rows, columns] = x[rows, at[rows, columns] - start]
        start += part.shape[1]
    logits = model.project(chosen)
    return logits if logits.dtype == torch.float64 else logits.float()


def scores(logits: Tensor, answers: Tensor) -> Tensor:
    """Nats of each answer [...], and 1 where it is the likeliest one: [2, N] float64 on the CPU."""
    logits, answers = logits.flatten(0, -2), answers.flatten()
    nats = nn.functional.cross_entropy(logits, answers, reduction="none")
    return torch.stack([nats, logits.argmax(-1) == answers]).double().cpu()


def judge(
    model: nn.Module,
    batches: Iterable[Questions],
    *,
    streamed: bool = True,
    amp: AbstractContextManager | None = None,
) -> dict[str, Any]:
    """Ask all questions, of texts that are read in one window, and again of streamed ones.

    Args:
        streamed: whether to stream as well.
        amp: autocast context to run in, re-enterable.

    Returns:
        What `tally` does, and the mean `nats` of an answer; with `streamed` the accuracy of
        streamed texts and, as `largest_difference`, that of the nats of any answer.
    """
    device = next(model.parameters()).device
    distances, windows, streams = [], [], []
    for batch in batches:
        inputs, asked, answers = (t.to(device) for t in batch[:3])
        distances.append(batch.distances.flatten().numpy())
        with reading(model), amp or nullcontext():
            windows.append(scores(logits_at(model, inputs, asked), answers))
            if streamed:
                chunk = max(1, min(CHUNK, inputs.shape[1] // 3))
                streams.append(scores(logits_at(model, inputs, asked, chunk), answers))
    nats, right = torch.cat(windows, 1)
    result = {"nats": nats.mean().item(), **tally(right.numpy() > 0, np.concatenate(distances))}
    if streamed:
        other_nats, other_right = torch.cat(streams, 1)
        result["streamed"] = other_right.mean().item()
        result["largest_difference"] = (other_nats - nats).abs().max().item()
    return result


def tally(right: np.ndarray, distances: np.ndarray) -> dict[str, Any]:
    """`questions`, `accuracy` and `by_distance` of answers [N] bool at distances [N], 1 or more."""
    rows, nearest, farthest = [], 1, NEAREST
    while nearest <= distances.max():
        inside = (distances >= nearest) & (distances <= farthest)
        if inside.any():
            rows.append(
                {
                    "nearest": nearest,
                    "farthest": farthest,
                    "questions": int(inside.sum()),
                    "accuracy": float(right[inside].mean()),
                }
            )
        nearest, farthest = farthest + 1, 2 * farthest
    return {"questions": len(right), "accuracy": float(right.mean()), "by_distance": rows}


def by_farthest(result: Mapping[str, Any]) -> dict[int, float]:
    """The accuracies of `tally` by the farthest distance of each row."""
    return {row["farthest"]: row["accuracy"] for row in result["by_distance"]}
