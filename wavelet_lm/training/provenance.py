"""What a result depends on besides the config: command, code and machine."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from wavelet_lm.training.processes import launcher

# What a result depends on in a checkout, besides the config, which a run keeps itself.
CODE = (":(top)*.py", ":(top)pyproject.toml", ":(top)constraints.txt")


def environment(command: str | None = None) -> dict[str, Any]:
    """What a result depends on besides the config.

    Args:
        command: that makes it; None is the one that was typed.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command or command_line(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it was typed, starting with `python`; of paths in this folder what is in it.

    It can then be typed again in another clone.

    Args:
        arguments: take the place of those that were typed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    program = [os.path.relpath(sys.argv[0])]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:  # run by -m
        program = ["-m", spec.name.removesuffix(".__main__")]
    if sys.argv[0].startswith("wavelet-lm "):
        return shlex.join([*sys.argv[0].split(), *map(_relative, arguments)])
    return shlex.join([*launcher(), *program, *map(_relative, arguments)])


def _relative(word: str) -> str:
    """A word of a command line; the path of a file or folder in this one is made relative."""
    flag, sign, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute() and path.is_relative_to(Path.cwd()) and os.path.lexists(path):
        value = os.path.relpath(path)
    return f"{flag}{sign}{value}"


def commit() -> str | None:
    """The commit of the code, with `+` where the code differs from it; None outside git.

    Tables and figures that runs and benchmarks add to are no code, nor are documents.
    """

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return head + ("+" if changed else "")


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
