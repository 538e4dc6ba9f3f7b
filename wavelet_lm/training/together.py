"""Commands that several processes run together."""

from collections.abc import Iterator
from contextlib import contextmanager

from wavelet_lm.training.processes import ALONE, Processes, n_processes


@contextmanager
def together() -> Iterator[Processes]:
    """A command that may be started in several processes, which end together.

    Where one fails, is killed or is told to stop, all end within seconds, and one line says which
    one it was and why.
    """
    if n_processes() == 1:
        yield ALONE
        return
    from wavelet_lm.training.process_group import joined_group

    with joined_group() as group:
        yield group
