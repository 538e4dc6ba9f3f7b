"""Memory that is given back when it is freed, or kept where it is needed again at once."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's parameter, and the bytes at the heap's end from which on they are given back: those of a
# server, which may rest for hours, and none.
M_TRIM_THRESHOLD, KEPT, NEVER = -1, 512 * 1024 * 1024, -1
# The same, and the sizes from which a block gets pages of its own: while a model is put together,
# and after it (the largest that glibc itself would come to).
M_MMAP_THRESHOLD = -3
LOADING, COMPUTING = 256 * 1024, 32 * 1024 * 1024


@contextmanager
def returning_memory() -> Iterator[None]:
    """Inside, tensors that are let go leave no holes behind that only small ones fit into.

    glibc's heap keeps what was freed below what is in use, which for a model that is read part by
    part comes to as much as the model. Other C libraries do as they like.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LOADING)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, COMPUTING)
        libc.malloc_trim(0)


def keep_freed_memory(most: int = NEVER) -> None:
    """From here on keep what is freed for what comes next.

    A step of many texts makes and frees many megabytes. Given back in between, every page of them
    has to be had anew: in a step of training some hundredths of its time, in one of a server more
    than the step itself. Blocks from 32 MiB on are always given back.

    Args:
        most: bytes at the heap's end from which on they are given back.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_TRIM_THRESHOLD, most)
        libc.mallopt(M_MMAP_THRESHOLD, COMPUTING)  # glibc no longer finds it by itself


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None
