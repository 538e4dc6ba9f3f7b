"""What a server does with many streams: speed, memory, texts, and how soon a known prompt begins.

    python benchmarks/serving.py --json FILE
    python benchmarks/serving.py --soak 100000 --compare 1000000
    python benchmarks/serving.py --streams 16 --tokens 32 --states 64 --soak 200 --prompt 4096

A model with random weights (`--config`, or a trained `--checkpoint`) is served by `wavelet-lm
serve` in a process of its own, and asked over HTTP by this one, with each number of `--threads`:

- speed: one stream alone and `--streams` of them at once, in turns; tokens per second from the
  first request to the last token, and whether texts are those that are written alone;
- and with the first number of threads, memory: resident bytes of the server before and after
  `--states` states were made, and along `--soak` requests; and the first token of a prompt of
  `--prompt` tokens, read for the first time and known.

Beside it the project's GPT with as many parameters (± 5%), which reads `--gpt_context` tokens,
behind the same server: its speed, its memory, and what a state of it takes. `--no_gpt` leaves it
out.

Where other programs are busy, seconds on the clock are theirs too: beside each speed stands that
by the seconds of CPU that the server itself took.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from equal_gpt import gpt_shape
from report import check_targets, median, positive, positives, table, write_results
from served_process import Server, served

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.config import Config
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model, n_params

MiB = 2**20
VOCAB = 256
PROMPT = 8  # tokens before a text
SAMPLES = 20  # measurements of the soak
ONE_STREAM = 4  # texts of one stream, for every time that many are written at once
ALONGSIDE = 16  # connections that the soak asks by
KNOWN = 9  # times that a known prompt is asked for
GPT_STATES = 64  # of a GPT, at most: each is as large as its context
SAY_EVERY = 10.0  # seconds between two lines of progress
STARTED = time.perf_counter()


def say(line: str) -> None:
    """A line of progress, on standard error."""
    print(f"{time.perf_counter() - STARTED:5.0f} s  {line}", file=sys.stderr, flush=True)


class Progress:
    """Says how far one of the longer measurements is, now and then."""

    def __init__(self, what: str, n: int):
        self._what, self._n, self._said = what, n, time.perf_counter()

    def at(self, done: int) -> None:
        """So much of it is done."""
        if time.perf_counter() - self._said >= SAY_EVERY:
            say(f"{self._what}: {done:,} of {self._n:,}")
            self._said = time.perf_counter()


# --- what is measured ----------------------------------------------------------------------------


def ask_for(seed: int, tokens: int) -> dict[str, Any]:
    """A request for a text; by its seed alone it is known which."""
    prompt = random.Random(seed).choices(range(32, 127), k=PROMPT)
    return {
        "prompt": prompt,
        "seed": seed,
        "max_tokens": tokens,
        "temperature": 0.9,
        "ignore_eot": True,
    }


class Speeds:
    """Tokens per second in several runs, by the clock and by the CPU of a server."""

    def __init__(self, server: Server):
        self._server = server
        self.by_clock: list[float] = []
        self.by_cpu: list[float] = []

    async def of(self, bodies: Sequence[dict[str, Any]]) -> list[str]:
        """Texts that are written at once."""
        n = sum(body["max_tokens"] for body in bodies)
        started, before = time.perf_counter(), self._server.cpu_seconds()
        texts = await asyncio.gather(*map(self._server.text, bodies))
        self.by_clock.append(n / (time.perf_counter() - started))
        self.by_cpu.append(n / max(0.01, self._server.cpu_seconds() - before))
        return texts


async def speeds(
    server: Server, streams: int, tokens: int, repeats: int, n_compared: int
) -> dict[str, Any]:
    """One stream alone and many at once, in turns, and so many of their texts written alone.

    One stream writes several texts, one after the other, so that it takes some time too.
    """
    single, many, equal = Speeds(server), Speeds(server), 0
    written: dict[int, str] = {}
    for repeat in range(repeats):
        seeds = range(repeat * streams, (repeat + 1) * streams)
        bodies = [ask_for(seed, tokens) for seed in seeds]
        await Speeds(server).of(bodies)  # after which prompts are known, as they are for the one
        written |= dict(zip(seeds, await many.of(bodies), strict=True))
        for body in bodies[:ONE_STREAM]:
            await single.of([body])
        say(
            f"{repeat + 1} of {repeats}: {streams} streams {many.by_clock[-1]:,.0f} tokens/s, one"
            f" {median(single.by_clock[-ONE_STREAM:]):,.0f}"
        )
    compared = list(written)[:: max(1, len(written) // n_compared)][:n_compared]
    progress = Progress("texts written alone", len(compared))
    for done, seed in enumerate(compared):
        equal += await server.text(ask_for(seed, tokens)) == written[seed]
        progress.at(done)
    by_clock, by_cpu = (
        {"alone": median(alone), "at_once": median(at_once)}
        for alone, at_once in ((single.by_clock, many.by_clock), (single.by_cpu, many.by_cpu))
    )
    return {
        "tokens_per_second": by_clock,
        "tokens_per_cpu_second": by_cpu,
        "ratio": by_clock["at_once"] / by_clock["alone"],
        "ratio_by_cpu": by_cpu["at_once"] / by_cpu["alone"],
        "texts": len(compared),
        "texts_equal": equal,
    }


async def idle_states(server: Server, n: int) -> dict[str, Any]:
    """What n saved states take."""
    ((health,),) = [await server.ask([("GET", "/health", None)])]
    before, progress = server.resident(), Progress("states", n)
    for start in range(0, n, 64):
        part = range(start, min(n, start + 64))
        asked = [{"text": f"state {i}", "name": f"s{i}"} for i in part]
        await server.ask([("POST", "/v1/states", body) for body in asked])
        progress.at(start)
    return {
        "state_bytes": health["state_bytes"],
        "states": n,
        "states_resident_bytes": server.resident() - before,
    }


async def soak(server: Server, n: int) -> dict[str, Any]:
    """Resident bytes along n short requests, by several connections at once."""
    resident, at, done, started = [], [], 0, time.perf_counter()
    for i in range(SAMPLES):
        until = n * (i + 1) // SAMPLES
        seeds = list(range(done, until))
        parts = [seeds[k::ALONGSIDE] for k in range(ALONGSIDE)]
        await asyncio.gather(
            *(
                server.ask([("POST", "/v1/completions", ask_for(s, 1 + s % 4)) for s in part])
                for part in parts
            )
        )
        done = until
        resident.append(server.resident())
        at.append(time.perf_counter() - started)
        say(f"{done:,} of {n:,} requests, {resident[-1] / MiB:,.1f} MiB")
    seconds = time.perf_counter() - started
    figures = {"requests": n, "requests_per_second": n / seconds}
    return {"soak": {**figures, "seconds": at, "resident_bytes": resident}}


async def first_token(server: Server, n: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first event after a prompt of n tokens, when new and when known."""
    prompt = "".join(random.Random(1).choices("abcdefgh \n", k=n))
    body = {"prompt": prompt, "seed": 1, "max_tokens": 4, "ignore_eot": True}
    seconds = []
    say(f"reading {n:,} tokens")
    for _ in range(1 + repeats):
        started = time.perf_counter()
        received = b""
        async for part in server.events(body):
            received += part
            if b"data: " in received:
                seconds.append(time.perf_counter() - started)
                break
        await asyncio.sleep(0.1)
    new, *known = seconds
    return {
        "prompt": n,
        "first_token_new": new,
        "first_token_known": median(known),
        "first_token_known_least": min(known),
    }


async def measure(server: Server, args: Any, is_gpt: bool, whole: bool) -> dict[str, Any]:
    """The figures of a server; without `whole` its speeds alone. Each is told once it is there."""
    row = {"resident_bytes_idle": server.resident()}
    await server.text(ask_for(0, 4))  # so that everything is loaded
    parts = [lambda: speeds(server, args.streams, args.tokens, args.repeats, args.compare)]
    if whole and not is_gpt:
        parts.append(lambda: first_token(server, args.prompt, KNOWN))
    if whole:
        n_states = min(args.states, GPT_STATES) if is_gpt else args.states
        parts.append(lambda: idle_states(server, n_states))
    if whole and not is_gpt:
        parts.append(lambda: soak(server, args.soak))
    for part in parts:
        row |= await part()
        row.setdefault("resident_bytes_after_streams", server.resident())
    return row


def make_run(folder: Path, config: Config) -> tuple[str, int]:
    """A run folder of random weights that reads bytes, and its number of parameters."""
    torch.manual_seed(0)
    model = build_model(config, VOCAB)
    ByteTokenizer().save(folder / "tokenizer")
    save_checkpoint(folder / "best.safetensors", model, {})
    return str(folder), n_params(model)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.json", metavar="FILE")
    parser.add_argument("--checkpoint", metavar="RUN", help="a trained run in its place")
    for name, default, words in (
        ("streams", 256, "at once"),
        ("tokens", 64, "of each of them"),
        ("repeats", 3, "of the speeds"),
        ("compare", 64, "texts, at most, that are written again alone"),
        ("prompt", 100_000, "tokens of the long prompt"),
        ("states", 4096, "that are saved"),
        ("soak", 4000, "requests of the soak"),
        ("cache_mib", 64, "MiB of the server's state cache"),
        ("gpt_context", 256, "tokens that the GPT reads"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{words} [{default:,}]"
        )
    parser.add_argument(
        "--threads", type=positives, default=(1, 2), metavar="LIST", help="of the server [1,2]"
    )
    names = ("wavelet_lm", "gpt")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--models", nargs="+", choices=names, default=names, help="[both]")
    which.add_argument("--no_gpt", action="store_true", help="as --models wavelet_lm")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    check_targets([args.json])
    has_gpt = "gpt" in args.models and not args.no_gpt
    if has_gpt and PROMPT + args.tokens > args.gpt_context:
        raise UserError(
            f"--tokens {args.tokens} after a prompt of {PROMPT} are more than the"
            f" {args.gpt_context} that the GPT reads; give a larger --gpt_context, or --no_gpt"
        )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = Config.from_json(args.config)
        run, n = make_run(Path(folder) / "wavelet_lm", config)
        runs = [("wavelet_lm", args.checkpoint or run, n)]
        if has_gpt:
            layers, C, heads = gpt_shape(n, VOCAB)
            shape = {"layers": layers, "C": C, "heads": heads, "block_size": args.gpt_context}
            # As `gpt_shape` counts: the head is the embedding, the table of positions is left out.
            gpt = Config(model="gpt", head_hidden=0, tie_embedding_to_lm_head=True, **shape)
            gpt_run, gpt_n = make_run(Path(folder) / "gpt", gpt)
            runs.append(("gpt", gpt_run, gpt_n - args.gpt_context * C))
        runs = [each for each in runs if each[0] in args.models]
        for threads, (name, run, n) in itertools.product(args.threads, runs):
            say(f"{name}, {threads} thread{'s' * (threads > 1)}")
            # A small cache, since memory is flat from where it is full.
            options = ["--threads", str(threads), "--max_streams", str(args.streams)]
            with served(run, *options, "--state_cache", f"{args.cache_mib}MiB") as server:
                whole = threads == args.threads[0]
                figures = asyncio.run(measure(server, args, name == "gpt", whole))
            rows.append({"model": name, "n_params": n, "threads": threads, **figures})
            if args.json:  # what is interrupted leaves what it has
                write_results(args.json, rows, config=args.config, **sizes(args))
    print(describe(rows))
    if args.json:
        print(f"written to {args.json}")


def sizes(args: Any) -> dict[str, int]:
    """What was asked for, for the file."""
    names = ("streams", "tokens", "repeats", "gpt_context", "cache_mib")
    return {name: getattr(args, name) for name in names}


def describe(rows: list[dict[str, Any]]) -> str:
    """The figures as a table, and those of one model alone as lines."""
    head = ["model", "threads", "alone, tokens/s", "at once", "ratio", "by CPU", "texts equal"]
    head += ["MiB then"]
    cells = [
        [
            row["model"],
            row["threads"],
            f"{row['tokens_per_second']['alone']:,.0f}",
            f"{row['tokens_per_second']['at_once']:,.0f}",
            f"{row['ratio']:.1f}",
            f"{row['ratio_by_cpu']:.1f}",
            f"{row['texts_equal']} of {row['texts']}",
            f"{row['resident_bytes_after_streams'] / MiB:,.0f}",
        ]
        for row in rows
    ]
    states = [
        f"{row['model']}: a state has {row['state_bytes'] / 1024:,.1f} KiB, {row['states']:,} of"
        f" them take {row['states_resident_bytes'] / MiB:,.1f} MiB"
        for row in rows
        if "states" in row
    ]
    lines = [table(head, cells), *states]
    first = rows[0]
    if "soak" in first:
        soak = first["soak"]
        lines += [
            f"{first['prompt']:,} tokens: first token after {first['first_token_new']:.2f} s, known"
            f" after {1000 * first['first_token_known']:.1f} ms, at least"
            f" {1000 * first['first_token_known_least']:.1f}",
            f"{soak['requests']:,} requests, {soak['requests_per_second']:,.0f}/s: resident MiB "
            + " ".join(f"{n / MiB:,.1f}" for n in soak["resident_bytes"]),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
