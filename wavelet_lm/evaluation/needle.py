"""A sentence of a text that comes again: how much better a model then knows it.

Every sentence is read three times: where it stands in the text (`first`), again after `distance`
tokens of what follows it there (`again`), and at the same place of a text in which it did not stand
before (`unseen`), which is what the model would get right without recalling anything. The first
`CUE` tokens of it are not scored, for they have to say which sentence it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wavelet_lm.data.tasks.needle import CUE, SHORTEST, Needle, find_needles
from wavelet_lm.devices import amp_dtype, autocast, reading, resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.evaluation.answers import logits_at, scores
from wavelet_lm.evaluation.likelihood import split_of_run

NEEDLES = 32
# Without other wishes, distances as multiples of the training length.
MULTIPLES = (0.25, 0.5, 1, 2, 4, 8)
# Positions of a chunk of a text, and of the longest text that is read in one window as well.
CHUNK = 1000
WINDOW = 2**14
READINGS = ("first", "again", "unseen")
FIGURES = ("nats", "accuracy")


def find_in_run(
    run: str | Path,
    *,
    dataset: str | None = None,
    distances: Sequence[int] | None = None,
    n: int = NEEDLES,
    device: str = "auto",
    progress: Callable[[int], object] = lambda n_tokens: None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """`evaluate` a run on its own data, or on `dataset`.

    Args:
        distances: in tokens between the two; None = `MULTIPLES` of the run's training length, as
            far as the model can read.
        n: sentences to look for.

    Returns:
        `run`, `dataset`, `split`, `tokenizer`, `block_size`, `lead` and `rows`.

    Raises:
        UserError: a distance is too long for the model or the text, or too short for a sentence; it
            is no text; the model's output is not finite.
    """
    from wavelet_lm.inference.generation import check_vocabulary
    from wavelet_lm.inference.loading import load_model, load_tokenizer

    where = resolve_device(device)
    model, tokenizer = load_model(run, where, log), load_tokenizer(run)
    check_vocabulary(model, tokenizer)
    config = model.config
    distances, lead = _fitting(distances, config.block_size, getattr(model, "longest", None))
    name, split, chosen = split_of_run(config, tokenizer, None, dataset, log)
    if not chosen.n_bytes:
        raise UserError(f"{name} is no text, and has no sentences; give --dataset")
    needles = find_needles(chosen.tokens, tokenizer.token_bytes, n, lead=lead, distances=distances)
    precision = torch.float32 if where.type == "cpu" else amp_dtype(config, where)
    rows = evaluate(
        model,
        chosen.tokens,
        needles,
        lead=lead,
        distances=distances,
        amp=autocast(where, precision),
        progress=progress,
    )
    return {
        "run": str(run),
        "dataset": name,
        "split": split,
        "tokenizer": tokenizer.name,
        "block_size": config.block_size,
        "lead": lead,
        "rows": rows,
    }


def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    needles: Sequence[Needle],
    *,
    lead: int,
    distances: Sequence[int],
    amp: AbstractContextManager | None = None,
    progress: Callable[[int], object] = lambda n_tokens: None,
) -> list[dict[str, Any]]:
    """A row per distance: `distance`, `needles`, `tokens`, and for each of `READINGS` the mean
    `nats` of a token and the `accuracy` of the likeliest one.

    Texts are streamed in chunks; those of up to `WINDOW` tokens are read in one window too, whose
    accuracy of `again` is `window`, None for longer ones.

    Args:
        progress: called with the number of tokens that each needle took.
    """
    rows = []
    for distance in distances:
        figures: dict[str, list[Tensor]] = {name: [] for name in (*READINGS, "window")}
        for needle in needles:
            with reading(model), amp or nullcontext():
                n_read = _read(model, tokens, needle, lead, distance, figures)
            progress(n_read)
        sums = {name: torch.cat(found, 1) for name, found in figures.items() if found}
        if not all(found.isfinite().all() for found in sums.values()):
            raise UserError("the model's output is not finite; use a checkpoint before it diverged")
        means = {name: found.mean(1).tolist() for name, found in sums.items()}
        rows.append(
            {
                "distance": distance,
                "needles": len(needles),
                "tokens": sums["again"].shape[1],
                **{name: dict(zip(FIGURES, means[name], strict=True)) for name in READINGS},
                "window": means["window"][1] if "window" in means else None,
            }
        )
    return rows


def _read(
    model: nn.Module,
    tokens: np.ndarray,
    needle: Needle,
    lead: int,
    distance: int,
    figures: dict[str, list[Tensor]],
) -> int:
    """Read the texts of a needle; its tokens' nats and hits, [2, n] each, are added to `figures`.

    Returns the number of tokens that were read.
    """
    device = next(model.parameters()).device
    texts = [
        torch.from_numpy(text.astype(np.int64))[None].to(device)
        for text in needle.texts(tokens, lead, distance)
    ]
    length = needle.end - needle.start
    # The prediction of a token comes after the one before it.
    asked = torch.arange(CUE - 1, length - 1, device=device)
    first, again, unseen = (
        start + asked for start in (lead, lead + distance, lead + distance - length)
    )
    answers = texts[0][0, lead + CUE : lead + length]
    streamed = logits_at(model, texts[0], torch.cat([first, again])[None], CHUNK)[0]
    control = logits_at(model, texts[1], unseen[None], CHUNK)[0]
    for name, logits in zip(READINGS, (*streamed.chunk(2), control), strict=True):
        figures[name].append(scores(logits, answers))
    if texts[0].shape[1] <= WINDOW:
        figures["window"].append(scores(logits_at(model, texts[0], again[None])[0], answers))
    return sum(text.shape[1] for text in texts)


def _fitting(
    distances: Sequence[int] | None, block_size: int, longest: int | None
) -> tuple[list[int], int]:
    """The distances, and how many tokens stand before a sentence.

    That is half a training window, less where the model cannot read as much.
    """
    lead = max(1, block_size // 2)
    # Of a text: the lead, the distance, and a sentence, which is as long as the least distance.
    most = None if longest is None else longest - 1
    if distances is None:
        wished = [int(part * block_size) for part in MULTIPLES]
        distances = [
            d for d in wished if d >= SHORTEST and (most is None or d + min(wished) <= most)
        ]
        if not distances:
            raise UserError(
                f"the run was trained on {block_size} tokens at once, too few for a sentence that"
                " comes again; give --distances"
            )
    for distance in distances:
        if distance < SHORTEST:
            raise UserError(
                f"a distance is {distance}; it must be {SHORTEST} or more, the tokens of a sentence"
            )
    needed = max(distances) + min(distances)
    if most is not None and needed > most:
        raise UserError(
            f"the model reads {longest:,} tokens at most, and --distances up to"
            f" {max(distances):,} need {needed + 1:,}; give smaller ones"
        )
    return list(distances), lead if most is None else min(lead, longest - needed)
