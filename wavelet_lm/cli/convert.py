"""Make a run folder of a published checkpoint, or of a folder of transformers.

`wavelet-lm convert best_model.pt --out RUN`, `wavelet-lm convert hf-RUN --out RUN`
"""

from __future__ import annotations

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.interop.kinds import check_convertible, is_transformers_folder
from wavelet_lm.interop.published import convert
from wavelet_lm.interop.transformers_folder import run_of_folder
from wavelet_lm.training.processes import command_words


def main() -> None:
    parser = OneLineParser(
        run="the .pt, with its config.json beside it; or the folder of transformers",
        description="Make a run folder of a published checkpoint, or of a folder of transformers.",
    )
    parser.add_argument("--out", metavar="RUN", required=True, help="run folder to make")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="bytes, gpt2, or a folder that holds a tokenizer [the one beside it; gpt2 for a"
        " published checkpoint with a vocabulary of its size]",
    )
    args = parser.parse_args()
    check_convertible(args.checkpoint)
    if is_transformers_folder(args.checkpoint):
        run = run_of_folder(args.checkpoint, args.out, args.tokenizer)
    else:
        run = convert(args.checkpoint, args.out, args.tokenizer, log=print)
    print(f"run folder {run}")
    print(f"try it: {' '.join(command_words('generate'))} --checkpoint {run}")
