"""Every option of the project, once: name, type, default, range and meaning.

`Config` is flat, like the JSON files and the command-line flags, and is put together from one
frozen dataclass per part of the program, so that a module can say which part it reads (a block
takes a `ModelConfig`). `option.py` says what a declaration is, `rules.py` which keys contradict
each other.
"""

from wavelet_lm.config.config import (
    CHANGES,
    FIELDS,
    GROUPS,
    Config,
    check_values,
    checked_value,
    parse_value,
    read_config,
    read_json_object,
)
from wavelet_lm.config.model import WAVELET_GPT_KEYS, ModelConfig, keys_read_by
from wavelet_lm.config.option import ConfigError, Option, nearest, show, type_words
from wavelet_lm.config.presets import find_config, presets
from wavelet_lm.config.rules import cell_config
from wavelet_lm.config.run import DataConfig, GenerationConfig, QuantizationConfig, TrainingConfig

__all__ = [
    "CHANGES",
    "FIELDS",
    "GROUPS",
    "WAVELET_GPT_KEYS",
    "Config",
    "ConfigError",
    "DataConfig",
    "GenerationConfig",
    "ModelConfig",
    "Option",
    "QuantizationConfig",
    "TrainingConfig",
    "cell_config",
    "check_values",
    "checked_value",
    "find_config",
    "keys_read_by",
    "nearest",
    "parse_value",
    "presets",
    "read_config",
    "read_json_object",
    "show",
    "type_words",
]
