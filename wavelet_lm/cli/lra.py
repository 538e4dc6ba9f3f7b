"""Train and judge models on a task of the Long Range Arena.

    python -m wavelet_lm.evaluation.lra --task listops --model gpt,wavelet_gpt:haar --steps 5000

`listops` is generated unless --data names a folder of its TSV files; `text` and `image` read the
IMDb reviews and the binary CIFAR-10 that --data names. Every model has the same batches in the same
order, and the weights with the best validation accuracy are tested. Without --config the models
have the size of the WaveletGPT paper: 6 layers of width 32, the last position, a dense layer of
2048, the classes. The defaults that --help shows beside the config's keys are those of train.py;
the whole config of each model is in the file that --json names.
"""

import argparse
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from wavelet_lm.cli.task_flags import add_shared_flags, command_parser, configs_of, given, positive
from wavelet_lm.config import Config
from wavelet_lm.data.dataset import cache_folder
from wavelet_lm.data.tasks import listops, pixels, reviews
from wavelet_lm.data.tasks.examples import Task, some
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.comparison_folder import ComparisonFolder
from wavelet_lm.experiments.results import check_targets
from wavelet_lm.experiments.tasks import DEFAULTS, compare, table
from wavelet_lm.models.classifier.model import build_classifier
from wavelet_lm.training.classification import judge
from wavelet_lm.training.processes import one_process_only
from wavelet_lm.training.run_folder import check_folder

# The arena's own numbers of batches of 32.
STEPS = {"listops": 5000, "text": 20_000, "image": 35_000}
SHAPE = tuple(spec.name for spec in fields(listops.Shape))
OPTIONS = {"listops": SHAPE, "text": ("max_length",), "image": ("pixels",)}
DOWNLOADS = {"text": reviews.DOWNLOAD, "image": pixels.DOWNLOAD}
SIZES = dict(zip(("train", "valid", "test"), listops.SIZES, strict=True))
SHARES = {"%": "accuracy", "majority %": "majority"}


def main() -> None:
    one_process_only("lra")
    parser = command_parser(__doc__, "--task TASK [--data PATH]")
    add_task_flags(parser)
    add_shared_flags(parser, ", ".join(f"{n:,} of {task}" for task, n in STEPS.items()))
    flags, folder = given(parser, "lra")
    own = {key: flags.pop(key) for key in ("task", "data", "pooling", "json", "config")}
    shaping = {key: flags.pop(key) for names in OPTIONS.values() for key in names if key in flags}
    limits = {part: flags.pop(f"{part}_examples", None) for part in SIZES}
    if own["task"] is None:
        raise UserError(f"which task? give --task {' or '.join(OPTIONS)}")
    check_targets([own["json"]])
    defaults = {**DEFAULTS, "max_steps": STEPS[own["task"]]}
    configs = configs_of(defaults, own["config"], flags)
    first = next(iter(configs.values()))
    check_folder(first.out_dir)
    task = load_task(own["task"], own["data"], shaping, limits, first)
    print(describe(task), flush=True)
    rows = compare(
        configs,
        task,
        folder or ComparisonFolder.create(first.out_dir, "lra", sys.argv[1:]),
        build=partial(
            build_classifier,
            vocab_size=task.vocab_size,
            n_classes=task.n_classes,
            pooling=own["pooling"],
        ),
        judge=judge,
        file=own["json"],
        about={**{key: own[key] for key in ("task", "data", "pooling")}, **shaping},
    )
    print(table(rows, SHARES))


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """What to learn, and from which data."""
    absent = {"default": argparse.SUPPRESS}
    parser.add_argument("--task", choices=tuple(OPTIONS), help="what to learn")
    parser.add_argument("--data", metavar="PATH", help="folder or file of the task's data")
    for part, n in SIZES.items():
        text = f"use so many of the {part} examples, drawn by --seed [all; {n:,} generated]"
        parser.add_argument(f"--{part}_examples", type=positive, metavar="N", help=text, **absent)
    for name, value in vars(listops.Shape()).items():
        text = f"of a generated expression, see ListOps [{value}]"
        if name == "max_length":
            text += f"; bytes of a review [{reviews.MAX_LENGTH}]"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text, **absent)
    text = f"of an image [{pixels.FORMATS[0]}]"
    parser.add_argument("--pixels", choices=pixels.FORMATS, help=text, **absent)


def load_task(
    name: str,
    data: str | None,
    shaping: dict[str, Any],
    limits: dict[str, int | None],
    config: Config,
) -> Task:
    """The task's data: generated into the cache, or read from `data`.

    Args:
        shaping: the options of `OPTIONS` that were given.
        limits: the most examples to use of train, valid and test; None = all.
    """
    wrong = [key for key in shaping if key not in OPTIONS[name]]
    if wrong:
        owner = next(task for task, keys in OPTIONS.items() if wrong[0] in keys)
        raise UserError(f"--{wrong[0]} is an option of the task {owner}, not of {name}; drop it")
    if name == "listops" and data is None:
        sizes = tuple(limits[part] or n for part, n in SIZES.items())
        return generated(sizes, listops.Shape(**shaping), config)
    if name == "listops" and shaping:
        raise UserError(f"--{next(iter(shaping))} shapes what is generated; drop it or --data")
    if data is None:
        raise UserError(f"the task {name} needs --data; {DOWNLOADS[name]}")
    path = Path(data).expanduser()
    task = {
        "listops": lambda: listops.load(path),
        "text": lambda: reviews.load(path, config.seed, **shaping),
        "image": lambda: pixels.load(path, config.seed, **shaping),
    }[name]()
    parts = {part: some(getattr(task, part), n, config.seed) for part, n in limits.items()}
    return replace(task, **parts)


def generated(sizes: tuple[int, int, int], shape: listops.Shape, config: Config) -> Task:
    """ListOps of this shape and seed, from the cache or generated into it."""
    folder = cache_folder(config) / "-".join(
        ["listops", *(str(n) for n in (*sizes, *vars(shape).values())), f"seed{config.seed}"]
    )
    # The files are written one after the other, each of them whole.
    if not (folder / f"basic_{listops.PARTS[-1]}.tsv").is_file():
        listops.generate(folder, sizes, shape, config.seed)
    return listops.load(folder)


def describe(task: Task) -> str:
    """The task in a line."""
    counts = (f"{len(getattr(task, part)):,} {part}" for part in SIZES)
    lengths = task.train.lengths
    return (
        f"{task.name}: {', '.join(counts)}; {task.n_classes} classes, {task.vocab_size} tokens,"
        f" lengths {lengths.min():,} … {lengths.max():,}, mean {lengths.mean():,.0f}"
    )
