"""WaveletLM: attention-free language models on learned, causal wavelets.

import wavelet_lm

config = wavelet_lm.Config.from_json("configs/quickstart.json", layers=2)
model = wavelet_lm.build_model(config, vocab_size=256)
logits, state = model(idx)  # idx [B, T] int64 -> logits [B, T, vocab]

model = wavelet_lm.load_model("logs/RUN")
tokenizer = wavelet_lm.load_tokenizer("logs/RUN")
text = wavelet_lm.generate(model, tokenizer, "def main", num_tokens=64, seed=1)

engine = wavelet_lm.Engine(model, tokenizer)  # the thing to keep: also streams and batches
text = engine.generate("def main", num_tokens=64, seed=1)

Importing the package loads nothing else of it: a name is fetched when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavelet_lm.config import Config, ConfigError
    from wavelet_lm.errors import UserError
    from wavelet_lm.inference.engine import Engine, generate
    from wavelet_lm.inference.loading import load_model, load_tokenizer
    from wavelet_lm.models.registry import build_model

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ConfigError",
    "Engine",
    "UserError",
    "build_model",
    "generate",
    "load_model",
    "load_tokenizer",
]

_HOMES = {
    "Config": "wavelet_lm.config",
    "ConfigError": "wavelet_lm.config",
    "UserError": "wavelet_lm.errors",
    "build_model": "wavelet_lm.models.registry",
    "Engine": "wavelet_lm.inference.engine",
    "generate": "wavelet_lm.inference.engine",
    "load_model": "wavelet_lm.inference.loading",
    "load_tokenizer": "wavelet_lm.inference.loading",
}


def __getattr__(name: str) -> Any:
    """A public name, imported from where it lives and kept."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
