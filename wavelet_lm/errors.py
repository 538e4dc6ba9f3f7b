"""Errors that speak to the person at the keyboard, and how commands report them.

Everything that a user can get wrong raises `UserError` with one line: what was given, what is
allowed, what to do. Commands wrap their `main` in `run_command`, which turns it into that line on
standard error and exit status 2. A stack trace is therefore always a defect of the program.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from wavelet_lm import streams
from wavelet_lm.environment import ready

# Signals within so many seconds are one wish to stop: `timeout`, service managers and terminals
# that close send two in a moment.
ONE_STOP = 1.0


class UserError(Exception):
    """A mistake in what the user gave; the message is one complete line."""


def missing_extra(what: str, library: str, extra: str) -> UserError:
    """The error of something that needs a library which only an extra of the project installs.

    Args:
        what: needs it, as the user asked for it.
    """
    return UserError(f'{what} needs {library}; install it with pip install "wavelet-lm[{extra}]"')


class Interrupted(BaseException):
    """A stop that the user asked for (Ctrl-C, SIGTERM, SIGHUP); the message says how to go on.

    Like `KeyboardInterrupt` it is no `Exception`, so that nothing takes it for a failure.

    Args:
        agreed: of several processes all stop so.
    """

    def __init__(self, signum: int, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.signum, self.agreed = signum, agreed


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit: 0, 2 for a user's error, 128 + signal when interrupted.

    Output that cannot be written is a user's error too; a reader that has left (`… | head`) is not.
    """
    spec = sys.modules["__main__"].__spec__  # of `python -m`, else None
    name = spec.name.removesuffix(".__main__") if spec else sys.argv[0].rsplit("/", 1)[-1]
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as by nohup
        signal.signal(signal.SIGHUP, _terminate)
    streams.guard()
    status, line, asked_to = 0, "", False
    try:
        ready()
        main()
    except UserError as error:
        status, line = 2, f"error: {error}"
    except Interrupted as stop:
        _no_more_signals()
        status, line = 128 + stop.signum, str(stop)
    except KeyboardInterrupt:
        _no_more_signals()
        status, line = 128 + signal.SIGINT, "interrupted"
    except streams.OutputFailed:
        pass  # `finish` says why
    except SystemExit as stop:  # of --help
        if stop.code:
            raise
        asked_to = True
    finally:
        lost = streams.finish()
    if status == 0 and lost:
        status, line = 2, f"error: {lost}"
    if line:
        print(f"{name}: {line}", file=sys.stderr)
    if status or asked_to:
        sys.exit(status)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C, so that temporary files are removed and what can be kept is saved."""
    _no_more_signals(signal.SIGTERM, signal.SIGHUP)
    raise Interrupted(signum, "terminated" if signum == signal.SIGTERM else "hung up")


def _no_more_signals(*numbers: int) -> None:
    """Ignore these signals, or all that ask to end, while the command ends anyway."""
    for number in numbers or (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
