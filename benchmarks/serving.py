"""What a server does with many streams: speed, memory, texts, and how soon a known prompt begins.

    python benchmarks/serving.py --json FILE
    python benchmarks/serving.py --streams 16 --tokens 32 --states 64 --soak 200 --prompt 4096

A model with random weights (`--config`, or a trained `--checkpoint`) is served by `wavelet-lm
serve` in a process of its own, and asked over HTTP by this one:

- speed: one stream alone and `--streams` of them at once, in turns; tokens per second from the
  first request to the last token, and whether each text is the one that was written alone;
- memory: resident bytes of the server before and after `--states` states were made, and along
  `--soak` requests;
- the first token of a prompt of `--prompt` tokens, read for the first time and known.

Beside it the project's GPT with as many parameters (± 5%), which reads `--gpt_context` tokens,
behind the same server: its speed, its memory, and what a state of it takes. `--no_gpt` leaves it
out.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import torch
from equal_gpt import gpt_shape
from report import check_targets, median, positive, table, write_results

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.config import Config
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model, n_params

ROOT = Path(__file__).parents[1]
MiB = 2**20
VOCAB = 256
SAMPLES = 8  # measurements of the soak
ALONGSIDE = 16  # connections that the soak asks by


@contextlib.contextmanager
def served(run: str, *options: str) -> Iterator[Server]:
    """A server of a run, in a process of its own.

    Raises:
        UserError: it did not start.
    """
    command = [sys.executable, "-m", "wavelet_lm.serving", run, "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " at http://" in line:
                break
        else:
            raise UserError(f"the server did not start: {''.join(lines[-1:]).strip()}")
        yield Server(process, int(line.split("://")[1].split()[0].rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stderr.close()


class Server:
    """A server that is running, asked without any library in between."""

    def __init__(self, process: subprocess.Popen, port: int):
        self._process, self._port = process, port

    def resident(self) -> int:
        """Bytes of memory that it has."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    async def events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """What comes of a stream, as it comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request_of("POST", "/v1/completions", {**body, "stream": True}, close=True))
        while part := await reader.read(1 << 16):
            yield part
        writer.close()

    async def text(self, body: dict[str, Any]) -> str:
        """A text that is streamed.

        Raises:
            UserError: it was refused.
        """
        return streamed_text(b"".join([part async for part in self.events(body)]))

    async def ask(self, asked: list[tuple[str, str, dict[str, Any] | None]]) -> list[Any]:
        """Requests one after the other on one connection; their answers.

        Raises:
            UserError: one was refused.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        answers = []
        for method, path, body in asked:
            writer.write(request_of(method, path, body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length:")[2].split()[0])
            answers.append(json.loads(await reader.readexactly(length)))
            if "error" in answers[-1]:
                raise UserError(f"{path}: {answers[-1]['error']['message']}")
        writer.close()
        return answers


def request_of(method: str, path: str, body: dict[str, Any] | None, close: bool = False) -> bytes:
    """A request as it is sent."""
    content = b"" if body is None else json.dumps(body).encode()
    last = "Connection: close\r\n" * close
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\n{last}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def streamed_text(received: bytes) -> str:
    """The text in the events of a stream.

    Raises:
        UserError: an event is an error.
    """
    text = []
    for line in received.splitlines():
        at = line.find(b'{"')
        if line.startswith(b"data: {") or b'{"error"' in line:
            event = json.loads(line[at:])
            if "error" in event:
                raise UserError(f"a stream failed: {event['error']['message']}")
            text += [choice["text"] for choice in event["choices"]]
    return "".join(text)


# --- what is measured ----------------------------------------------------------------------------


def ask_for(seed: int, tokens: int) -> dict[str, Any]:
    """A request for a text; by its seed alone it is known which."""
    prompt = random.Random(seed).choices(range(32, 127), k=8)
    return {
        "prompt": prompt,
        "seed": seed,
        "max_tokens": tokens,
        "temperature": 0.9,
        "ignore_eot": True,
    }


async def speeds(
    server: Server, streams: int, tokens: int, repeats: int, n_compared: int
) -> dict[str, Any]:
    """One stream alone and many at once, in turns, and so many of their texts written alone."""
    single, many, equal = [], [], 0
    written: dict[int, str] = {}
    for repeat in range(repeats):
        seeds = range(repeat * streams, (repeat + 1) * streams)
        for _ in range(2):  # the second time prompts are known, as they are for the one stream
            started = time.perf_counter()
            texts = await asyncio.gather(*(server.text(ask_for(s, tokens)) for s in seeds))
            seconds = time.perf_counter() - started
        many.append(streams * tokens / seconds)
        written |= dict(zip(seeds, texts, strict=True))
        started = time.perf_counter()
        await server.text(ask_for(seeds[0], tokens))
        single.append(tokens / (time.perf_counter() - started))
    compared = list(written)[:: max(1, len(written) // n_compared)][:n_compared]
    for seed in compared:
        equal += await server.text(ask_for(seed, tokens)) == written[seed]
    return {
        "tokens_per_second_alone": median(single),
        "tokens_per_second": median(many),
        "ratio": median(many) / median(single),
        "texts": len(compared),
        "texts_equal": equal,
    }


async def idle_states(server: Server, n: int) -> dict[str, Any]:
    """What n saved states take."""
    ((health,),) = [await server.ask([("GET", "/health", None)])]
    before = server.resident()
    asked = [("POST", "/v1/states", {"text": f"state {i}", "name": f"s{i}"}) for i in range(n)]
    await server.ask(asked)
    return {
        "state_bytes": health["state_bytes"],
        "states": n,
        "states_resident_bytes": server.resident() - before,
    }


async def soak(server: Server, n: int) -> dict[str, Any]:
    """Resident bytes along n short requests, by several connections at once."""
    resident, done, started = [], 0, time.perf_counter()
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
        print(f"{done:,} requests, {resident[-1] / MiB:,.1f} MiB", file=sys.stderr)
    seconds = time.perf_counter() - started
    return {"requests": n, "requests_per_second": n / seconds, "resident_bytes": resident}


async def first_token(server: Server, n: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first event after a prompt of n tokens, when new and when known."""
    prompt = "".join(random.Random(1).choices("abcdefgh \n", k=n))
    body = {"prompt": prompt, "seed": 1, "max_tokens": 4, "ignore_eot": True}
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        received = b""
        async for part in server.events(body):
            received += part
            if b"data: " in received:
                seconds.append(time.perf_counter() - started)
                break
        await asyncio.sleep(0.1)
    return {"prompt": n, "first_token_new": seconds[0], "first_token_known": median(seconds[1:])}


async def measure(server: Server, args: Any, whole: bool) -> dict[str, Any]:
    """All figures of a server; without `whole` those of a GPT. Each is told once it is there."""
    row = {"resident_bytes_idle": server.resident()}
    await server.text(ask_for(0, 4))  # so that everything is loaded
    parts = [speeds(server, args.streams, args.tokens, args.repeats, args.compare)]
    if whole:
        parts.append(first_token(server, args.prompt, 5))
    parts.append(idle_states(server, args.states if whole else min(args.states, 64)))
    for part in parts:
        figures = await part
        print(", ".join(f"{name} {value:,.4g}" for name, value in figures.items()), file=sys.stderr)
        row |= figures
        row.setdefault("resident_bytes_after_streams", server.resident())
    if whole:
        row["soak"] = await soak(server, args.soak)
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
        ("tokens", 128, "of each of them"),
        ("repeats", 3, "of the speeds"),
        ("compare", 1_000_000, "texts, at most, that are written again alone"),
        ("prompt", 100_000, "tokens of the long prompt"),
        ("states", 4096, "that are saved"),
        ("soak", 100_000, "requests of the soak"),
        ("cache_mib", 64, "MiB of the server's state cache"),
        ("gpt_context", 1024, "tokens that the GPT reads"),
        ("threads", 1, "of the server"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{words} [{default:,}]"
        )
    parser.add_argument("--no_gpt", action="store_true", help="leave the GPT out")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    check_targets([args.json])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = Config.from_json(args.config)
        run, n = make_run(Path(folder) / "wavelet_lm", config)
        runs = [("wavelet_lm", args.checkpoint or run, n)]
        if not args.no_gpt:
            layers, C, heads = gpt_shape(n, VOCAB)
            shape = {"layers": layers, "C": C, "heads": heads, "block_size": args.gpt_context}
            gpt = config.replace(model="gpt", **shape)
            runs.append(("gpt", *make_run(Path(folder) / "gpt", gpt)))
        for name, run, n in runs:
            # A small cache, since memory is flat from where it is full.
            options = ["--threads", args.threads, "--max_streams", args.streams]
            options = [*map(str, options), "--state_cache", f"{args.cache_mib}MiB"]
            with served(run, *options) as server:
                figures = asyncio.run(measure(server, args, name == "wavelet_lm"))
            rows.append({"model": name, "n_params": n, **figures})
    print(describe(rows))
    if args.json:
        write_results(args.json, rows, config=args.config, **sizes(args))
        print(f"written to {args.json}")


def sizes(args: Any) -> dict[str, int]:
    """What was asked for, for the file."""
    names = ("streams", "tokens", "repeats", "gpt_context", "threads", "cache_mib")
    return {name: getattr(args, name) for name in names}


def describe(rows: list[dict[str, Any]]) -> str:
    """The figures as a table, and those of one model alone as lines."""
    head = ["model", "alone, tokens/s", "at once, tokens/s", "ratio", "texts equal", "state KiB"]
    cells = [
        [
            row["model"],
            f"{row['tokens_per_second_alone']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.1f}",
            f"{row['texts_equal']} of {row['texts']}",
            f"{row['state_bytes'] / 1024:,.1f}",
        ]
        for row in rows
    ]
    first, resident = rows[0], rows[0]["soak"]["resident_bytes"]
    return "\n".join(
        [
            table(head, cells),
            f"{first['prompt']:,} tokens: first token after {first['first_token_new']:.2f} s, known"
            f" after {1000 * first['first_token_known']:.1f} ms",
            f"{first['states']:,} states: {first['states_resident_bytes'] / MiB:,.1f} MiB more",
            f"{first['soak']['requests']:,} requests: resident MiB "
            + " ".join(f"{n / MiB:,.1f}" for n in resident),
        ]
    )


if __name__ == "__main__":
    run_command(main)
