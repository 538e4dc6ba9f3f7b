"""Make of a run what other programs read: transformers, onnxruntime or torch.export.

wavelet-lm export hf logs/RUN --out hf-RUN
wavelet-lm export onnx logs/RUN --out model.onnx
wavelet-lm export torch logs/RUN --out model.pt2
"""

import argparse
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from wavelet_lm.atomic_files import check_writable
from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import is_fused
from wavelet_lm.inference.loading import load_model, load_tokenizer
from wavelet_lm.interop.exported_step import FORMAT
from wavelet_lm.json_files import read_json


class Format(NamedTuple):
    """What is written, and by which function `module:name`: (model, tokenizer, out) -> files.

    words: what it is, what stands beside it, who reads it.
    suffix: that the name of the file must have; "" where it is a folder.
    """

    words: str
    function: str
    suffix: str


FORMATS = {
    "hf": Format(
        "a new folder: AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) loads it,"
        " and wavelet-lm convert makes a run of it again; needs the extra transformers",
        "wavelet_lm.interop.transformers_folder:export_hf",
        "",
    ),
    "onnx": Format(
        "a step of generation as OUT.onnx, the names of its inputs and outputs as OUT.json, and"
        " OUT_generate.py, which writes text with them and numpy; needs the extra onnx",
        "wavelet_lm.interop.onnx_export:export_onnx",
        ".onnx",
    ),
    "torch": Format(
        "the same step as OUT.pt2, which torch.export.load reads, and its names as OUT.json",
        "wavelet_lm.interop.torch_export:export_torch",
        ".pt2",
    ),
}


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=formats()
    )
    parser.add_argument("format", choices=tuple(FORMATS), help="what to make")
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint file, or hf://user/name")
    parser.add_argument(
        "--out",
        required=True,
        help="where: a new folder (hf), or a file that ends in .onnx or .pt2, in place of an"
        " earlier one",
    )
    args = parser.parse_args()
    form, out = FORMATS[args.format], Path(args.out).expanduser()
    if form.suffix:
        if out.suffix != form.suffix:
            raise UserError(f"--out {out}: the name must end in {form.suffix}")
        check_writable(out)
        check_beside(out)
    log = partial(print, file=sys.stderr)
    model, tokenizer = load_model(args.run, "cpu", log), load_tokenizer(args.run)
    if is_fused(model):
        raise UserError(f"{args.run} is quantized; export the run that it was made from")
    if form.suffix and any(getattr(module, "learns", False) for module in model.modules()):
        log("fast weights rest: memory that learns has no fixed size")
    module, _, name = form.function.partition(":")
    write: Callable[..., list[Path]] = getattr(import_module(module), name)
    for file in write(model, tokenizer, out):
        print(file)


def formats() -> str:
    """The formats, each with what it is, as `--help` shows them."""
    width = max(map(len, FORMATS)) + 4
    texts = (
        textwrap.fill(
            form.words, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width
        )
        for name, form in FORMATS.items()
    )
    return "\n".join(["formats:", *texts])


def check_beside(out: Path) -> None:
    """Raise `UserError` where what goes beside an exported file would replace something else."""
    names, program = out.with_suffix(".json"), out.with_name(f"{out.stem}_generate.py")
    taken = program if program.exists() and not out.exists() else None
    if names.exists():
        with suppress(UserError):  # what is no JSON is not ours either
            known = read_json(names)
            if isinstance(known, dict) and known.get("format") == FORMAT:
                return
        taken = names
    if taken is not None:
        raise UserError(f"{taken}: is there already, and {out.name} needs that name; give another")
