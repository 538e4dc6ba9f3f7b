"""Generate ListOps as the Long Range Arena's TSV files: `wavelet-lm listops FOLDER`."""

from __future__ import annotations

from pathlib import Path

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.data.tasks.listops import PARTS, SIZES, Shape, generate
from wavelet_lm.errors import UserError


def main() -> None:
    parser = OneLineParser(description="Generate ListOps as TSV.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=1337, help="[%(default)s]")
    for part, n in zip(PARTS, SIZES, strict=True):
        parser.add_argument(f"--{part}", type=int, default=n, help="examples [%(default)s]")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="[%(default)s]")
    args = vars(parser.parse_args())
    sizes = tuple(args[part] for part in PARTS)
    if min(sizes) < 1:
        raise UserError("every file needs 1 example or more")
    shape = Shape(**{name: args[name] for name in vars(Shape())})
    generate(args["folder"], sizes, shape, args["seed"])
    print(f"wrote {' + '.join(f'{n:,}' for n in sizes)} expressions to {args['folder']}")
