"""WaveletLM: attention-free language models on learned, causal wavelets.

import wavelet_lm

config = wavelet_lm.Config.from_json("configs/quickstart.json", layers=2)
model = wavelet_lm.build_model(config, vocab_size=256)
logits, state = model(idx)  # idx [B, T] int64 -> logits [B, T, vocab]

model = wavelet_lm.load_model("logs/RUN")
tokenizer = wavelet_lm.load_tokenizer("logs/RUN")
text = wavelet_lm.generate(model, tokenizer, "def main", num_tokens=64, seed=1)
"""

from wavelet_lm.config import Config, ConfigError
from wavelet_lm.errors import UserError
from wavelet_lm.inference.generation import generate
from wavelet_lm.inference.loading import load_model, load_tokenizer
from wavelet_lm.models.registry import build_model

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ConfigError",
    "UserError",
    "build_model",
    "generate",
    "load_model",
    "load_tokenizer",
]
