"""One page about runs: curves, configs, samples, scales, machines. It needs nothing from outside.

    wavelet-lm report logs/RUN --out report.html
    wavelet-lm report logs --prompt "def main(" --out report.html

Of a folder of runs all are taken, those that still run and those that died among them. The model
of each reads a text, its last sample if none is given, and the page shows what each scale sees.
"""

import argparse
import sys
from datetime import datetime
from functools import partial

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.errors import UserError
from wavelet_lm.report.build import on_page
from wavelet_lm.report.page import page_of
from wavelet_lm.report.runs import find_runs
from wavelet_lm.text_files import read_text
from wavelet_lm.threads import use_threads


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders, or folders of them")
    add("--out", metavar="FILE", default="report.html", help="the page [report.html]")
    add("--prompt", metavar="TEXT", help="the text that the models read")
    add("--text", metavar="FILE", help="a file with it; - is standard input")
    add("--no_scopes", action="store_true", help="let no model read: quicker, and needs no weights")
    add("--device", default="auto", help="where they read: auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    args = parser.parse_args()
    if args.prompt is not None and args.text is not None:
        raise UserError("--prompt and --text both give the text; give one of the two")
    check_writable(args.out)
    runs = find_runs(args.runs)
    text = args.prompt if args.text is None else read_text(args.text)
    use_threads(args.threads)
    scopes, log = not args.no_scopes, partial(print, file=sys.stderr)
    found = []
    for run in runs:
        try:
            found.append(on_page(run, scopes=scopes, text=text, device=args.device, log=log))
        except UserError as error:
            log(f"left out: {error}")
    if not found:
        raise UserError("no run is left to draw")
    write_text(args.out, page_of(found, f"wavelet-lm report, {datetime.now():%Y-%m-%d %H:%M}"))
    print(f"{args.out}: {len(found)} {'run' if len(found) == 1 else 'runs'}")
