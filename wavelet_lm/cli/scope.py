"""What does each scale see? Draw how a run reads a text.

    wavelet-lm scope RUN --prompt "def main(" --out scope.html
    wavelet-lm scope RUN --text book.txt --tokens 200 --ablate --out scope.png --json scope.json

For every block: the log energy of each scale's mixed band along the tokens, each row from its own
least to its own greatest; how far the gates are open; which earlier tokens the memory finds; the
lags that the wavelet has learned; and bits per token. With --ablate also what silencing each scale
costs in bits per byte. A table of it goes to standard output.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.cli.scope_plots import plot_scope
from wavelet_lm.cli.task_flags import positive
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.results import IMAGES, check_plot
from wavelet_lm.scope.page import page_of
from wavelet_lm.scope.scope import MOST_TOKENS, TOKENS, scope_run
from wavelet_lm.tables import aligned
from wavelet_lm.text_files import read_text
from wavelet_lm.threads import use_threads

PAGE = ".html"


def main() -> None:
    parser = OneLineParser(
        run="run folder, checkpoint file, or hf://user/name",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="the text to read")
    add("--text", metavar="FILE", help="a file with it; - is standard input")
    add(
        "--tokens",
        type=positive,
        default=TOKENS,
        metavar="N",
        help="draw the last N tokens of the text; those before them are read as well"
        f" [{TOKENS}, up to {MOST_TOKENS:,}]",
    )
    add(
        "--out",
        metavar="FILE",
        help=f"the picture: {PAGE}, one page to point into, or {', '.join(IMAGES)}",
    )
    add("--ablate", action="store_true", help="read it again with each scale silenced")
    add("--json", metavar="FILE", help="also write the numbers there")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    args = parser.parse_args()
    if (args.prompt is None) == (args.text is None):
        raise UserError("which text? give --prompt TEXT or --text FILE, one of the two")
    for path in filter(None, (args.out, args.json)):
        check_writable(path)
    if args.out is not None:
        check_out(args.out)
    use_threads(args.threads)
    text = args.prompt if args.text is None else read_text(args.text)
    picture = _scope(args, text)
    if args.json:
        write_text(args.json, json.dumps(picture, ensure_ascii=False) + "\n")
    if args.out is not None:
        if args.out.lower().endswith(PAGE):
            write_text(args.out, page_of(picture))
        else:
            plot_scope(args.out, picture)
    print(describe(picture))


def _scope(args: argparse.Namespace, text: str) -> dict[str, Any]:
    from tqdm import tqdm

    with tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        return scope_run(
            args.checkpoint,
            text,
            last=args.tokens,
            ablate=args.ablate,
            device=args.device,
            progress=bar.update,
            log=lambda line: tqdm.write(line, file=sys.stderr),
        )


def check_out(path: str) -> None:
    """Raise `UserError` for a picture that could not be drawn, before anything is read."""
    suffix = Path(path).suffix.lower()
    if suffix == PAGE:
        return
    if suffix not in IMAGES:
        raise UserError(f"--out {path}: the name must end in {PAGE}, {', '.join(IMAGES)}")
    check_plot(path, "--out")


def describe(picture: dict[str, Any]) -> str:
    """The picture as a table: of each scale the lags, the reach, and means over the tokens."""
    n, before, cost = len(picture["tokens"]), picture["n_before"], picture["bits_per_byte"]
    lines = [f"{n:,} tokens" + (f" after {before:,} others" if before else "")]
    if cost is not None:
        lines[0] += f", {cost:.4f} bits/byte"
    rows = [["scale", "lag", "reach", "energy %", "open %", "silenced, bits/byte"]]
    for block in picture["blocks"]:
        for scale in block["scales"]:
            rows.append(
                [
                    f"{block['name']}  {scale['name']}",
                    lags(scale),
                    f"{scale['reach']:,}",
                    f"{100 * scale['share']:.1f}",
                    _mean_percent(scale["openness"]),
                    "-" if scale["change"] is None else f"{scale['change']:+.4f}",
                ]
            )
    if all(row[-1] == "-" for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return "\n".join([*lines, aligned(rows)])


def lags(scale: dict[str, Any]) -> str:
    """The lags of a scale in words, a dash where it takes no difference."""
    return " + ".join(f"{lag:.2f}" for lag in scale["lags"]) or "-"


def _mean_percent(shares: list[float] | None) -> str:
    return "-" if shares is None else f"{100 * sum(shares) / len(shares):.1f}"
