"""Speed of texts as users write them: sampling, penalties, strategies and decoding bytes to text.

    python benchmarks/generation.py --config configs/mini.json --batches 1,16
    python benchmarks/generation.py --config config.json --device cuda --dtype bfloat16 --compile \\
        --batches 1,16,64 --json FILE

`decode.py` times the model's step with an argmax; this times `Engine.generate_batch`, what
`generate.py` is made of, with each way of drawing a token in turns: greedy, the plain draw, top-k,
top-p, a repetition penalty, all of these, and the strategies. The model has random weights. A row
says what a way costs beside the greedy one: its tokens per second, and the milliseconds that a
token of every text takes.

Each text begins with one token, so that nearly all of the time is writing; the median of
`--repeats` turns, after one that compiles and captures.
Results go to `--json FILE`, by convention `benchmarks/results/generation_<config>_<machine>.json`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import sys
from functools import partial
from typing import Any

import torch
from report import (
    alternate,
    check_targets,
    median,
    natural,
    positive,
    positives,
    step_seconds,
    table,
    write_results,
)

from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.config import Config
from wavelet_lm.data.tokenizers import named_tokenizer
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.inference.declarations import DTYPES
from wavelet_lm.inference.engine import Engine
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.memory_estimate import refuse_large_model_on_cpu

# What is off unless a way asks for it, and how a token is chosen, by its name in the table.
PLAIN = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"top_k": 1},
    "draw": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "penalty 1.2": {"repetition_penalty": 1.2},
    "all four": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2},
    "entropy": {"entropy_adaptive": True},
    "coherence": {"wavelet_coherence": True},
    "best of 4": {"best_of_n": 4},
    "lookahead": {"lookahead_k": 4, "lookahead_depth": 4},
}

FIGURES = {"tokens_per_second": 1, "milliseconds": 3, "over_greedy": 2}  # and their digits


def measure(
    engine: Engine, ways: list[str], batches: tuple[int, ...], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for every way and number of texts at once; texts of a way are the same every time."""
    prompt = "a"  # a token of both vocabularies
    device = engine.decoder.device

    def write(way: str, batch: int) -> None:
        engine.generate_batch(
            [prompt] * batch,
            tokens,
            seed=list(range(1, 8 * batch + 1, 8)),
            batch_size=batch,
            ignore_eot=True,
            **{**PLAIN, **WAYS[way]},
        )

    places = [(way, batch) for batch in batches for way in ways]
    for way, batch in places:
        print(f"… {way}, {batch}", file=sys.stderr, flush=True)
        write(way, batch)
    samples = alternate(
        {place: partial(step_seconds, partial(write, *place), 1, device) for place in places},
        repeats,
    )
    rows = []
    for (way, batch), seconds in samples.items():
        time = median(seconds)
        greedy = median(samples.get(("greedy", batch), seconds))
        rows.append(
            {
                "way": way,
                "options": WAYS[way],
                "batch": batch,
                "tokens_per_second": round(batch * tokens / time, 2),
                "milliseconds": round(time / tokens * 1000, 4),
                "over_greedy": round(time / greedy, 4),
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The table."""
    return table(
        ["", "texts", "tokens/s", "ms", "times greedy"],
        [
            [row["way"], row["batch"]]
            + [f"{row[key]:,.{digits}f}" for key, digits in FIGURES.items()]
            for row in rows
        ],
    )


def way_list(text: str) -> list[str]:
    """Names of `WAYS`; greedy, beside which the others are put, comes first."""
    names = text.split(",")
    for name in names:
        if name not in WAYS:
            raise UserError(f"--ways has {name!r}; known are {', '.join(WAYS)}")
    return ["greedy", *(name for name in names if name != "greedy")]


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="configs/mini.json", metavar="FILE", help="[configs/mini.json]")
    add("--tokenizer", default="gpt2", help="gpt2 or bytes: its vocabulary [gpt2]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    add("--dtype", choices=DTYPES, default="float32", help="of weights and products [float32]")
    add("--compile", action="store_true", help="torch.compile the decoder's step")
    add("--ways", default=",".join(WAYS), metavar="LIST", help="of choosing a token [all]")
    add("--batches", type=positives, default=(1, 16), metavar="LIST", help="texts at once [1,16]")
    add("--tokens", type=positive, default=64, metavar="N", help="of every text [64]")
    add("--repeats", type=positive, default=5, metavar="N", help="turns of every row [5]")
    add("--seed", type=natural, default=1, metavar="N", help="of the weights [1]")
    add("--json", metavar="FILE", help="write the results there")
    return parser


def main() -> None:
    args = parser().parse_args()
    ways = way_list(args.ways)
    if args.tokenizer not in ("gpt2", "bytes"):
        raise UserError(f"--tokenizer is {args.tokenizer!r}; it must be gpt2 or bytes")
    check_targets([args.json])
    use_threads(args.threads)
    device = resolve_device(args.device)
    how = {"dtype": args.dtype, "compile": args.compile}
    config, tokenizer = Config.from_json(args.config), named_tokenizer(args.tokenizer)
    with torch.device("meta"):
        size = n_params(build_model(config, tokenizer.vocab_size))
    refuse_large_model_on_cpu(config.replace(device=args.device), size, device)
    torch.manual_seed(args.seed)
    with device:
        model = build_model(config, tokenizer.vocab_size).eval()
    engine = Engine(model, tokenizer, **how)
    rows = measure(engine, ways, args.batches, args.tokens, args.repeats)
    print(report(rows))
    if args.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        about = {"config": args.config, "n_params": size, "device": name, "tokens": args.tokens}
        write_results(args.json, rows, **about, **how)


if __name__ == "__main__":
    run_command(main)
