"""Make a quantized checkpoint: `python -m wavelet_lm.inference.quantization RUN --out RUN8`."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from wavelet_lm.atomic_files import as_user_error, check_new_folder, write_text
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.cli.quantization_flags import add_quantization_flags, quantization_options
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import is_fused, n_bytes
from wavelet_lm.inference.loading import load_model, load_tokenizer
from wavelet_lm.models.checkpoint import check_finite, find_checkpoint
from wavelet_lm.quantization.checkpoint import save_quantized
from wavelet_lm.quantization.options import QuantizationOptions
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.threads import use_threads
from wavelet_lm.training.processes import command_words


def main() -> None:
    parser = OneLineParser(
        run="run folder, checkpoint file, or hf://user/name",
        description="Make a quantized checkpoint, which generate.py and evaluation read directly.",
    )
    parser.add_argument("--out", metavar="RUN8", required=True, help="run folder to make")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    parser.add_argument(
        "--fwpkm_inference_updates",
        action="store_true",
        help="for generating with fast weights that learn",
    )
    add_quantization_flags(parser, switch=False)
    args = parser.parse_args()
    options = dataclasses.replace(quantization_options(vars(args)), ptq8=True)
    use_threads(args.threads)
    adapt = True if args.fwpkm_inference_updates else None
    quantize_run(
        args.checkpoint,
        args.out,
        options,
        device=args.device,
        adapt=adapt,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(f"try it: {' '.join(command_words('generate'))} --checkpoint {args.out}")


def quantize_run(
    run: str | Path,
    out: str | Path,
    options: QuantizationOptions,
    *,
    device: str = "auto",
    adapt: bool | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> Path:
    """Make a run folder with quantized weights: config.json, tokenizer/, best.safetensors.

    Args:
        adapt: the fast weights will learn while text is generated; None asks the run's config.

    Raises:
        UserError: the run cannot be read or is quantized already; `out` exists; the scheme cannot
            be had, or cannot be saved.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out}: already there; give --out a new folder")
    check_new_folder(out)
    checkpoint = find_checkpoint(run)
    model, tokenizer = load_model(checkpoint, resolve_device(device), log), load_tokenizer(run)
    if is_fused(model):
        raise UserError(f"{run} is quantized already; give the run that it was made from")
    check_finite(model, checkpoint)
    scheme = options.scheme(model, str(run))
    if scheme.backend != "native":
        raise UserError(
            f"--ptq_backend {scheme.backend} quantizes when a checkpoint is read, and only native"
            " weights are saved; give --ptq_backend native"
        )
    if adapt and not (model.config.model == "wavelet_lm" and model.config.fwpkm_enabled):
        raise UserError(
            "--fwpkm_inference_updates adapts a memory that this model lacks (fwpkm_enabled is"
            " false); leave it out"
        )
    quantized = quantize(
        model,
        scheme,
        adapt=model.config.fwpkm_inference_updates if adapt is None else adapt,
        calibration=options.calibration(model.config, tokenizer),
        progress=lambda stage: log(f"calibrating {stage}"),
    )
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise as_user_error(error, out) from error
    try:
        write_text(out / "config.json", quantized.config.to_json())
        tokenizer.save(out / "tokenizer")
        save_quantized(
            out / "best.safetensors", quantized, scheme, {"quantized_from": Path(run).name}
        )
    except BaseException:  # a folder without weights is no run
        shutil.rmtree(out, ignore_errors=True)
        raise
    size = (out / "best.safetensors").stat().st_size
    log(f"{scheme.describe()}: {size / 1e6:,.2f} MB, {size / (2 * n_bytes(model) / 4):.1%} of bf16")
    return out
