"""Commands typed in this process: starting Python and PyTorch takes longer than all the rest."""

import contextlib
import io
import sys
from importlib import import_module
from unittest import mock


def typed(command: str, *arguments: object) -> str:
    """What `wavelet-lm COMMAND ARGUMENTS…` prints; a user's error is raised."""
    module = import_module(f"wavelet_lm.cli.{command}")
    stdout = io.StringIO()
    words = [f"wavelet-lm {command}", *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(stdout):
        module.main()
    return stdout.getvalue()
