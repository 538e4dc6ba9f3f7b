"""What follows where `torch.compile` does not work: a line and the same without it, or the end."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from wavelet_lm.errors import UserError

T = TypeVar("T")

# On a GPU: kernels that wait for nothing of each other are one launch. PyTorch calls that
# experimental.
MERGED_KERNELS: dict[str, Any] = {"combo_kernels": True}
# Batches of products write where their results are put beside others', and nothing is copied.
IN_PLACE = "max_autotune_allow_flexible_layouts"


def training_options() -> list[dict[str, Any]]:
    """The compiler's options for a training step on a GPU, the next where those before fail.

    PyTorch also merges sums over rows and over columns. In large graphs its scheduler fails on what
    it has merged (2.13: `FusedMixOrderReductions`). Options that a version does not know are left
    out.
    """
    from torch._inductor import config

    merged = MERGED_KERNELS | ({IN_PLACE: True} if hasattr(config, IN_PLACE) else {})
    known = hasattr(config.triton, "mix_order_reduction")
    separate = {"triton.mix_order_reduction": False} if known else {}
    return [merged, *([merged | separate] if known else []), separate]


def first_that_compiles(
    run: Callable[[dict[str, Any]], T],
    options: Sequence[dict[str, Any]],
    log: Callable[[str], object],
) -> T:
    """What `run` returns with the first of the compiler's options that do not fail.

    Args:
        run: a first run of code that is compiled with the options given; its results do not depend
            on what a run before it has left.
        log: gets a line where a run fails that is not the last.

    Raises:
        UserError, torch.OutOfMemoryError: of the code itself; all that the last run raises.
    """
    *firsts, last = options
    for given, following in zip(firsts, options[1:], strict=True):
        try:
            return run(given)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            words = " and ".join(
                f"{name} {str(value).lower()}" for name, value in following.items()
            )
            log(f"compiling once more with {words or 'no options'}: {_first_line(error)}")
            torch.compiler.reset()
    return run(last)


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
