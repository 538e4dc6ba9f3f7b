"""Where things are kept that can be made again."""

import os
from pathlib import Path

DEFAULT_CACHE = "~/.cache/wavelet_lm"


def user_cache() -> Path:
    """Below an absolute XDG_CACHE_HOME, or `DEFAULT_CACHE`; the folder need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return base / "wavelet_lm" if base.is_absolute() else Path(DEFAULT_CACHE).expanduser()
