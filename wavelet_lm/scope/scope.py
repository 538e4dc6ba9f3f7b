"""A text, read by a model that is watched: `look` measures, `picture` says it in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.devices import reading, resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import fuse, is_fused
from wavelet_lm.inference.context import apply_context
from wavelet_lm.models.losses import token_cross_entropy
from wavelet_lm.scope.bands import Band, Mixture, bands_of, mixtures_of
from wavelet_lm.scope.watching import Run, Watched, check_scales

FORMAT = "wavelet-lm scope 1"
# Tokens of a picture, unless another number is asked for, and the most there can be: what a memory
# reads takes their square.
TOKENS, MOST_TOKENS = 256, 2048
# Positions of what comes before them that are read at once.
CHUNK = 4096
# Of a read, the earlier tokens and slots that a picture names: at most so many, none of less.
MOST_NAMED, LEAST_SHARE = 6, 0.02


@dataclass
class BlockScope:
    """One run of a block: what it is called, its scales, the delays of its wavelet, what it did.

    change: bits of all scored tokens together with a scale silenced, less without, one a scale;
    None where that was not asked for.
    """

    name: str
    bands: list[Band]
    mixtures: list[Mixture]
    run: Run
    change: list[float] | None = None


@dataclass
class Scope:
    """What a model saw in the last `len(tokens)` of a text.

    n_before: tokens of the text before these, which were read too; bits: [T] float64, what each
    token cost given all before it, NaN for the first one of a text.
    """

    tokens: list[int]
    n_before: int
    bits: Tensor
    blocks: list[BlockScope]


def look(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    last: int = TOKENS,
    ablate: bool = False,
    progress: Callable[[int], object] = lambda n_tokens: None,
) -> Scope:
    """Read a text, and see what every scale of every block does with its last tokens.

    Args:
        model: of wavelet blocks, fused or not; it is left as it is.
        tokens: 2 or more.
        last: how many of them to look at, 1 to `MOST_TOKENS`.
        ablate: read the text once more for every scale of every block, with its mixed band zero.
        progress: called with the number of tokens that were read.

    Raises:
        UserError: the model has no scales; there are too few tokens, or too many to look at; its
            output is not finite.
    """
    if not 1 <= last <= MOST_TOKENS:
        raise UserError(f"tokens is {last}; it must be between 1 and {MOST_TOKENS:,}")
    if len(tokens) < 2:
        raise UserError(f"the text has {len(tokens)} tokens; give 2 or more")
    watched = Watched(model)
    idx = torch.tensor([list(tokens)], device=next(watched.model.parameters()).device)
    n_before = max(0, len(tokens) - last)

    def bits(silenced: tuple[int, int, int] | None = None) -> Tensor:
        watched.silenced = silenced
        found = _read(watched, idx, n_before, progress)
        if not found[0 if n_before else 1 :].isfinite().all():
            raise UserError("the model's output is not finite; use a checkpoint before it diverged")
        return found

    with reading(watched.model):
        found = bits()
        runs = watched.runs
        scope = Scope(list(tokens[n_before:]), n_before, found, [])
        for n, network in enumerate(watched.networks):
            for r, run in enumerate(runs[n]):
                number = network.order[r % len(network.order)]
                wavelet = network.wavelets[number % len(network.wavelets)]
                name = _name(watched, n, r)
                block = BlockScope(name, bands_of(wavelet), mixtures_of(wavelet), run)
                if ablate:
                    changed = [bits((n, r, s)) for s in range(len(block.bands))]
                    block.change = [(other - found).nansum().item() for other in changed]
                scope.blocks.append(block)
    return scope


def _read(
    watched: Watched, idx: Tensor, n_before: int, progress: Callable[[int], object]
) -> Tensor:
    """Bits [T] of the tokens from `n_before` on, which the model is watched at."""
    model, state, hidden = watched.model, None, []
    for chunk in idx[:, :n_before].split(CHUNK, 1) if n_before else ():
        x, state = watched.read(chunk, state, look=False)
        hidden = [x[0, -1:]]
        progress(chunk.shape[1])
    x, _ = watched.read(idx[:, n_before:], state, look=watched.silenced is None)
    progress(x.shape[1])
    predicting = torch.cat([*hidden, x[0, :-1]])
    targets = idx[0, -len(predicting) :]
    nats = token_cross_entropy(predicting, model.project, model.vocab_size, targets)
    bits = nats.double() / math.log(2)
    return bits if n_before else torch.cat((bits.new_full((1,), torch.nan), bits))


def _name(watched: Watched, n: int, r: int) -> str:
    """What the r-th run of a block of the n-th network is called."""
    network = watched.networks[n]
    turn, i = divmod(r, len(network.order))
    name = f"block {i + 1}"
    if network.config.loop_iterations > 1:
        name = f"pass {turn + 1}, {name}"
    return f"model {n + 1}, {name}" if len(watched.networks) > 1 else name


def picture(scope: Scope, tokenizer: Tokenizer, run: str | None = None) -> dict[str, Any]:
    """All that is drawn, as plain numbers and texts that JSON can hold.

    Energies are sums of squares over the channels; `shade` is their logarithm, 0 at the row's least
    and 1 at its greatest, and 0 all along a row that has one value. Bits are those of the token in
    the column; null: not scored. `docs/scope.md` has all fields.
    """
    pieces = [tokenizer.token_bytes(token) for token in scope.tokens]
    scored = [not math.isnan(bits) for bits in scope.bits.tolist()]
    n_bytes = sum(len(piece) for piece, counts in zip(pieces, scored, strict=True) if counts)
    total = scope.bits.nansum().item()

    def per_byte(bits: float) -> float | None:
        return _rounded(bits / n_bytes) if n_bytes else None

    return {
        "format": FORMAT,
        "run": run,
        "tokenizer": tokenizer.name,
        "tokens": [token_text(piece) for piece in pieces],
        "ids": scope.tokens,
        "n_before": scope.n_before,
        "bits": _numbers(scope.bits),
        "bits_per_byte": per_byte(total),
        "blocks": [
            {
                "name": block.name,
                "scales": _scales(block, per_byte),
                "delays": [mixture._asdict() for mixture in block.mixtures],
                "recall": _recall(block.run),
                "slots": _slots(block.run),
            }
            for block in scope.blocks
        ],
    }


def _scales(block: BlockScope, per_byte: Callable[[float], float | None]) -> list[dict[str, Any]]:
    run = block.run
    shades = shade(run.energy)
    share = run.energy.sum(-1) / run.energy.sum().clamp(min=torch.finfo(run.energy.dtype).tiny)
    return [
        {
            **band._asdict(),
            "share": _rounded(share[s].item()),
            "energy": _numbers(run.energy[s], 6),
            "shade": _numbers(shades[s], 3),
            "openness": None if run.openness is None else _numbers(run.openness[s], 3),
            "change": None if block.change is None else per_byte(block.change[s]),
        }
        for s, band in enumerate(block.bands)
    ]


def shade(energy: Tensor) -> Tensor:
    """Energies [S, T] ≥ 0 as shades 0 … 1 of every row's own logarithms, [S, T]."""
    logs = energy.double().log10()
    known = logs.isfinite()
    low = logs.where(known, torch.inf).amin(-1, keepdim=True)
    high = logs.where(known, -torch.inf).amax(-1, keepdim=True)
    spread = high - low
    shades = (logs - low) / spread.where(spread > 0, 1)
    return shades.where(known & (spread > 0), 0)


def _recall(run: Run) -> dict[str, Any] | None:
    if run.recall is None:
        return None
    recall = run.recall
    heads = range(len(recall.shares))
    return {
        "heads": [
            {
                "reads": [_named(row, range(len(row))) for row in recall.shares[h]],
                "before": _numbers(recall.before[h], 3),
                "written": _numbers(recall.written[h], 3),
                "kept": _numbers(recall.kept[h], 6),
            }
            for h in heads
        ],
        # Of all heads together, for who draws one picture of them.
        "reads": [_named(row, range(len(row))) for row in recall.shares.mean(0)],
    }


def _slots(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "name": slots.name,
            "n_rows": slots.n_rows,
            "reads": [
                _named(shares, rows.tolist())
                for rows, shares in zip(slots.rows, slots.shares, strict=True)
            ],
        }
        for slots in run.slots
    ]


def _named(shares: Tensor, names: Sequence[int]) -> list[list[float]]:
    """The largest of shares [n] as pairs of name and share."""
    best = shares.topk(min(MOST_NAMED, len(shares)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[names[i], _rounded(share, 3)] for i, share in pairs if share >= LEAST_SHARE]


def token_text(piece: bytes) -> str:
    """A token as text; bytes that are no text of their own as ⟨hex⟩."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{piece.hex(' ')}⟩"


def _numbers(x: Tensor, digits: int = 5) -> list[float | None]:
    return [None if math.isnan(value) else _rounded(value, digits) for value in x.tolist()]


def _rounded(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")


def scope_run(
    run: str | Path,
    text: str,
    *,
    last: int = TOKENS,
    ablate: bool = False,
    device: str = "auto",
    progress: Callable[[int], object] = lambda n_tokens: None,
    log: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """`picture` of a text that the model of a run folder or a checkpoint reads, as it generates.

    Raises:
        UserError: as `look`; the run cannot be read, or does not read text.
    """
    from wavelet_lm.data.tokenizers import load_modality
    from wavelet_lm.inference.generation import check_vocabulary
    from wavelet_lm.inference.loading import load_model, load_tokenizer

    if (modality := load_modality(run)) is not None:
        raise UserError(
            f"{run}: reads {modality.kind} ({modality.name}), and scope shows text alone"
        )
    model, tokenizer = load_model(run, resolve_device(device), log), load_tokenizer(run)
    check_scales(model, str(run))
    check_vocabulary(model, tokenizer)
    model = apply_context(model if is_fused(model) else fuse(model), "auto")
    seen = look(model, tokenizer.encode(text), last=last, ablate=ablate, progress=progress)
    return picture(seen, tokenizer, str(run))
