"""Quantized weights: size, speed and bits per byte of a run, and the speed of a larger model.

    python benchmarks/quantization.py logs/RUN --calibrate TEXT --json FILE --plot FILE.png
    python benchmarks/quantization.py --speed_config config.json --json FILE
    python benchmarks/quantization.py --speed_config config.json --device cuda --dtype bfloat16 \\
        --compile true --backends torchao,bitsandbytes --json FILE

With a run, the sweep: every component at 16, 8, 4 and 2 bits; each component alone at 4 and at 2
bits, the others at 8; and the smallest mix of those whose bits per byte stay within `--budget` of
the unquantized model's. The mix is searched among all combinations as if costs added up, and then
measured; a mix that costs more than the budget is followed by the next larger one. The best is the
smallest of all rows within the budget. With `--calibrate` every row below 8 bits is measured with
and without compensated rounding. Bits per byte are those of sliding windows over the first
`--tokens` tokens of the test split, on one device and in the same float dtype for all.

With `--speed_config`, a model of random weights that is larger than the caches decodes greedily in
the float dtype, in 8 bits and in 4, and with the 8 and 4 bits of other `--backends`. All are timed
in turns. The share of bandwidth is the bytes of weights that a token reads over the time of a step
and the speed of memory, which is measured in the same run.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decode import DTYPES, Stream, timed
from report import (
    alternate,
    bandwidth,
    boolean,
    check_plot,
    check_targets,
    median,
    positive,
    table,
    write_results,
)

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.data.dataset import TokenSplit, prepare_data
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.evaluation.likelihood import BATCH_POSITIONS, score
from wavelet_lm.fusion.fuse import COMPONENTS, fuse, n_bytes
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.loading import load_model, load_tokenizer
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.quantization.backends import check_backend
from wavelet_lm.quantization.options import QuantizationOptions
from wavelet_lm.quantization.quantize import quantize, scheme_component
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.threads import use_threads

MB = 1e6
LOW_BITS = (4, 2)
PROMPT_TOKENS = 8
# Mixes that are measured, from the smallest one that is expected to keep the budget.
MAX_MIXES = 5

Row = dict[str, Any]


def scheme_of(default: int, backend: str = "native", **bits: int) -> Scheme:
    """`default` bits for every component but those that are named."""
    scheme = Scheme.uniform(default)
    return dataclasses.replace(scheme, bits={**scheme.bits, **bits}, backend=backend)


# --- a run: what quantizing costs ----------------------------------------------------------------


class Sweep:
    """Measures schemes on one run: size, tokens/s and bits per byte of each."""

    def __init__(
        self,
        model: LanguageModel,
        split: TokenSplit,
        tokenizer: Tokenizer,
        calibration: torch.Tensor | None,
        args: Any,
        device: torch.device,
    ):
        self.model, self.calibration, self.device = model, calibration, device
        self.n_timed = args.steps
        self.tokens = split.tokens[: args.tokens]
        self.n_bytes = sum(len(tokenizer.token_bytes(int(t))) for t in self.tokens[1:])
        self.rows: list[Row] = []

    def measure(self, name: str, scheme: Scheme, calibrated: bool = False) -> Row:
        """Quantize, measure, print and keep one row."""
        if min(scheme.bits.values()) == 16:
            fused = fuse(self.model)
        else:
            text = self.calibration if calibrated else None
            fused = quantize(self.model, scheme, calibration=text)
        bits_per_byte = self.bits_per_byte(fused)
        reference = self.rows[0]["bits_per_byte"] if self.rows else bits_per_byte
        row = {
            "name": name + (", calibrated" if calibrated else ""),
            "bits": scheme.bits,
            "backend": scheme.backend,
            "calibrated": calibrated,
            "bytes": n_bytes(fused),
            "bits_per_weight": 8 * n_bytes(fused) / n_params(self.model),
            "tokens_per_second": self.tokens_per_second(fused),
            "bits_per_byte": bits_per_byte,
            "cost": bits_per_byte - reference,
        }
        self.rows.append(row)
        print(" | ".join(cells(row)), file=sys.stderr, flush=True)
        return row

    def bits_per_byte(self, model: LanguageModel) -> float:
        size = model.config.block_size
        nats, _ = score(
            model,
            self.tokens,
            block_size=size,
            stride=max(1, size // 2),
            batch_size=max(1, BATCH_POSITIONS // size),
            device=self.device,
        )
        return nats / math.log(2) / self.n_bytes

    def tokens_per_second(self, model: LanguageModel) -> float:
        stream = opened(Decoder(model))
        return 1 / median(timed(stream.step, self.n_timed, self.device))

    def low(self, name: str, **bits: int) -> Row:
        """A row below 8 bits: plain, and calibrated where there is a text; returns the better."""
        row = self.measure(name, scheme_of(8, **bits))
        if self.calibration is not None:
            row = min(row, self.measure(name, scheme_of(8, **bits), True), key=lambda r: r["cost"])
        return row

    def run(self, budget: float) -> Row | None:
        """All rows; returns the smallest one that keeps the budget, None where none does."""
        for bits in (16, 8):
            self.measure(f"all {bits}", scheme_of(bits))
        eight = self.rows[-1]
        for bits in LOW_BITS:
            self.low(f"all {bits}", **dict.fromkeys(COMPONENTS, bits))
        alone = {
            (name, bits): self.low(f"{name} {bits}", **{name: bits})
            for name in self.components()
            for bits in LOW_BITS
        }
        for mix in itertools.islice(mixes(eight, alone, budget), MAX_MIXES):
            calibrated = self.calibration is not None and min(mix.values(), default=8) < 8
            name = ", ".join(f"{k} {v}" for k, v in mix.items()) or "all 8"
            row = self.measure(f"mix: {name}", scheme_of(8, **mix), calibrated)
            if row["cost"] <= budget:
                break
        return smallest(self.rows, budget)

    def components(self) -> list[str]:
        """The components that this model has, but what is left of it, which keeps its 8 bits."""
        fused = fuse(self.model, precision=lambda name: name)
        present = {scheme_component(fused, name.removesuffix(".weight")) for name in weights(fused)}
        return [name for name in COMPONENTS if name in present and name != "rest"]


def smallest(rows: list[Row], budget: float) -> Row | None:
    """The row of the fewest bytes among those that cost the budget at most."""
    return min((r for r in rows if r["cost"] <= budget), key=lambda r: r["bytes"], default=None)


def weights(fused: LanguageModel) -> Iterator[str]:
    """Names of matrices and tables."""
    return (name for name, p in fused.named_parameters() if name.endswith("weight") and p.ndim > 1)


def mixes(eight: Row, alone: dict[tuple[str, int], Row], budget: float) -> Iterator[dict[str, int]]:
    """Low bits by component, the smallest model first, whose costs add up to the budget at most.

    Args:
        eight: the row with 8 bits for all.
        alone: the rows with one component in fewer bits.
    """
    names = list(dict.fromkeys(name for name, _ in alone))
    found = []
    for choice in itertools.product((8, *LOW_BITS), repeat=len(names)):
        mix = {name: bits for name, bits in zip(names, choice, strict=True) if bits < 8}
        rows = [alone[item] for item in mix.items()]
        cost = eight["cost"] + sum(row["cost"] - eight["cost"] for row in rows)
        if cost <= budget:
            size = eight["bytes"] + sum(row["bytes"] - eight["bytes"] for row in rows)
            found.append((size, cost, mix))
    return (mix for _, _, mix in sorted(found, key=lambda item: item[:2]))


def cells(row: Row) -> list[str]:
    """A row as people read it."""
    return [
        row["name"],
        f"{row['bytes'] / MB:,.2f}",
        f"{row['bits_per_weight']:.2f}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['bits_per_byte']:.4f}",
        f"{row['cost']:+.5f}",
    ]


def sweep(args: Any, device: torch.device) -> tuple[list[Row], Row | None]:
    model, tokenizer = load_model(args.checkpoint, device), load_tokenizer(args.checkpoint)
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # noqa: E731
    data = prepare_data(model.config, tokenizer=tokenizer, log=log)
    options = QuantizationOptions(ptq8=True, ptq_calibrate=args.calibrate)
    calibration = options.calibration(model.config, tokenizer)
    measured = Sweep(model, data.test or data.valid, tokenizer, calibration, args, device)
    best = measured.run(args.budget)
    head = ["weights", "MB", "bits/weight", "tokens/s", "bits/byte", "cost"]
    print(table(head, [cells(row) for row in measured.rows]))
    if best is None:
        print(f"everything costs more than the budget of {args.budget} bits/byte")
    else:
        print(f"best within {args.budget} bits/byte: {best['name']}")
    return measured.rows, best


def plot(rows: list[Row], budget: float, path: str) -> None:
    """Cost in bits per byte of every row, with its size; calibrated ones beside the plain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain = [row["name"].removesuffix(", calibrated") for row in rows]
    names = list(dict.fromkeys(plain))
    sizes = dict(zip(plain, (row["bytes"] for row in rows), strict=True))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.3 * len(names)), layout="constrained")
    for calibrated, marker in ((False, "o"), (True, "^")):
        chosen = [row for row in rows if row["calibrated"] == calibrated]
        axes.plot(
            [row["cost"] for row in chosen],
            [names.index(row["name"].removesuffix(", calibrated")) for row in chosen],
            marker,
            label="calibrated" if calibrated else "rounded to nearest",
        )
    axes.axvline(budget, color="gray", linestyle=":", label=f"budget, {budget} bits/byte")
    labels = [f"{name.replace('mixer_', '')}  {sizes[name] / MB:,.2f} MB" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlabel("bits/byte above the unquantized model's")
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix("."), dpi=130)
    plt.close(figure)


# --- a model larger than the caches: how fast ----------------------------------------------------


def opened(decoder: Decoder) -> Stream:
    """A greedy text that goes on from a prompt."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(decoder.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    logits, state = decoder.prefill([prompt])
    stream = Stream(decoder, state, 1)
    stream.draw(logits)
    return stream


def speed(args: Any, device: torch.device) -> tuple[list[Row], dict[str, float]]:
    config = Config.from_dict(read_json_object(args.speed_config), args.speed_config)
    dtype = DTYPES[args.dtype]
    schemes: dict[str, Scheme | None] = {args.dtype: None}
    for backend in ("native", *filter(None, args.backends.split(","))):
        for bits in (8, 4):
            scheme = scheme_of(8, backend, **dict.fromkeys(COMPONENTS, bits))
            try:
                check_backend(scheme)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            schemes[f"{backend} {bits}-bit"] = scheme
    torch.manual_seed(0)
    with device:
        model = build_model(config, args.vocab_size).eval()
    decoders = {}
    for name, scheme in schemes.items():
        print(f"quantizing {name}", file=sys.stderr, flush=True)
        quantized = model if scheme is None else quantize(model, scheme, dtype=dtype)
        decoders[name] = Decoder(quantized, dtype=dtype, compile=args.compile)
    del model, quantized
    streams = {name: opened(decoder) for name, decoder in decoders.items()}
    memory = bandwidth(device)
    samples = alternate(
        {
            name: lambda stream=stream: timed(stream.step, args.steps, device)
            for name, stream in streams.items()
        },
        args.repeats,
    )
    rows = []
    for name, decoder in decoders.items():
        seconds, read = median(samples[name]), decoder.weight_bytes_per_token()
        rows.append(
            {
                "name": name,
                "bytes": n_bytes(decoder.model),
                "bytes_per_token": read,
                "ms_per_token": 1e3 * seconds,
                "tokens_per_second": 1 / seconds,
                "speedup": median(samples[args.dtype]) / seconds,
                "of_copy_bandwidth": read / seconds / memory["copy"],
                "of_read_bandwidth": read / seconds / memory["read"],
            }
        )
    print(f"{args.speed_config}: {config.model}, {args.dtype}, compile {args.compile}, {device}")
    print(", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in memory.items()))
    head = ["weights", "MB", "MB/token", "ms/token", "tokens/s", "speedup", "of copy", "of read"]
    print(
        table(
            head,
            [
                [
                    row["name"],
                    f"{row['bytes'] / MB:,.0f}",
                    f"{row['bytes_per_token'] / MB:,.0f}",
                    f"{row['ms_per_token']:.2f}",
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['speedup']:.2f}",
                    f"{row['of_copy_bandwidth']:.2f}",
                    f"{row['of_read_bandwidth']:.2f}",
                ]
                for row in rows
            ],
        )
    )
    return rows, memory


def main() -> None:
    parser = OneLineParser(
        run="run folder to sweep", needs_run=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument("--calibrate", metavar="FILE", help="a text to calibrate on")
    parser.add_argument("--budget", type=float, default=0.005, help="bits per byte [0.005]")
    parser.add_argument(
        "--tokens", type=positive, default=100_000, help="test tokens that are scored [100000]"
    )
    parser.add_argument("--speed_config", metavar="FILE", help="config of a model to time")
    parser.add_argument("--vocab_size", type=positive, default=50257, help="its tokens [50257]")
    parser.add_argument(
        "--backends", default="", help="other libraries to time: torchao,bitsandbytes [none]"
    )
    parser.add_argument("--steps", type=positive, default=30, help="timed in a row [30]")
    parser.add_argument("--repeats", type=positive, default=5, help="turns [5]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", type=boolean, default=False, metavar="BOOL")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plot", metavar="FILE", help="draw the sweep there")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.speed_config is None):
        raise UserError("give a RUN to sweep or a --speed_config to time, one of them")
    if args.plot and args.checkpoint is None:
        raise UserError("--plot draws the sweep of a RUN; leave it out")
    check_targets([args.json, args.plot])
    if args.plot:
        check_plot(args.plot)
    use_threads(args.threads)
    device = resolve_device(args.device)
    command = " ".join(["python", *sys.argv])
    if args.checkpoint is not None:
        rows, best = sweep(args, device)
        more = {"command": command, "budget": args.budget, "best": best and best["name"]}
        if args.plot:
            plot(rows, args.budget, args.plot)
    else:
        rows, memory = speed(args, device)
        more = {"command": command, "bandwidth": memory}
    if args.json:
        write_results(args.json, rows, device=str(device), torch=torch.__version__, **more)


if __name__ == "__main__":
    run_command(main)
