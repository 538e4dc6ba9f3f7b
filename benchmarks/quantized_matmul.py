"""Products with quantized weights: time, and the share of the speed of memory.

    python benchmarks/quantized_matmul.py --device cuda --rows 1,2,4,16 --json FILE
    python benchmarks/quantized_matmul.py --device cuda --sweep
    python benchmarks/quantized_matmul.py --shapes 1x2048x2048,3x1024x1024 --formats dense,8,4

Each shape n × N × K is n matrices, as the model with C = 2048 has them. Of each there are as many
copies as no cache holds, and a measurement reads all of them, on a GPU from a CUDA graph as when
decoding. `dense` is torch's product with weights in `--dtype`. The share is of the speed of a copy,
for the bytes of weights, scales, x and y. `--sweep` tries other tiles of the Triton kernels.
Results go to `--json FILE`, by convention `benchmarks/results/quantized_matmul_<machine>.json`.
"""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from report import (
    alternate,
    bandwidth,
    boolean,
    check_targets,
    median,
    positive,
    positives,
    step_seconds,
    table,
    write_results,
)
from torch import Tensor

from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.kernels.quantized_matmul import MAX_ROWS, quantized_matmul
from wavelet_lm.threads import use_threads

SHAPES = "1x2048x2048,3x2048x2048,1x40960x2048,1x2048x40960,1x50257x2048"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = ("dense", "8", "4", "2")
# Weights of one kind that are read in turns: several times what the caches hold.
ROTATED_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}

Shape = tuple[int, int, int]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    formats: tuple[str, ...]
    group_size: int
    repeats: int


def products(shape: Shape, form: str, settings: Settings) -> tuple[list[Product], int]:
    """Products with copies of random weights, and the bytes of one copy."""
    weights = random_weights(shape, form, settings)
    size = sum(w.numel() * w.element_size() for w in weights)
    n_copies = max(1, -(-ROTATED_BYTES[settings.device.type] // size))
    copies = [weights] + [[w.clone() for w in weights] for _ in range(n_copies - 1)]
    if form == "dense":
        return [lambda x, W=W: torch.bmm(x, W.mT) for (W,) in copies], size
    bits, group_size = int(form), settings.group_size
    return [lambda x, w=w: quantized_matmul(x, *w, bits, group_size) for w in copies], size


def random_weights(shape: Shape, form: str, settings: Settings) -> list[Tensor]:
    n, N, K = shape
    on = {"device": settings.device}
    if form == "dense":
        return [torch.randn(n, N, K, dtype=settings.dtype, **on)]
    if form == "8":
        codes, n_groups = torch.randint(-127, 128, (n, N, K), dtype=torch.int8, **on), 1
    else:
        row = -(-K * int(form) // 8)
        codes = torch.randint(256, (n, N, row), dtype=torch.uint8, **on)
        n_groups = -(-K // settings.group_size)
    return [codes, torch.rand(n, N, n_groups, dtype=torch.bfloat16, **on)]


def timed(copies: list[Product], x: Tensor, repeats: int) -> Callable[[], list[float]]:
    """A measurement of the seconds of one product, among those with all copies in turn."""

    def step() -> None:
        for product in copies:
            product(x)

    if x.is_cuda:
        step = captured(step)
    step()
    return lambda: [s / len(copies) for s in step_seconds(step, repeats, x.device)]


def captured(step: Callable[[], None]) -> Callable[[], None]:
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def measure(settings: Settings, copy_speed: float, note: Callable[[str], None]) -> list[dict]:
    """One row per shape, number of rows of x and format."""
    rows = []
    for shape, M in itertools.product(settings.shapes, settings.rows):
        note(f"{name(shape)}, {M} rows of x")
        n, N, K = shape
        x = torch.randn(n, M, K, dtype=settings.dtype, device=settings.device)
        made = {form: products(shape, form, settings) for form in settings.formats}
        samples = alternate(
            {form: timed(copies, x, 3) for form, (copies, _) in made.items()}, settings.repeats
        )
        for form, (_, size) in made.items():
            seconds = median(samples[form])
            n_bytes = size + (x.numel() + n * M * N) * x.element_size()
            rows.append(
                {"n": n, "N": N, "K": K, "rows": M, "format": form, "microseconds": seconds * 1e6}
                | {"bytes": n_bytes, "of_copy": n_bytes / seconds / copy_speed}
            )
    return rows


def summary(rows: list[dict]) -> list[dict[str, Any]]:
    """Of all shapes together, for each number of rows: as a model that has each once."""
    sums: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        total = sums.setdefault(
            (row["rows"], row["format"]),
            {"rows": row["rows"], "format": row["format"], "microseconds": 0.0, "copied": 0.0},
        )
        total["microseconds"] += row["microseconds"]
        total["copied"] += row["of_copy"] * row["microseconds"]
    for total in sums.values():
        total["of_copy"] = total.pop("copied") / total["microseconds"]
        if dense := sums.get((total["rows"], "dense")):
            total["speedup_over_dense"] = dense["microseconds"] / total["microseconds"]
    return list(sums.values())


# --- tiles ---------------------------------------------------------------------------------------


def candidates(M: int, form: str) -> Iterator[dict[str, int]]:
    """Tiles to try; the first is the planned one."""
    from wavelet_lm.kernels.triton_quantized_matmul import MAX_REDUCED_ROWS

    yield {}
    if M <= MAX_REDUCED_ROWS:
        for block_n, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4)):
            yield {"BLOCK_N": block_n, "num_warps": num_warps}
        return
    for block_n, num_warps, stages in itertools.product((16, 32, 64), (2, 4), (3, 5)):
        tiles = {"BLOCK_N": block_n, "num_warps": num_warps, "num_stages": stages}
        yield tiles
        if form == "8":
            yield tiles | {"BLOCK_BYTES": 128}


@torch.no_grad()
def sweep(settings: Settings, copy_speed: float, note: Callable[[str], None]) -> list[dict]:
    """One row per shape, number of rows of x, format and tiles."""
    from wavelet_lm.kernels.triton_quantized_matmul import launch

    rows = []
    forms = [form for form in settings.formats if form != "dense"]
    few = [M for M in settings.rows if M <= MAX_ROWS]
    for shape, M, form in itertools.product(settings.shapes, few, forms):
        note(f"{name(shape)}, {M} rows of x, {form} bits")
        n, N, K = shape
        x = torch.randn(n, M, K, dtype=settings.dtype, device=settings.device)
        weights = random_weights(shape, form, settings)
        size = sum(w.numel() * w.element_size() for w in weights)
        n_copies = max(1, -(-ROTATED_BYTES["cuda"] // size))
        copies = [[w.clone() for w in weights] for _ in range(n_copies)]
        for tiles in candidates(M, form):
            run = partial(launch, bits=int(form), group_size=settings.group_size, tiles=tiles)
            steps = [lambda x, w=w, run=run: run(x, *w) for w in copies]
            seconds = median(timed(steps, x, settings.repeats)())
            rows.append(
                {"n": n, "N": N, "K": K, "rows": M, "format": form, "tiles": tiles}
                | {"microseconds": seconds * 1e6, "of_copy": size / seconds / copy_speed}
            )
    return rows


# --- the command ---------------------------------------------------------------------------------


def name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def shapes(text: str) -> tuple[Shape, ...]:
    """n × N × K, separated by commas."""
    parsed = tuple(tuple(positive(size) for size in part.split("x")) for part in text.split(","))
    if any(len(shape) != 3 for shape in parsed):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 3x2048x1024,1x512x512")
    return parsed


def formats(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    if not set(parts) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r}: formats are {', '.join(FORMATS)}")
    return parts


def report(rows: list[dict]) -> str:
    lines = [
        (name((row["n"], row["N"], row["K"])), row["rows"], row["format"], *_speed(row))
        for row in rows
    ]
    return table(["shape", "rows", "format", "us", "of copy"], lines)


def report_sweep(rows: list[dict]) -> str:
    """The planned tiles and the three best of every product."""
    lines = []
    groups = itertools.groupby(rows, lambda r: (r["n"], r["N"], r["K"], r["rows"], r["format"]))
    for (n, N, K, M, form), group in groups:
        planned, *others = group
        for row in [planned, *sorted(others, key=lambda r: r["microseconds"])[:3]]:
            tiles = " ".join(f"{k}={v}" for k, v in row["tiles"].items()) or "planned"
            lines.append((name((n, N, K)), M, form, *_speed(row), tiles))
    return table(["shape", "rows", "format", "us", "of copy", "tiles"], lines)


def _speed(row: dict) -> tuple[str, str]:
    return f"{row['microseconds']:.2f}", f"{row['of_copy']:.3f}"


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    add("--dtype", choices=DTYPES, help="of x and dense weights [bfloat16; on a CPU float32]")
    add("--shapes", type=shapes, default=SHAPES, metavar="LIST", help=f"n x N x K [{SHAPES}]")
    add("--rows", type=positives, default=(1,), metavar="LIST", help="rows M of x [1]")
    shown = ",".join(FORMATS)
    add("--formats", type=formats, default=FORMATS, metavar="LIST", help=f"[{shown}]")
    add("--group_size", type=positive, default=128, metavar="N", help="of 4 and 2 bits [128]")
    add("--repeats", type=positive, default=9, metavar="N", help="turns of every product [9]")
    truth = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add("--sweep", default=False, **truth, help="try tiles of the Triton kernels [false]")
    add("--json", metavar="FILE", help="write the results there")
    return parser


def main() -> None:
    flags = vars(parser().parse_args())
    json_file, sweeping, dtype = (flags.pop(key) for key in ("json", "sweep", "dtype"))
    check_targets((json_file,))
    use_threads(flags.pop("threads"))
    device = flags["device"] = resolve_device(flags["device"])
    cuda = device.type == "cuda"
    if sweeping and not cuda:
        raise UserError("--sweep tries tiles of kernels for a GPU; use it with --device cuda")
    if flags["group_size"] % 16:
        raise UserError(f"--group_size is {flags['group_size']}; it must be a multiple of 16")
    flags["dtype"] = DTYPES[dtype or ("bfloat16" if cuda else "float32")]
    settings = Settings(**flags)
    torch.manual_seed(1)
    speed = bandwidth(device)
    function = sweep if sweeping else measure
    rows = function(settings, speed["copy"], lambda text: print(f"… {text}", file=sys.stderr))
    print(f"copy: {speed['copy'] / 1e9:.0f} GB/s, reading alone: {speed['read'] / 1e9:.0f} GB/s\n")
    print(report_sweep(rows) if sweeping else report(rows))
    totals = [] if sweeping else summary(rows)
    for total in totals:
        speedup = total.get("speedup_over_dense")
        faster = f", {speedup:.2f} times as fast as dense" if speedup else ""
        print(
            f"all shapes, {total['rows']} rows, {total['format']}:"
            f" {total['microseconds']:.1f} us, {total['of_copy']:.3f} of copy{faster}"
        )
    if json_file:
        about = {
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
            "dtype": str(settings.dtype).removeprefix("torch."),
            "group_size": settings.group_size,
            "bandwidth_bytes_per_second": speed,
        }
        write_results(json_file, rows, **about, summary=totals)


if __name__ == "__main__":
    run_command(main)
