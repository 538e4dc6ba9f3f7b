"""Train a wavelet language model: `python train.py --config configs/quickstart.json`.

Every key of the config file is also a flag: `--lr 0.02 --layers 3 --dropout_mlp 0`.
"""

import sys

from wavelet_lm.config import (
    Config,
    ConfigError,
    OneLineParser,
    add_config_flags,
    parse_flags,
    read_json_object,
)
from wavelet_lm.errors import run_command


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    parser = OneLineParser(
        usage="python train.py [--config FILE | --resume RUN] [--key value ...]",
        description="Train a wavelet language model.",
        epilog="booleans: --key, --key false or --no_key; lists: 1,1,.5; null: none",
    )
    parser.add_argument("--config", metavar="FILE", help="config file [config.json]")
    parser.add_argument("--resume", metavar="RUN", help="go on with a stopped run, bit for bit")
    add_config_flags(parser)
    flags = parse_flags(parser, sys.argv[1:])
    file, run = flags.pop("config"), flags.pop("resume")
    if run is not None:
        if file is not None or flags:
            raise ConfigError(
                "--resume goes on with the run's own config and takes no other option;"
                " to change one, start a new run with --init_from"
            )
        from wavelet_lm.training.run import resume

        resume(run)
        return

    config = Config.from_dict({**base_values(file, flags), **flags}, source=file or "config")
    if config.benchmark_only:
        from wavelet_lm.evaluation.__main__ import evaluate_and_print

        evaluate_and_print(config.benchmark_run_dir, device=config.device)
    else:
        from wavelet_lm.training.run import train

        train(config)


def base_values(file: str | None, flags: dict) -> dict:
    """The values below the flags: a config file's, else those of the run to start from."""
    if file is None and flags.get("init_from"):
        from wavelet_lm.models.checkpoint import Checkpoint, find_checkpoint

        return Checkpoint(find_checkpoint(flags["init_from"])).config.to_dict()
    return read_json_object(file or "config.json")


if __name__ == "__main__":
    run_command(main)
