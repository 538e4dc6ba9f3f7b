"""Evaluate a trained model: `python -m wavelet_lm.evaluation RUN --split test`.

Under torchrun the processes share the windows. The tasks that other models are judged by are
`wavelet-lm eval`.
"""

import json
import sys
from typing import Any

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.cli.quantization_flags import add_quantization_flags, quantization_options
from wavelet_lm.errors import UserError
from wavelet_lm.evaluation.likelihood import evaluate_run
from wavelet_lm.quantization.options import QuantizationOptions
from wavelet_lm.tables import table
from wavelet_lm.threads import use_threads
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.together import together


def main() -> None:
    parser = OneLineParser(
        run="run folder, checkpoint file, or hf://user/name",
        description=__doc__,
    )
    parser.add_argument(
        "--split",
        choices=("train", "valid", "test"),
        help="[test, or valid where there is no test split; all of a text that --dataset names]",
    )
    parser.add_argument("--dataset", help="other data than the run's own, with its tokenizer")
    parser.add_argument("--batch_size", type=int, help="windows at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    add_quantization_flags(parser)
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"batch_size is {args.batch_size}; it must be 1 or more")

    if args.json:
        check_writable(args.json)
    use_threads(args.threads)
    with together() as processes:
        evaluate_and_print(
            args.checkpoint,
            args.split,
            dataset=args.dataset,
            batch_size=args.batch_size,
            device=args.device,
            quantization=quantization_options(vars(args)),
            json_file=args.json,
            processes=processes,
        )


def evaluate_and_print(
    run: str,
    split: str | None = None,
    *,
    dataset: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    quantization: QuantizationOptions | None = None,
    json_file: str | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """`evaluate_run` with a progress bar and the table on standard output; returns the results.

    The file, if any, is written first, for standard output may turn out to be full or closed. Of
    several processes, which share the windows, the first one speaks and writes.
    """
    from tqdm import tqdm

    silent = None if processes.is_main else True
    with tqdm(unit=" tokens", unit_scale=True, disable=silent, leave=False) as bar:
        results = evaluate_run(
            run,
            split,
            dataset=dataset,
            batch_size=batch_size,
            device=device,
            quantization=quantization,
            progress=bar.update,
            log=lambda message: processes.is_main and print(message, file=sys.stderr),
            among=None if processes.size == 1 else processes,
        )
    if not processes.is_main:
        return results
    if json_file:
        write_text(json_file, json.dumps(results, indent=1) + "\n")
    about = ", ".join(f"{key} {results[key]}" for key in ("run", "dataset", "split", "tokenizer"))
    print(f"{about}, {results['n_params']:,} parameters\n{table(results)}")
    return results
