"""Speed of decoding: latency against position, tokens/s against batch, and the share of bandwidth.

    python benchmarks/decode.py --config configs/mini.json --json FILE --plot FILE.png
    python benchmarks/decode.py --config configs/quickstart.json --positions 64,4096 --no_gpt
    python benchmarks/decode.py --config config.json --device cuda --dtype bfloat16 --compile \\
        --batches 1,16,64,256 --recompute 256 --json FILE --plot FILE.png

A model with random weights continues random texts greedily; the argmax is part of the step and
stays on the device. Beside it, in the same run and in turns with it:

- `recompute:N`: the plain model reads the last N tokens again for every token, as the published
  code does; only the last position's logits are computed;
- `gpt`: the project's GPT at equal parameters (± 5%, not counting its table of positions), with
  the context that the measurement needs; `--no_gpt` leaves it out.

The plot needs `python -m pip install -c constraints.txt -e ".[bench]"`.

Latency is the median over all timed steps, the mean beside it would show a step that is dear now
and then. Bytes of weights per token come in three counts: those of the fused weights
(`prepared`), those of the plain model's as often as they are read (shared nets are read again), and
each of these once. Each over the time and the speed of memory, measured in the same run, is how
near decoding comes to what memory allows.
Results go to `--json FILE`, by convention `benchmarks/results/decode_<config>_<machine>.json`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from equal_gpt import EqualGPT
from report import (
    alternate,
    bandwidth,
    boolean,
    check_plot,
    check_targets,
    median,
    natural,
    positive,
    positives,
    resident_bytes,
    step_seconds,
    table,
    write_results,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.cost import breakdown
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.memory_estimate import (
    GiB,
    available_bytes,
    peak_bytes,
    refuse_large_model_on_cpu,
    reset_peak,
)

MiB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_STEPS = 2
# A recomputed token costs as much as dozens of decoded ones: fewer of them are timed, one in 16.
RECOMPUTED_SHARE = 16
CHECKED_TOKENS = 16
# Share of the memory that is free which the GPT's caches may take.
CACHE_SHARE = 0.6


# --- what is measured: texts that go on by one token a step --------------------------------------


class Stream:
    """Greedy decoding with a session, as `generate.py` does it."""

    def __init__(self, decoder: Decoder, state: Any, batch: int):
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)
        self.session = session = decoder.start(state)
        self.step = decoder.accelerate(
            lambda: self.draw(session.decode(self.tokens)[:, -1]), (session, self)
        )

    @torch.no_grad()
    def draw(self, logits: Tensor) -> None:
        self.tokens.copy_(logits.argmax(-1, keepdim=True))

    def buffers(self) -> list[Tensor]:
        return [self.tokens]

    def rewind(self, state: Any, tokens: Tensor) -> None:
        """Go on from another state and the tokens [B, 1] that come next there."""
        self.session.load(state, range(len(tokens)))
        self.tokens.copy_(tokens)


class Recomputed:
    """The last tokens of a text, all of them read again for every new one."""

    def __init__(self, model: nn.Module, window: Tensor):
        self._model, self.window = model, window

    @torch.no_grad()
    def step(self) -> None:
        logits, _ = self._model(self.window, last_only=True)
        token = logits[:, -1:].argmax(-1)
        self.window = torch.cat([self.window[:, 1:], token], 1)


def timed(
    step: Callable[[], None],
    n: int,
    device: torch.device,
    rewind: Callable[[], None] = lambda: None,
    warm_up: int = WARM_UP_STEPS,
) -> list[float]:
    """Seconds of each of n steps, the first of them `warm_up` steps after `rewind`."""
    rewind()
    for _ in range(warm_up):
        step()
    return step_seconds(step, n, device)


# --- the benchmark -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What was asked for; `tokens` is the number of steps timed in a row."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    context: str
    positions: tuple[int, ...]
    batches: tuple[int, ...]
    recompute: int
    gpt: bool
    tokens: int
    repeats: int
    seed: int


class Benchmark:
    """All measurements of one model. Rows accumulate in `rows`, one per method and place."""

    def __init__(self, config: Config, vocab_size: int, settings: Settings):
        self.config, self.vocab_size, self.settings = config, vocab_size, settings
        self.device = settings.device
        self.bandwidth = bandwidth(self.device)
        torch.manual_seed(settings.seed)
        with self.device:
            self.model = build_model(config, vocab_size).eval().requires_grad_(False)
            for p in self.model.parameters():
                if not p.any():  # a matrix that starts at zero would be spared the arithmetic
                    p.normal_(std=0.02)
        self.decoder = Decoder(
            self.model, context=settings.context, dtype=settings.dtype, compile=settings.compile
        )
        cost = breakdown(config, vocab_size).total
        size = settings.dtype.itemsize
        self.weight_bytes = {
            "prepared": self.decoder.weight_bytes_per_token(),
            "reads": cost.read * size,
            "distinct": cost.distinct * size,
        }
        self.text = torch.randint(
            vocab_size, (settings.positions[-1] + 1,), device=self.device
        ).tolist()
        self.batch_position = settings.recompute or config.block_size
        if self.decoder.longest is not None:  # a GPT must have room for what it writes
            self.batch_position = max(1, min(self.batch_position, config.block_size - self._room))
        self.rows: list[dict[str, Any]] = []
        self.gpt: EqualGPT | None = None

    def run(self, note: Callable[[str], None]) -> None:
        note("reading texts up to the positions")
        states, at, state = {}, 0, None
        for position in self.settings.positions:
            _, state = self.decoder.prefill([self.text[at:position]], state)
            states[position], at = state, position
        stream = Stream(self.decoder, states[self.settings.positions[0]], 1)
        self.agreement = self._check(stream, states)
        memory = self._memory(stream, states)
        self._build_opponents()
        note("latency against position")
        self._latency(stream, states, memory)
        note("tokens/s against batch")
        self._throughput(stream)

    def _check(self, stream: Stream, states: dict[int, Any]) -> dict[str, Any]:
        """Greedy decoding beside recomputation of the whole text in float32, from one position."""
        position = max((p for p in states if p < self.config.block_size), default=None)
        if position is None:
            return {}
        n = min(CHECKED_TOKENS, self.config.block_size - position)
        session = self.decoder.start(states[position])
        decoded = session.decode(torch.tensor([[self.text[position]]], device=self.device))[0, -1]
        self._rewind(stream, states[position], position)
        whole = torch.tensor([self.text[: position + 1]], device=self.device)
        agreeing, difference = 0, 0.0
        with torch.no_grad():
            for i in range(n):
                stream.step()
                logits = self.model(whole, last_only=True)[0][0, -1]
                if not logits.isfinite().all():
                    raise UserError(
                        "the model with random weights gives NaN or infinite logits;"
                        " another --seed or another config may not"
                    )
                if i == 0:
                    span = logits.max() - logits.min()
                    difference = float((decoded - logits).abs().max() / span)
                token = logits.argmax().view(1, 1)
                if not torch.equal(token, stream.tokens):
                    break
                agreeing += 1
                whole = torch.cat([whole, token], 1)
        return {
            "position": position,
            "logits_difference_of_range": difference,
            "greedy_tokens_equal": agreeing,
            "greedy_tokens_compared": n,
        }

    def _memory(self, stream: Stream, states: dict[int, Any]) -> dict[int, dict[str, Any]]:
        """Memory while decoding at each position, before anything else takes some."""
        memory = {}
        for position, state in states.items():
            timed(stream.step, 1, self.device, partial(self._rewind, stream, state, position))
            reset_peak()
            timed(
                stream.step,
                self.settings.tokens,
                self.device,
                partial(self._rewind, stream, state, position),
            )
            resident = resident_bytes(self.device)
            memory[position] = {
                "state_bytes": _size(state),
                "resident_bytes": resident,
                "peak_bytes": max(peak_bytes(self.device), resident or 0),
            }
        return memory

    def _build_opponents(self) -> None:
        settings = self.settings
        if settings.recompute:
            plain = self.model
            if settings.dtype != torch.float32:
                plain = copy.deepcopy(plain).to(settings.dtype)
            self.plain = plain
        if settings.gpt:
            longest = max(settings.positions[-1], self.batch_position)
            self.gpt = EqualGPT(
                n_params(self.model),
                self.vocab_size,
                longest + self._room,
                settings.dtype,
                self.device,
            )

    @property
    def _room(self) -> int:
        return WARM_UP_STEPS + self.settings.tokens

    def _rewind(self, stream: Stream, state: Any, position: int) -> None:
        stream.rewind(state, torch.tensor([[self.text[position]]], device=self.device))

    def _latency(
        self, stream: Stream, states: dict[int, Any], memory: dict[int, dict[str, Any]]
    ) -> None:
        settings = self.settings
        measurements = {}
        for position, state in states.items():
            rewind = partial(self._rewind, stream, state, position)
            measurements["streaming", position] = self._steps(stream.step, rewind)
            if settings.recompute:
                window = self.text[max(0, position - settings.recompute) : position]
                idx = torch.tensor([window], device=self.device)
                measurements[self._recompute, position] = self._recompute_steps(idx)
            if settings.gpt:
                self._add_gpt(measurements, "position", 1, position)
        samples = alternate(measurements, settings.repeats)
        for (method, position), seconds in samples.items():
            row = {"part": "position", "method": method, "position": position, "batch": 1}
            row |= _speeds(seconds, 1)
            if method == "streaming":
                row |= memory[position] | self._fractions(self.weight_bytes, row["milliseconds"])
            elif method == "gpt":
                cached = self.gpt.cache_bytes(1, position)
                n_bytes = {"reads": self.gpt.weight_bytes_per_token + cached}
                row |= {"state_bytes": cached} | self._fractions(n_bytes, row["milliseconds"])
            self.rows.append(row)

    def _throughput(self, single: Stream) -> None:
        settings = self.settings
        position = self.batch_position
        measurements = {}
        for batch in settings.batches:
            texts = torch.randint(self.vocab_size, (batch, position), device=self.device)
            _, state = self.decoder.prefill(texts.tolist())
            stream = single if batch == 1 else Stream(self.decoder, state, batch)
            rewind = partial(stream.rewind, state, texts[:, -1:])
            measurements["streaming", batch] = self._steps(stream.step, rewind)
            if settings.recompute:
                measurements[self._recompute, batch] = self._recompute_steps(texts)
            if settings.gpt:
                self._add_gpt(measurements, "batch", batch, position)
        samples = alternate(measurements, settings.repeats)
        for (method, batch), seconds in samples.items():
            row = {"part": "batch", "method": method, "position": position, "batch": batch}
            self.rows.append(row | _speeds(seconds, batch))

    @property
    def _recompute(self) -> str:
        return f"recompute:{self.settings.recompute}"

    def _steps(self, step: Callable[[], None], rewind: Callable[[], None]) -> Callable:
        return partial(timed, step, self.settings.tokens, self.device, rewind)

    def _recompute_steps(self, window: Tensor) -> Callable[[], list[float]]:
        n = max(1, self.settings.tokens // RECOMPUTED_SHARE)
        return partial(timed, Recomputed(self.plain, window).step, n, self.device, warm_up=1)

    def _add_gpt(self, measurements: dict, part: str, batch: int, position: int) -> None:
        """Add the GPT's steps, or a row that says why there are none."""
        needed = self.gpt.cache_bytes(batch, position + self._room)
        free = _free_bytes(self.device)
        if needed > CACHE_SHARE * free:
            why = f"its cache needs {needed / GiB:.2f} GiB and {free / GiB:.2f} GiB are free"
            row = {"part": part, "method": "gpt", "position": position, "batch": batch}
            self.rows.append(row | {"skipped": why})
            return
        text = self.gpt.start(batch, position, self._room)
        place = {"position": position, "batch": batch}[part]
        measurements["gpt", place] = self._steps(text.step, text.rewind)

    def _fractions(self, n_bytes: dict[str, int], milliseconds: float) -> dict[str, Any]:
        """Bytes per token by each count, and their rate over the measured ones of memory."""
        row: dict[str, Any] = {}
        for count, size in n_bytes.items():
            rate = size / milliseconds * 1000
            row[f"{count}_bytes"] = size
            row |= {f"{count}_of_{kind}": rate / speed for kind, speed in self.bandwidth.items()}
        return row


def _speeds(seconds: Sequence[float], batch: int) -> dict[str, float | int]:
    return {
        "milliseconds": median(seconds) * 1000,
        "milliseconds_mean": sum(seconds) / len(seconds) * 1000,
        "tokens_per_second": batch / median(seconds),
        "timed_steps": len(seconds),
    }


def _size(state: Any) -> int:
    leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _free_bytes(device: torch.device) -> int:
    """Memory that can still be had: on a GPU, or, less what this process holds, of the machine."""
    if device.type == "cuda":
        return available_bytes(device)
    return available_bytes(device) - (resident_bytes(device) or 0)


# --- what it says --------------------------------------------------------------------------------


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The ratios that the targets are about, as far as the rows have what they need."""
    at = {(r["part"], r["method"], r["position"]): r for r in rows if "skipped" not in r}
    streaming = [r for (part, method, _), r in at.items() if (part, method) == _STREAMING]
    first, last = streaming[0], streaming[-1]
    ratios = {
        "last_over_first_position": last["milliseconds"] / first["milliseconds"],
        "last_over_first_state_bytes": last["state_bytes"] / first["state_bytes"],
    }
    if first["resident_bytes"]:
        ratios["last_over_first_resident_bytes"] = last["resident_bytes"] / first["resident_bytes"]
    for (part, method, position), row in at.items():
        if part == "position" and position == last["position"] and method != "streaming":
            name = f"speedup_over_{method}_at_last_position"
            ratios[name] = row["milliseconds"] / last["milliseconds"]
    batches = [r for r in rows if (r["part"], r["method"]) == ("batch", "streaming")]
    if len(batches) > 1:
        few, many = batches[0], batches[-1]
        name = f"tokens_per_second_of_batch_{many['batch']}_over_{few['batch']}"
        ratios[name] = many["tokens_per_second"] / few["tokens_per_second"]
    for kind in ("copy", "read"):
        for count in ("prepared", "reads", "distinct"):
            best = max(r[f"{count}_of_{kind}"] for r in streaming)
            ratios[f"{count}_bytes_of_{kind}_bandwidth"] = best
    return ratios


_STREAMING = ("position", "streaming")


def report(benchmark: Benchmark) -> str:
    """Tables for people."""

    def mebibytes(row: dict[str, Any], key: str) -> str | None:
        return f"{row[key] / MiB:,.1f}" if row.get(key) is not None else None

    def share(row: dict[str, Any], key: str) -> str | None:
        return f"{row[key]:.3f}" if key in row else None

    def speed(row: dict[str, Any]) -> list[object]:
        keys = ("milliseconds", "milliseconds_mean", "tokens_per_second")
        return [f"{row[key]:,.{digits}f}" for key, digits in zip(keys, (3, 3, 1), strict=True)]

    rows = [row for row in benchmark.rows if "skipped" not in row]
    rows.sort(key=lambda r: (r["method"] == "gpt", r["method"].startswith("recompute")))
    head = ["", "position", "ms", "mean ms", "tokens/s", "state MiB", "resident MiB", "peak MiB"]
    lines = [
        table(
            [*head, "prepared/copy", "reads/copy", "reads/read"],
            [
                [row["method"], f"{row['position']:,}", *speed(row)]
                + [mebibytes(row, f"{key}_bytes") for key in ("state", "resident", "peak")]
                + [share(row, key) for key in ("prepared_of_copy", "reads_of_copy")]
                + [share(row, "reads_of_read")]
                for row in rows
                if row["part"] == "position"
            ],
        ),
        "",
        table(
            ["", "batch", "ms", "mean ms", "tokens/s"],
            [[row["method"], row["batch"], *speed(row)] for row in rows if row["part"] == "batch"],
        ),
        "",
    ]
    lines += [
        f"no gpt at position {row['position']:,}, batch {row['batch']}: {row['skipped']}"
        for row in benchmark.rows
        if "skipped" in row
    ]
    lines += [f"{key:>52}  {value:.4g}" for key, value in summary(benchmark.rows).items()]
    lines += [
        "",
        "x/y: bytes per token by count x over time, over the speed of memory y (copy: bytes read",
        "  and written; read: a sum). prepared: the fused weights; reads: those",
        "  of the plain model, as often as they are read; of the GPT, its weights and its cache",
    ]
    return "\n".join(lines)


def about(benchmark: Benchmark) -> dict[str, Any]:
    """What the rows are measured on, for the JSON file."""
    settings, gpt = benchmark.settings, benchmark.gpt
    cuda = settings.device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(settings.device) if cuda else "cpu",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "compile": settings.compile,
        "context": settings.context,
        "vocab_size": benchmark.vocab_size,
        "n_params": n_params(benchmark.model),
        "weight_bytes_per_token": benchmark.weight_bytes,
        "bandwidth_bytes_per_second": benchmark.bandwidth,
        "check": benchmark.agreement,
    }
    if gpt is not None:
        n_layer, n_embd, n_head = gpt.shape
        about["gpt"] = {
            "n_layer": n_layer,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_params": gpt.n_params,
            "n_position_params": gpt.n_position_params,
        }
    return about


def plot(path: str, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Latency against position and tokens/s against batch, one line per method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    measured = [row for row in rows if "skipped" not in row]
    for axes, part, x, y in (
        (left, "position", "position", "milliseconds"),
        (right, "batch", "batch", "tokens_per_second"),
    ):
        for method in dict.fromkeys(row["method"] for row in measured):
            points = [r for r in measured if (r["part"], r["method"]) == (part, method)]
            axes.plot([r[x] for r in points], [r[y] for r in points], marker="o", label=method)
        ticks = sorted({row[x] for row in measured if row["part"] == part})
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y.replace("_", " "))
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    left.set_ylabel("milliseconds per token (batch 1)")
    right.set_ylabel("tokens per second")
    left.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=_image_format(path), dpi=150)


def _image_format(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()


# --- the command ---------------------------------------------------------------------------------


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    truth = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add("--config", default="configs/mini.json", metavar="FILE", help="[configs/mini.json]")
    add("--vocab", type=positive, default=50257, metavar="N", help="size of the vocabulary [50257]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    add("--dtype", choices=DTYPES, default="float32", help="of weights and products [float32]")
    add("--context", default="auto", help="as for generate.py [auto]")
    add("--compile", default=False, **truth, help="torch.compile the decoder's step [false]")
    positions = (64, 1024, 4096, 16384, 65536)
    shown = ",".join(map(str, positions))
    add(
        "--positions",
        type=positives,
        default=positions,
        metavar="LIST",
        help=f"where the cost of a token is measured [{shown}]",
    )
    add(
        "--batches",
        type=positives,
        default=(1, 4, 16),
        metavar="LIST",
        help="texts at once, at the position of the recomputed window [1,4,16]",
    )
    add(
        "--recompute",
        type=natural,
        default=256,
        metavar="N",
        help="window that is read again for every token; 0 leaves that out [256]",
    )
    add("--gpt", default=True, **truth, help="measure a GPT with a key-value cache too [true]")
    for name in ("compile", "gpt"):
        add(f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
    add("--tokens", type=positive, default=32, metavar="N", help="steps timed in a row [32]")
    add("--repeats", type=positive, default=5, metavar="N", help="turns of every method [5]")
    add("--seed", type=natural, default=1, metavar="N", help="of weights and texts [1]")
    add("--json", metavar="FILE", help="write the results there")
    add("--plot", metavar="FILE", help="draw them there (.png, .svg or .pdf)")
    return parser


def main() -> None:
    flags = vars(parser().parse_args())
    file, vocab_size, json_file, plot_file = (
        flags.pop(key) for key in ("config", "vocab", "json", "plot")
    )
    config = Config.from_dict(read_json_object(file), source=file)
    check_targets((json_file, plot_file))
    if plot_file:
        check_plot(plot_file)
    use_threads(flags.pop("threads"))
    requested = flags["device"]
    flags["device"] = resolve_device(requested)
    flags["dtype"] = DTYPES[flags["dtype"]]
    size = breakdown(config, vocab_size).n_params
    refuse_large_model_on_cpu(config.replace(device=requested), size, flags["device"])
    benchmark = Benchmark(config, vocab_size, Settings(**flags))
    benchmark.run(lambda text: print(f"… {text}", file=sys.stderr, flush=True))
    details = about(benchmark)
    for key, value in details.items():
        print(f"{key:>28}  {value}")
    print(f"\n{report(benchmark)}")
    if json_file:
        ratios = summary(benchmark.rows)
        write_results(json_file, benchmark.rows, config=file, **details, summary=ratios)
    if plot_file:
        title = f"{file}, {details['n_params'] / 1e6:.0f}M parameters, {details['device']}"
        plot(plot_file, benchmark.rows, f"{title}, {details['dtype']}")


if __name__ == "__main__":
    run_command(main)
