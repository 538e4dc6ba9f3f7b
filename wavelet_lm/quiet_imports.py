"""Other people's libraries, imported without what they warn of then."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, only errors are logged; torchao warns of its kernels for other machines and Pythons.

    transformers imports torchao with any model, wherever it is installed.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)
