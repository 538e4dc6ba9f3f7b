"""Train a wavelet language model: `python train.py --config configs/quickstart.json`.

Every key of the config file is also a flag: `--lr 0.02 --layers 3 --dropout_mlp 0`. A sweep trains
a grid of them: `--set lr=0.01,0.02 --set layers=2,3`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from wavelet_lm.cli.flags import OneLineParser, add_config_flags, check_flags, parse_flags
from wavelet_lm.config import Config, ConfigError, presets, read_config
from wavelet_lm.streams import output_is_optional
from wavelet_lm.tables import aligned
from wavelet_lm.training.processes import Processes, one_process_only
from wavelet_lm.training.together import together

DEFAULT = "config.json"  # of the repository: the headline model


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    parser = OneLineParser(
        usage="%(prog)s [--config FILE | --resume RUN] [--set KEY=V1,V2] [--key value ...]",
        description="Train a wavelet language model, or a grid of them.",
        epilog="booleans: --key, --key false or --no_key; lists: 1,1,.5; null: none",
        argument_default=argparse.SUPPRESS,
    )
    sets = "train every value, and every combination of several --set; lists apart by ;"
    parser.add_argument(
        "--config", metavar="FILE", help="config file, or the name of a preset [config.json]"
    )
    goes_on = "go on with a run, bit for bit; or on to another --max_steps, see docs/training.md"
    parser.add_argument("--resume", metavar="RUN", help=goes_on)
    parser.add_argument("--set", metavar="KEY=V1,V2", action="append", help=sets)
    parser.add_argument("--sweep", metavar="FILE", help="the same as JSON, key to list of values")
    spread = "train a run of the grid on each of these at a time: cuda:0,cuda:1, all, cpu,cpu"
    parser.add_argument("--devices", metavar="LIST", help=spread)
    add_config_flags(parser)
    with together() as processes:
        run(parse_flags(parser, sys.argv[1:]), processes)


def run(flags: dict[str, Any], processes: Processes) -> None:
    """What the flags ask for."""
    check_flags(flags)
    if "resume" in flags:
        from wavelet_lm.training.run import resume

        output_is_optional()  # a run keeps what it says in its log.txt
        resume(flags.pop("resume"), flags, processes)
        return

    names = ("config", "set", "sweep", "devices")
    file, sets, grid, devices = (flags.pop(name, None) for name in names)
    if file is None and not (Path(DEFAULT).exists() or flags.get("init_from")):
        if processes.is_main:
            print(preset_table())
        raise ConfigError(
            f"which config? there is no {DEFAULT} in this folder; give --config with a file or one"
            " of these names, such as --config quickstart"
        )
    source = file or "config"
    if sets or grid:
        one_process_only("a sweep")
        from wavelet_lm.experiments.sweep import read_grid, sweep

        members = read_grid(sets or [], grid, fixed=flags)
        chosen = [] if devices is None else _devices_of_a_sweep(devices, {**flags, **members[0]})
        output_is_optional()
        values_of = lambda member: config_values(file, {**flags, **member})  # noqa: E731
        sweep(members, values_of, source, devices=chosen)
    elif devices is not None:
        raise ConfigError("--devices spreads a sweep and there is none; give --set, or --device")
    elif (config := Config.from_dict(config_values(file, flags), source)).benchmark_only:
        from wavelet_lm.cli.evaluate import evaluate_and_print
        from wavelet_lm.threads import use_threads

        one_process_only("benchmark_only")
        use_threads(config.threads)
        dataset = flags.get("dataset")  # of the run itself where none was typed
        evaluate_and_print(config.benchmark_run_dir, dataset=dataset, device=config.device)
    else:
        from wavelet_lm.training.run import train

        output_is_optional()
        train(config, processes=processes)


def _devices_of_a_sweep(text: str, given: dict) -> list[str]:
    from wavelet_lm.experiments.side_by_side import read_devices

    if "device" in given:
        raise ConfigError("--devices says where the runs of a sweep train; leave --device out")
    return read_devices(text)


def config_values(file: str | None, flags: dict) -> dict:
    """The flags over a config file's values, else over those of the run to start from."""
    if file is None and flags.get("init_from"):
        from wavelet_lm.inference.loading import find_own_checkpoint
        from wavelet_lm.models.checkpoint import Checkpoint

        base = Checkpoint(find_own_checkpoint(flags["init_from"])).config.to_dict()
    else:
        base = read_config(file or DEFAULT)
    return {**base, **flags}


def preset_table() -> str:
    """The presets by name: their size, and what they train on."""
    rows = [["preset", "blocks", "channels", "positions", "data set", "tokenizer", "steps"]]
    for name in presets():
        config = Config.from_json(name)
        sizes = (config.layers, config.C, config.block_size)
        steps = "" if config.max_steps is None else f"{config.max_steps:,}"
        numbers = (f"{size:,}" for size in sizes)
        rows.append([name, *numbers, config.dataset, config.tokenizer, steps])
    return aligned(rows)
