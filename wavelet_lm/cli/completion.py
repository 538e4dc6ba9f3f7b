"""Print what makes a shell complete commands, options and values.

    source <(wavelet-lm completion bash)

The line may stand in ~/.bashrc, ~/.zshrc (zsh), or with `| source` behind the command in
~/.config/fish/config.fish (fish). The script holds all that is needed: completing starts nothing.
"""

import argparse
from importlib import import_module

from wavelet_lm.cli.flags import OneLineParser, parser_of
from wavelet_lm.cli.main import COMMANDS
from wavelet_lm.config import FIELDS, show

SHELLS = ("bash", "zsh", "fish")
FILES = ("FILE", "RUN", "RUN8", "CONFIG", "FOLDER", "DIR", "PATH", "NAME_OR_FOLDER")


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    print(script(parser.parse_args().shell), end="")


def script(shell: str) -> str:
    """The completions of the console command for one of `SHELLS`."""
    import shtab

    parser = argparse.ArgumentParser(prog="wavelet-lm", description="Wavelet language models.")
    commands = parser.add_subparsers(dest="command")
    for name, words in COMMANDS.items():
        command = parser_of(import_module(f"wavelet_lm.cli.{name}").main)
        for action in command._actions:
            _say_values(action, shtab.FILE)
        commands.add_parser(name, parents=[command], add_help=False, help=words)
    return shtab.complete(parser, shell=shell)


def _say_values(action: argparse.Action, files: dict[str, str]) -> None:
    """Note what may follow an option: the choices of a key, or a file."""
    if action.metavar in FILES or action.dest in ("first", "checkpoint"):
        action.complete = files
    if action.dest in FIELDS and action.default is argparse.SUPPRESS and action.const != "false":
        spec = FIELDS[action.dest]
        limits = spec.metadata["option"]
        action.help = limits.meaning.replace("%", "%%")  # also where --help leaves it out
        boolean = spec.type.startswith("bool")
        choices = limits.choices or ((True, False) if boolean else ())
        action.choices = [show(choice) for choice in choices] or None
        if boolean:
            action.nargs = None  # nothing is offered for what may be left away
