"""From the name in the config to the network."""

from torch import nn

from wavelet_lm.config import Config
from wavelet_lm.models.gpt import GPT
from wavelet_lm.models.language_model import LanguageModel
from wavelet_lm.models.multinodal import MultinodalLM
from wavelet_lm.models.wavelet_lm import WaveletLM

MODELS = {"wavelet_lm": WaveletLM, "gpt": GPT, "wavelet_gpt": GPT}


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """A model with random weights in training mode; under `torch.device("meta")` none at all."""
    model = MultinodalLM if config.multinodal_enabled else MODELS[config.model]
    return model(config, vocab_size)


def n_params(model: nn.Module) -> int:
    """Distinct parameters, shared ones counted once, frozen ones included."""
    return sum(p.numel() for p in model.parameters())
