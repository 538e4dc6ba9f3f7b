"""Bits per byte on long texts, by position, for what a token may see of the text before it.

    python benchmarks/context_length.py --checkpoint logs/RUN --text book.txt --json FILE
    python benchmarks/context_length.py --checkpoint logs/RUN --text a.txt b.txt \\
        --contexts stream,window:128,window:512,recompute:128 --lengths 1,4,16 --texts 16

A model is trained on windows of block_size tokens. Past that, `stream` goes on with all it has
read, `window:N` limits the running mean to the last N tokens, and `recompute:N` reads the last N
tokens again for every target (`wavelet_lm/inference/context.py`). Each of `--texts` stretches of
the files is read from its start as a text of its own. Targets are told apart by how many tokens
stand before them: up to 1 × block_size, 1–4 ×, and so on by `--lengths`.

stream and window are scored on every target. recompute is dear, so it is scored on `--targets`
evenly spaced ones of each band in each text, and so are the others a second time: only figures of
the same targets compare. Bits are those of the scored tokens, over exactly their bytes. Texts
differ much more than contexts do; so beside the spread over the texts (standard deviation) stands
the mean difference to the first context in the same text, with its standard error.
Results go to `--json FILE`, by convention `benchmarks/results/context_length_<run>.json`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from report import check_targets, positive, positives, table, write_results
from torch import Tensor, nn

from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.inference.context import parse_context
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import check_vocabulary
from wavelet_lm.inference.loading import load_model, load_tokenizer
from wavelet_lm.models.registry import n_params
from wavelet_lm.threads import use_threads

# Logits that are held at once, and positions that are read at once.
MAX_LOGITS = 2**26
MAX_POSITIONS = 4096


class Band(NamedTuple):
    """Targets with more than `start` and up to `end` tokens before them."""

    name: str
    start: int
    end: int


def bands(lengths: Sequence[int], block_size: int) -> list[Band]:
    """One per length, in units of block_size; the first starts with the text."""
    edges = [0, *lengths]
    return [
        Band(f"{a}–{b}×" if a else f"≤ {b}×", a * block_size, b * block_size)
        for a, b in itertools.pairwise(edges)
    ]


def sampled_positions(band: Band, n: int) -> np.ndarray:
    """Up to n evenly spaced positions of a band, its first and last among them."""
    return np.unique(np.linspace(band.start + 1, band.end, n).round().astype(np.int64))


def read_tokens(path: str, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a text file."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    return np.asarray(tokenizer.encode(text), dtype=np.int64)


def cut_texts(files: Sequence[np.ndarray], length: int, most: int) -> np.ndarray:
    """Stretches of `length` tokens [K, length] that do not overlap, up to `most`, spread evenly."""
    starts = [(file, at) for file in files for at in range(0, len(file) - length + 1, length)]
    if not starts:
        longest = max(map(len, files), default=0)
        raise UserError(
            f"the longest text has {longest} tokens and {length} are needed; give a longer one or"
            " smaller --lengths"
        )
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(int))
    return np.stack([starts[i][0][starts[i][1] :][:length] for i in chosen])


def read_through(decoder: Decoder, texts: np.ndarray) -> np.ndarray:
    """Nats of every target [K, T] of texts [K, T + 1], read in parallel, chunk by chunk."""
    K, T = texts.shape[0], texts.shape[1] - 1
    chunk = max(1, min(MAX_LOGITS // (K * decoder.vocab_size), MAX_POSITIONS // K))
    state, nats = None, []
    for at in range(0, T, chunk):
        idx, targets = (
            torch.from_numpy(texts[:, start : min(at + chunk, T) + start - at]).to(decoder.device)
            for start in (at, at + 1)
        )
        logits, state = decoder.read(idx, state)
        nats.append(_nats(logits, targets))
    return np.concatenate(nats, axis=1)


def read_again(decoder: Decoder, texts: np.ndarray, positions: np.ndarray, N: int) -> np.ndarray:
    """Nats of the targets at `positions`, each from the N tokens before it: [K, positions]."""
    nats = np.empty((len(texts), len(positions)))
    for n in np.unique(np.minimum(positions, N)):
        columns = np.flatnonzero(np.minimum(positions, N) == n)
        windows = positions[columns, None] - n + np.arange(n + 1)
        windows = texts[:, windows].reshape(-1, n + 1)
        rows = torch.from_numpy(windows).to(decoder.device).split(_windows_at_once(decoder, n))
        scored = [
            _nats(decoder.read(batch[:, :-1], None, last_only=True)[0], batch[:, -1:])
            for batch in rows
        ]
        nats[:, columns] = np.concatenate(scored).reshape(len(texts), -1)
    return nats


def _windows_at_once(decoder: Decoder, n: int) -> int:
    return max(1, min(MAX_POSITIONS // int(n), MAX_LOGITS // decoder.vocab_size))


def _nats(logits: Tensor, targets: Tensor) -> np.ndarray:
    """−log p of targets [B, T], float64."""
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).double().cpu().numpy()


def score(
    model: nn.Module, context: str, texts: np.ndarray, sample: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and the nats [K, positions] of the targets there: `sample` for recompute, or all.

    Position t is that of the target with t tokens before it, texts[:, t].
    """
    kind, N = parse_context(context)
    if kind == "recompute":
        decoder = Decoder(model, adapt=False)
        return sample, read_again(decoder, texts, sample, N)
    decoder = Decoder(model, context=context, adapt=False)
    return np.arange(1, texts.shape[1]), read_through(decoder, texts)


def measure(
    model: nn.Module,
    texts: np.ndarray,
    byte_counts: np.ndarray,
    contexts: Sequence[str],
    the_bands: Sequence[Band],
    n_targets: int,
) -> Iterator[dict[str, Any]]:
    """One row per context, band, and choice of targets (`sampled`, `all`).

    byte_counts: [K, T + 1], of the tokens in texts.
    """
    sample = np.concatenate([sampled_positions(band, n_targets) for band in the_bands])
    first: dict[tuple[str, str], np.ndarray] = {}
    for context in contexts:
        started = time.perf_counter()
        positions, nats = score(model, context, texts, sample)
        seconds = round(time.perf_counter() - started, 2)
        if not np.isfinite(nats).all():
            raise UserError(f"context {context}: the model's losses are not finite")
        kinds = {"sampled": sample}
        if len(positions) > len(sample):
            kinds["all"] = positions
        for band in the_bands:
            for kind, chosen in kinds.items():
                chosen = chosen[(chosen > band.start) & (chosen <= band.end)]
                bits = nats[:, np.searchsorted(positions, chosen)].sum(1) / math.log(2)
                n_bytes = byte_counts[:, chosen].sum(1)
                per_text = bits / n_bytes
                difference = per_text - first.setdefault((band.name, kind), per_text)
                yield {
                    "context": context,
                    "targets": kind,
                    "band": band.name,
                    "from_position": band.start + 1,
                    "to_position": band.end,
                    "tokens": int(nats.shape[0] * len(chosen)),
                    "bytes": int(n_bytes.sum()),
                    "bits_per_byte": round(float(bits.sum() / n_bytes.sum()), 5),
                    "spread": _rounded(_deviation(per_text)),
                    "difference": round(float(difference.mean()), 5),
                    "standard_error": _rounded(_deviation(difference, len(texts))),
                    "per_text": [round(float(value), 5) for value in per_text],
                    "seconds": seconds,
                }


def _deviation(values: np.ndarray, n: int = 1) -> float | None:
    """Standard deviation of one value, or of the mean of n; None for a single text."""
    return statistics.stdev(values.tolist()) / math.sqrt(n) if len(values) > 1 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def summary(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """A table: a line per context, and for each band bits per byte and the difference."""
    rows = [row for row in rows if row["targets"] == kind]
    names = list(dict.fromkeys(row["band"] for row in rows))
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    cells = {(row["context"], row["band"]): row for row in rows}
    lines = []
    for context in contexts:
        line: list[object] = [context]
        for name in names:
            row = cells[context, name]
            line.append(f"{row['bits_per_byte']:.4f}")
            error = row["standard_error"]
            line.append(
                "±" + ("–" if row["spread"] is None else f" {row['spread']:.4f}")
                if context == contexts[0]
                else f"{round(row['difference'], 4) + 0.0:+.4f}"
                + ("" if error is None else f" ({error:.4f})")
            )
        lines.append(line)
    return table([f"{kind} targets", *(cell for name in names for cell in (name, ""))], lines)


def context_list(text: str) -> tuple[str, ...]:
    """Contexts separated by commas."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def main() -> None:
    parser = OneLineParser(
        run="a run folder or a checkpoint file", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--text", required=True, nargs="+", metavar="FILE", help="long held-out texts, UTF-8")
    add(
        "--contexts",
        type=context_list,
        metavar="LIST",
        help="stream, window:N, recompute:N; differences are to the first of them"
        " (default: stream,window:B,window:4B,recompute:B with the model's block_size B)",
    )
    add("--lengths", type=positives, default=(1, 4, 16, 64), help="ends of bands, in block_sizes")
    add("--texts", type=positive, default=8, help="stretches to read, as many as fit (default 8)")
    add("--targets", type=positive, default=64, help="sampled per band and text (default 64)")
    add("--device", default="auto")
    add_threads_flag(parser)
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(sys.argv[1:])
    check_targets([args.json])

    use_threads(args.threads)
    model = load_model(args.checkpoint, resolve_device(args.device))
    tokenizer = load_tokenizer(args.checkpoint)
    check_vocabulary(model, tokenizer)
    B = model.config.block_size
    contexts = args.contexts or ("stream", f"window:{B}", f"window:{4 * B}", f"recompute:{B}")
    for context in contexts:
        parse_context(context)
    the_bands = bands(args.lengths, B)
    files = [read_tokens(path, tokenizer) for path in args.text]
    texts = cut_texts(files, the_bands[-1].end + 1, args.texts)
    print(
        f"{len(texts)} texts of {texts.shape[1]} tokens; block_size {B};"
        f" {n_params(model):,} parameters"
    )
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    rows = []
    for row in measure(model, texts, sizes[texts], contexts, the_bands, args.targets):
        if row["context"] not in {done["context"] for done in rows}:
            print(f"{row['context']}: {row['seconds']} s", file=sys.stderr)
        rows.append(row)
    for kind in ("all", "sampled"):
        if any(row["targets"] == kind for row in rows):
            print("\n" + summary(rows, kind))
    if args.json:
        about = {
            "checkpoint": str(args.checkpoint),
            "parameters": n_params(model),
            "tokenizer": tokenizer.name,
            "block_size": B,
            "device": str(next(model.parameters()).device),
            "texts": len(texts),
            "text_files": [Path(path).name for path in args.text],
        }
        write_results(args.json, rows, **about)


if __name__ == "__main__":
    run_command(main)
