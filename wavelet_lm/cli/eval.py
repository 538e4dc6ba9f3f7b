"""Score a run on tasks of lm-evaluation-harness: `wavelet-lm eval RUN --tasks lambada_openai`.

What a run makes of its own test split, in bits per byte, is `wavelet-lm evaluate`.
"""

from __future__ import annotations

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.inference.declarations import DTYPES
from wavelet_lm.inference.engine import Engine
from wavelet_lm.inference.generation import start_token
from wavelet_lm.tables import aligned
from wavelet_lm.threads import use_threads


def main() -> None:
    parser = OneLineParser(
        run="run folder, a checkpoint inside it, or hf://user/name", description=__doc__
    )
    parser.add_argument(
        "--tasks", required=True, metavar="NAMES", help="tasks and groups, with commas between"
    )
    parser.add_argument(
        "--limit", type=float, help="documents of each task; below 1 the share of them [all]"
    )
    parser.add_argument("--num_fewshot", type=int, help="examples before each [what the task says]")
    parser.add_argument(
        "--include_path", metavar="FOLDER", help="where your own tasks are, as YAML"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="texts at once [8]")
    parser.add_argument("--context", default="auto", help="as of wavelet-lm generate [auto]")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the computation [the run's]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the scores there")
    args = parser.parse_args()
    tasks = [name for name in args.tasks.split(",") if name]
    if not tasks:
        raise UserError("--tasks names none; write --tasks NAME,NAME")
    if args.limit is not None and not (math.isfinite(args.limit) and args.limit > 0):
        raise UserError(f"limit is {args.limit:g}; it must be above 0")
    for name, lowest in (("batch_size", 1), ("num_fewshot", 0)):
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"{name} is {value}; it must be {lowest} or more")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise UserError(f"{args.include_path}: there is no such folder")
    if args.json:
        check_writable(args.json)
    use_threads(args.threads)
    try:
        from wavelet_lm.interop.lm_eval import evaluate_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise missing_extra("wavelet-lm eval", "lm_eval", "eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    engine = Engine.open(args.checkpoint, args.device, dtype=args.dtype, context=args.context)
    rows = evaluate_tasks(
        harness_model(engine, args.batch_size),
        tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        include_path=args.include_path,
    )
    results = {"run": args.checkpoint, "context": args.context, "rows": rows}
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")
    print(table(rows))


def harness_model(engine: Engine, batch_size: int = 8) -> Any:
    """The engine's model as the harness asks it."""
    from wavelet_lm.interop.lm_eval import HarnessModel

    return HarnessModel(
        engine.decoder,
        engine.tokenizer,
        partial(_write, engine, batch_size),
        start_token(engine.tokenizer)[0],
        batch_size,
    )


def _write(
    engine: Engine,
    batch_size: int,
    prompts: list[str],
    num_tokens: int,
    stop: list[str],
    options: dict[str, Any],
) -> list[str]:
    """Texts after prompts, without the run's own options of sampling."""
    plain = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **options}
    return engine.generate_batch(prompts, num_tokens, stop=stop, batch_size=batch_size, **plain)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned columns; a dash where there is no figure."""
    cells = [["task", "metric", "score", "± error", "chance", "documents", "examples"]]
    for row in rows:
        figures = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("score", "error", "chance"))
        counts = ("-" if row[k] is None else f"{row[k]:,}" for k in ("n", "num_fewshot"))
        cells.append([row["task"], row["metric"], *figures, *counts])
    return aligned(cells)
