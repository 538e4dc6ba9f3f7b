"""Make a run folder of a published checkpoint: `wavelet-lm convert best_model.pt --out RUN`."""

from __future__ import annotations

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.interop.published import convert


def main() -> None:
    parser = OneLineParser(
        run="the .pt, with its config.json beside it",
        description="Make a run folder of a published checkpoint.",
    )
    parser.add_argument("--out", metavar="RUN", required=True, help="run folder to make")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="bytes, or a folder that holds a tokenizer [gpt2, for a vocabulary of its size]",
    )
    args = parser.parse_args()
    run = convert(args.checkpoint, args.out, args.tokenizer, log=print)
    print(f"run folder {run}")
    print(f"try it: python generate.py --checkpoint {run}")
