"""What follows where `torch.compile` does not work: a line and the same without it, or the end."""

from collections.abc import Callable
from typing import TypeVar

import torch

from wavelet_lm.errors import UserError

T = TypeVar("T")


def compiled_or_plain(
    compiled: Callable[[], T],
    plain: Callable[[], T],
    *,
    required: bool,
    way_out: str,
    log: Callable[[str], object],
) -> T:
    """What `compiled` returns, or where the compiler fails `plain`, which `log` gets a line about.

    Args:
        compiled: a first run of compiled code, which shows whether the compiler works here.
        plain: the same without the compiler.
        required: refuse to go on without.
        way_out: the option that does go on, for the message.

    Raises:
        UserError: the compiler failed and is required; whatever the code itself says.
        torch.OutOfMemoryError: of the code itself, which no compiler is at fault for.
    """
    try:
        return compiled()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if required:
            raise UserError(
                f"compile is true and torch.compile failed ({reason}); use {way_out}"
            ) from error
    log(f"going on without torch.compile, which failed: {reason}")
    return plain()
