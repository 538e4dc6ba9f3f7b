"""What follows where `torch.compile` does not work: a line and the same without it, or the end."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from wavelet_lm.errors import UserError

T = TypeVar("T")

# On a GPU: kernels that wait for nothing of each other are one launch. PyTorch calls that
# experimental.
MERGED_KERNELS: dict[str, Any] = {"combo_kernels": True}


def separate_sums() -> dict[str, Any]:
    """Options that keep sums over rows and over columns apart, where PyTorch would merge them.

    In large graphs its scheduler fails on what it has merged (2.13: `FusedMixOrderReductions`).
    """
    from torch._inductor import config

    known = hasattr(config.triton, "mix_order_reduction")
    return {"triton.mix_order_reduction": False} if known else {}


def merged_or_not(
    run: Callable[[dict[str, Any]], T],
    log: Callable[[str], object],
    otherwise: Callable[[], dict[str, Any]] = dict,
) -> T:
    """What `run` returns with the compiler's options `MERGED_KERNELS`, or where that fails without.

    Args:
        run: a first run of code that is compiled with the options given; its results do not depend
            on what a run before it has left.
        log: gets a line where the first run fails.
        otherwise: makes the options of the second run.

    Raises:
        UserError, torch.OutOfMemoryError: of the code itself; all that the second run raises.
    """
    try:
        return run(MERGED_KERNELS)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log(f"compiling once more without {', '.join(MERGED_KERNELS)}: {_first_line(error)}")
        torch.compiler.reset()
    return run(otherwise())


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
